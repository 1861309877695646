//! One weight, resolved: data, type and block scales, checked against the layout.

use hal::DType;
use safetensors::Dtype;

use super::{
    Checkpoint, TensorView, check_fp8_nan,
    error::CheckpointError,
    layout::{SCALE_SUFFIX, Storage, TensorSpec},
};
use crate::config::FP8_BLOCK;

/// A weight that matches the layout.
#[derive(Clone, Debug)]
pub struct Weight<'a> {
    /// Full name.
    pub name: &'a str,
    /// The file it lies in.
    pub file: &'a str,
    /// FP8 E4M3, BF16 or F32.
    pub dtype: DType,
    /// `[out, in]`, or one dimension for norms and biases.
    pub shape: &'a [usize],
    /// The elements, little-endian, row-major, aligned to nothing in particular.
    pub data: &'a [u8],
    /// Block scales; present if and only if `dtype` is FP8.
    pub scales: Option<BlockScales>,
}

/// Scales of an FP8 weight: element `[r, c]` is its FP8 value times scale `[r / 128, c / 128]`.
#[derive(Clone, Debug, PartialEq)]
pub struct BlockScales {
    /// `[ceil(out / 128), ceil(in / 128)]`.
    pub shape: [usize; 2],
    /// Row-major; finite and not negative.
    pub values: Vec<f32>,
}

impl Weight<'_> {
    /// Searches the weight for NaN, which no quantiser writes. Reads all of its data.
    ///
    /// A loader that copies in pieces calls [`check_fp8_nan`] on each instead, while it is in the
    /// cache, and [`Weight::nan_at`] for the message.
    ///
    /// # Errors
    /// [`CheckpointError::NanWeight`].
    pub fn check_values(&self) -> Result<(), CheckpointError> {
        let nan = match self.dtype {
            DType::F8E4M3 => check_fp8_nan(self.data),
            // Exponent all ones is infinity or NaN; neither is a weight.
            DType::Bf16 => first_chunk(self.data, |b: [u8; 2]| b[1] & 0x7f == 0x7f && b[0] >= 0x80),
            _ => first_chunk(self.data, |b: [u8; 4]| !f32::from_le_bytes(b).is_finite()),
        };
        nan.map_or(Ok(()), |element| Err(self.nan_at(element)))
    }

    /// The error for a NaN found at a linear element index.
    pub fn nan_at(&self, element: usize) -> CheckpointError {
        let mut index = vec![0; self.shape.len()];
        let mut rest = element;
        for (position, &size) in index.iter_mut().zip(self.shape).rev() {
            *position = rest % size.max(1);
            rest /= size.max(1);
        }
        CheckpointError::NanWeight {
            file: self.file.to_owned(),
            tensor: self.name.to_owned(),
            index,
        }
    }
}

/// Index of the first element of `N` bytes for which `bad` holds.
fn first_chunk<const N: usize>(data: &[u8], bad: impl Fn([u8; N]) -> bool) -> Option<usize> {
    data.as_chunks::<N>().0.iter().position(|&bytes| bad(bytes))
}

impl Checkpoint {
    pub(super) fn resolve(&self, spec: &TensorSpec) -> Result<Weight<'_>, CheckpointError> {
        let Ok(view) = self.tensor(&spec.name) else { return Err(self.missing(spec)) };
        self.check(spec, &view)?;
        let TensorView { name, dtype, shape, data, file } = view;
        let dtype = match dtype {
            Dtype::F8_E4M3 => DType::F8E4M3,
            Dtype::BF16 => DType::Bf16,
            // `check` lets nothing else pass.
            _ => DType::F32,
        };
        let scales = spec.scale().map(|scale| self.scales(&scale)).transpose()?;
        Ok(Weight { name, file, dtype, shape, data, scales })
    }

    /// The error for a tensor of the layout that no file holds.
    pub(super) fn missing(&self, spec: &TensorSpec) -> CheckpointError {
        let weight = spec.name.strip_suffix(SCALE_SUFFIX);
        match weight.and_then(|weight| self.tensor(weight).ok()) {
            Some(weight) => CheckpointError::MissingScale {
                file: weight.file.to_owned(),
                tensor: weight.name.to_owned(),
                scale: spec.name.clone(),
            },
            None => CheckpointError::MissingTensor {
                tensor: spec.name.clone(),
                location: self.location(),
            },
        }
    }

    /// Shape, type, and no scales where none belong. Reads no data.
    pub(super) fn check(
        &self,
        spec: &TensorSpec,
        view: &TensorView<'_>,
    ) -> Result<(), CheckpointError> {
        let (file, tensor) = (|| view.file.to_owned(), || view.name.to_owned());
        if !spec.storage.accepts(view.dtype) {
            return Err(CheckpointError::WrongDtype {
                file: file(),
                tensor: tensor(),
                expected: spec.storage.accepted(),
                found: view.dtype,
                hint: dtype_hint(spec.storage, view.dtype),
            });
        }
        if view.shape != spec.shape {
            return Err(CheckpointError::WrongShape {
                file: file(),
                tensor: tensor(),
                expected: spec.shape.clone(),
                found: view.shape.to_vec(),
            });
        }
        let may_have_scale = matches!(spec.storage, Storage::Fp8WithScale | Storage::BlockScale);
        match self.tensor(&format!("{}{SCALE_SUFFIX}", spec.name)) {
            Ok(scale) if !may_have_scale => Err(CheckpointError::UnexpectedScale {
                file: scale.file.to_owned(),
                tensor: tensor(),
                scale: scale.name.to_owned(),
            }),
            _ => Ok(()),
        }
    }

    fn scales(&self, spec: &TensorSpec) -> Result<BlockScales, CheckpointError> {
        let Ok(view) = self.tensor(&spec.name) else { return Err(self.missing(spec)) };
        self.check(spec, &view)?;
        let shape = match *spec.shape {
            [rows, columns] => [rows, columns],
            // FP8 weights are matrices in the layout; a vector would be one row of blocks.
            _ => [1, spec.shape.iter().product()],
        };
        let values: Vec<f32> =
            view.data.as_chunks().0.iter().map(|&bytes| f32::from_le_bytes(bytes)).collect();
        // `>= 0` is false for NaN; -0.0 passes, and is harmless.
        match values.iter().position(|value| !(value.is_finite() && *value >= 0.0)) {
            None => Ok(BlockScales { shape, values }),
            Some(bad) => Err(CheckpointError::BadScale {
                file: view.file.to_owned(),
                scale: view.name.to_owned(),
                row: bad / shape[1],
                column: bad % shape[1],
                value: values[bad],
            }),
        }
    }
}

/// What the reader most likely has in hand when a type is wrong.
fn dtype_hint(storage: Storage, found: Dtype) -> &'static str {
    match (storage, found) {
        (Storage::Fp8WithScale, Dtype::BF16 | Dtype::F32 | Dtype::F16) => {
            "; for a dequantised checkpoint, remove quantization_config from config.json"
        }
        (Storage::Bf16, Dtype::F8_E4M3) => {
            "; for an FP8 checkpoint, config.json needs its quantization_config"
        }
        (_, Dtype::F16) => "; convert it to BF16",
        _ => "",
    }
}

impl BlockScales {
    /// The scale of element `[row, column]`.
    ///
    /// # Panics
    /// Outside the weight.
    pub fn at(&self, row: usize, column: usize) -> f32 {
        self.values[row / FP8_BLOCK * self.shape[1] + column / FP8_BLOCK]
    }
}

//! Bringing weights from a checkpoint to a die.

use super::{Piece, Role, WeightKey, WeightSpec};
use crate::checkpoint::{Checkpoint, CheckpointError};
use crate::config::ModelConfig;
use hal::op;
use hal::{DType, Device, Op, Operand, Region, Stream, Tensor, TensorDesc};
use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

/// How long loading may stand still before it counts as failed.
const TIMEOUT: Duration = Duration::from_secs(600);

/// Bytes of converted weights in flight before the loader waits: bounds the staging memory.
const STAGING: u64 = 256 << 20;

/// Why weights cannot be loaded.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum LoadError {
    /// The checkpoint.
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    /// The device.
    #[error("loading {tensor}: {source}")]
    Device {
        /// The tensor being loaded.
        tensor: String,
        /// What the device said.
        source: hal::Error,
    },
}

/// How far loading has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LoadProgress {
    /// Bytes of the checkpoint read.
    pub done: u64,
    /// Bytes to read in all.
    pub total: u64,
}

/// The weights on a die.
#[derive(Debug)]
pub struct Weights {
    tensors: HashMap<WeightKey, (Tensor, Option<Tensor>)>,
    /// Bytes read from the checkpoint.
    pub read_bytes: u64,
    /// Bytes that they take on the device.
    pub device_bytes: u64,
}

impl Weights {
    /// A weight, if the plan had it.
    pub fn get(&self, key: WeightKey) -> Option<&Tensor> {
        self.tensors.get(&key).map(|(tensor, _)| tensor)
    }

    /// The scales of an FP8 weight.
    pub fn scales(&self, key: WeightKey) -> Option<&Tensor> {
        self.tensors.get(&key)?.1.as_ref()
    }
}

/// Loads every weight of the plan.
///
/// Weights go to the device as the checkpoint has them where the plan keeps the dtype; others go
/// through a staging buffer and are dequantised or converted by the device.
///
/// # Errors
///
/// [`LoadError`] naming the tensor. What was allocated is freed.
pub fn load(
    device: &Arc<dyn Device>,
    checkpoint: &Checkpoint,
    specs: &[WeightSpec],
    progress: &mut dyn FnMut(LoadProgress),
) -> Result<Weights, LoadError> {
    let stream = device.stream("load").map_err(|e| wrap("the load stream", e))?;
    let mut total = 0;
    for piece in specs.iter().flat_map(|s| &s.pieces) {
        total += checkpoint.tensor(&piece.name)?.data.len() as u64;
    }
    let mut loader = Loader {
        stream: &*stream,
        checkpoint,
        progress,
        state: LoadProgress { done: 0, total },
        staged: 0,
    };
    let mut tensors = HashMap::with_capacity(specs.len());
    for spec in specs {
        tensors.insert(spec.key, loader.weight(spec)?);
    }
    let read_bytes = loader.state.done;
    stream.synchronize(TIMEOUT).map_err(|e| wrap("the weights", e))?;
    let device_bytes = specs.iter().map(WeightSpec::bytes).sum();
    Ok(Weights { tensors, read_bytes, device_bytes })
}

fn wrap(tensor: &str, source: hal::Error) -> LoadError {
    LoadError::Device { tensor: tensor.to_string(), source }
}

struct Loader<'a> {
    stream: &'a dyn Stream,
    checkpoint: &'a Checkpoint,
    progress: &'a mut dyn FnMut(LoadProgress),
    state: LoadProgress,
    staged: u64,
}

impl Loader<'_> {
    fn weight(&mut self, spec: &WeightSpec) -> Result<(Tensor, Option<Tensor>), LoadError> {
        let name = spec.pieces.first().map_or("the rotary table", |p| &p.name);
        let alloc = |desc: TensorDesc| {
            let buffer = self.stream.alloc(desc.bytes()).map_err(|e| wrap(name, e))?;
            Ok::<_, LoadError>(Tensor::new(buffer, 0, desc))
        };
        let tensor = alloc(spec.desc)?;
        let scales = spec.scales.map(alloc).transpose()?;
        if spec.key.role == Role::RopeTable {
            let table = rope_table(self.checkpoint.config(), spec.desc.dim(0));
            self.write(name, &tensor.region(), bytemuck::cast_slice(&table))?;
        }
        for piece in &spec.pieces {
            self.piece(spec, piece, &tensor, scales.as_ref())?;
        }
        Ok((tensor, scales))
    }

    fn piece(
        &mut self,
        spec: &WeightSpec,
        piece: &Piece,
        tensor: &Tensor,
        scales: Option<&Tensor>,
    ) -> Result<(), LoadError> {
        let source = self.checkpoint.weight(&piece.name)?;
        source.check_values()?;
        let part = part_of(tensor, piece, source.shape[0]);
        match &source.scales {
            _ if source.dtype == spec.desc.dtype() => {
                self.write(&piece.name, &part.region(), source.data)?;
                if let (Some(from), Some(to)) = (&source.scales, scales) {
                    // Each stacked segment has scale rows of its own.
                    let row = spec.grid.scale_row(piece.row, rows_of(spec));
                    let part = part_of(to, &Piece { row, ..piece.clone() }, from.shape[0]);
                    self.write(&piece.name, &part.region(), bytemuck::cast_slice(&from.values))?;
                }
            }
            Some(from) => {
                let w = self.stage(&piece.name, source.dtype, source.shape, source.data)?;
                let values = bytemuck::cast_slice(&from.values);
                let w_scales = self.stage(&piece.name, DType::F32, &from.shape, values)?;
                let grid = op::BlockGrid::default();
                let out = part.with_desc(TensorDesc::new(spec.desc.dtype(), source.shape));
                self.submit(&piece.name, op::Dequantize { w, w_scales, out, grid }.into())?;
            }
            None => {
                let x = self.stage(&piece.name, source.dtype, source.shape, source.data)?;
                let out = part.with_desc(TensorDesc::new(spec.desc.dtype(), source.shape));
                self.submit(&piece.name, op::Cast { x, out }.into())?;
            }
        }
        self.state.done += source.data.len() as u64;
        (self.progress)(self.state);
        Ok(())
    }

    /// A staging buffer with these bytes; freed when the conversion has run.
    fn stage(
        &mut self,
        name: &str,
        dtype: DType,
        shape: &[usize],
        data: &[u8],
    ) -> Result<Tensor, LoadError> {
        self.staged += data.len() as u64;
        if self.staged > STAGING {
            self.stream.synchronize(TIMEOUT).map_err(|e| wrap(name, e))?;
            self.staged = data.len() as u64;
        }
        let tensor = self.stream.alloc_tensor(dtype, shape).map_err(|e| wrap(name, e))?;
        self.write(name, &tensor.region(), data)?;
        Ok(tensor)
    }

    fn write(&self, name: &str, region: &Region, data: &[u8]) -> Result<(), LoadError> {
        self.stream.write(region, data).map_err(|e| wrap(name, e))
    }

    fn submit(&self, name: &str, op: Op) -> Result<(), LoadError> {
        self.stream.submit(&op.label("load")).map_err(|e| wrap(name, e))
    }
}

fn rows_of(spec: &WeightSpec) -> usize {
    spec.desc.dim(spec.desc.rank().saturating_sub(2))
}

/// The part of a weight that a piece fills: `rows` rows of one expert's slice.
fn part_of(tensor: &Tensor, piece: &Piece, rows: usize) -> Tensor {
    match tensor.desc().rank() {
        3 => {
            let expert = tensor.narrowed(0, piece.expert, 1).narrowed(1, piece.row, rows);
            let shape = [rows, tensor.desc().dim(2)];
            let desc = TensorDesc::new(tensor.desc().dtype(), &shape);
            expert.with_desc(desc)
        }
        _ => tensor.narrowed(0, piece.row, rows),
    }
}

/// `[positions, d]`: the cosines of each position's angles, then the sines.
///
/// Angles are products in FP32, as the reference implementations form them; cosines and sines are
/// then exact to FP32.
fn rope_table(config: &ModelConfig, positions: usize) -> Vec<f32> {
    let frequencies = config.rope_inv_freq();
    let factor = config.rope_attention_factor();
    let mut table = Vec::with_capacity(positions * frequencies.len() * 2);
    for position in 0..positions {
        let angle = |f: &f32| f64::from(position as f32 * f);
        table.extend(frequencies.iter().map(|f| (angle(f).cos() * factor) as f32));
        table.extend(frequencies.iter().map(|f| (angle(f).sin() * factor) as f32));
    }
    table
}

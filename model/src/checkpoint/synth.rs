//! Checkpoints of random weights in exactly the released layout, for tests and benchmarks.
//!
//! Every tensor is drawn from its own ChaCha8 stream, keyed by seed and name, so a tensor's bytes
//! depend neither on the others nor on the sharding. Memory use is small however large the
//! checkpoint is: a piece of a tensor, and the list of tensors.

use std::{
    fs::{self, File},
    io::{self, BufWriter, Write},
    path::{Path, PathBuf},
};

use half::bf16;
use rand_chacha::{
    ChaCha8Rng,
    rand_core::{Rng, SeedableRng},
};
use serde_json::{Map, Value, json};

use super::{
    fp8,
    index::INDEX_FILE,
    layout::{self, Storage, TensorSpec},
};
use crate::config::ModelConfig;

/// Standard deviation of the weights: `initializer_range` of the released model.
const WEIGHT_STD: f32 = 0.02;
/// Bytes generated and written at a time.
const PIECE: usize = 1 << 20;
/// Shard numbers have five digits.
const MAX_SHARDS: usize = 99_999;

/// How to synthesise.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SynthOptions {
    /// Equal seeds give equal weights, whatever the shard size.
    pub seed: u64,
    /// Bytes of tensor data after which a new shard is begun; a larger tensor has one to itself.
    pub shard_bytes: u64,
}

impl Default for SynthOptions {
    /// Seed 0, shards of 4 GiB: about the released size.
    fn default() -> SynthOptions {
        SynthOptions { seed: 0, shard_bytes: 4 << 30 }
    }
}

/// Why a checkpoint was not made. Nothing is left behind.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SynthError {
    /// The folder holds something already.
    #[error("{} is not an empty folder; choose another one, or empty it", path.display())]
    NotEmpty {
        /// The folder.
        path: PathBuf,
    },
    /// The shard size would need too many files.
    #[error("shards of {shard_bytes} bytes would be more than {MAX_SHARDS}; make them larger")]
    TooManyShards {
        /// The size asked for.
        shard_bytes: u64,
    },
    /// The operating system refused.
    #[error("cannot write {}: {source}", path.display())]
    Io {
        /// The file or folder.
        path: PathBuf,
        /// Its answer.
        source: io::Error,
    },
}

/// Writes a checkpoint of random weights into `folder`, which must be empty or not exist.
///
/// Weights have a standard deviation of 0.02 (after dequantisation), norms are near 1, routing
/// biases near 0; no NaN. Files get their names only when all are complete, the index last, and
/// what was written is removed on failure. `progress` is told bytes done and bytes in all.
///
/// # Errors
/// [`SynthError`].
pub fn synthesize(
    config: &ModelConfig,
    folder: &Path,
    options: SynthOptions,
    progress: &mut dyn FnMut(u64, u64),
) -> Result<(), SynthError> {
    let shards = plan_shards(config, options.shard_bytes)?;
    let total: u64 = shards.iter().flatten().map(TensorSpec::bytes).sum();
    let mut output = Output::create(folder)?;
    let shard_name =
        |number: usize| format!("model-{number:05}-of-{:06}.safetensors", shards.len());

    let tables = Tables::new();
    let (mut done, mut weight_map) = (0, Map::new());
    for (number, tensors) in (1..).zip(&shards) {
        let name = shard_name(number);
        output.write(&name, |out| {
            out.write_all(&header(tensors))?;
            for spec in tensors {
                let mut stream = stream_of(options.seed, config, spec);
                tables.write(spec, &mut stream, out, &mut |bytes| {
                    done += bytes;
                    progress(done, total);
                })?;
            }
            Ok(())
        })?;
        let names = tensors.iter().map(|spec| (spec.name.clone(), json!(name)));
        weight_map.extend(names);
    }
    weight_map.sort_keys();
    let index = json!({ "metadata": { "total_size": total }, "weight_map": weight_map });
    let generation = json!({
        "bos_token_id": config.bos_token_id,
        "eos_token_id": match config.eos_token_ids[..] {
            [id] => json!(id),
            _ => json!(config.eos_token_ids),
        },
        "do_sample": false,
    });
    output.write_text("generation_config.json", &format!("{generation:#}\n"))?;
    output.write_text("config.json", &config.to_json())?;
    output.write_text(INDEX_FILE, &format!("{index:#}\n"))?;
    output.commit()
}

/// Deals the tensors out in the layout's order. Within a shard the widest types come first, as the
/// `safetensors` library has it, so that data is aligned.
fn plan_shards(config: &ModelConfig, shard_bytes: u64) -> Result<Vec<Vec<TensorSpec>>, SynthError> {
    let mut shards: Vec<Vec<TensorSpec>> = vec![Vec::new()];
    let mut filled = 0u64;
    for spec in layout::tensors(config) {
        let bytes = spec.bytes();
        filled = filled.saturating_add(bytes);
        let begun = shards.last().is_some_and(|shard| !shard.is_empty());
        if begun && filled > shard_bytes {
            if shards.len() == MAX_SHARDS {
                return Err(SynthError::TooManyShards { shard_bytes });
            }
            shards.push(Vec::new());
            filled = bytes;
        }
        if let Some(shard) = shards.last_mut() {
            shard.push(spec);
        }
    }
    for shard in &mut shards {
        shard.sort_by_key(|spec| std::cmp::Reverse(spec.storage.bytes_per_element()));
    }
    Ok(shards)
}

/// Length field and JSON, padded with spaces to a multiple of 8.
fn header(tensors: &[TensorSpec]) -> Vec<u8> {
    let mut entries = Map::new();
    entries.insert("__metadata__".to_owned(), json!({ "format": "pt" }));
    let mut offset = 0;
    for spec in tensors {
        let end = offset + spec.bytes();
        let entry = json!({
            "dtype": spec.storage.dtype().to_string(),
            "shape": spec.shape,
            "data_offsets": [offset, end],
        });
        entries.insert(spec.name.clone(), entry);
        offset = end;
    }
    let mut text = Value::Object(entries).to_string().into_bytes();
    text.resize(text.len().next_multiple_of(8), b' ');
    let mut bytes = (text.len() as u64).to_le_bytes().to_vec();
    bytes.append(&mut text);
    bytes
}

/// The random stream of one tensor; that of the original for a copy.
fn stream_of(seed: u64, config: &ModelConfig, spec: &TensorSpec) -> ChaCha8Rng {
    let original = spec.copy_of(config);
    let name = original.as_ref().map_or(&spec.name, |original| &original.name);
    // FNV-1a, twice with different offsets: 128 bits, so that no two names meet.
    let hash = |basis: u64| {
        name.bytes()
            .fold(basis, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3))
    };
    let words = [seed, hash(0xcbf2_9ce4_8422_2325), hash(0x9e37_79b9_7f4a_7c15), 0];
    let mut key = [0; 32];
    for (bytes, word) in key.chunks_exact_mut(8).zip(words) {
        bytes.copy_from_slice(&word.to_le_bytes());
    }
    ChaCha8Rng::from_seed(key)
}

/// Value tables, one entry per random byte: quantiles of a normal distribution.
struct Tables {
    fp8: [u8; 256],
    weight: [[u8; 2]; 256],
    norm: [[u8; 2]; 256],
    bias: [[u8; 4]; 256],
    scale: [[u8; 4]; 256],
}

impl Tables {
    fn new() -> Tables {
        let quantiles: [f32; 256] = std::array::from_fn(normal_quantile);
        let largest = quantiles[255];
        // As a quantiser does: the largest value of a block becomes 448.
        let fp8 = quantiles.map(|z| fp8::encode_slowly(z / largest * 448.0));
        let mean_square = fp8.iter().map(|&byte| fp8::decode(byte).powi(2)).sum::<f32>() / 256.0;
        let scale = WEIGHT_STD / mean_square.sqrt();
        let bf16_bytes = |value: f32| bf16::from_f32(value).to_le_bytes();
        Tables {
            fp8,
            weight: quantiles.map(|z| bf16_bytes(WEIGHT_STD * z)),
            norm: quantiles.map(|z| bf16_bytes(1.0 + 0.1 * z)),
            bias: quantiles.map(|z| (0.01 * z).to_le_bytes()),
            // Blocks differ, but not by much, as in trained weights.
            scale: quantiles.map(|z| (scale * (1.0 + 0.05 * z)).to_le_bytes()),
        }
    }

    fn write(
        &self,
        spec: &TensorSpec,
        stream: &mut ChaCha8Rng,
        out: &mut dyn Write,
        written: &mut dyn FnMut(u64),
    ) -> io::Result<()> {
        match (spec.storage, spec.shape.len()) {
            (Storage::Fp8WithScale, _) => {
                let table = self.fp8.map(|byte| [byte]);
                draw(&table, spec.elements(), stream, out, written)
            }
            (Storage::BlockScale, _) => draw(&self.scale, spec.elements(), stream, out, written),
            (Storage::F32, _) => draw(&self.bias, spec.elements(), stream, out, written),
            (Storage::Bf16, 1) => draw(&self.norm, spec.elements(), stream, out, written),
            (Storage::Bf16, _) => draw(&self.weight, spec.elements(), stream, out, written),
        }
    }
}

/// Writes `elements` entries of a table, picked by random bytes.
fn draw<const N: usize>(
    table: &[[u8; N]; 256],
    elements: u64,
    stream: &mut ChaCha8Rng,
    out: &mut dyn Write,
    written: &mut dyn FnMut(u64),
) -> io::Result<()> {
    let mut left = elements;
    let piece = usize::try_from(elements).unwrap_or(usize::MAX).min(PIECE / N);
    let (mut random, mut values) = (vec![0; piece], vec![[0; N]; piece]);
    while left > 0 {
        let count = usize::try_from(left).unwrap_or(usize::MAX).min(piece);
        stream.fill_bytes(&mut random[..count]);
        for (value, &byte) in values.iter_mut().zip(&random[..count]) {
            *value = table[usize::from(byte)];
        }
        out.write_all(values[..count].as_flattened())?;
        left -= count as u64;
        written((count * N) as u64);
    }
    Ok(())
}

/// The normal distribution's value at the middle of step `index` of 256.
///
/// Tukey's lambda distribution with lambda 0.135, which follows the normal quantile to within 1%
/// here; more would be pointless at 8 bits.
fn normal_quantile(index: usize) -> f32 {
    let p = (index as f32 + 0.5) / 256.0;
    (p.powf(0.135) - (1.0 - p).powf(0.135)) / 0.1975
}

/// A folder in the making: files have temporary names until [`Output::commit`].
struct Output {
    folder: PathBuf,
    created: bool,
    names: Vec<String>,
    committed: bool,
}

impl Output {
    fn create(folder: &Path) -> Result<Output, SynthError> {
        let folder = folder.to_owned();
        let created = match fs::read_dir(&folder) {
            Ok(mut entries) => match entries.next() {
                Some(_) => return Err(SynthError::NotEmpty { path: folder }),
                None => false,
            },
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                let made = fs::create_dir_all(&folder);
                made.map_err(|source| SynthError::Io { path: folder.clone(), source })?;
                true
            }
            Err(source) => return Err(SynthError::Io { path: folder, source }),
        };
        Ok(Output { folder, created, names: Vec::new(), committed: false })
    }

    fn temporary(&self, name: &str) -> PathBuf {
        self.folder.join(format!("{name}.partial"))
    }

    fn write(
        &mut self,
        name: &str,
        contents: impl FnOnce(&mut dyn Write) -> io::Result<()>,
    ) -> Result<(), SynthError> {
        let path = self.temporary(name);
        self.names.push(name.to_owned());
        let result = File::create_new(&path).and_then(|file| {
            let mut out = BufWriter::with_capacity(PIECE, file);
            contents(&mut out)?;
            out.flush()
        });
        result.map_err(|source| SynthError::Io { path, source })
    }

    fn write_text(&mut self, name: &str, text: &str) -> Result<(), SynthError> {
        self.write(name, |out| out.write_all(text.as_bytes()))
    }

    /// Gives every file its name, in the order of writing: the index, without which the folder is
    /// no checkpoint, comes last.
    fn commit(mut self) -> Result<(), SynthError> {
        for name in &self.names {
            let path = self.folder.join(name);
            let renamed = fs::rename(self.temporary(name), &path);
            renamed.map_err(|source| SynthError::Io { path, source })?;
        }
        self.committed = true;
        Ok(())
    }
}

impl Drop for Output {
    fn drop(&mut self) {
        if self.committed {
            return;
        }
        // Best effort: the error that led here is the one to report.
        for name in &self.names {
            let _ = fs::remove_file(self.temporary(name));
            let _ = fs::remove_file(self.folder.join(name));
        }
        if self.created {
            let _ = fs::remove_dir(&self.folder);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::checkpoint::layout::Role;

    #[test]
    fn quantiles_are_normal_enough() {
        for (index, exact) in [(127, -0.0049), (192, 0.6769), (243, 1.6593), (255, 2.8856)] {
            let found = normal_quantile(index);
            assert!((found - exact).abs() < 0.03, "{index}: {found} is not {exact}");
        }
        let mean_square = (0..256).map(|i| normal_quantile(i).powi(2)).sum::<f32>() / 256.0;
        assert!((mean_square - 1.0).abs() < 0.02, "{mean_square}");
    }

    #[test]
    fn fp8_table_has_no_nan_and_uses_the_range() {
        let tables = Tables::new();
        assert_eq!(super::super::check_fp8_nan(&tables.fp8), None);
        assert_eq!((fp8::decode(tables.fp8[255]), fp8::decode(tables.fp8[0])), (448.0, -448.0));
    }

    /// A tensor's stream depends on seed and name only, and copies share that of their original.
    #[test]
    fn streams_are_per_tensor() {
        let config = crate::config::Preset::Tiny.config();
        let first = |seed, role, layer| {
            let spec = TensorSpec::at(&config, role, layer, None).unwrap();
            stream_of(seed, &config, &spec).next_u64()
        };
        let embedding = first(1, Role::Embedding, None);
        assert_eq!(embedding, first(1, Role::MtpEmbedding, Some(4)));
        assert_ne!(embedding, first(2, Role::Embedding, None));
        assert_ne!(embedding, first(1, Role::Head, None));
    }
}

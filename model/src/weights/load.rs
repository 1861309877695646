//! Bringing weights from a checkpoint to the dies: each rank reads its own parts, side by side.

use super::{Piece, PlanOptions, Role, WeightKey, WeightPlan, WeightSpec};
use crate::checkpoint::{Checkpoint, CheckpointError, Weight};
use crate::config::{FP8_BLOCK, ModelConfig};
use crate::plan::RankPlan;
use hal::op;
use hal::{DType, Device, Op, Operand, Region, Stream, Tensor, TensorDesc};
use std::borrow::Cow;
use std::cell::RefCell;
use std::collections::{BTreeMap, HashMap};
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::mpsc;
use std::time::Duration;

/// How long loading may stand still before it counts as failed.
const TIMEOUT: Duration = Duration::from_secs(600);

/// Bytes of weights in flight on one die before its loader waits: bounds the staging memory, which
/// is this for each rank being loaded, and as many are as there are processors.
const STAGING: u64 = 256 << 20;

/// Tensors of a buffer begin at multiples of this many bytes, as buffers do.
const ALIGNMENT: u64 = 256;

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

/// How far loading has come, all ranks together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LoadProgress {
    /// Bytes of the checkpoint read.
    pub done: u64,
    /// Bytes to read in all: what several ranks need counts for each.
    pub total: u64,
}

/// The weights on a die.
#[derive(Debug)]
pub struct Weights {
    tensors: HashMap<WeightKey, (Tensor, Option<Tensor>)>,
    /// Bytes read from the checkpoint.
    pub read_bytes: u64,
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

/// Makes room for a rank's weights without reading any: for devices that compute no values.
///
/// # Errors
///
/// [`LoadError::Device`]. What was allocated is freed.
pub fn allocate(device: &Arc<dyn Device>, plan: &WeightPlan) -> Result<Weights, LoadError> {
    let stream = device.stream("load").map_err(|e| wrap("the load stream", e))?;
    let tensors = alloc(&*stream, plan)?;
    stream.synchronize(TIMEOUT).map_err(|e| wrap("the weights", e))?;
    Ok(Weights { tensors, read_bytes: 0 })
}

/// Loads the weights of every rank, some ranks side by side.
///
/// Weights go to the device as the checkpoint has them where the plan keeps the dtype; others go
/// through a staging buffer and are dequantised or converted by the device.
///
/// # Errors
///
/// [`LoadError`] naming the tensor, that of the lowest rank if several fail. What was allocated is
/// freed.
pub fn load(
    ranks: &[(Arc<dyn Device>, RankPlan, WeightPlan)],
    checkpoint: &Checkpoint,
    options: PlanOptions,
    progress: &mut dyn FnMut(LoadProgress),
) -> Result<Vec<Weights>, LoadError> {
    let mut total = 0;
    for (_, rank, plan) in ranks {
        for spec in &plan.specs {
            for piece in super::pieces(checkpoint.config(), rank, options, spec.key) {
                let dtype = checkpoint.tensor(&piece.name)?.dtype;
                let elements = piece.rows.len() * piece.columns.as_ref().map_or(1, |c| c.len());
                total += (elements * dtype.bitsize() / 8) as u64;
            }
        }
    }
    let mut state = LoadProgress { done: 0, total };
    if let [(device, rank, plan)] = ranks {
        // On the caller's own thread: one stream keeps one thread busy at most.
        let state = RefCell::new((state, progress));
        let told = |bytes: u64| {
            let (state, progress) = &mut *state.borrow_mut();
            state.done += bytes;
            progress(*state);
        };
        let target = Target { device, rank, plan, options };
        return Ok(vec![target.load(checkpoint, &told, &AtomicBool::new(false))?]);
    }
    let workers = std::thread::available_parallelism().map_or(1, |n| n.get()).min(ranks.len());
    let (next, failed) = (AtomicUsize::new(0), AtomicBool::new(false));
    let (sender, receiver) = mpsc::channel();
    let work = |sender: mpsc::Sender<u64>| {
        let mut results = Vec::new();
        loop {
            let at = next.fetch_add(1, Ordering::Relaxed);
            let Some((device, rank, plan)) = ranks.get(at) else { return results };
            let target = Target { device, rank, plan, options };
            // Nobody listens any more only if the caller is gone.
            let told = |bytes: u64| sender.send(bytes).unwrap_or(());
            let result = target.load(checkpoint, &told, &failed);
            failed.fetch_or(result.is_err(), Ordering::Relaxed);
            results.push((at, result));
        }
    };
    let work = &work;
    let mut loaded: Vec<(usize, Result<Weights, LoadError>)> = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..workers)
            .map(|_| {
                let sender = sender.clone();
                scope.spawn(move || work(sender))
            })
            .collect();
        drop(sender);
        for bytes in receiver {
            state.done += bytes;
            progress(state);
        }
        let results = threads.into_iter().map(|thread| thread.join());
        results.flat_map(|r| r.unwrap_or_else(|panic| std::panic::resume_unwind(panic))).collect()
    });
    loaded.sort_by_key(|(at, _)| *at);
    // A rank that stopped because another failed has a failure too, of a later rank or cause.
    loaded.into_iter().map(|(_, result)| result).collect()
}

fn wrap(tensor: &str, source: hal::Error) -> LoadError {
    LoadError::Device { tensor: tensor.to_string(), source }
}

/// Makes room for a rank's weights: one buffer a layer, since a die that finds many small buffers all
/// over its memory spends its time on finding them. Not one for all, which a device with other
/// tenants may not have in one piece. Weights that all ranks of a tensor group hold alike have
/// buffers of their own: a simulator keeps equal ones once.
fn alloc(
    stream: &dyn Stream,
    plan: &WeightPlan,
) -> Result<HashMap<WeightKey, (Tensor, Option<Tensor>)>, LoadError> {
    let mut sizes: BTreeMap<(usize, Option<Role>), u64> = BTreeMap::new();
    // Which buffer a tensor is in, and where it begins there.
    let mut place = |layer: usize, alone: Option<Role>, desc: &TensorDesc| {
        let size = sizes.entry((layer, alone)).or_default();
        let at = *size;
        *size += desc.bytes().next_multiple_of(ALIGNMENT);
        ((layer, alone), at)
    };
    let mut places = Vec::with_capacity(plan.specs.len());
    for WeightSpec { key, desc, scales, .. } in &plan.specs {
        let tensor = place(key.layer, key.role.is_whole().then_some(key.role), desc);
        places.push((tensor, scales.as_ref().map(|scales| place(key.layer, None, scales))));
    }
    let mut buffers = BTreeMap::new();
    for ((layer, alone), size) in sizes {
        let name = || match alone {
            Some(role) => format!("{role:?} of layer {layer}"),
            None => format!("the weights of layer {layer}"),
        };
        let buffer = stream.alloc(size).map_err(|e| wrap(&name(), e))?;
        buffers.insert((layer, alone), buffer);
    }
    let tensors = plan.specs.iter().zip(places).map(|(spec, (place, scales_place))| {
        let tensor = |desc, (buffer, at)| Tensor::new(buffers[&buffer].clone(), at, desc);
        let scales = spec.scales.zip(scales_place).map(|(desc, place)| tensor(desc, place));
        (spec.key, (tensor(spec.desc, place), scales))
    });
    Ok(tensors.collect())
}

/// A rank to load.
struct Target<'a> {
    device: &'a Arc<dyn Device>,
    rank: &'a RankPlan,
    plan: &'a WeightPlan,
    options: PlanOptions,
}

impl Target<'_> {
    fn load(
        &self,
        checkpoint: &Checkpoint,
        progress: &dyn Fn(u64),
        stop: &AtomicBool,
    ) -> Result<Weights, LoadError> {
        let stream = self.device.stream("load").map_err(|e| wrap("the load stream", e))?;
        let mut loader = Loader { stream: &*stream, checkpoint, progress, read: 0, in_flight: 0 };
        let tensors = alloc(&*stream, self.plan)?;
        for spec in &self.plan.specs {
            if stop.load(Ordering::Relaxed) {
                break;
            }
            let pieces = super::pieces(checkpoint.config(), self.rank, self.options, spec.key);
            loader.weight(spec, &pieces, self.rank, &tensors[&spec.key])?;
        }
        let read_bytes = loader.read;
        stream.synchronize(TIMEOUT).map_err(|e| wrap("the weights", e))?;
        Ok(Weights { tensors, read_bytes })
    }
}

struct Loader<'a> {
    stream: &'a dyn Stream,
    checkpoint: &'a Checkpoint,
    progress: &'a dyn Fn(u64),
    read: u64,
    in_flight: u64,
}

impl Loader<'_> {
    fn weight(
        &mut self,
        spec: &WeightSpec,
        pieces: &[Piece],
        rank: &RankPlan,
        (tensor, scales): &(Tensor, Option<Tensor>),
    ) -> Result<(), LoadError> {
        let name = pieces.first().map_or("a computed table", |p| &p.name);
        match spec.key.role {
            Role::RopeTable => {
                let table = rope_table(self.checkpoint.config(), spec.desc.dim(0));
                self.write(name, &tensor.region(), bytemuck::cast_slice(&table))?;
            }
            Role::Replicas => {
                let table = replica_table(rank, spec.desc.dim(1));
                self.write(name, &tensor.region(), bytemuck::cast_slice(&table))?;
            }
            _ => {}
        }
        for piece in pieces {
            self.piece(spec, piece, tensor, scales.as_ref())?;
        }
        Ok(())
    }

    fn piece(
        &mut self,
        spec: &WeightSpec,
        piece: &Piece,
        tensor: &Tensor,
        scales: Option<&Tensor>,
    ) -> Result<(), LoadError> {
        let source = self.checkpoint.weight(&piece.name)?;
        let (data, shape) = part_of_source(&source, piece);
        // The message for a bad value gives its place in the whole tensor.
        let part = Weight { data: &data, scales: None, ..source.clone() };
        if part.check_values().is_err() {
            source.check_values()?;
        }
        let out = part_of(tensor, piece.expert, piece.row, piece.rows.len());
        let from = source.scales.as_ref().map(|from| {
            let rows = blocks(&piece.rows);
            let columns = piece.columns.as_ref().map_or(0..1, blocks);
            let values: Vec<f32> = rows
                .clone()
                .flat_map(|r| &from.values[r * from.shape[1]..][columns.clone()])
                .copied()
                .collect();
            (values, [rows.len(), columns.len()])
        });
        match from {
            _ if source.dtype == spec.desc.dtype() => {
                self.write(&piece.name, &out.region(), &data)?;
                if let (Some((values, shape)), Some(to)) = (&from, scales) {
                    // Each stacked segment has scale rows of its own.
                    let row = spec.grid.scale_row(piece.row, rows_of(spec));
                    let to = part_of(to, piece.expert, row, shape[0]);
                    self.write(&piece.name, &to.region(), bytemuck::cast_slice(values))?;
                }
            }
            Some((values, scale_shape)) => {
                let w = self.stage(&piece.name, source.dtype, &shape, &data)?;
                let values = bytemuck::cast_slice(&values);
                let w_scales = self.stage(&piece.name, DType::F32, &scale_shape, values)?;
                let within = |range: &Range<usize>| (range.start % FP8_BLOCK) as u32;
                let grid = op::BlockGrid {
                    row_offset: within(&piece.rows),
                    column_offset: piece.columns.as_ref().map_or(0, within),
                    segments: 1,
                };
                let out = out.with_desc(TensorDesc::new(spec.desc.dtype(), &shape));
                self.submit(&piece.name, op::Dequantize { w, w_scales, out, grid }.into())?;
            }
            None => {
                let x = self.stage(&piece.name, source.dtype, &shape, &data)?;
                let out = out.with_desc(TensorDesc::new(spec.desc.dtype(), &shape));
                self.submit(&piece.name, op::Cast { x, out }.into())?;
            }
        }
        self.read += data.len() as u64;
        (self.progress)(data.len() as u64);
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
        let tensor = self.stream.alloc_tensor(dtype, shape).map_err(|e| wrap(name, e))?;
        self.write(name, &tensor.region(), data)?;
        Ok(tensor)
    }

    fn write(&mut self, name: &str, region: &Region, data: &[u8]) -> Result<(), LoadError> {
        self.in_flight += data.len() as u64;
        if self.in_flight > STAGING {
            self.stream.synchronize(TIMEOUT).map_err(|e| wrap(name, e))?;
            self.in_flight = data.len() as u64;
        }
        self.stream.write(region, data).map_err(|e| wrap(name, e))
    }

    fn submit(&self, name: &str, op: Op) -> Result<(), LoadError> {
        self.stream.submit(&op.label("load")).map_err(|e| wrap(name, e))
    }
}

/// The blocks that a range of rows or columns touches.
fn blocks(range: &Range<usize>) -> Range<usize> {
    range.start / FP8_BLOCK..range.end.div_ceil(FP8_BLOCK)
}

/// The bytes of a piece and their shape: a view of the file where the columns are whole.
fn part_of_source<'s>(source: &Weight<'s>, piece: &Piece) -> (Cow<'s, [u8]>, Vec<usize>) {
    let size = source.dtype.size();
    let Some(columns) = &piece.columns else {
        let data = &source.data[piece.rows.start * size..piece.rows.end * size];
        return (Cow::Borrowed(data), vec![piece.rows.len()]);
    };
    let width = source.shape.last().copied().unwrap_or(1) * size;
    let rows = &source.data[piece.rows.start * width..piece.rows.end * width];
    let shape = vec![piece.rows.len(), columns.len()];
    if columns.len() * size == width {
        return (Cow::Borrowed(rows), shape);
    }
    let range = columns.start * size..columns.end * size;
    let packed = rows.chunks_exact(width).flat_map(|row| &row[range.clone()]).copied().collect();
    (Cow::Owned(packed), shape)
}

fn rows_of(spec: &WeightSpec) -> usize {
    spec.desc.dim(spec.desc.rank().saturating_sub(2))
}

/// Some rows of a weight, or of one expert's slice of it.
fn part_of(tensor: &Tensor, expert: usize, row: usize, rows: usize) -> Tensor {
    match tensor.desc().rank() {
        3 => {
            let part = tensor.narrowed(0, expert, 1).narrowed(1, row, rows);
            let shape = [rows, tensor.desc().dim(2)];
            part.with_desc(TensorDesc::new(tensor.desc().dtype(), &shape))
        }
        _ => tensor.narrowed(0, row, rows),
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

/// `[experts, most]`: the physical experts of each logical one, −1 behind them.
fn replica_table(rank: &RankPlan, most: usize) -> Vec<i32> {
    let replicas = rank.experts.as_ref().map(|e| e.replicas()).unwrap_or_default();
    let row = |of: Vec<u32>| {
        let padding = most.saturating_sub(of.len());
        of.into_iter().map(|p| p as i32).chain(std::iter::repeat_n(-1, padding))
    };
    replicas.into_iter().flat_map(row).collect()
}

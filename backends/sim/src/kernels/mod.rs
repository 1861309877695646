//! What every op computes.
//!
//! A result is a function of the operands alone: the order of every sum is fixed per output
//! element (see [`simd`]), whatever the number of rows, the threads or the instruction set.
//! Shapes, strides and alignment were checked before; values in memory (indices, offsets, page
//! numbers) were not, and are checked here.

mod args;
mod attention;
mod batched;
mod cache;
mod dispatch;
mod fused;
mod linear;
mod moe;
mod number;
mod rowwise;
mod scratch;
mod select;
mod simd;
#[cfg(test)]
mod tests;

pub(crate) use args::{Arg, Args, View, ViewMut};
pub(crate) use cache::check_starts;
pub(crate) use simd::{Isa, fetch};

use hal::op::Routing;
use hal::{Op, TensorDesc};
use rayon::prelude::*;

/// How kernels run.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Context {
    pub(crate) isa: Isa,
    pub(crate) threads: usize,
}

impl Context {
    pub(crate) fn new(threads: usize) -> Self {
        Context { isa: Isa::detect(), threads }
    }
}

/// What only the values could tell.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Outcome {
    /// How a grouped op's rows were spread.
    pub(crate) routing: Option<Routing>,
}

/// Whether the kernels can run an op: all that is well-formed.
pub(crate) fn supports(op: &Op<TensorDesc>) -> Result<(), String> {
    hal::op::check(op)
}

/// Runs an op.
///
/// # Errors
///
/// Values that make it impossible: an index outside its table, a NaN where an order is asked for.
pub(crate) fn run(op: &Op<Arg>, args: &mut Args<'_>, ctx: &Context) -> Result<Outcome, String> {
    match op {
        Op::GroupedLinear(op) => return linear::grouped_linear(op, args, ctx),
        Op::GatherRows(op) => rowwise::gather_rows(op, args)?,
        Op::RmsNorm(op) => rowwise::rms_norm(op, args, ctx),
        Op::Quantize(op) => rowwise::quantize(op, args, ctx)?,
        Op::RmsNormQuantize(op) => fused::rms_norm_quantize(op, args, ctx),
        Op::Dequantize(op) => rowwise::dequantize(op, args, ctx),
        Op::Linear(op) => linear::linear(op, args, ctx),
        Op::BatchedLinear(op) => batched::batched_linear(op, args, ctx),
        Op::Rope(op) => cache::rope(op, args)?,
        Op::CacheWrite(op) => cache::write(op, args)?,
        Op::CacheRead(op) => cache::read(op, args)?,
        Op::MlaPrefill(op) => attention::prefill(op, args, ctx)?,
        Op::MlaDecode(op) => attention::decode(op, args, ctx)?,
        Op::SwiGlu(op) => rowwise::swiglu(op, args, ctx)?,
        Op::SwiGluQuantize(op) => fused::swiglu_quantize(op, args, ctx)?,
        Op::Gate(op) => moe::gate(op, args),
        Op::MoeDispatch(op) => dispatch::dispatch(op, args)?,
        Op::MoePermute(op) => moe::permute(op, args)?,
        Op::MoeCombine(op) => moe::combine(op, args, ctx)?,
        Op::Add(op) => rowwise::add(op, args, ctx),
        Op::Cast(op) => rowwise::cast(op, args, ctx),
        Op::Copy(op) => rowwise::copy(op, args),
        Op::ArgMax(op) => select::argmax(op, args)?,
        Op::TopK(op) => select::top_k(op, args)?,
        other => return Err(format!("{} is newer than this simulator", other.kind().name())),
    }
    Ok(Outcome::default())
}

/// How many rows of `available` count: all, or as many as the last of `row_offsets` says.
fn counted_rows(
    row_offsets: Option<&Arg>,
    available: usize,
    args: &Args<'_>,
) -> Result<usize, String> {
    let Some(offsets) = row_offsets else { return Ok(available) };
    let last = args.read::<i32>(offsets).data.last().copied().unwrap_or(0);
    match usize::try_from(last) {
        Ok(rows) if rows <= available => Ok(rows),
        _ => Err(format!("row_offsets end at {last}, which is not within {available} rows")),
    }
}

/// Multiply-adds from which on it pays to wake other threads: some 100 µs of one.
const PARALLEL: usize = 1 << 20;

/// Calls `f` with the number of each chunk and the chunk, on all threads if there is enough work
/// (`cost` multiply-adds a chunk).
fn for_each_chunk(
    ctx: &Context,
    values: &mut [f32],
    chunk: usize,
    cost: usize,
    f: impl Fn(usize, &mut [f32]) + Sync,
) {
    let chunk = chunk.max(1);
    let count = values.len() / chunk;
    if ctx.threads == 1 || count * cost < PARALLEL {
        values.chunks_exact_mut(chunk).enumerate().for_each(|(i, c)| f(i, c));
    } else {
        values.par_chunks_exact_mut(chunk).enumerate().for_each(|(i, c)| f(i, c));
    }
}

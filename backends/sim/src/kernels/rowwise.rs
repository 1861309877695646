//! Ops that work row by row: norms, conversions, elementwise arithmetic, copies.

use super::number::{E4M3_MAX, E4M3_VALUES, Float, encode_e4m3, sigmoid};
use super::simd::{Element, LANES, for_vectors, kernel, sum, vector};
use super::{Arg, Args, Context, View, ViewMut, counted_rows};
use hal::op::{
    Add, BlockGrid, Cast, Copy, Dequantize, GatherRows, Quantize, RmsNorm, ScaleFormat, SwiGlu,
};
use hal::{DType, TensorDesc};
use half::bf16;

/// DeepSeek's floor for the largest magnitude of a group (`act_quant`).
const LEAST_AMAX: f32 = 1e-4;

/// Offsets of the innermost rows of a tensor, in elements.
fn row_offsets(desc: TensorDesc) -> impl Iterator<Item = usize> {
    let outer = desc.rank() - 1;
    (0..desc.rows()).map(move |mut row| {
        let mut at = 0;
        for axis in (0..outer).rev() {
            at += (row % desc.dim(axis)) * desc.stride(axis);
            row /= desc.dim(axis);
        }
        at
    })
}

/// Calls `f` with each innermost row of two tensors of the same shape.
fn for_rows<A, B>(x: &View<'_, A>, out: &mut ViewMut<'_, B>, mut f: impl FnMut(&[A], &mut [B])) {
    let width = x.desc.last_dim();
    if width == 0 {
        return;
    }
    for (from, to) in row_offsets(x.desc).zip(row_offsets(out.desc)) {
        f(&x.data[from..from + width], &mut out.data[to..to + width]);
    }
}

/// See [`GatherRows`].
pub(super) fn gather_rows(op: &GatherRows<Arg>, args: &mut Args<'_>) -> Result<(), String> {
    match op.table.desc.dtype() {
        DType::F32 => gather_as::<f32>(op, args),
        _ => gather_as::<bf16>(op, args),
    }
}

fn gather_as<T: Float>(op: &GatherRows<Arg>, args: &mut Args<'_>) -> Result<(), String> {
    let (table, rows) = (args.read::<T>(&op.table), args.read::<i32>(&op.rows));
    let mut out = args.write::<T>(&op.out);
    for (t, &row) in rows.data.iter().enumerate() {
        if row < 0 || row as u32 >= op.total_rows {
            return Err(format!("row {row} (number {t}) is not one of {}", op.total_rows));
        }
        let local = (row as usize).checked_sub(op.first_row as usize);
        match local.filter(|&local| local < op.table.desc.dim(0)) {
            Some(local) => out.row(t).copy_from_slice(table.row(local)),
            None => out.row(t).fill(T::zeroed()),
        }
    }
    Ok(())
}

kernel! {
    /// `Σ x²`.
    fn square_sum<L, T: Element>(x: &[T]) -> f32 {
        let mut acc = L::splat(0.0);
        for_vectors!(|i| in x.len(), {
            let v: L = T::load(vector(x, i));
            acc = acc.fma(v, v);
        }, |_rest| {
            let v: L = T::load_some(&x[i..]);
            acc = acc.fma(v, v);
        });
        sum(acc.array())
    }
}

kernel! {
    /// `out = x · factor · weight`.
    fn normalize<_L, T: Float>(x: &[T], factor: f32, weight: &[T], out: &mut [T]) {
        for ((out, x), w) in out.iter_mut().zip(x).zip(weight) {
            *out = T::round(x.widen() * factor * w.widen());
        }
    }
}

kernel! {
    /// `residual += x`.
    fn accumulate<_L, T: Float>(x: &[T], residual: &mut [T]) {
        for (r, x) in residual.iter_mut().zip(x) {
            *r = T::round(r.widen() + x.widen());
        }
    }
}

/// See [`RmsNorm`].
pub(super) fn rms_norm(op: &RmsNorm<Arg>, args: &mut Args<'_>, ctx: &Context) {
    match op.x.desc.dtype() {
        DType::F32 => rms_norm_as::<f32>(op, args, ctx),
        _ => rms_norm_as::<bf16>(op, args, ctx),
    }
}

fn rms_norm_as<T: Float>(op: &RmsNorm<Arg>, args: &mut Args<'_>, ctx: &Context) {
    let (x, weight) = (args.read::<T>(&op.x), args.read::<T>(&op.weight));
    let mut residual = op.residual.as_ref().map(|r| args.write::<T>(r));
    let mut out = args.write::<T>(&op.out);
    for t in 0..op.x.desc.dim(0) {
        let residual = residual.as_mut().map(|r| r.row(t));
        norm_row(x.row(t), weight.data, residual, op.eps, out.row(t), ctx);
    }
}

/// One row of [`RmsNorm`].
pub(super) fn norm_row<T: Float>(
    x: &[T],
    weight: &[T],
    residual: Option<&mut [T]>,
    eps: f32,
    out: &mut [T],
    ctx: &Context,
) {
    let row = match residual {
        Some(residual) => {
            accumulate(ctx.isa, x, residual);
            residual
        }
        None => x,
    };
    let mean = square_sum(ctx.isa, row) / x.len() as f32;
    let factor = 1.0 / (mean + eps).sqrt();
    normalize(ctx.isa, row, factor, weight, out);
}

kernel! {
    /// The largest magnitude; NaN if there is one.
    fn largest<_L, T: Element>(x: &[T]) -> f32 {
        let mut lanes = [0.0f32; LANES];
        let mut nan = false;
        for chunk in x.chunks(LANES) {
            for (lane, v) in lanes.iter_mut().zip(chunk) {
                let magnitude = v.widen().abs();
                nan |= magnitude.is_nan();
                *lane = if magnitude > *lane { magnitude } else { *lane };
            }
        }
        let max = lanes.iter().fold(0.0, |a: f32, &b| if b > a { b } else { a });
        if nan { f32::NAN } else { max }
    }
}

kernel! {
    /// `q = e4m3(x / scale)`.
    fn encode<_L, T: Element>(x: &[T], scale: f32, q: &mut [u8]) {
        for (q, x) in q.iter_mut().zip(x) {
            *q = encode_e4m3(x.widen() / scale);
        }
    }
}

/// The scale of a group whose largest magnitude is `amax`.
fn group_scale(amax: f32, format: ScaleFormat) -> f32 {
    let floor = if amax < LEAST_AMAX { LEAST_AMAX } else { amax };
    let scale = floor / E4M3_MAX;
    match format {
        ScaleFormat::Float => scale,
        ScaleFormat::PowerOfTwo if scale.is_nan() => scale,
        ScaleFormat::PowerOfTwo => {
            // Up to the next power of two: a mantissa that is not zero carries into the exponent.
            let bits = scale.to_bits();
            let up = u32::from(bits & 0x7f_ffff != 0);
            f32::from_bits(((bits >> 23) + up) << 23)
        }
    }
}

/// See [`Quantize`].
pub(super) fn quantize(
    op: &Quantize<Arg>,
    args: &mut Args<'_>,
    ctx: &Context,
) -> Result<(), String> {
    match op.x.desc.dtype() {
        DType::F32 => quantize_as::<f32>(op, args, ctx),
        _ => quantize_as::<bf16>(op, args, ctx),
    }
}

fn quantize_as<T: Float>(
    op: &Quantize<Arg>,
    args: &mut Args<'_>,
    ctx: &Context,
) -> Result<(), String> {
    let rows = counted_rows(op.row_offsets.as_ref(), op.x.desc.dim(0), args)?;
    let x = args.read::<T>(&op.x);
    let (mut q, mut scales) = (args.write::<u8>(&op.q), args.write::<f32>(&op.scales));
    for t in 0..rows {
        let groups = (op.column_offset, op.scale_format);
        quantize_row(x.row(t), groups, q.row(t), scales.row(t), ctx);
    }
    Ok(())
}

/// One row of [`Quantize`], with its column offset and its format of scales.
pub(super) fn quantize_row<T: Float>(
    row: &[T],
    (column_offset, format): (u32, ScaleFormat),
    q: &mut [u8],
    scales: &mut [f32],
    ctx: &Context,
) {
    let grid = BlockGrid { column_offset, ..BlockGrid::default() };
    for (group, scale) in scales.iter_mut().enumerate() {
        let range = grid.group_columns(group, row.len());
        *scale = group_scale(largest(ctx.isa, &row[range.clone()]), format);
        encode(ctx.isa, &row[range.clone()], *scale, &mut q[range]);
    }
}

/// See [`Dequantize`].
pub(super) fn dequantize(op: &Dequantize<Arg>, args: &mut Args<'_>, ctx: &Context) {
    match op.out.desc.dtype() {
        DType::F32 => dequantize_as::<f32>(op, args, ctx),
        _ => dequantize_as::<bf16>(op, args, ctx),
    }
}

kernel! {
    /// `out = w · scale`, by a table of decoded values.
    fn scale_row<_L, T: Float>(w: &[u8], scale: f32, out: &mut [T]) {
        for (out, &w) in out.iter_mut().zip(w) {
            *out = T::round(E4M3_VALUES[usize::from(w)] * scale);
        }
    }
}

fn dequantize_as<T: Float>(op: &Dequantize<Arg>, args: &mut Args<'_>, ctx: &Context) {
    use rayon::prelude::*;
    let (w, scales) = (args.read::<u8>(&op.w).data, args.read::<f32>(&op.w_scales).data);
    let out = args.write::<T>(&op.out).data;
    let rank = op.w.desc.rank();
    let (rows, columns) = (op.w.desc.dim(rank - 2), op.w.desc.last_dim());
    if rows * columns == 0 {
        return;
    }
    let (scale_rows, scale_columns) = (op.grid.scale_rows(rows), op.grid.scale_columns(columns));
    let one = |row: usize, w: &[u8], out: &mut [T]| {
        let at = (row / rows * scale_rows + op.grid.scale_row(row % rows, rows)) * scale_columns;
        for (group, &scale) in scales[at..at + scale_columns].iter().enumerate() {
            let range = op.grid.group_columns(group, columns);
            scale_row(ctx.isa, &w[range.clone()], scale, &mut out[range]);
        }
    };
    let pairs = out.par_chunks_exact_mut(columns).zip(w.par_chunks_exact(columns)).enumerate();
    let least = (super::PARALLEL / columns).max(1);
    pairs.with_min_len(least).for_each(|(row, (out, w))| one(row, w, out));
}

kernel! {
    /// `out = silu(gate) · up`.
    fn gated<_L, T: Float>(gate: &[T], up: &[T], out: &mut [T]) {
        for ((out, gate), up) in out.iter_mut().zip(gate).zip(up) {
            let gate = gate.widen();
            *out = T::round(gate * sigmoid(gate) * up.widen());
        }
    }
}

/// See [`SwiGlu`].
pub(super) fn swiglu(op: &SwiGlu<Arg>, args: &mut Args<'_>, ctx: &Context) -> Result<(), String> {
    match op.x.desc.dtype() {
        DType::F32 => swiglu_as::<f32>(op, args, ctx),
        _ => swiglu_as::<bf16>(op, args, ctx),
    }
}

fn swiglu_as<T: Float>(op: &SwiGlu<Arg>, args: &mut Args<'_>, ctx: &Context) -> Result<(), String> {
    let rows = counted_rows(op.row_offsets.as_ref(), op.x.desc.dim(0), args)?;
    let x = args.read::<T>(&op.x);
    let mut out = args.write::<T>(&op.out);
    for t in 0..rows {
        swiglu_row(x.row(t), out.row(t), ctx);
    }
    Ok(())
}

/// One row of [`SwiGlu`].
pub(super) fn swiglu_row<T: Float>(x: &[T], out: &mut [T], ctx: &Context) {
    let (gate, up) = x.split_at(out.len());
    gated(ctx.isa, gate, up, out);
}

/// See [`Add`].
pub(super) fn add(op: &Add<Arg>, args: &mut Args<'_>, ctx: &Context) {
    match op.a.desc.dtype() {
        DType::F32 => add_as::<f32>(op, args, ctx),
        _ => add_as::<bf16>(op, args, ctx),
    }
}

fn add_as<T: Float>(op: &Add<Arg>, args: &mut Args<'_>, ctx: &Context) {
    // Where an input is the output's very memory, the sum is formed in place.
    let inputs = [&op.a, &op.b].map(|arg| (!args.is_alias(arg)).then(|| args.read::<T>(arg)));
    let mut out = args.write::<T>(&op.out);
    let copy = |x: &View<'_, T>, out: &mut ViewMut<'_, T>| {
        for_rows(x, out, |from, to| to.copy_from_slice(from));
    };
    match inputs {
        [Some(a), Some(b)] => {
            copy(&a, &mut out);
            for_rows(&b, &mut out, |b, out| accumulate(ctx.isa, b, out));
        }
        [Some(x), None] | [None, Some(x)] => {
            for_rows(&x, &mut out, |x, out| accumulate(ctx.isa, x, out));
        }
        [None, None] => {
            let width = out.desc.last_dim();
            for at in row_offsets(out.desc) {
                for v in &mut out.data[at..at + width] {
                    *v = T::round(v.widen() + v.widen());
                }
            }
        }
    }
}

kernel! {
    /// Converts.
    fn convert<_L, A: Element, B: Float>(x: &[A], out: &mut [B]) {
        for (out, x) in out.iter_mut().zip(x) {
            *out = B::round(x.widen());
        }
    }
}

/// See [`Cast`].
pub(super) fn cast(op: &Cast<Arg>, args: &mut Args<'_>, ctx: &Context) {
    match (op.x.desc.dtype(), op.out.desc.dtype()) {
        (DType::F32, DType::F32) => cast_as::<f32, f32>(op, args, ctx),
        (DType::F32, _) => cast_as::<f32, bf16>(op, args, ctx),
        (_, DType::F32) => cast_as::<bf16, f32>(op, args, ctx),
        (..) => cast_as::<bf16, bf16>(op, args, ctx),
    }
}

fn cast_as<A: Element, B: Float>(op: &Cast<Arg>, args: &mut Args<'_>, ctx: &Context) {
    let x = args.read::<A>(&op.x);
    for_rows(&x, &mut args.write::<B>(&op.out), |x, out| convert(ctx.isa, x, out));
}

/// See [`struct@Copy`].
pub(super) fn copy(op: &Copy<Arg>, args: &mut Args<'_>) {
    match op.x.desc.dtype().size() {
        4 => copy_as::<u32>(op, args),
        2 => copy_as::<u16>(op, args),
        _ => copy_as::<u8>(op, args),
    }
}

fn copy_as<T: bytemuck::Pod>(op: &Copy<Arg>, args: &mut Args<'_>) {
    let x = args.read::<T>(&op.x);
    for_rows(&x, &mut args.write::<T>(&op.out), |x, out| out.copy_from_slice(x));
}

//! Two ops in one: each row goes through the kernels of both, so the bits are those of the pair.

use super::number::Float;
use super::rowwise::{norm_row, quantize_row, swiglu_row};
use super::{Arg, Args, Context, counted_rows};
use hal::DType;
use hal::op::{RmsNormQuantize, SwiGluQuantize};
use half::bf16;

/// See [`RmsNormQuantize`].
pub(super) fn rms_norm_quantize(op: &RmsNormQuantize<Arg>, args: &mut Args<'_>, ctx: &Context) {
    match op.x.desc.dtype() {
        DType::F32 => rms_norm_quantize_as::<f32>(op, args, ctx),
        _ => rms_norm_quantize_as::<bf16>(op, args, ctx),
    }
}

fn rms_norm_quantize_as<T: Float>(op: &RmsNormQuantize<Arg>, args: &mut Args<'_>, ctx: &Context) {
    let (x, weight) = (args.read::<T>(&op.x), args.read::<T>(&op.weight));
    let mut residual = op.residual.as_ref().map(|r| args.write::<T>(r));
    let mut out = op.out.as_ref().map(|out| args.write::<T>(out));
    let (mut q, mut scales) = (args.write::<u8>(&op.q), args.write::<f32>(&op.scales));
    let mut between = vec![T::zeroed(); op.x.desc.dim(1)];
    for t in 0..op.x.desc.dim(0) {
        let residual = residual.as_mut().map(|r| r.row(t));
        let normed = match &mut out {
            Some(out) => out.row(t),
            None => &mut between[..],
        };
        norm_row(x.row(t), weight.data, residual, op.eps, normed, ctx);
        let groups = (op.column_offset, op.scale_format);
        quantize_row(normed, groups, q.row(t), scales.row(t), ctx);
    }
}

/// See [`SwiGluQuantize`].
pub(super) fn swiglu_quantize(
    op: &SwiGluQuantize<Arg>,
    args: &mut Args<'_>,
    ctx: &Context,
) -> Result<(), String> {
    match op.x.desc.dtype() {
        DType::F32 => swiglu_quantize_as::<f32>(op, args, ctx),
        _ => swiglu_quantize_as::<bf16>(op, args, ctx),
    }
}

fn swiglu_quantize_as<T: Float>(
    op: &SwiGluQuantize<Arg>,
    args: &mut Args<'_>,
    ctx: &Context,
) -> Result<(), String> {
    let rows = counted_rows(op.row_offsets.as_ref(), op.x.desc.dim(0), args)?;
    let x = args.read::<T>(&op.x);
    let (mut q, mut scales) = (args.write::<u8>(&op.q), args.write::<f32>(&op.scales));
    let mut between = vec![T::zeroed(); op.q.desc.dim(1)];
    for t in 0..rows {
        swiglu_row(x.row(t), &mut between, ctx);
        let groups = (op.column_offset, op.scale_format);
        quantize_row(&between, groups, q.row(t), scales.row(t), ctx);
    }
    Ok(())
}

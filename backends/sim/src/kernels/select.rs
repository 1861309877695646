//! Choosing among logits.

use super::number::Float;
use super::{Arg, Args};
use hal::DType;
use hal::op::{ArgMax, TopK};
use half::bf16;
use std::cmp::Ordering;

fn candidates<T: Float>(row: &[T], limit: u32, number: usize) -> Result<&[T], String> {
    let row = &row[..limit as usize];
    match row.iter().position(|v| v.widen().is_nan()) {
        Some(at) => Err(format!("row {number} has a NaN at {at}")),
        None => Ok(row),
    }
}

/// See [`ArgMax`].
pub(super) fn argmax(op: &ArgMax<Arg>, args: &mut Args<'_>) -> Result<(), String> {
    match op.x.desc.dtype() {
        DType::F32 => argmax_as::<f32>(op, args),
        _ => argmax_as::<bf16>(op, args),
    }
}

fn argmax_as<T: Float>(op: &ArgMax<Arg>, args: &mut Args<'_>) -> Result<(), String> {
    let x = args.read::<T>(&op.x);
    let out = args.write::<i32>(&op.out).data;
    for (t, out) in out.iter_mut().enumerate() {
        let row = candidates(x.row(t), op.limit, t)?;
        let mut best = (0, row[0].widen());
        for (i, v) in row.iter().enumerate().skip(1) {
            if v.widen() > best.1 {
                best = (i, v.widen());
            }
        }
        *out = best.0 as i32;
    }
    Ok(())
}

/// See [`TopK`].
pub(super) fn top_k(op: &TopK<Arg>, args: &mut Args<'_>) -> Result<(), String> {
    match op.x.desc.dtype() {
        DType::F32 => top_k_as::<f32>(op, args),
        _ => top_k_as::<bf16>(op, args),
    }
}

fn top_k_as<T: Float>(op: &TopK<Arg>, args: &mut Args<'_>) -> Result<(), String> {
    let x = args.read::<T>(&op.x);
    let (mut values, mut indices) = (args.write::<f32>(&op.values), args.write::<i32>(&op.indices));
    let k = op.values.desc.dim(1);
    if k == 0 {
        return Ok(());
    }
    for t in 0..op.x.desc.dim(0) {
        let row = candidates(x.row(t), op.limit, t)?;
        let descending = |&(i, a): &(usize, f32), &(j, b): &(usize, f32)| {
            b.partial_cmp(&a).unwrap_or(Ordering::Equal).then(i.cmp(&j))
        };
        let mut all: Vec<(usize, f32)> = row.iter().map(|v| v.widen()).enumerate().collect();
        if k < all.len() {
            all.select_nth_unstable_by(k - 1, descending);
        }
        all.truncate(k);
        all.sort_unstable_by(descending);
        for (slot, (i, v)) in all.into_iter().enumerate() {
            values.row(t)[slot] = v;
            indices.row(t)[slot] = i as i32;
        }
    }
    Ok(())
}

//! Mixture of experts: choosing experts, sorting token copies, and adding the results up.

use super::number::{Float, sigmoid};
use super::simd::{Element, LANES, for_vectors, kernel, vector};
use super::{Arg, Args, Context, counted_rows};
use hal::DType;
use hal::op::{Gate, MoeCombine, MoePermute};
use half::bf16;

/// See [`Gate`].
pub(super) fn gate(op: &Gate<Arg>, args: &mut Args<'_>) {
    let logits = args.read::<f32>(&op.logits);
    let bias = op.bias.as_ref().map(|b| args.read::<f32>(b).data);
    let (mut experts, mut weights) =
        (args.write::<i32>(&op.experts), args.write::<f32>(&op.weights));
    let count = op.logits.desc.dim(1);
    let per_group = count / op.groups as usize;
    let (mut scores, mut biased) = (vec![0.0; count], vec![0.0; count]);
    let mut groups = Vec::with_capacity(op.groups as usize);
    for t in 0..op.logits.desc.dim(0) {
        for (e, &logit) in logits.row(t).iter().enumerate() {
            scores[e] = sigmoid(logit);
            biased[e] = scores[e] + bias.map_or(0.0, |b| b[e]);
        }
        groups.clear();
        groups.extend(biased.chunks_exact(per_group).map(top_two));
        let mut kept = vec![false; groups.len()];
        for _ in 0..op.groups_kept {
            let best = largest(&groups, &kept, |_| true);
            kept[best] = true;
        }
        let mut chosen = vec![false; count];
        let mut total = 0.0;
        for slot in experts.row(t).iter_mut() {
            let best = largest(&biased, &chosen, |e| kept[e / per_group]);
            chosen[best] = true;
            total += scores[best];
            *slot = best as i32;
        }
        let divisor = if op.normalize { total + 1e-20 } else { 1.0 };
        for (weight, &expert) in weights.row(t).iter_mut().zip(experts.row(t).iter()) {
            *weight = scores[expert as usize] / divisor * op.scale;
        }
    }
}

/// Sum of the two largest; the only one where there is one.
fn top_two(scores: &[f32]) -> f32 {
    let (mut first, mut second) = (f32::NEG_INFINITY, f32::NEG_INFINITY);
    for &s in scores {
        if s > first {
            (first, second) = (s, first);
        } else if s > second {
            second = s;
        }
    }
    if scores.len() == 1 { first } else { first + second }
}

/// The first of the largest values that are not taken and are allowed. A NaN counts as larger than
/// everything, so that it is not hidden: its expert is chosen and the weights become NaN.
fn largest(values: &[f32], taken: &[bool], allowed: impl Fn(usize) -> bool) -> usize {
    let mut best: Option<usize> = None;
    for (i, &v) in values.iter().enumerate() {
        if taken[i] || !allowed(i) {
            continue;
        }
        if best.is_none_or(|b| v > values[b] || (v.is_nan() && !values[b].is_nan())) {
            best = Some(i);
        }
    }
    // The shape rules leave at least as many candidates as choices.
    best.unwrap_or(0)
}

/// See [`MoePermute`].
pub(super) fn permute(op: &MoePermute<Arg>, args: &mut Args<'_>) -> Result<(), String> {
    let chosen = args.read::<i32>(&op.experts);
    let tokens = op.experts.desc.dim(0);
    let counted = counted_rows(op.row_offsets.as_ref(), tokens, args)?;
    let local = op.offsets.desc.dim(0) - 1;
    let first = op.first_expert as usize;
    // Negative numbers are no experts, and none of those here.
    let local_expert =
        |expert: i32| usize::try_from(expert).ok()?.checked_sub(first).filter(|&e| e < local);
    let mut counts = vec![0usize; local + 1];
    for t in 0..counted {
        for &expert in chosen.row(t) {
            if expert >= 0 && expert as u32 >= op.total_experts {
                return Err(format!(
                    "expert {expert} of token {t} is not one of {}",
                    op.total_experts
                ));
            }
            if let Some(e) = local_expert(expert) {
                counts[e + 1] += 1;
            }
        }
    }
    // Counts become starts.
    for e in 0..local {
        counts[e + 1] += counts[e];
    }
    let available = op.out.desc.dim(0);
    if counts[local] > available {
        return Err(format!("{} token copies do not fit {available} rows", counts[local]));
    }
    let offsets = args.write::<i32>(&op.offsets);
    offsets.data.iter_mut().zip(&counts).for_each(|(to, &n)| *to = n as i32);
    let mut rows = args.write::<i32>(&op.rows);
    let mut sources = vec![0usize; counts[local]];
    (counted..tokens).for_each(|t| rows.row(t).fill(-1));
    for t in 0..counted {
        for (slot, &expert) in rows.row(t).iter_mut().zip(chosen.row(t)) {
            *slot = local_expert(expert).map_or(-1, |e| {
                let row = counts[e];
                counts[e] += 1;
                sources[row] = t;
                row as i32
            });
        }
    }
    move_rows((&op.x, op.x_scales.as_ref()), (&op.out, op.out_scales.as_ref()), &sources, args);
    Ok(())
}

/// Row `r` of the destination becomes row `sources[r]` of the source, its scales too.
pub(super) fn move_rows(
    (x, x_scales): (&Arg, Option<&Arg>),
    (out, out_scales): (&Arg, Option<&Arg>),
    sources: &[usize],
    args: &mut Args<'_>,
) {
    match x.desc.dtype() {
        DType::F32 => copy_rows::<f32>(x, out, sources, args),
        DType::Bf16 => copy_rows::<bf16>(x, out, sources, args),
        _ => copy_rows::<u8>(x, out, sources, args),
    }
    if let (Some(from), Some(to)) = (x_scales, out_scales) {
        copy_rows::<f32>(from, to, sources, args);
    }
}

fn copy_rows<T: bytemuck::Pod>(from: &Arg, to: &Arg, sources: &[usize], args: &mut Args<'_>) {
    let x = args.read::<T>(from);
    let mut out = args.write::<T>(to);
    for (row, &t) in sources.iter().enumerate() {
        out.row(row).copy_from_slice(x.row(t));
    }
}

kernel! {
    /// `acc += weight · y`.
    fn add_scaled<L, T: Element>(weight: f32, y: &[T], acc: &mut [f32]) {
        for_vectors!(|i| in y.len(), {
            let v = L::load(vector(acc, i)).fma(L::splat(weight), T::load(vector(y, i)));
            acc[i..i + LANES].copy_from_slice(&v.array());
        }, |rest| {
            let v = L::load_some(&acc[i..]).fma(L::splat(weight), T::load_some(&y[i..]));
            acc[i..].copy_from_slice(&v.array()[..rest]);
        });
    }
}

/// See [`MoeCombine`].
pub(super) fn combine(
    op: &MoeCombine<Arg>,
    args: &mut Args<'_>,
    ctx: &Context,
) -> Result<(), String> {
    match op.y.desc.dtype() {
        DType::F32 => combine_as::<f32>(op, args, ctx),
        _ => combine_as::<bf16>(op, args, ctx),
    }
}

fn combine_as<T: Float>(
    op: &MoeCombine<Arg>,
    args: &mut Args<'_>,
    ctx: &Context,
) -> Result<(), String> {
    let y = args.read::<T>(&op.y);
    let counted = counted_rows(op.row_offsets.as_ref(), op.rows.desc.dim(0), args)?;
    let rows = args.read::<i32>(&op.rows);
    let weights = op.weights.as_ref().map(|w| args.read::<f32>(w));
    let base = op.base.as_ref().map(|b| args.read::<T>(b));
    let mut out = args.write::<T>(&op.out);
    let available = op.y.desc.dim(0);
    let mut acc = vec![0.0; op.y.desc.dim(1)];
    for t in 0..counted {
        acc.fill(0.0);
        for (j, &row) in rows.row(t).iter().enumerate() {
            let Ok(row) = usize::try_from(row) else { continue };
            if row >= available {
                return Err(format!("row {row} of token {t} is not one of {available}"));
            }
            let weight = weights.map_or(1.0, |weights| weights.row(t)[j]);
            add_scaled(ctx.isa, weight, y.row(row), &mut acc);
        }
        if let Some(base) = &base {
            add_scaled(ctx.isa, 1.0, base.row(t), &mut acc);
        }
        out.row(t).iter_mut().zip(&acc).for_each(|(to, &v)| *to = T::round(v));
    }
    Ok(())
}

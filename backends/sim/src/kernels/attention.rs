//! MLA in both forms.
//!
//! Per query and head: all scores, their maximum, exponentials and sum, then the weighted values,
//! each in ascending order of the keys; so a result does not depend on what else is in the batch
//! nor on how a prompt was cut.

use super::cache::{check_pages, check_starts};
use super::number::{Float, exp};
use super::simd::{Element, LANES, for_vectors, kernel, sum, vector};
use super::{Arg, Args, Context};
use hal::DType;
use hal::op::{MlaDecode, MlaPrefill};
use half::bf16;

/// Keys whose scores are formed together.
const KEYS: usize = 4;

/// How many keys ahead of those at hand are fetched.
const AHEAD: usize = 2 * KEYS;

/// Bytes that memory moves at once.
const CACHE_LINE: usize = 64;

/// Vectors of the output that are summed together.
const VECTORS: usize = 4;

kernel! {
    /// `(q · k) · scale` for each key; both in two parts, whose sums share their lanes.
    fn scores<L, T: Element>(q: [&[f32]; 2], keys: &[[&[T]; 2]], scale: f32, out: &mut [f32]) {
        let mut j = 0;
        while j < keys.len() {
            // The last keys are done one by one, in the same order of operations.
            let count = if j + KEYS <= keys.len() { KEYS } else { 1 };
            let mut acc = [L::splat(0.0); KEYS];
            for n in j + AHEAD..(j + AHEAD + count).min(keys.len()) {
                let mut i = 0;
                while i < keys[n][0].len() {
                    L::prefetch(&keys[n][0][i]);
                    i += CACHE_LINE / size_of::<T>();
                }
            }
            for part in 0..2 {
                let q = q[part];
                if count == KEYS {
                    let k = [keys[j][part], keys[j + 1][part], keys[j + 2][part], keys[j + 3][part]];
                    for_vectors!(|i| in q.len(), {
                        let qv = L::load(vector(q, i));
                        for n in 0..KEYS {
                            acc[n] = acc[n].fma(qv, T::load(vector(k[n], i)));
                        }
                    }, |_rest| {
                        let qv = L::load_some(&q[i..]);
                        for n in 0..KEYS {
                            acc[n] = acc[n].fma(qv, T::load_some(&k[n][i..]));
                        }
                    });
                } else {
                    let k = keys[j][part];
                    for_vectors!(|i| in q.len(), {
                        acc[0] = acc[0].fma(L::load(vector(q, i)), T::load(vector(k, i)));
                    }, |_rest| {
                        acc[0] = acc[0].fma(L::load_some(&q[i..]), T::load_some(&k[i..]));
                    });
                }
            }
            for n in 0..count {
                out[j + n] = acc[n].sum() * scale;
            }
            j += count;
        }
    }
}

kernel! {
    /// Turns scores into exponentials relative to their maximum, and returns their sum.
    fn softmax<_L>(scores: &mut [f32]) -> f32 {
        let mut lanes = [f32::NEG_INFINITY; LANES];
        for chunk in scores.chunks(LANES) {
            for (lane, &s) in lanes.iter_mut().zip(chunk) {
                *lane = if s > *lane { s } else { *lane };
            }
        }
        let max = lanes.iter().fold(f32::NEG_INFINITY, |a, &b| if b > a { b } else { a });
        let mut sums = [0.0f32; LANES];
        for chunk in scores.chunks_mut(LANES) {
            for (lane, s) in sums.iter_mut().zip(chunk) {
                *s = exp(*s - max);
                *lane += *s;
            }
        }
        sum(sums)
    }
}

kernel! {
    /// `out = (Σ_j weights[j] · values[j]) / total`, in ascending order of j.
    fn weighted_sum<L, T: Element>(weights: &[f32], values: &[&[T]], total: f32, out: &mut [f32]) {
        let width = out.len();
        let mut c = 0;
        while c < width {
            let wide = c + VECTORS * LANES <= width;
            if wide {
                let mut acc = [L::splat(0.0); VECTORS];
                for (j, row) in values.iter().enumerate() {
                    let weight = L::splat(weights[j]);
                    for v in 0..VECTORS {
                        acc[v] = acc[v].fma(weight, T::load(vector(row, c + v * LANES)));
                    }
                }
                for v in 0..VECTORS {
                    out[c + v * LANES..c + (v + 1) * LANES].copy_from_slice(&acc[v].array());
                }
                c += VECTORS * LANES;
            } else if c + LANES <= width {
                let mut acc = L::splat(0.0);
                for (j, row) in values.iter().enumerate() {
                    acc = acc.fma(L::splat(weights[j]), T::load(vector(row, c)));
                }
                out[c..c + LANES].copy_from_slice(&acc.array());
                c += LANES;
            } else {
                let mut acc = L::splat(0.0);
                for (j, row) in values.iter().enumerate() {
                    acc = acc.fma(L::splat(weights[j]), T::load_some(&row[c..width]));
                }
                out[c..].copy_from_slice(&acc.array()[..width - c]);
                c = width;
            }
        }
        for v in out.iter_mut() {
            *v /= total;
        }
    }
}

/// Attention of one query and head.
fn attend<T: Element>(
    ctx: &Context,
    q: [&[f32]; 2],
    keys: &[[&[T]; 2]],
    values: &[&[T]],
    scale: f32,
    out: &mut [f32],
) {
    let mut weights = vec![0.0; keys.len()];
    scores(ctx.isa, q, keys, scale, &mut weights);
    let total = softmax(ctx.isa, &mut weights);
    weighted_sum(ctx.isa, &weights, values, total, out);
}

/// Which sequence each query token belongs to, and how many keys it sees.
fn queries(q_starts: &[i32], keys: impl Fn(usize) -> usize) -> Result<Vec<(usize, usize)>, String> {
    let mut all = Vec::new();
    for (b, pair) in q_starts.windows(2).enumerate() {
        let (count, keys) = ((pair[1] - pair[0]) as usize, keys(b));
        if count > keys {
            return Err(format!("sequence {b} has {count} queries but {keys} keys"));
        }
        all.extend((0..count).map(|i| (b, keys - count + i + 1)));
    }
    Ok(all)
}

/// Writes `[T, h, d]` results, contiguous FP32, to the output.
fn store<T: Float>(results: &[f32], out: &Arg, args: &mut Args<'_>) {
    let (heads, width) = (out.desc.dim(1), out.desc.dim(2));
    let mut out = args.write::<T>(out);
    for (index, row) in results.chunks_exact(width.max(1)).enumerate() {
        let to = out.row2(index / heads, index % heads);
        to.iter_mut().zip(row).for_each(|(to, &v)| *to = T::round(v));
    }
}

fn widen<T: Element>(row: &[T]) -> Vec<f32> {
    row.iter().map(|&v| v.widen()).collect()
}

/// Work of the average query and head, for the decision about threads.
fn average(pairs: u64, tokens: usize, width: usize) -> usize {
    (pairs as usize / tokens.max(1)).max(1) * width
}

/// See [`MlaPrefill`].
pub(super) fn prefill(
    op: &MlaPrefill<Arg>,
    args: &mut Args<'_>,
    ctx: &Context,
) -> Result<(), String> {
    match op.q.desc.dtype() {
        DType::F32 => prefill_as::<f32>(op, args, ctx),
        _ => prefill_as::<bf16>(op, args, ctx),
    }
}

fn prefill_as<T: Float>(
    op: &MlaPrefill<Arg>,
    args: &mut Args<'_>,
    ctx: &Context,
) -> Result<(), String> {
    let (q, kv, k_rope) =
        (args.read::<T>(&op.q), args.read::<T>(&op.kv), args.read::<T>(&op.k_rope));
    let q_starts = args.read::<i32>(&op.q_starts).data;
    let kv_starts = args.read::<i32>(&op.kv_starts).data;
    check_starts("q_starts", q_starts, op.q.desc.dim(0))?;
    check_starts("kv_starts", kv_starts, op.kv.desc.dim(0))?;
    let queries = queries(q_starts, |b| (kv_starts[b + 1] - kv_starts[b]) as usize)?;
    let (heads, v) = (op.q.desc.dim(1), op.out.desc.dim(2));
    let nope = op.q.desc.dim(2) - op.k_rope.desc.dim(1);
    let mut results = vec![0.0; op.out.desc.elements()];
    let pairs: usize = queries.iter().map(|(_, keys)| keys).sum();
    let cost = average(pairs as u64, queries.len(), op.q.desc.dim(2) + v);
    super::for_each_chunk(ctx, &mut results, v, cost, |index, out| {
        let (t, h) = (index / heads, index % heads);
        let Some(&(b, keys)) = queries.get(t) else { return };
        let first = kv_starts[b] as usize;
        let query = widen(q.row2(t, h));
        let (q_nope, q_rope) = query.split_at(nope);
        let all = first..first + keys;
        let values: Vec<&[T]> = all.clone().map(|j| &kv.row2(j, h)[nope..]).collect();
        let keys: Vec<[&[T]; 2]> = all.map(|j| [&kv.row2(j, h)[..nope], k_rope.row(j)]).collect();
        attend(ctx, [q_nope, q_rope], &keys, &values, op.scale, out);
    });
    store::<T>(&results, &op.out, args);
    Ok(())
}

/// See [`MlaDecode`].
pub(super) fn decode(
    op: &MlaDecode<Arg>,
    args: &mut Args<'_>,
    ctx: &Context,
) -> Result<(), String> {
    match op.q_latent.desc.dtype() {
        DType::F32 => decode_as::<f32>(op, args, ctx),
        _ => decode_as::<bf16>(op, args, ctx),
    }
}

fn decode_as<T: Float>(
    op: &MlaDecode<Arg>,
    args: &mut Args<'_>,
    ctx: &Context,
) -> Result<(), String> {
    let (q_latent, q_rope) = (args.read::<T>(&op.q_latent), args.read::<T>(&op.q_rope));
    let cache = args.read::<T>(&op.cache).data;
    let table = args.read::<i32>(&op.block_table);
    let q_starts = args.read::<i32>(&op.q_starts).data;
    let kv_lens = args.read::<i32>(&op.kv_lens).data;
    check_starts("q_starts", q_starts, op.q_latent.desc.dim(0))?;
    let (page_size, width) = (op.cache.desc.dim(1), op.cache.desc.dim(2));
    for (b, &keys) in kv_lens.iter().enumerate() {
        let keys = usize::try_from(keys).map_err(|_| format!("sequence {b} has {keys} keys"))?;
        check_pages(table.row(b), keys, page_size, op.cache.desc.dim(0))?;
    }
    let queries = queries(q_starts, |b| kv_lens[b] as usize)?;
    let (heads, rank) = (op.q_latent.desc.dim(1), op.q_latent.desc.dim(2));
    let mut results = vec![0.0; op.out.desc.elements()];
    let pairs: usize = queries.iter().map(|(_, keys)| keys).sum();
    let cost = average(pairs as u64, queries.len(), width + rank);
    // Every head and query of a sequence reads the same rows.
    let rows: Vec<Vec<[&[T]; 2]>> = (0..kv_lens.len())
        .map(|b| {
            let pages = table.row(b).iter().map(|&page| page as usize * page_size * width);
            let slots = pages.flat_map(|at| cache[at..at + page_size * width].chunks_exact(width));
            slots.take(kv_lens[b] as usize).map(|row| row.split_at(rank).into()).collect()
        })
        .collect();
    let latents: Vec<Vec<&[T]>> =
        rows.iter().map(|rows| rows.iter().map(|row| row[0]).collect()).collect();
    super::for_each_chunk(ctx, &mut results, rank, cost, |index, out| {
        let (t, h) = (index / heads, index % heads);
        let Some(&(b, keys)) = queries.get(t) else { return };
        let (latent, rope) = (widen(q_latent.row2(t, h)), widen(q_rope.row2(t, h)));
        attend(ctx, [&latent, &rope], &rows[b][..keys], &latents[b][..keys], op.scale, out);
    });
    store::<T>(&results, &op.out, args);
    Ok(())
}

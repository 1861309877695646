//! MLA in both forms.
//!
//! Per query and head: all scores, their maximum, exponentials and sum, then the weighted values,
//! each in ascending order of the keys; so a result does not depend on what else is in the batch
//! nor on how a prompt was cut.

use super::cache::{check_pages, check_starts};
use super::number::{Float, exp};
use super::simd::{Element, LANES, for_vectors, kernel, sum, tail, vector};
use super::{Arg, Args, Context};
use half::bf16;
use hal::DType;
use hal::op::{MlaDecode, MlaPrefill};

/// Keys whose scores are formed together.
const KEYS: usize = 4;

kernel! {
    /// `(q · k) · scale` for some keys; both in two parts, whose sums share their lanes.
    fn scores<L, T: Element; const N>(
        q: [&[f32]; 2],
        k: [[&[T]; 2]; N],
        scale: f32,
    ) -> [f32; N] {
        let mut acc = [L::splat(0.0); N];
        for part in 0..2 {
            let q = q[part];
            for_vectors!(|i| in q.len(), {
                let qv = L::load(vector(q, i));
                for n in 0..N {
                    acc[n] = acc[n].fma(qv, T::load(vector(k[n][part], i)));
                }
            }, |_rest| {
                let qv = L::load(&tail(q, i));
                for n in 0..N {
                    acc[n] = acc[n].fma(qv, T::load(&tail(k[n][part], i)));
                }
            });
        }
        let mut out = [0.0; N];
        for n in 0..N {
            out[n] = sum(acc[n].array()) * scale;
        }
        out
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
    /// `out += Σ_n weights[n] · rows[n]`, in order.
    fn accumulate<L, T: Element; const N>(weights: [f32; N], rows: [&[T]; N], out: &mut [f32]) {
        for_vectors!(|i| in out.len(), {
            let mut acc = L::load(vector(out, i));
            for n in 0..N {
                acc = acc.fma(L::splat(weights[n]), T::load(vector(rows[n], i)));
            }
            out[i..i + LANES].copy_from_slice(&acc.array());
        }, |rest| {
            let mut acc = L::load(&tail(out, i));
            for n in 0..N {
                acc = acc.fma(L::splat(weights[n]), T::load(&tail(rows[n], i)));
            }
            out[i..].copy_from_slice(&acc.array()[..rest]);
        });
    }
}

/// Attention of one query and head over keys and values that `key` and `value` find.
fn attend<'k, T: Element>(
    ctx: &Context,
    q: [&[f32]; 2],
    keys: usize,
    scale: f32,
    key: impl Fn(usize) -> [&'k [T]; 2],
    value: impl Fn(usize) -> &'k [T],
    out: &mut [f32],
) {
    let mut weights = vec![0.0; keys];
    let whole = keys - keys % KEYS;
    for j in (0..whole).step_by(KEYS) {
        let k: [_; KEYS] = std::array::from_fn(|n| key(j + n));
        weights[j..j + KEYS].copy_from_slice(&scores(ctx.isa, q, k, scale));
    }
    for j in whole..keys {
        weights[j] = scores(ctx.isa, q, [key(j)], scale)[0];
    }
    let total = softmax(ctx.isa, &mut weights);
    out.fill(0.0);
    for j in (0..whole).step_by(KEYS) {
        let rows: [_; KEYS] = std::array::from_fn(|n| value(j + n));
        accumulate(ctx.isa, std::array::from_fn::<f32, KEYS, _>(|n| weights[j + n]), rows, out);
    }
    for j in whole..keys {
        accumulate(ctx.isa, [weights[j]], [value(j)], out);
    }
    out.iter_mut().for_each(|v| *v /= total);
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
pub(super) fn prefill(op: &MlaPrefill<Arg>, args: &mut Args<'_>, ctx: &Context) -> Result<(), String> {
    match op.q.desc.dtype() {
        DType::F32 => prefill_as::<f32>(op, args, ctx),
        _ => prefill_as::<bf16>(op, args, ctx),
    }
}

fn prefill_as<T: Float>(op: &MlaPrefill<Arg>, args: &mut Args<'_>, ctx: &Context) -> Result<(), String> {
    let (q, kv, k_rope) = (args.read::<T>(&op.q), args.read::<T>(&op.kv), args.read::<T>(&op.k_rope));
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
        let key = |j: usize| [&kv.row2(first + j, h)[..nope], k_rope.row(first + j)];
        let value = |j: usize| &kv.row2(first + j, h)[nope..];
        attend(ctx, [q_nope, q_rope], keys, op.scale, key, value, out);
    });
    store::<T>(&results, &op.out, args);
    Ok(())
}

/// See [`MlaDecode`].
pub(super) fn decode(op: &MlaDecode<Arg>, args: &mut Args<'_>, ctx: &Context) -> Result<(), String> {
    match op.q_latent.desc.dtype() {
        DType::F32 => decode_as::<f32>(op, args, ctx),
        _ => decode_as::<bf16>(op, args, ctx),
    }
}

fn decode_as<T: Float>(op: &MlaDecode<Arg>, args: &mut Args<'_>, ctx: &Context) -> Result<(), String> {
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
    super::for_each_chunk(ctx, &mut results, rank, cost, |index, out| {
        let (t, h) = (index / heads, index % heads);
        let Some(&(b, keys)) = queries.get(t) else { return };
        let pages = table.row(b);
        let row = |j: usize| {
            let slot = pages[j / page_size] as usize * page_size + j % page_size;
            &cache[slot * width..(slot + 1) * width]
        };
        let (latent, rope) = (widen(q_latent.row2(t, h)), widen(q_rope.row2(t, h)));
        let key = |j: usize| {
            let (latent, rope) = row(j).split_at(rank);
            [latent, rope]
        };
        attend(ctx, [&latent, &rope], keys, op.scale, key, |j| &row(j)[..rank], out);
    });
    store::<T>(&results, &op.out, args);
    Ok(())
}

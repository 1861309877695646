//! MLA in both forms.
//!
//! Per query and head: all scores, their maximum, exponentials and sum, then the weighted values,
//! each in ascending order of the keys; so a result does not depend on what else is in the batch
//! nor on how a prompt was cut.

use super::cache::{check_pages, check_starts};
use super::number::{Float, exp};
use super::scratch::Scratch;
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

/// Equally long rows at equal distances.
#[derive(Clone, Copy)]
pub(super) struct Rows<'a, T> {
    /// From the first row on.
    data: &'a [T],
    stride: usize,
    width: usize,
}

impl<'a, T> Rows<'a, T> {
    #[inline(always)]
    fn row(&self, j: usize) -> &'a [T] {
        &self.data[j * self.stride..][..self.width]
    }
}

/// Keys that follow each other in memory: all of a prompt, or those in one page of the cache.
#[derive(Clone, Copy)]
struct Run<'a, T> {
    count: usize,
    /// Both parts of the keys, as those of queries.
    keys: [Rows<'a, T>; 2],
    values: Rows<'a, T>,
}

kernel! {
    /// `(q · k) · scale` for each key, as many as `out` holds; both in two parts, whose sums share
    /// their lanes.
    fn scores<L, T: Element>(q: [&[f32]; 2], keys: [Rows<'_, T>; 2], scale: f32, out: &mut [f32]) {
        let mut j = 0;
        while j < out.len() {
            // The last keys are done one by one, in the same order of operations.
            let count = if j + KEYS <= out.len() { KEYS } else { 1 };
            let mut acc = [L::splat(0.0); KEYS];
            for n in j + AHEAD..(j + AHEAD + count).min(out.len()) {
                let (row, mut i) = (keys[0].row(n), 0);
                while i < row.len() {
                    L::prefetch(&row[i]);
                    i += CACHE_LINE / size_of::<T>();
                }
            }
            for part in 0..2 {
                let (q, keys) = (q[part], keys[part]);
                if count == KEYS {
                    let k = [keys.row(j), keys.row(j + 1), keys.row(j + 2), keys.row(j + 3)];
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
                    let k = keys.row(j);
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
    /// `out += Σ_j weights[j] · values[j]`, in ascending order of j.
    fn weighted_sum<L, T: Element>(weights: &[f32], values: Rows<'_, T>, out: &mut [f32]) {
        let width = out.len();
        let mut c = 0;
        while c < width {
            let wide = c + VECTORS * LANES <= width;
            if wide {
                let mut acc = [L::splat(0.0); VECTORS];
                for v in 0..VECTORS {
                    acc[v] = L::load(vector(out, c + v * LANES));
                }
                for j in 0..weights.len() {
                    let (weight, row) = (L::splat(weights[j]), values.row(j));
                    for v in 0..VECTORS {
                        acc[v] = acc[v].fma(weight, T::load(vector(row, c + v * LANES)));
                    }
                }
                for v in 0..VECTORS {
                    out[c + v * LANES..c + (v + 1) * LANES].copy_from_slice(&acc[v].array());
                }
                c += VECTORS * LANES;
            } else {
                let end = width.min(c + LANES);
                let mut acc = L::load_some(&out[c..end]);
                for j in 0..weights.len() {
                    acc = acc.fma(L::splat(weights[j]), T::load_some(&values.row(j)[c..end]));
                }
                out[c..end].copy_from_slice(&acc.array()[..end - c]);
                c = end;
            }
        }
    }
}

/// Attention of one query and head to so many keys.
fn attend<'a, T: Element>(
    ctx: &Context,
    q: [&[f32]; 2],
    runs: impl Iterator<Item = Run<'a, T>> + Clone,
    keys: usize,
    scale: f32,
    out: &mut [f32],
) {
    let mut weights = Scratch::any(keys);
    let mut rest = &mut weights[..];
    for run in runs.clone() {
        let (these, later) = rest.split_at_mut(run.count);
        scores(ctx.isa, q, run.keys, scale, these);
        rest = later;
    }
    let total = softmax(ctx.isa, &mut weights);
    out.fill(0.0);
    let mut rest = &weights[..];
    for run in runs {
        let (these, later) = rest.split_at(run.count);
        weighted_sum(ctx.isa, these, run.values, out);
        rest = later;
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

fn widen<T: Element>(row: &[T]) -> Scratch {
    let mut values = Scratch::empty();
    values.extend(row.iter().map(|&v| v.widen()));
    values
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
    let rope = op.k_rope.desc.dim(1);
    let nope = op.q.desc.dim(2) - rope;
    let mut results = Scratch::zeros(op.out.desc.elements());
    let pairs: usize = queries.iter().map(|(_, keys)| keys).sum();
    let cost = average(pairs as u64, queries.len(), op.q.desc.dim(2) + v);
    super::for_each_chunk(ctx, &mut results, v, cost, |index, out| {
        let (t, h) = (index / heads, index % heads);
        let Some(&(b, keys)) = queries.get(t) else { return };
        let first = kv_starts[b] as usize;
        let query = widen(q.row2(t, h));
        let (q_nope, q_rope) = query.split_at(nope);
        let rows = |data, stride, width| Rows { data, stride, width };
        let at = first * kv.desc.stride(0) + h * kv.desc.stride(1);
        let stride = kv.desc.stride(0);
        let run = Run {
            count: keys,
            keys: [
                rows(&kv.data[at..], stride, nope),
                rows(&k_rope.data[first * k_rope.desc.stride(0)..], k_rope.desc.stride(0), rope),
            ],
            values: rows(&kv.data[at + nope..], stride, v),
        };
        attend(ctx, [q_nope, q_rope], std::iter::once(run), keys, op.scale, out);
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
    let mut results = Scratch::zeros(op.out.desc.elements());
    let pairs: usize = queries.iter().map(|(_, keys)| keys).sum();
    let cost = average(pairs as u64, queries.len(), width + rank);
    // The first keys of a sequence, page by page.
    let runs = |b: usize, keys: usize| {
        let pages = table.row(b).iter().take(keys.div_ceil(page_size));
        pages.enumerate().map(move |(number, &page)| {
            let data = &cache[page as usize * page_size * width..][..page_size * width];
            let latent = Rows { data, stride: width, width: rank };
            let rope = Rows { data: &data[rank..], stride: width, width: width - rank };
            let count = page_size.min(keys - number * page_size);
            Run { count, keys: [latent, rope], values: latent }
        })
    };
    super::for_each_chunk(ctx, &mut results, rank, cost, |index, out| {
        let (t, h) = (index / heads, index % heads);
        let Some(&(b, keys)) = queries.get(t) else { return };
        let (latent, rope) = (widen(q_latent.row2(t, h)), widen(q_rope.row2(t, h)));
        attend(ctx, [&latent, &rope], runs(b, keys), keys, op.scale, out);
    });
    store::<T>(&results, &op.out, args);
    Ok(())
}

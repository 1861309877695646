//! Every op in plain f64, written from its documentation and from nothing else: no lanes, no tiles,
//! no care for speed.

use super::cases::tensor;
use super::host::HostTensor;
use hal::op::{
    BlockGrid, FP8_BLOCK, MoeDispatch, Quantize, RmsNorm, RmsNormQuantize, ScaleFormat, SwiGlu,
    SwiGluQuantize,
};
use hal::{DType, Op, TensorDesc};
use half::bf16;
use std::sync::LazyLock;

/// A tensor's values, contiguous.
#[derive(Clone, Debug)]
pub struct Values {
    /// The values, in order.
    pub v: Vec<f64>,
    /// Their shape; its strides are those of the view that was read.
    pub d: TensorDesc,
}

/// Where element number `flat` of a strided tensor lies.
fn place(d: &TensorDesc, mut flat: usize) -> usize {
    let mut at = 0;
    for axis in (0..d.rank()).rev() {
        at += (flat % d.dim(axis)) * d.stride(axis);
        flat /= d.dim(axis);
    }
    at
}

/// FP8 by the definition of the format.
pub fn e4m3(byte: u8) -> f64 {
    let (exponent, mantissa) = (i32::from(byte >> 3 & 15), f64::from(byte & 7));
    let magnitude = match (exponent, byte & 7) {
        (15, 7) => f64::NAN,
        (0, _) => mantissa / 8.0 * 2f64.powi(-6),
        _ => (1.0 + mantissa / 8.0) * 2f64.powi(exponent - 7),
    };
    if byte & 0x80 == 0 { magnitude } else { -magnitude }
}

/// The nearest FP8 value, ties to the even byte.
pub fn nearest_e4m3(x: f64) -> u8 {
    static VALUES: LazyLock<[f64; 0x7f]> =
        LazyLock::new(|| std::array::from_fn(|byte| e4m3(byte as u8)));
    let distance = |byte: &u8| (VALUES[usize::from(*byte)] - x.abs().min(448.0)).abs();
    let order = |a: &u8, b: &u8| distance(a).total_cmp(&distance(b)).then((a & 1).cmp(&(b & 1)));
    // The values ascend: only the two around `x` can be nearest.
    let above = VALUES.partition_point(|v| *v < x.abs().min(448.0)).min(0x7e) as u8;
    let best = (above.saturating_sub(1)..=above).min_by(order).unwrap_or(0);
    if x < 0.0 { best | 0x80 } else { best }
}

/// Reads a tensor.
pub fn get(t: &HostTensor) -> Values {
    decode(&t.desc, &t.view_bytes())
}

/// The values of a view, whose bytes begin at its first element.
pub fn decode(d: &TensorDesc, bytes: &[u8]) -> Values {
    let d = *d;
    let size = d.dtype().size();
    let one = |i: usize| {
        let b = &bytes[place(&d, i) * size..][..size];
        match d.dtype() {
            DType::F32 => f64::from(f32::from_le_bytes(b.try_into().unwrap())),
            DType::Bf16 => bf16::from_le_bytes(b.try_into().unwrap()).to_f64(),
            DType::I32 => f64::from(i32::from_le_bytes(b.try_into().unwrap())),
            _ => e4m3(b[0]),
        }
    };
    Values { v: (0..d.elements()).map(one).collect(), d }
}

impl Values {
    fn row(&self, r: usize) -> &[f64] {
        let width = self.d.last_dim();
        &self.v[r * width..(r + 1) * width]
    }
}

/// How many of `all` rows count.
fn counted(row_offsets: &Option<HostTensor>, all: usize) -> usize {
    row_offsets.as_ref().map_or(all, |offsets| get(offsets).v.last().map_or(0, |&n| n as usize))
}

/// These rows, and what is left alone up to the size of the tensor.
fn padded(mut rows: Vec<f64>, to: &HostTensor) -> Vec<f64> {
    rows.resize(to.desc.elements(), f64::NAN);
    rows
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

/// A row of activations times a row of weights, with the scales of each group of columns.
fn product(x: &[f64], w: &[f64], scales: Option<(&[f64], &[f64])>, grid: BlockGrid) -> f64 {
    let Some((xs, ws)) = scales else { return dot(x, w) };
    let group = |g: usize| {
        let range = grid.group_columns(g, x.len());
        dot(&x[range.clone()], &w[range]) * xs[g] * ws[g]
    };
    (0..xs.len()).map(group).sum()
}

fn softmax(scores: &[f64]) -> Vec<f64> {
    let max = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let e: Vec<f64> = scores.iter().map(|s| (s - max).exp()).collect();
    let total: f64 = e.iter().sum();
    e.iter().map(|e| e / total).collect()
}

fn sigmoid(x: f64) -> f64 {
    1.0 / (1.0 + (-x).exp())
}

/// Numbers of `values` from the largest down, ties by number.
fn descending(values: &[f64]) -> Vec<usize> {
    let mut order: Vec<usize> = (0..values.len()).collect();
    order.sort_by(|&a, &b| values[b].total_cmp(&values[a]));
    order
}

/// One destination after the other, each token in turn.
fn dispatch(o: &MoeDispatch<HostTensor>) -> Vec<Vec<f64>> {
    let (x, chosen, weights) = (get(&o.x), get(&o.experts), get(&o.weights));
    let (tokens, k) = (counted(&o.row_offsets, chosen.d.dim(0)), chosen.d.dim(1));
    let replicas = o.replicas.as_ref().map(get);
    let physical = |t: usize, expert: f64| match &replicas {
        Some(replicas) if expert >= 0.0 => {
            let present: Vec<f64> =
                replicas.row(expert as usize).iter().copied().filter(|&r| r >= 0.0).collect();
            present[(t + o.replica_offset as usize) % present.len()]
        }
        _ => expert,
    };
    let each = f64::from(o.experts_per_destination);
    let (mut offsets, mut rows) = (vec![0.0], vec![-1.0; chosen.v.len()]);
    let (mut sources, mut experts) = (Vec::new(), Vec::new());
    for d in 0..o.offsets.desc.dim(0) - 1 {
        let first = d as f64 * each;
        for t in 0..tokens {
            let there: Vec<f64> = chosen.row(t).iter().map(|&e| physical(t, e) - first).collect();
            let lives = |e: &f64| (0.0..each).contains(e);
            if let Some(j) = there.iter().position(lives) {
                rows[t * k + j] = sources.len() as f64;
                sources.push(t);
                experts.extend(there.iter().map(|e| if lives(e) { *e } else { -1.0 }));
            }
        }
        offsets.push(sources.len() as f64);
    }
    let gather = |from: &Values, to: &HostTensor| {
        padded(sources.iter().flat_map(|&t| from.row(t).to_vec()).collect(), to)
    };
    let mut out = vec![gather(&x, &o.out)];
    if let (Some(from), Some(to)) = (&o.x_scales, &o.out_scales) {
        out.push(gather(&get(from), to));
    }
    let weights = gather(&weights, &o.out_weights);
    out.extend([padded(experts, &o.out_experts), weights, offsets, rows]);
    out
}

/// The values that an op writes, in the order of its written operands. Rows that an op leaves
/// alone are NaN.
pub fn run(op: &Op<HostTensor>) -> Vec<Vec<f64>> {
    match op {
        Op::GatherRows(o) => {
            let (table, rows) = (get(&o.table), get(&o.rows));
            let h = table.d.dim(1);
            let row = |&r: &f64| match (r as usize).checked_sub(o.first_row as usize) {
                Some(local) if local < table.d.dim(0) => table.row(local).to_vec(),
                _ => vec![0.0; h],
            };
            vec![rows.v.iter().flat_map(row).collect()]
        }
        Op::RmsNorm(o) => {
            let (mut x, weight) = (get(&o.x), get(&o.weight));
            let mut out = Vec::new();
            if let Some(residual) = &o.residual {
                let round = |v: f64| match residual.desc.dtype() {
                    DType::Bf16 => bf16::from_f64(v).to_f64(),
                    _ => f64::from(v as f32),
                };
                x.v = get(residual).v.iter().zip(&x.v).map(|(r, x)| round(r + x)).collect();
                out.push(x.v.clone());
            }
            let h = weight.v.len();
            let normed = x.v.chunks(h).flat_map(|row| {
                let factor = 1.0 / (dot(row, row) / h as f64 + f64::from(o.eps)).sqrt();
                row.iter().zip(&weight.v).map(move |(x, w)| x * factor * w)
            });
            out.push(normed.collect());
            out
        }
        Op::Quantize(o) => {
            let x = get(&o.x);
            let grid = BlockGrid { column_offset: o.column_offset, ..BlockGrid::default() };
            let columns = x.d.dim(1);
            let (mut q, mut scales) = (Vec::new(), Vec::new());
            for row in x.v.chunks(columns).take(counted(&o.row_offsets, x.d.dim(0))) {
                for group in 0..grid.scale_columns(columns) {
                    let part = &row[grid.group_columns(group, columns)];
                    let amax = part.iter().fold(1e-4f32, |m, v| m.max(v.abs() as f32));
                    let scale = match o.scale_format {
                        ScaleFormat::Float => amax / 448.0,
                        ScaleFormat::PowerOfTwo => (amax / 448.0).log2().ceil().exp2(),
                    };
                    scales.push(f64::from(scale));
                    q.extend(part.iter().map(|v| e4m3(nearest_e4m3(f64::from(*v as f32 / scale)))));
                }
            }
            vec![padded(q, &o.q), padded(scales, &o.scales)]
        }
        Op::RmsNormQuantize(o) => {
            let x = o.x.clone();
            let (dtype, shape) = (x.desc.dtype(), [x.desc.dim(0), x.desc.dim(1)]);
            let out = tensor(dtype, &shape, |_| 0.0);
            let (weight, residual, eps) = (o.weight.clone(), o.residual.clone(), o.eps);
            let mut results = run(&RmsNorm { x, weight, residual, out, eps }.into());
            let normed = results.last().map_or(&[][..], |v| v);
            let x = tensor(dtype, &shape, |i| normed[i]);
            if o.out.is_none() {
                results.pop();
            }
            let (q, scales) = (o.q.clone(), o.scales.clone());
            let RmsNormQuantize { column_offset, scale_format, .. } = *o;
            let (row_offsets, expected_rows) = (None, 0);
            let quantize =
                Quantize { x, row_offsets, q, scales, column_offset, scale_format, expected_rows };
            results.extend(run(&quantize.into()));
            results
        }
        Op::SwiGluQuantize(o) => {
            let x = o.x.clone();
            let (dtype, shape) = (x.desc.dtype(), [x.desc.dim(0), x.desc.dim(1) / 2]);
            let out = tensor(dtype, &shape, |_| 0.0);
            let SwiGluQuantize { column_offset, scale_format, expected_rows, .. } = *o;
            let row_offsets = o.row_offsets.clone();
            let gated = run(&SwiGlu { x, out, row_offsets, expected_rows }.into());
            let x = tensor(dtype, &shape, |i| gated[0][i]);
            let (q, scales, row_offsets) = (o.q.clone(), o.scales.clone(), o.row_offsets.clone());
            let quantize =
                Quantize { x, row_offsets, q, scales, column_offset, scale_format, expected_rows };
            run(&quantize.into())
        }
        Op::Dequantize(o) => {
            let (w, scales) = (get(&o.w), get(&o.w_scales));
            let (rows, columns) = (w.d.dim(w.d.rank() - 2), w.d.last_dim());
            let (r, c) = (o.grid.scale_rows(rows), o.grid.scale_columns(columns));
            let one = |(i, v): (usize, &f64)| {
                let (expert, row, column) = (i / (rows * columns), i / columns % rows, i % columns);
                let block = (column + o.grid.column_offset as usize) / FP8_BLOCK;
                v * scales.v[(expert * r + o.grid.scale_row(row, rows)) * c + block]
            };
            vec![w.v.iter().enumerate().map(one).collect()]
        }
        Op::Linear(o) => {
            let (x, w) = (get(&o.x), get(&o.w));
            let scales = o.x_scales.as_ref().map(get).zip(o.w_scales.as_ref().map(get));
            let rows = w.d.dim(0);
            let mut out = Vec::new();
            for t in 0..x.d.dim(0) {
                for n in 0..rows {
                    let scales = scales.as_ref();
                    let scales = scales.map(|(x, w)| (x.row(t), w.row(o.grid.scale_row(n, rows))));
                    out.push(product(x.row(t), w.row(n), scales, o.grid));
                }
            }
            vec![out]
        }
        Op::GroupedLinear(o) => {
            let (x, w, offsets) = (get(&o.x), get(&o.w), get(&o.offsets));
            let scales = o.x_scales.as_ref().map(get).zip(o.w_scales.as_ref().map(get));
            let (experts, rows) = (w.d.dim(0), w.d.dim(1));
            let mut out = vec![f64::NAN; o.out.desc.elements()];
            for e in 0..experts {
                for t in offsets.v[e] as usize..offsets.v[e + 1] as usize {
                    for n in 0..rows {
                        let row = e * o.grid.scale_rows(rows) + o.grid.scale_row(n, rows);
                        let scales = scales.as_ref().map(|(x, w)| (x.row(t), w.row(row)));
                        out[t * rows + n] = product(x.row(t), w.row(e * rows + n), scales, o.grid);
                    }
                }
            }
            vec![out]
        }
        Op::BatchedLinear(o) => {
            let (x, w) = (get(&o.x), get(&o.w));
            let (heads, k, n) = (x.d.dim(1), x.d.dim(2), o.out.desc.dim(2));
            let mut out = Vec::new();
            for row in 0..x.d.dim(0) * heads {
                let head = row % heads;
                let weight = |i: usize, j: usize| match o.k_major {
                    true => w.v[(head * k + j) * n + i],
                    false => w.v[(head * n + i) * k + j],
                };
                let sums =
                    (0..n).map(|i| (0..k).map(|j| x.row(row)[j] * weight(i, j)).sum::<f64>());
                out.extend(sums);
            }
            vec![out]
        }
        Op::Rope(o) => {
            let (mut x, positions, table) = (get(&o.x), get(&o.positions), get(&o.table));
            let (heads, d) = (x.d.dim(1), x.d.dim(2));
            for (i, pair) in x.v.chunks_mut(2).enumerate() {
                let (token, j) = (i / (d / 2) / heads, i % (d / 2));
                let row = table.row(positions.v[token] as usize);
                let (cos, sin, a, b) = (row[j], row[d / 2 + j], pair[0], pair[1]);
                pair.copy_from_slice(&[a * cos - b * sin, a * sin + b * cos]);
            }
            vec![x.v]
        }
        Op::CacheWrite(o) => {
            let (latent, k_rope, slots) = (get(&o.latent), get(&o.k_rope), get(&o.slots));
            let mut cache = get(&o.cache);
            let width = cache.d.last_dim();
            for (t, &slot) in slots.v.iter().enumerate().filter(|(_, s)| **s >= 0.0) {
                let row = [latent.row(t), k_rope.row(t)].concat();
                cache.v[slot as usize * width..][..width].copy_from_slice(&row);
            }
            vec![cache.v]
        }
        Op::CacheRead(o) => {
            let (cache, table, starts) = (get(&o.cache), get(&o.block_table), get(&o.kv_starts));
            let page_size = cache.d.dim(1);
            let mut out = Vec::new();
            for (b, pair) in starts.v.windows(2).enumerate() {
                for i in 0..(pair[1] - pair[0]) as usize {
                    let page = table.row(b)[i / page_size] as usize;
                    out.extend_from_slice(cache.row(page * page_size + i % page_size));
                }
            }
            vec![out]
        }
        Op::MlaPrefill(o) => {
            let (q, kv, k_rope) = (get(&o.q), get(&o.kv), get(&o.k_rope));
            let (q_starts, kv_starts) = (get(&o.q_starts), get(&o.kv_starts));
            let (heads, v) = (q.d.dim(1), o.out.desc.dim(2));
            let nope = q.d.dim(2) - k_rope.d.dim(1);
            let mut out = vec![0.0; o.out.desc.elements()];
            for b in 0..q_starts.v.len() - 1 {
                let [q0, q1] = [b, b + 1].map(|i| q_starts.v[i] as usize);
                let [k0, k1] = [b, b + 1].map(|i| kv_starts.v[i] as usize);
                for t in q0..q1 {
                    let visible = k0..k1 - (q1 - t - 1);
                    for h in 0..heads {
                        let (query_nope, query_rope) = q.row(t * heads + h).split_at(nope);
                        let score = |j: usize| {
                            let key = &kv.row(j * heads + h)[..nope];
                            (dot(query_nope, key) + dot(query_rope, k_rope.row(j)))
                                * f64::from(o.scale)
                        };
                        let weights = softmax(&visible.clone().map(score).collect::<Vec<_>>());
                        for (j, weight) in visible.clone().zip(weights) {
                            for c in 0..v {
                                out[(t * heads + h) * v + c] +=
                                    weight * kv.row(j * heads + h)[nope + c];
                            }
                        }
                    }
                }
            }
            vec![out]
        }
        Op::MlaDecode(o) => {
            let (q_latent, q_rope, cache) = (get(&o.q_latent), get(&o.q_rope), get(&o.cache));
            let (table, starts, lens) = (get(&o.block_table), get(&o.q_starts), get(&o.kv_lens));
            let (heads, rank, page_size) = (q_latent.d.dim(1), q_latent.d.dim(2), cache.d.dim(1));
            let mut out = vec![0.0; o.out.desc.elements()];
            for (b, pair) in starts.v.windows(2).enumerate() {
                for t in pair[0] as usize..pair[1] as usize {
                    let visible = lens.v[b] as usize - (pair[1] as usize - t - 1);
                    let row = |j: usize| {
                        cache.row(table.row(b)[j / page_size] as usize * page_size + j % page_size)
                    };
                    for h in 0..heads {
                        let query =
                            [q_latent.row(t * heads + h), q_rope.row(t * heads + h)].concat();
                        let score = |j| dot(&query, row(j)) * f64::from(o.scale);
                        let weights = softmax(&(0..visible).map(score).collect::<Vec<_>>());
                        for (j, weight) in weights.iter().enumerate() {
                            for c in 0..rank {
                                out[(t * heads + h) * rank + c] += weight * row(j)[c];
                            }
                        }
                    }
                }
            }
            vec![out]
        }
        Op::SwiGlu(o) => {
            let x = get(&o.x);
            let inner = x.d.dim(1) / 2;
            let rows = x.v.chunks(2 * inner).take(counted(&o.row_offsets, x.d.dim(0)));
            let gated = |row: &[f64], i: usize| row[i] * sigmoid(row[i]) * row[inner + i];
            let out = rows.flat_map(|row| (0..inner).map(|i| gated(row, i)).collect::<Vec<_>>());
            vec![padded(out.collect(), &o.out)]
        }
        Op::MoeDispatch(o) => dispatch(o),
        Op::Gate(o) => {
            let logits = get(&o.logits);
            let (experts, k) = (logits.d.dim(1), o.experts.desc.dim(1));
            let bias = o.bias.as_ref().map_or(vec![0.0; experts], |b| get(b).v);
            let per_group = experts / o.groups as usize;
            let (mut ids, mut weights) = (Vec::new(), Vec::new());
            for row in logits.v.chunks(experts) {
                let scores: Vec<f64> = row.iter().map(|&l| sigmoid(l)).collect();
                let mut biased: Vec<f64> = scores.iter().zip(&bias).map(|(s, b)| s + b).collect();
                let group_scores: Vec<f64> = biased
                    .chunks(per_group)
                    .map(|g| descending(g).iter().take(2).map(|&i| g[i]).sum())
                    .collect();
                let kept = &descending(&group_scores)[..o.groups_kept as usize];
                for (e, score) in biased.iter_mut().enumerate() {
                    if !kept.contains(&(e / per_group)) {
                        *score = f64::NEG_INFINITY;
                    }
                }
                let chosen = &descending(&biased)[..k];
                let total: f64 = chosen.iter().map(|&e| scores[e]).sum();
                let divisor = if o.normalize { total + 1e-20 } else { 1.0 };
                ids.extend(chosen.iter().map(|&e| e as f64));
                weights.extend(chosen.iter().map(|&e| scores[e] / divisor * f64::from(o.scale)));
            }
            vec![ids, weights]
        }
        Op::MoePermute(o) => {
            let (x, chosen) = (get(&o.x), get(&o.experts));
            let (local, k) = (o.offsets.desc.dim(0) - 1, chosen.d.dim(1));
            let (mut offsets, mut rows) = (vec![0.0], vec![-1.0; chosen.v.len()]);
            let mut copies = Vec::new();
            let tokens = counted(&o.row_offsets, chosen.d.dim(0));
            for e in 0..local {
                for (copy, &expert) in chosen.v.iter().take(tokens * k).enumerate() {
                    if expert == (o.first_expert as usize + e) as f64 {
                        rows[copy] = copies.len() as f64;
                        copies.push(copy / k);
                    }
                }
                offsets.push(copies.len() as f64);
            }
            let gather = |from: &Values, to: &HostTensor| {
                padded(copies.iter().flat_map(|&t| from.row(t).to_vec()).collect(), to)
            };
            let mut out = vec![gather(&x, &o.out)];
            if let (Some(from), Some(to)) = (&o.x_scales, &o.out_scales) {
                out.push(gather(&get(from), to));
            }
            out.extend([offsets, rows]);
            out
        }
        Op::MoeCombine(o) => {
            let (y, rows, weights) = (get(&o.y), get(&o.rows), o.weights.as_ref().map(get));
            let base = o.base.as_ref().map(get);
            let mut out = Vec::new();
            for t in 0..counted(&o.row_offsets, rows.d.dim(0)) {
                let mut row = base.as_ref().map_or(vec![0.0; y.d.dim(1)], |b| b.row(t).to_vec());
                for (j, &from) in rows.row(t).iter().enumerate() {
                    let weight = weights.as_ref().map_or(1.0, |weights| weights.row(t)[j]);
                    if from >= 0.0 {
                        row.iter_mut()
                            .zip(y.row(from as usize))
                            .for_each(|(r, y)| *r += weight * y);
                    }
                }
                out.extend(row);
            }
            vec![padded(out, &o.out)]
        }
        Op::Add(o) => {
            let (a, b) = (get(&o.a), get(&o.b));
            vec![a.v.iter().zip(&b.v).map(|(a, b)| a + b).collect()]
        }
        Op::Cast(o) => vec![get(&o.x).v],
        Op::Copy(o) => vec![get(&o.x).v],
        Op::ArgMax(o) => {
            let x = get(&o.x);
            let best = |row: &[f64]| descending(&row[..o.limit as usize])[0] as f64;
            vec![x.v.chunks(x.d.dim(1)).map(best).collect()]
        }
        Op::TopK(o) => {
            let (x, k) = (get(&o.x), o.values.desc.dim(1));
            let (mut values, mut ids) = (Vec::new(), Vec::new());
            for row in x.v.chunks(x.d.dim(1)) {
                for &i in &descending(&row[..o.limit as usize])[..k] {
                    values.push(row[i]);
                    ids.push(i as f64);
                }
            }
            vec![values, ids]
        }
        other => panic!("{} has no reference", other.kind().name()),
    }
}

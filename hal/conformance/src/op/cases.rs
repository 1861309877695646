//! Ops with operands: small and odd shapes, every dtype, strided views.

use super::host::{HostMemory, HostTensor};
use super::reference;
use hal::op::*;
use hal::{DType, Op, TensorDesc};
use half::bf16;
use std::collections::HashMap;
use std::sync::{Arc, LazyLock};

/// SplitMix64.
#[derive(Clone, Debug)]
pub struct Rng(pub u64);

impl Rng {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// From 0 to 1.
    pub fn unit(&mut self) -> f64 {
        (self.next() >> 11) as f64 / (1u64 << 53) as f64
    }

    /// About normal.
    pub fn normal(&mut self) -> f64 {
        (0..12).map(|_| self.unit()).sum::<f64>() - 6.0
    }

    fn below(&mut self, n: usize) -> usize {
        (self.next() % n as u64) as usize
    }
}

fn encode(dtype: DType, value: f64, out: &mut Vec<u8>) {
    match dtype {
        DType::F32 => out.extend_from_slice(&(value as f32).to_le_bytes()),
        DType::Bf16 => out.extend_from_slice(&bf16::from_f64(value).to_le_bytes()),
        DType::I32 => out.extend_from_slice(&(value as i32).to_le_bytes()),
        _ => out.push(reference::nearest_e4m3(value)),
    }
}

/// A contiguous tensor with these values.
pub fn tensor(dtype: DType, shape: &[usize], mut value: impl FnMut(usize) -> f64) -> HostTensor {
    let desc = TensorDesc::new(dtype, shape);
    let mut bytes = Vec::with_capacity(desc.elements() * dtype.size());
    (0..desc.elements()).for_each(|i| encode(dtype, value(i), &mut bytes));
    HostTensor { memory: Arc::new(HostMemory::new(bytes)), offset: 0, desc }
}

/// A contiguous tensor whose values come from random numbers, when somebody looks at them.
fn lazy(dtype: DType, shape: &[usize], seed: u64, value: fn(&mut Rng) -> f64) -> HostTensor {
    let desc = TensorDesc::new(dtype, shape);
    let make = move || {
        let mut rng = Rng(seed);
        let mut bytes = Vec::with_capacity(desc.elements() * dtype.size());
        (0..desc.elements()).for_each(|_| encode(dtype, value(&mut rng), &mut bytes));
        bytes
    };
    HostTensor { memory: Arc::new(HostMemory::lazy(make)), offset: 0, desc }
}

/// A vector of integers.
pub fn ints(values: &[i32]) -> HostTensor {
    tensor(DType::I32, &[values.len()], |i| f64::from(values[i]))
}

pub(super) fn matrix(values: HostTensor, shape: &[usize]) -> HostTensor {
    HostTensor { desc: TensorDesc::new(values.desc.dtype(), shape), ..values }
}

pub(super) fn columns(t: HostTensor, start: usize, len: usize) -> HostTensor {
    let (offset, desc) = t.desc.columns(start, len);
    HostTensor { offset, desc, ..t }
}

struct Maker {
    rng: Rng,
    dtype: DType,
}

impl Maker {
    fn random(&mut self, shape: &[usize]) -> HostTensor {
        self.random_of(self.dtype, shape)
    }

    fn random_of(&mut self, dtype: DType, shape: &[usize]) -> HostTensor {
        lazy(dtype, shape, self.rng.next(), Rng::normal)
    }

    /// Columns of a wider tensor, so that rows have gaps between them.
    fn strided(&mut self, rows: usize, width: usize) -> HostTensor {
        let wide = self.random(&[rows, width + 5]);
        columns(wide, 3, width)
    }

    fn scales(&mut self, shape: &[usize]) -> HostTensor {
        lazy(DType::F32, shape, self.rng.next(), |rng| rng.unit() + 0.01)
    }
}

fn add_linear(all: &mut Vec<(String, Op<HostTensor>)>, m: &mut Maker, dtype: DType) {
    let grids = [
        BlockGrid::default(),
        BlockGrid { row_offset: 64, column_offset: 64, segments: 1 },
        BlockGrid { row_offset: 64, column_offset: 64, segments: 2 },
        BlockGrid { row_offset: 100, column_offset: 3, segments: 2 },
    ];
    let fp8 = dtype == DType::F8E4M3;
    for grid in grids.into_iter().take(if fp8 { grids.len() } else { 1 }) {
        for (t, n, k) in [
            (0, 4, 4),
            (1, 2, 1),
            (1, 22, 40),
            (3, 6, 17),
            (2, 10, 128),
            (9, 130, 200),
            (3, 256, 320),
            (5, 34, 300),
            (70, 144, 512),
            (129, 272, 1040),
        ] {
            // The large one takes long to work out by the reference: once with a slice, once without.
            if t == 129 && (grid.segments == 1 || grid.row_offset == 100) {
                continue;
            }
            let groups = grid.scale_columns(k);
            let scales = |m: &mut Maker, shape: &[usize]| fp8.then(|| m.scales(shape));
            let out = if t % 2 == 1 { DType::F32 } else { DType::Bf16 };
            let linear = Linear {
                x: m.random_of(dtype, &[t, k]),
                x_scales: scales(m, &[t, groups]),
                w: m.random_of(dtype, &[n, k]),
                w_scales: scales(m, &[grid.scale_rows(n), groups]),
                out: m.random_of(out, &[t, n]),
                grid,
            };
            all.push((format!("linear/{dtype}/{t}x{n}x{k}{}", slug(grid)), linear.into()));
            let grouped = GroupedLinear {
                x: m.random_of(dtype, &[t + 2, k]),
                x_scales: scales(m, &[t + 2, groups]),
                w: m.random_of(dtype, &[3, n, k]),
                w_scales: scales(m, &[3, grid.scale_rows(n), groups]),
                offsets: ints(&[0, t as i32 / 2, t as i32 / 2, t as i32 + 1]),
                out: m.random_of(out, &[t + 2, n]),
                grid,
                routing: Routing::default(),
            };
            all.push((format!("grouped_linear/{dtype}/{t}x{n}x{k}{}", slug(grid)), grouped.into()));
        }
    }
}

fn add_rowwise(all: &mut Vec<(String, Op<HostTensor>)>, m: &mut Maker, dtype: DType) {
    for (t, h) in [(0, 8), (1, 1), (3, 17), (2, 128), (5, 300), (65, 1024)] {
        let mut add =
            |name: &str, op: Op<HostTensor>| all.push((format!("{name}/{dtype}/{t}x{h}"), op));
        let rows: Vec<i32> = (0..t).map(|i| (i * 7 % 11) as i32).collect();
        let (table, out) = (m.random(&[6, h]), m.strided(t, h));
        let gather = GatherRows { table, rows: ints(&rows), out, first_row: 3, total_rows: 11 };
        add("gather_rows", gather.into());
        for residual in [None, Some(m.strided(t, h))] {
            let (x, weight, out) = (m.strided(t, h), m.random(&[h]), m.strided(t, h));
            add("rms_norm", RmsNorm { x, weight, residual, out, eps: 1e-6 }.into());
        }
        for (column_offset, scale_format) in
            [(0, ScaleFormat::Float), (65, ScaleFormat::PowerOfTwo)]
        {
            let grid = BlockGrid { column_offset, ..BlockGrid::default() };
            let (x, q) = (m.strided(t, h), m.random_of(DType::F8E4M3, &[t, h]));
            let scales = m.scales(&[t, grid.scale_columns(h)]);
            // All rows, or those before the last offset.
            let row_offsets = (column_offset == 65).then(|| ints(&[0, 7, t as i32 / 2]));
            let quantize = Quantize {
                x,
                q,
                scales,
                row_offsets,
                column_offset,
                scale_format,
                expected_rows: 0,
            };
            add("quantize", quantize.into());
        }
        for (number, (column_offset, scale_format)) in
            [(0, ScaleFormat::Float), (0, ScaleFormat::PowerOfTwo), (65, ScaleFormat::Float)]
                .into_iter()
                .enumerate()
        {
            let grid = BlockGrid { column_offset, ..BlockGrid::default() };
            let q = |m: &mut Maker| m.random_of(DType::F8E4M3, &[t, h]);
            let scales = |m: &mut Maker| m.scales(&[t, grid.scale_columns(h)]);
            let fused = RmsNormQuantize {
                x: m.strided(t, h),
                weight: m.random(&[h]),
                residual: (number > 0).then(|| m.strided(t, h)),
                out: (number != 1).then(|| m.strided(t, h)),
                q: q(m),
                scales: scales(m),
                eps: 1e-6,
                column_offset,
                scale_format,
            };
            add("rms_norm_quantize", fused.into());
            let fused = SwiGluQuantize {
                x: m.strided(t, 2 * h),
                row_offsets: (number > 0).then(|| ints(&[0, t as i32 - t as i32 / 3])),
                q: q(m),
                scales: scales(m),
                column_offset,
                scale_format,
                expected_rows: 0,
            };
            add("swiglu_quantize", fused.into());
        }
        let grid = BlockGrid { row_offset: 1, column_offset: 2, segments: 2 };
        let w = m.random_of(DType::F8E4M3, &[2, 2 * t, h]);
        let w_scales = m.scales(&[2, grid.scale_rows(2 * t), grid.scale_columns(h)]);
        let out = m.random(&[2, 2 * t, h]);
        add("dequantize", Dequantize { w, w_scales, out, grid }.into());
        for row_offsets in [None, Some(ints(&[t as i32 - t as i32 / 3]))] {
            let (x, out) = (m.strided(t, 2 * h), m.strided(t, h));
            add("swiglu", SwiGlu { x, out, row_offsets, expected_rows: 0 }.into());
        }
        let (a, b) = (m.strided(t, h), m.strided(t, h));
        add("add", Add { a: a.clone(), b: b.clone(), out: m.strided(t, h) }.into());
        add("add/to_a", Add { a: a.clone(), b: b.clone(), out: a.clone() }.into());
        add("add/to_b", Add { a: a.clone(), b: b.clone(), out: b }.into());
        add("add/to_itself", Add { a: a.clone(), b: a.clone(), out: a }.into());
        for to in [DType::F32, DType::Bf16] {
            add("cast", Cast { x: m.strided(t, h), out: m.random_of(to, &[t, h]) }.into());
        }
        add("copy", Copy { x: m.strided(t, h), out: m.strided(t, h) }.into());
        let limit = (h as u32).div_ceil(2);
        let numbers = m.random_of(DType::I32, &[t]);
        add("argmax", ArgMax { x: m.strided(t, h), out: numbers, limit }.into());
        let k = (limit as usize).min(4);
        let (values, indices) =
            (m.random_of(DType::F32, &[t, k]), m.random_of(DType::I32, &[t, k]));
        add("top_k", TopK { x: m.strided(t, h), values, indices, limit }.into());
    }
}

/// Sequences with new tokens and keys in all.
const SEQUENCES: &[&[(usize, usize)]] =
    &[&[(1, 1)], &[(3, 3), (1, 9)], &[(2, 5), (0, 4), (7, 40)], &[(66, 130), (1, 257)]];

pub(super) fn starts(lengths: impl Iterator<Item = usize>) -> HostTensor {
    let mut all = vec![0];
    for n in lengths {
        all.push(all.last().unwrap() + n as i32);
    }
    ints(&all)
}

fn add_attention(all: &mut Vec<(String, Op<HostTensor>)>, m: &mut Maker, dtype: DType) {
    let page_size = 4;
    for sequences in SEQUENCES {
        let (tokens, keys) = sequences.iter().fold((0, 0), |(t, k), s| (t + s.0, k + s.1));
        for (h, nope, rope, v, rank) in [(1, 1, 2, 1, 3), (3, 16, 6, 24, 70)] {
            let mut add = |name: &str, op: Op<HostTensor>| {
                all.push((
                    {
                        let lengths: Vec<String> =
                            sequences.iter().map(|(q, kv)| format!("{q}of{kv}")).collect();
                        format!("{name}/{dtype}/{}/h{h}", lengths.join("+"))
                    },
                    op,
                ));
            };
            let mut work = AttentionWork::default();
            sequences.iter().for_each(|s| work.add(s.0 as u64, s.1 as u64));
            let (q_starts, kv_starts) =
                (starts(sequences.iter().map(|s| s.0)), starts(sequences.iter().map(|s| s.1)));
            let k_rope = m.strided(keys, rope);
            let prefill = MlaPrefill {
                q: m.random(&[tokens, h, nope + rope]),
                kv: m.random(&[keys, h, nope + v]),
                k_rope,
                q_starts: q_starts.clone(),
                kv_starts: kv_starts.clone(),
                out: m.random(&[tokens, h, v]),
                scale: 0.3,
                work,
            };
            add("mla_prefill", prefill.into());
            // Pages scattered over a larger cache.
            let max_pages = sequences.iter().map(|s| s.1.div_ceil(page_size)).max().unwrap();
            let pages = sequences.len() * max_pages;
            let table: Vec<i32> =
                (0..pages).map(|i| ((i * 5 + 2) % (pages * 5 / 5)) as i32).collect();
            let block_table = matrix(ints(&table), &[sequences.len(), max_pages]);
            let cache = m.random(&[pages, page_size, rank + rope]);
            let lens: Vec<i32> = sequences.iter().map(|s| s.1 as i32).collect();
            let q = m.random(&[tokens, h, rank + rope]);
            let decode = MlaDecode {
                q_latent: columns(q.clone(), 0, rank),
                q_rope: columns(q, rank, rope),
                cache: cache.clone(),
                block_table: block_table.clone(),
                q_starts,
                kv_lens: ints(&lens),
                out: m.random(&[tokens, h, rank]),
                scale: 0.3,
                work,
            };
            add("mla_decode", decode.into());
            let out = m.random(&[keys, rank + rope]);
            add(
                "cache_read",
                CacheRead { cache: cache.clone(), block_table, kv_starts, out }.into(),
            );
            let slots: Vec<i32> = (0..tokens)
                .map(|i| if i == 1 { -1 } else { (i * 3 % (pages * 4)) as i32 })
                .collect();
            let (latent, k_rope) = (m.strided(tokens, rank), m.strided(tokens, rope));
            let distinct: std::collections::BTreeSet<_> = slots.iter().collect();
            if distinct.len() == slots.len() {
                add(
                    "cache_write",
                    CacheWrite { latent, k_rope, slots: ints(&slots), cache }.into(),
                );
            }
            let positions: Vec<i32> = (0..tokens).map(|i| (i * 4 % 9) as i32).collect();
            let x = m.random(&[tokens, h, nope + rope]);
            let table = m.random_of(DType::F32, &[9, rope]);
            add(
                "rope",
                Rope { x: columns(x, nope, rope), positions: ints(&positions), table }.into(),
            );
            for k_major in [false, true] {
                let x = m.random(&[tokens, h, nope + rope]);
                let (w, n) = (m.random(&[h, nope + v, rank]), if k_major { rank } else { v });
                let (start, len) = if k_major { (0, nope) } else { (nope, v) };
                let (offset, desc) = w.desc.narrowed(1, start, len);
                let w = HostTensor { offset, desc, ..w };
                let x = if k_major { columns(x, 0, nope) } else { m.random(&[tokens, h, rank]) };
                let out = m.random(&[tokens, h, n]);
                add("batched_linear", BatchedLinear { x, w, out, k_major }.into());
            }
        }
    }
}

fn add_experts(all: &mut Vec<(String, Op<HostTensor>)>, m: &mut Maker, dtype: DType) {
    for (t, e, k, groups, kept, h) in
        [(1, 4, 1, 1, 1, 1), (5, 8, 2, 4, 2, 10), (33, 16, 3, 4, 3, 129), (129, 64, 8, 8, 4, 272)]
    {
        let mut add =
            |name: &str, op: Op<HostTensor>| all.push((format!("{name}/{dtype}/t{t}e{e}"), op));
        let chosen: Vec<i32> = (0..t * k).map(|_| m.rng.below(e) as i32).collect();
        for shift in [0.0, -2.0] {
            let rng = &mut m.rng;
            let bias = tensor(DType::F32, &[e], |_| rng.normal() * 0.1 + shift);
            let gate = Gate {
                logits: m.random_of(DType::F32, &[t, e]),
                bias: Some(bias),
                experts: m.random_of(DType::I32, &[t, k]),
                weights: m.random_of(DType::F32, &[t, k]),
                groups,
                groups_kept: kept,
                normalize: shift == 0.0,
                scale: 2.5,
            };
            add("gate", gate.into());
        }
        let some: Vec<i32> =
            chosen.iter().enumerate().map(|(i, &e)| if i % 3 == 2 { -1 } else { e }).collect();
        let counted = |part: bool| part.then(|| ints(&[0, t as i32 - t as i32 / 4]));
        for (first_expert, local) in [(0, e), (1, e - 2)] {
            let fp8 = dtype == DType::F8E4M3;
            let permute = MoePermute {
                x: m.random(&[t, h]),
                x_scales: fp8.then(|| m.scales(&[t, h.div_ceil(FP8_BLOCK)])),
                experts: matrix(ints(if first_expert == 0 { &chosen } else { &some }), &[t, k]),
                row_offsets: counted(first_expert == 1),
                out: m.random(&[t * k, h]),
                out_scales: fp8.then(|| m.scales(&[t * k, h.div_ceil(FP8_BLOCK)])),
                offsets: m.random_of(DType::I32, &[local + 1]),
                rows: m.random_of(DType::I32, &[t, k]),
                first_expert,
                total_experts: e as u32,
                expected_rows: 0,
            };
            add("moe_permute", permute.into());
        }
        // To one rank, to every expert a rank, and to some, with each expert twice there.
        for (destinations, each, copies) in [(1, e, 1), (e, 1, 1), (4, e / 2, 2)] {
            let fp8 = dtype == DType::F8E4M3;
            let room = t * k.min(destinations) + 1;
            // Where there are two, all but the first logical expert have both.
            let replica = |i: usize| match (i / 2, i % 2) {
                (0, 1) => -1,
                (logical, number) => (logical + number * e) as i32,
            };
            let table: Vec<i32> = (0..e * 2).map(replica).collect();
            let dispatch = MoeDispatch {
                x: m.random(&[t, 10]),
                x_scales: fp8.then(|| m.scales(&[t, 1])),
                experts: matrix(ints(if copies == 1 { &chosen } else { &some }), &[t, k]),
                weights: m.random_of(DType::F32, &[t, k]),
                replicas: (copies == 2).then(|| matrix(ints(&table), &[e, 2])),
                row_offsets: counted(copies == 2),
                out: m.random(&[room, 10]),
                out_scales: fp8.then(|| m.scales(&[room, 1])),
                out_experts: m.random_of(DType::I32, &[room, k]),
                out_weights: m.random_of(DType::F32, &[room, k]),
                offsets: m.random_of(DType::I32, &[destinations + 1]),
                rows: m.random_of(DType::I32, &[t, k]),
                experts_per_destination: each as u32,
                total_experts: e as u32,
                replica_offset: 3,
                expected_rows: 0,
            };
            add(&format!("moe_dispatch/to{destinations}"), dispatch.into());
        }
        if dtype != DType::F8E4M3 {
            for (number, base) in
                [None, Some(m.strided(t, h)), Some(m.strided(t, h))].into_iter().enumerate()
            {
                let rows: Vec<i32> =
                    (0..t * k).map(|i| if i % 4 == 3 { -1 } else { i as i32 }).collect();
                let (y, weights) = (m.random(&[t * k, h]), m.random_of(DType::F32, &[t, k]));
                let (rows, out) = (matrix(ints(&rows), &[t, k]), m.random(&[t, h]));
                let (weights, row_offsets) =
                    ((number != 2).then_some(weights), counted(number == 2));
                let combine = MoeCombine {
                    y,
                    rows,
                    weights,
                    base,
                    row_offsets,
                    out,
                    expected_rows: 0,
                    expected_copies: 0,
                };
                add("moe_combine", combine.into());
            }
        }
    }
}

pub(super) fn slug(grid: BlockGrid) -> String {
    match grid == BlockGrid::default() {
        true => String::new(),
        false => format!("/from{}.{}x{}", grid.row_offset, grid.column_offset, grid.stacks()),
    }
}

/// Every op over a grid of shapes and dtypes, with random operands, each under a name of its own.
///
/// They are made once: copies share their operands.
pub fn cases() -> Vec<(String, Op<HostTensor>)> {
    static ALL: LazyLock<Vec<(String, Op<HostTensor>)>> = LazyLock::new(make);
    ALL.clone()
}

fn make() -> Vec<(String, Op<HostTensor>)> {
    let mut all = Vec::new();
    for dtype in [DType::F32, DType::Bf16, DType::F8E4M3] {
        let mut m = Maker { rng: Rng(1), dtype };
        add_linear(&mut all, &mut m, dtype);
        add_experts(&mut all, &mut m, dtype);
        if dtype != DType::F8E4M3 {
            add_rowwise(&mut all, &mut m, dtype);
            add_attention(&mut all, &mut m, dtype);
        }
    }
    super::edges::add(&mut all);
    let mut seen: HashMap<String, usize> = HashMap::new();
    for (name, _) in &mut all {
        let count = seen.entry(name.clone()).or_default();
        *count += 1;
        if *count > 1 {
            *name = format!("{name}/{count}");
        }
    }
    all
}

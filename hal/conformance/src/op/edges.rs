//! Operands that random ones do not reach: ties, tiny, huge and infinite values, slices of weights
//! that begin inside a block, the widths of the real model.

use super::cases::{Rng, columns, ints, matrix, slug, starts, tensor};
use super::host::HostTensor;
use hal::op::*;
use hal::{DType, Op};

const FLOATS: [DType; 2] = [DType::F32, DType::Bf16];

pub(super) fn add(all: &mut Vec<(String, Op<HostTensor>)>) {
    for dtype in FLOATS {
        norms(all, dtype);
        quantization(all, dtype);
        activations(all, dtype);
        choices(all, dtype);
        attention(all, dtype);
    }
    gates(all);
    copies(all);
}

/// Copies move elements of any dtype between views with gaps.
fn copies(all: &mut Vec<(String, Op<HostTensor>)>) {
    for dtype in [DType::F8E4M3, DType::U8, DType::I32] {
        for (rows, width) in [(1, 1), (3, 17), (5, 129)] {
            let view = |seed: usize| {
                columns(tensor(dtype, &[rows, width + 5], |i| wave(i + seed) * 9.0), 3, width)
            };
            let op = Copy { x: view(0), out: view(50) };
            all.push((format!("copy/{dtype}/{rows}x{width}"), op.into()));
        }
    }
}

/// Some number whose low bits are not zero, different for each `i`.
fn wave(i: usize) -> f64 {
    (i as f64 * 0.7).sin() * 1.9
}

fn norms(all: &mut Vec<(String, Op<HostTensor>)>, dtype: DType) {
    // Epsilon beside values of its size, and beside nothing at all.
    for (name, eps, size) in [("epsilon", 0.5, 1.0), ("tiny", 1e-6, 1e-3), ("zeros", 1e-6, 0.0)] {
        let op = RmsNorm {
            x: tensor(dtype, &[3, 70], |i| wave(i) * size),
            weight: tensor(dtype, &[70], |i| wave(i) + 2.0),
            residual: None,
            out: tensor(dtype, &[3, 70], |_| 9.0),
            eps,
        };
        all.push((format!("rms_norm/{dtype}/{name}"), op.into()));
    }
}

fn quantization(all: &mut Vec<(String, Op<HostTensor>)>, dtype: DType) {
    let mut add = |name: &str, value: fn(usize) -> f64, scale_format| {
        let op = Quantize {
            x: tensor(dtype, &[2, 150], value),
            q: tensor(DType::F8E4M3, &[2, 150], |_| 1.0),
            scales: tensor(DType::F32, &[2, 2], |_| 9.0),
            column_offset: 0,
            scale_format,
            row_offsets: None,
            expected_rows: 0,
        };
        all.push((format!("quantize/{dtype}/{name}"), op.into()));
    };
    for format in [ScaleFormat::Float, ScaleFormat::PowerOfTwo] {
        add("below_the_floor", |i| wave(i) * 3e-5, format);
        add("zeros", |_| 0.0, format);
        add("huge", |i| wave(i) * 1e30, format);
    }
    // The largest is 448, so the scale is 1 and values between two of FP8 stay so: 17 and 19 lie
    // in the middle of 16, 18 and 20; subnormals in the middle of theirs.
    let ties = |i: usize| match i % 5 {
        0 => 448.0,
        1 => 17.0,
        2 => -19.0,
        3 => 1.5 / 512.0,
        _ => -2.5 / 512.0,
    };
    add("ties", ties, ScaleFormat::Float);
    add("power_of_two_already", ties, ScaleFormat::PowerOfTwo);
    for grid in [
        BlockGrid::default(),
        BlockGrid { row_offset: 64, column_offset: 64, segments: 2 },
        BlockGrid { row_offset: 127, column_offset: 1, segments: 1 },
    ] {
        for experts in [None, Some(3)] {
            let mut rng = Rng(7);
            let (rows, columns) = (300, 200);
            let shape = |r: usize, c: usize| match experts {
                None => vec![r, c],
                Some(e) => vec![e, r, c],
            };
            let scales = shape(grid.scale_rows(rows), grid.scale_columns(columns));
            let op = Dequantize {
                w: tensor(DType::F8E4M3, &shape(rows, columns), |_| rng.normal()),
                w_scales: tensor(DType::F32, &scales, |i| 0.3 + i as f64),
                out: tensor(dtype, &shape(rows, columns), |_| 9.0),
                grid,
            };
            let experts = experts.map_or(String::new(), |e| format!("/e{e}"));
            let name = format!("dequantize/{dtype}/{rows}x{columns}{experts}{}", slug(grid));
            all.push((name, op.into()));
        }
    }
}

fn activations(all: &mut Vec<(String, Op<HostTensor>)>, dtype: DType) {
    // Where the sigmoid is 0 and 1 to the last bit.
    let op = SwiGlu {
        x: tensor(dtype, &[2, 40], |i| wave(i) * 100.0),
        out: tensor(dtype, &[2, 20], |_| 9.0),
        row_offsets: None,
        expected_rows: 0,
    };
    all.push((format!("swiglu/{dtype}/saturated"), op.into()));
    // Halfway between two values of BF16, on both sides of even; the largest that do not overflow.
    let op = Cast {
        x: tensor(DType::F32, &[4], |i| [1.003_906_25, 1.011_718_75, 3.0e38, -1e-40][i]),
        out: tensor(dtype, &[4], |_| 9.0),
    };
    all.push((format!("cast/{dtype}/ties"), op.into()));
}

fn choices(all: &mut Vec<(String, Op<HostTensor>)>, dtype: DType) {
    // Ties everywhere; the largest in the padding; all negative; infinite.
    for (name, value) in [
        (
            "ties",
            (|i| [3.0, 5.0, 5.0, -1.0, 5.0][i % 5] + if i % 40 >= 35 { 10.0 } else { 0.0 })
                as fn(usize) -> f64,
        ),
        ("negative", |i| -100.0 - (i % 7) as f64),
        ("infinite", |i| if i % 3 == 0 { f64::NEG_INFINITY } else { -wave(i) }),
    ] {
        let x = || tensor(dtype, &[3, 40], value);
        let op = ArgMax { x: x(), out: ints(&[9; 3]), limit: 35 };
        all.push((format!("argmax/{dtype}/{name}"), op.into()));
        for k in [1, 4, 35] {
            let op = TopK {
                x: x(),
                values: tensor(DType::F32, &[3, k], |_| 9.0),
                indices: matrix(ints(&vec![9; 3 * k]), &[3, k]),
                limit: 35,
            };
            all.push((format!("top_k/{dtype}/{name}"), op.into()));
        }
    }
}

fn gates(all: &mut Vec<(String, Op<HostTensor>)>) {
    for (name, value) in [
        // Experts and groups that are as good as each other.
        ("ties", (|i| [0.5, 1.5, 1.5, 0.5][i % 4]) as fn(usize) -> f64),
        ("equal", |_| 0.25),
    ] {
        for bias in [false, true] {
            let op = Gate {
                logits: tensor(DType::F32, &[3, 32], value),
                bias: bias.then(|| tensor(DType::F32, &[32], |i| [0.25, -0.5][i / 8 % 2])),
                experts: matrix(ints(&[9; 18]), &[3, 6]),
                weights: tensor(DType::F32, &[3, 6], |_| 9.0),
                groups: 8,
                groups_kept: 4,
                normalize: !bias,
                scale: 2.5,
            };
            all.push((format!("gate/f32/{name}"), op.into()));
        }
    }
}

/// Attention whose scores are far beyond what an exponential can hold, and attention of the real
/// model's widths over pages of 64.
fn attention(all: &mut Vec<(String, Op<HostTensor>)>, dtype: DType) {
    for (name, h, nope, rope, v, rank, page, scale) in [
        ("large_scores", 2, 16, 8, 16, 40, 4, 300.0),
        ("deepseek", 2, 128, 64, 128, 512, 64, 0.135),
    ] {
        let mut rng = Rng(11);
        let mut random = |shape: &[usize]| tensor(dtype, shape, |_| rng.normal());
        let sequences: [(usize, usize); 2] = [(3, 70), (1, 9)];
        let (tokens, keys) = (4, 79);
        let (q_starts, kv_starts) =
            (starts(sequences.iter().map(|s| s.0)), starts(sequences.iter().map(|s| s.1)));
        let mut work = AttentionWork::default();
        sequences.iter().for_each(|s| work.add(s.0 as u64, s.1 as u64));
        let prefill = MlaPrefill {
            q: random(&[tokens, h, nope + rope]),
            kv: random(&[keys, h, nope + v]),
            k_rope: random(&[keys, rope]),
            q_starts: q_starts.clone(),
            kv_starts,
            out: random(&[tokens, h, v]),
            scale,
            work,
        };
        all.push((format!("mla_prefill/{dtype}/{name}"), prefill.into()));
        let max_pages = 70usize.div_ceil(page);
        let pages = 2 * max_pages;
        let table: Vec<i32> = (0..pages as i32).rev().collect();
        let q = random(&[tokens, h, rank + rope]);
        let decode = MlaDecode {
            q_latent: columns(q.clone(), 0, rank),
            q_rope: columns(q, rank, rope),
            cache: random(&[pages, page, rank + rope]),
            block_table: matrix(ints(&table), &[2, max_pages]),
            q_starts,
            kv_lens: ints(&[70, 9]),
            out: random(&[tokens, h, rank]),
            scale,
            work,
        };
        all.push((format!("mla_decode/{dtype}/{name}"), decode.into()));
    }
}

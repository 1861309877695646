//! Norms, quantisation, gates, permutations and whatever else passes over memory once.

use super::die::DieFigures;
use super::program::{Bytes, Program, TileClass};
use hal::{Op, TensorDesc, op::Work};

/// Elements that one core takes at a time where an op has no rows to respect.
const BLOCK: u64 = 1024;

/// How many pieces an op falls into that cores can take independently.
fn pieces(op: &Op<TensorDesc>) -> u64 {
    let rows = |desc: &TensorDesc| desc.rows() as u64;
    let blocks = |desc: &TensorDesc| (desc.elements() as u64).div_ceil(BLOCK);
    // Rows that are expected to count, where only the device knows; 0 stands for all.
    let counted = |desc: &TensorDesc, expected: u32| match expected {
        0 => rows(desc),
        expected => rows(desc).min(u64::from(expected)),
    };
    match op {
        Op::RmsNorm(o) => rows(&o.x),
        Op::Gate(o) => rows(&o.logits),
        Op::Quantize(o) => counted(&o.scales, o.expected_rows) * o.scales.last_dim() as u64,
        Op::Rope(o) => rows(&o.x),
        Op::MoePermute(o) => counted(&o.out, o.expected_rows),
        Op::MoeDispatch(o) => counted(&o.out, o.expected_rows),
        Op::MoeCombine(o) => {
            let rows = counted(&o.out, o.expected_rows);
            (rows * o.out.last_dim() as u64).div_ceil(BLOCK).max(rows)
        }
        Op::GatherRows(o) => rows(&o.out),
        Op::CacheWrite(o) => rows(&o.latent),
        Op::CacheRead(o) => rows(&o.out),
        Op::SwiGlu(o) => {
            (counted(&o.out, o.expected_rows) * o.out.last_dim() as u64).div_ceil(BLOCK)
        }
        Op::Dequantize(o) => blocks(&o.w),
        Op::Add(o) => blocks(&o.out),
        Op::Cast(o) => blocks(&o.out),
        Op::Copy(o) => blocks(&o.out),
        Op::ArgMax(o) => blocks(&o.x),
        Op::TopK(o) => blocks(&o.x),
        _ => u64::MAX,
    }
    .max(1)
}

/// The mapping in words, and the program.
pub(crate) fn rowwise(die: &DieFigures, op: &Op<TensorDesc>, work: &Work) -> (String, Program) {
    let pieces = pieces(op);
    // Cores take equal numbers of pieces, as nearly as they divide, in portions of which a few fit.
    let active = pieces.min(die.cores);
    let most = pieces.div_ceil(active);
    let least = work.bytes().div_ceil(active * (die.core_bytes / 8).max(1)).clamp(1, most);
    // Small portions overlap better, large ones need fewer of them.
    let mut best: Option<(f64, u64, Program)> = None;
    for waves in [least, 2 * least, 4 * least].map(|w| w.min(most)) {
        let program = portions(die, op, work, active, waves, most as f64 / pieces as f64);
        let seconds = program.seconds();
        if best.as_ref().is_none_or(|(least, ..)| seconds < *least) {
            best = Some((seconds, waves, program));
        }
    }
    let Some((_, waves, program)) = best else { unreachable!("three ways were tried") };
    let text = format!("{pieces} piece(s) in {} tile(s) on {} cores", active * waves, die.cores);
    (text, program)
}

/// `share` is the part of the work that the core with the most of it has.
fn portions(
    die: &DieFigures,
    op: &Op<TensorDesc>,
    work: &Work,
    active: u64,
    waves: u64,
    share: f64,
) -> Program {
    let each = (active * waves) as f64;
    let read = work.read_bytes as f64 / each;
    let ops = (work.vector_ops + work.matrix_ops) as f64;
    let class = TileClass {
        count: active * waves,
        steps: 1,
        compute: ops * share / waves as f64 / die.vector,
        load: Bytes { port: read, cache: read, memory: read },
        epilogue: 0.0,
        store: work.write_bytes as f64 / each,
    };
    // Results over whole rows of a vocabulary are collected from the cores.
    let collected = matches!(op, Op::ArgMax(_) | Op::TopK(_));
    Program {
        cores: die.cores,
        stages: 2,
        stores_overlap: true,
        startup: die.startup,
        rates: die.stream_rates,
        classes: vec![class],
        finish: if collected { die.memory_latency } else { 0.0 },
    }
}

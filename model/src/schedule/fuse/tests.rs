//! That a fused graph computes alike, on graphs at random, and what it looks like.

use super::*;
use crate::graph::{Value, ValueId};
use crate::schedule::{Schedule, interleave};
use hal::DType;
use hal::op::{Add, Linear, ScaleFormat};
use std::collections::HashMap;
use std::hash::{DefaultHasher, Hash, Hasher};

/// Rows of every value, and columns that a norm has.
const ROWS: usize = 4;
const COLUMNS: usize = 256;

fn hash(of: impl Hash) -> u64 {
    let mut hasher = DefaultHasher::new();
    of.hash(&mut hasher);
    hasher.finish()
}

/// What a graph computes, without arithmetic: each row of each value is a hash of all that it comes
/// from.
#[derive(Default)]
struct Memory {
    rows: HashMap<(ValueId, usize), u64>,
    /// What each command is and what it read, as a hash.
    read: Vec<u64>,
}

impl Memory {
    fn rows_of(slot: &Slot) -> impl Iterator<Item = (ValueId, usize)> + use<> {
        let (first, value) = (slot.offset as usize / row_bytes(slot), slot.value);
        (first..first + slot.desc().dim(0)).map(move |row| (value, row))
    }

    fn run(&mut self, op: &Op<Slot>) {
        let mut seen = vec![hash(format!("{:?}", op.map(|_| ())))];
        op.visit(|name, access, slot| {
            if access.reads() {
                let rows = Self::rows_of(slot).map(|row| self.rows.get(&row).copied());
                seen.push(hash((name, rows.collect::<Vec<_>>())));
            }
        });
        let seen = hash(seen);
        self.read.push(seen);
        op.visit(|name, access, slot| {
            if access.writes() {
                for (number, row) in Self::rows_of(slot).enumerate() {
                    self.rows.insert(row, hash((seen, name, number)));
                }
            }
        });
    }

    /// Runs a graph; fused ops as the two that they stand for, through a value of their own where
    /// what lies between is no output.
    fn of(graph: &Graph) -> Self {
        let mut memory = Memory::default();
        for node in graph.nodes() {
            let Work::Op(op) = &node.work else { panic!("there are only ops") };
            let between = |x: &Slot| Slot::new(ValueId(u32::MAX), 0, *x.desc());
            let (first, x, rest): (Op<Slot>, _, _) = match op.clone() {
                Op::RmsNormQuantize(o) => {
                    let out = o.out.unwrap_or_else(|| between(&o.x));
                    let (x, weight, residual, eps) = (o.x, o.weight, o.residual, o.eps);
                    let norm = RmsNorm { x, weight, residual, out, eps };
                    (norm.into(), out, (o.q, o.scales, None, o.column_offset, o.scale_format))
                }
                Op::SwiGluQuantize(o) => {
                    let out = between(&o.x.columns(0, COLUMNS));
                    let out = Slot::new(
                        out.value,
                        0,
                        TensorDesc::new(DType::Bf16, &[out.desc().dim(0), COLUMNS]),
                    );
                    let (row_offsets, expected_rows) = (o.row_offsets, o.expected_rows);
                    let swiglu = SwiGlu { x: o.x, row_offsets, out, expected_rows };
                    let rest = (o.q, o.scales, row_offsets, o.column_offset, o.scale_format);
                    (swiglu.into(), out, rest)
                }
                other => {
                    memory.run(&other);
                    continue;
                }
            };
            let (q, scales, row_offsets, column_offset, scale_format) = rest;
            let second = Quantize {
                x,
                row_offsets,
                q,
                scales,
                column_offset,
                scale_format,
                expected_rows: 0,
            };
            memory.run(&first);
            memory.run(&second.into());
        }
        memory.read.sort_unstable();
        memory.rows.retain(|(value, _), _| *value != ValueId(u32::MAX));
        memory
    }
}

fn row_bytes(slot: &Slot) -> usize {
    slot.desc().last_dim() * slot.desc().dtype().size()
}

struct Maker {
    state: u64,
    values: Vec<Value>,
    nodes: Vec<Node>,
}

impl Maker {
    fn below(&mut self, n: usize) -> usize {
        // Knuth's MMIX.
        self.state = self
            .state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        (self.state >> 33) as usize % n
    }

    fn value(&mut self, dtype: DType, shape: &[usize]) -> Slot {
        let (id, desc) = (ValueId(self.values.len() as u32), TensorDesc::new(dtype, shape));
        self.values.push(Value { name: format!("v{}", id.0), desc, source: Source::Scratch });
        Slot::new(id, 0, desc)
    }

    fn push(&mut self, label: &str, op: impl Into<Op<Slot>>) {
        let op = op.into();
        assert_eq!(hal::op::check(&op.desc()), Ok(()), "{label}");
        self.nodes.push(Node { work: Work::Op(op), label: label.into() });
    }

    fn graph(self) -> Graph {
        Graph::new(self.values, self.nodes)
    }
}

/// A graph over few values, so that they are written again and read by several; some of it is the
/// pairs to merge, with or without something between.
fn random(seed: u64) -> Graph {
    let mut m = Maker { state: seed, values: Vec::new(), nodes: Vec::new() };
    let plain: Vec<Slot> = (0..5).map(|_| m.value(DType::Bf16, &[ROWS, COLUMNS])).collect();
    let wide: Vec<Slot> = (0..2).map(|_| m.value(DType::Bf16, &[ROWS, 2 * COLUMNS])).collect();
    let q: Vec<Slot> = (0..2).map(|_| m.value(DType::F8E4M3, &[ROWS, COLUMNS])).collect();
    let scales: Vec<Slot> = (0..2).map(|_| m.value(DType::F32, &[ROWS, 2])).collect();
    let weight = m.value(DType::Bf16, &[COLUMNS]);
    let offsets: Vec<Slot> = (0..2).map(|_| m.value(DType::I32, &[3])).collect();
    let w = m.value(DType::F8E4M3, &[COLUMNS, COLUMNS]);
    let w_scales = m.value(DType::F32, &[2, 2]);
    let mut written = plain[0];
    for number in 0..24 {
        // All rows, or half of them.
        let (start, len) = [(0, ROWS), (0, ROWS), (0, ROWS), (2, 2)][m.below(4)];
        let pick = |m: &mut Maker, of: &[Slot]| of[m.below(of.len())].narrowed(0, start, len);
        let counted = |m: &mut Maker| (m.below(3) == 0).then(|| offsets[m.below(2)]);
        let label = format!("n{number}");
        let distinct = |slots: &[Slot]| {
            let mut values: Vec<_> = slots.iter().map(|s| s.value).collect();
            values.sort_unstable();
            values.windows(2).all(|pair| pair[0] != pair[1])
        };
        match m.below(6) {
            0 => {
                let (x, residual, out) =
                    (pick(&mut m, &plain), pick(&mut m, &plain), pick(&mut m, &plain));
                if distinct(&[x, residual, out]) {
                    let residual = (m.below(2) == 0).then_some(residual);
                    m.push(&label, RmsNorm { x, weight, residual, out, eps: 1e-6 });
                    written = out;
                }
            }
            1 => {
                let (x, out, row_offsets) =
                    (pick(&mut m, &wide), pick(&mut m, &plain), counted(&mut m));
                m.push(&label, SwiGlu { x, row_offsets, out, expected_rows: 0 });
                written = out;
            }
            // Twice as likely, and mostly of what was written last.
            2 | 3 => {
                let x = if m.below(4) > 0 { written } else { pick(&mut m, &plain) };
                let rows = |s: Slot| s.narrowed(0, 0, x.desc().dim(0));
                let (q, scales) = (rows(q[m.below(2)]), rows(scales[m.below(2)]));
                let row_offsets = counted(&mut m);
                let (column_offset, scale_format) = (0, ScaleFormat::Float);
                m.push(
                    &label,
                    Quantize {
                        x,
                        row_offsets,
                        q,
                        scales,
                        column_offset,
                        scale_format,
                        expected_rows: 0,
                    },
                );
            }
            4 => {
                let (a, b, out) =
                    (pick(&mut m, &plain), pick(&mut m, &plain), pick(&mut m, &plain));
                m.push(&label, Add { a, b, out });
            }
            _ => {
                let (x, x_scales, out) =
                    (pick(&mut m, &q), Some(pick(&mut m, &scales)), pick(&mut m, &plain));
                let (w_scales, grid) = (Some(w_scales), Default::default());
                m.push(&label, Linear { x, x_scales, w, w_scales, out, grid });
            }
        }
    }
    m.graph()
}

#[test]
fn fused_graphs_compute_alike() {
    let (mut pairs, mut kept, mut left) = (0, 0, 0);
    for seed in 0..5000 {
        let graph = random(seed);
        let before = Memory::of(&graph);
        let fused = fuse(graph.clone(), &|_| true);
        let after = Memory::of(&fused);
        assert_eq!(after.read, before.read, "seed {seed}: commands read what they read");
        // Values that nobody names any more hold nothing; who names one finds the same in it.
        let mut named = vec![false; graph.values().len()];
        fused.visit(|_, access, slot| named[slot.value.0 as usize] |= access.reads());
        for (row, state) in before.rows.iter().filter(|((value, _), _)| named[value.0 as usize]) {
            assert_eq!(after.rows.get(row), Some(state), "seed {seed}: {row:?}");
        }
        for node in fused.nodes() {
            let Work::Op(op) = &node.work else { continue };
            assert_eq!(hal::op::check(&op.desc()), Ok(()), "seed {seed}: {}", node.label);
            match op {
                Op::RmsNormQuantize(o) if o.out.is_some() => kept += 1,
                Op::RmsNormQuantize(_) | Op::SwiGluQuantize(_) => pairs += 1,
                Op::Quantize(_) => left += 1,
                _ => {}
            }
        }
        assert_eq!(
            fuse(graph.clone(), &|_| false).nodes().len(),
            graph.nodes().len(),
            "a device without fused ops gets the graph as it was"
        );
    }
    assert!(pairs > 100 && kept > 100 && left > 100, "{pairs} {kept} {left}");
}

/// A layer's MLP as the model writes it: the router reads the norm besides.
fn layer() -> Graph {
    let mut m = Maker { state: 0, values: Vec::new(), nodes: Vec::new() };
    let mut plain = || m.value(DType::Bf16, &[ROWS, COLUMNS]);
    let (x, residual, normed, logits, inner) = (plain(), plain(), plain(), plain(), plain());
    let both = m.value(DType::Bf16, &[ROWS, 2 * COLUMNS]);
    let weight = m.value(DType::Bf16, &[COLUMNS]);
    let mut quantized =
        || (m.value(DType::F8E4M3, &[ROWS, COLUMNS]), m.value(DType::F32, &[ROWS, 2]));
    let ((q, scales), (inner_q, inner_scales)) = (quantized(), quantized());
    let router = m.value(DType::Bf16, &[COLUMNS, COLUMNS]);
    let w = m.value(DType::F8E4M3, &[2 * COLUMNS, COLUMNS]);
    let w_scales = Some(m.value(DType::F32, &[4, 2]));
    let quantize = |x, q, scales| Quantize {
        x,
        row_offsets: None,
        q,
        scales,
        column_offset: 0,
        scale_format: ScaleFormat::Float,
        expected_rows: 0,
    };
    let grid = Default::default();
    let norm = RmsNorm { x, weight, residual: Some(residual), out: normed, eps: 1e-6 };
    m.push("layer 4 post-attention norm", norm);
    m.push("layer 4 mlp quantise", quantize(normed, q, scales));
    let linear = Linear { x: normed, x_scales: None, w: router, w_scales: None, out: logits, grid };
    m.push("layer 4 router", linear);
    let linear = Linear { x: q, x_scales: Some(scales), w, w_scales, out: both, grid };
    m.push("layer 4 mlp gate_up", linear);
    m.push(
        "layer 4 mlp swiglu",
        SwiGlu { x: both, row_offsets: None, out: inner, expected_rows: 0 },
    );
    m.push("layer 4 mlp down quantise", quantize(inner, inner_q, inner_scales));
    m.graph()
}

#[test]
fn a_layer_after_fusion() {
    let asked = std::cell::Cell::new(0);
    let supports = |_: &Op<TensorDesc>| {
        asked.set(asked.get() + 1);
        true
    };
    let graph = fuse(interleave(vec![layer(), layer()]), &supports);
    assert_eq!(graph.nodes().len(), 8);
    assert_eq!(asked.get(), 2, "once for each shape");
    let graph = fuse(layer(), &supports);
    let dump = Schedule::new(&graph).dump(&graph);
    let lines: Vec<&str> = dump.lines().collect();
    let expected = [
        "compute    0 layer 4 post-attention norm + quantise = rms_norm_quantize(%0: bf16[4, 256], %6: bf16[256]) -> in place %1: bf16[4, 256], %2: bf16[4, 256], %7: f8_e4m3[4, 256], %8: f32[4, 2]",
        "compute    1 layer 4 router = linear(%2: bf16[4, 256], %11: bf16[256, 256]) -> %3: bf16[4, 256]",
        "compute    2 layer 4 mlp gate_up = linear(%7: f8_e4m3[4, 256], %8: f32[4, 2], %12: f8_e4m3[512, 256], %13: f32[4, 2]) -> %5: bf16[4, 512]",
        "compute    3 layer 4 mlp swiglu + quantise = swiglu_quantize(%5: bf16[4, 512]) -> %9: f8_e4m3[4, 256], %10: f32[4, 2]",
    ];
    // Places in the workspace are another test's business.
    let without_places = |line: &&str| {
        let parts: Vec<&str> = line.split(" @").collect();
        let rest = parts.iter().skip(1).map(|p| p.trim_start_matches(|c: char| c.is_ascii_digit()));
        std::iter::once(parts[0]).chain(rest).collect::<String>()
    };
    let found: Vec<String> = lines[..lines.len() - 1].iter().map(without_places).collect();
    assert_eq!(found, expected);
}

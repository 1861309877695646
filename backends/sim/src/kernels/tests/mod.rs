//! Kernels against f64, and the promise that nothing but the operands decides the bits.

use super::{Args, Context, Isa, run};
use crate::memory::{Guards, Memory, SimTensor, args, spans};
use conformance::op::{self, HostMemory, HostTensor, Rng, reference, written};
use hal::op::{Access, BlockGrid, Gate, Linear, Quantize, RmsNorm, SwiGlu};
use hal::{DType, DeviceId, Op, OpKind};
use std::collections::{BTreeSet, HashMap};
use std::sync::Arc;

const PLAIN: Context = Context { isa: Isa::Portable, threads: 1 };

fn execute(op: &Op<SimTensor>, ctx: &Context) -> Result<super::Outcome, String> {
    let spans = spans(op);
    let (mut guards, mut slots) = (Guards::default(), Args::default());
    guards.lock(&spans).unwrap();
    guards.carve(&spans, slots.slots()).unwrap();
    run(&args(op), &mut slots, ctx)
}

/// The suite's cases, in the simulator's memory. Aliases stay aliases.
fn cases() -> Vec<(String, Op<HostTensor>, Op<SimTensor>)> {
    let place = |(name, op): (String, Op<HostTensor>)| {
        let placed = place(&op);
        (name, op, placed)
    };
    op::cases().into_iter().map(place).collect()
}

fn place(op: &Op<HostTensor>) -> Op<SimTensor> {
    let mut known: HashMap<*const HostMemory, Arc<Memory>> = HashMap::new();
    op.map(|t| {
        let memory = known.entry(Arc::as_ptr(&t.memory)).or_insert_with(|| {
            let bytes = t.memory.bytes();
            let memory = Memory::new(DeviceId(0), bytes.len() as u64, true).unwrap();
            memory.try_write(0, bytes.len() as u64, |m| m.copy_from_slice(bytes)).unwrap();
            Arc::new(memory)
        });
        SimTensor { memory: memory.clone(), offset: t.offset, desc: t.desc }
    })
}

fn tensor(dtype: DType, shape: &[usize], value: impl FnMut(usize) -> f64) -> SimTensor {
    let host = op::cases::tensor(dtype, shape, value);
    let mut placed = None;
    place(&hal::op::Copy { x: host.clone(), out: host }.into())
        .visit(|_, _, t: &SimTensor| placed = Some(t.clone()));
    placed.unwrap()
}

/// The values of a tensor.
fn values(t: &SimTensor) -> Vec<f64> {
    let bytes = t.memory.try_read(t.offset, t.desc.extent(), <[u8]>::to_vec).unwrap();
    reference::decode(&t.desc, &bytes).v
}

fn bytes(t: &SimTensor) -> Vec<u8> {
    t.memory.try_read(0, t.memory.size, <[u8]>::to_vec).unwrap()
}

fn restore(t: &SimTensor, saved: &[u8]) {
    t.memory.try_write(0, t.memory.size, |m| m.copy_from_slice(saved)).unwrap();
}

#[test]
fn every_op_agrees_with_f64() {
    let mut seen = BTreeSet::new();
    for (name, host, op) in cases() {
        seen.insert(op.kind());
        let expected = reference::run(&host);
        execute(&op, &PLAIN).unwrap_or_else(|e| panic!("{name}: {e}"));
        let outputs = written(&op);
        assert_eq!(outputs.len(), expected.len(), "{name}");
        for ((operand, tensor), expected) in outputs.into_iter().zip(expected) {
            let dtype = tensor.desc.dtype();
            let compared = op::compare_output(op.kind(), dtype, &values(tensor), &expected);
            compared.unwrap_or_else(|e| panic!("{name}: {operand}{e}"));
        }
    }
    let all: BTreeSet<_> = OpKind::ALL.iter().copied().collect();
    assert_eq!(seen, all, "every op has cases");
}

#[test]
fn bits_do_not_depend_on_threads_or_instruction_set() {
    let pool = rayon::ThreadPoolBuilder::new().num_threads(3).build().unwrap();
    for (name, _, op) in cases() {
        let before: Vec<_> = written(&op).iter().map(|(_, t)| bytes(t)).collect();
        let run = |ctx: &Context| {
            written(&op).iter().zip(&before).for_each(|((_, t), saved)| restore(t, saved));
            execute(&op, ctx).unwrap();
            written(&op).iter().map(|(_, t)| bytes(t)).collect::<Vec<_>>()
        };
        let expected = run(&PLAIN);
        for isa in Isa::available() {
            for threads in [1, 3] {
                let got = pool.install(|| run(&Context { isa, threads }));
                assert_eq!(got, expected, "{name} on {isa:?} with {threads} threads");
            }
        }
    }
}

#[test]
fn nothing_is_written_outside_the_outputs() {
    for (name, _, op) in cases() {
        let mut others = Vec::new();
        op.visit(|operand, access, t| {
            if access == Access::Read {
                others.push((operand, t, bytes(t)));
            }
        });
        let gaps = |t: &SimTensor| {
            // Bytes of the buffer that belong to no element of the view.
            let mut outside = vec![true; t.memory.size as usize];
            let size = t.desc.dtype().size();
            for flat in 0..t.desc.elements() {
                let (mut rest, mut at) = (flat, t.offset as usize);
                for axis in (0..t.desc.rank()).rev() {
                    at += (rest % t.desc.dim(axis)) * t.desc.stride(axis) * size;
                    rest /= t.desc.dim(axis);
                }
                outside[at..at + size].fill(false);
            }
            let bytes = bytes(t);
            outside.iter().zip(bytes).filter(|(out, _)| **out).map(|(_, b)| b).collect::<Vec<_>>()
        };
        let before: Vec<_> = written(&op).iter().map(|(_, t)| gaps(t)).collect();
        execute(&op, &Context { isa: Isa::detect(), threads: 1 }).unwrap();
        for ((operand, t), before) in written(&op).iter().zip(before) {
            assert_eq!(gaps(t), before, "{name}: around {operand}");
        }
        let aliased = |t: &SimTensor| written(&op).iter().any(|(_, w)| w.memory.id == t.memory.id);
        for (operand, t, before) in others {
            assert!(aliased(t) || bytes(t) == before, "{name}: {operand} is only read");
        }
    }
}

/// The two ops that a fused one stands for; the first writes to `between`.
fn pair(op: &Op<SimTensor>, between: SimTensor) -> Option<[Op<SimTensor>; 2]> {
    let x = between.clone();
    Some(match op.clone() {
        Op::RmsNormQuantize(o) => {
            let out = between;
            let norm = RmsNorm { x: o.x, weight: o.weight, residual: o.residual, out, eps: o.eps };
            let quantize = Quantize {
                x,
                row_offsets: None,
                q: o.q,
                scales: o.scales,
                column_offset: o.column_offset,
                scale_format: o.scale_format,
                expected_rows: 0,
            };
            [norm.into(), quantize.into()]
        }
        Op::SwiGluQuantize(o) => {
            let (out, row_offsets) = (between, o.row_offsets.clone());
            let swiglu = SwiGlu { x: o.x, out, row_offsets, expected_rows: 0 };
            let quantize = Quantize {
                x,
                row_offsets: o.row_offsets,
                q: o.q,
                scales: o.scales,
                column_offset: o.column_offset,
                scale_format: o.scale_format,
                expected_rows: 0,
            };
            [swiglu.into(), quantize.into()]
        }
        _ => return None,
    })
}

#[test]
fn a_fused_op_has_the_bits_of_the_pair() {
    let mut compared = 0;
    for (name, _, op) in cases() {
        let (q, dtype, kept) = match &op {
            Op::RmsNormQuantize(o) => (&o.q, o.x.desc.dtype(), o.out.clone()),
            Op::SwiGluQuantize(o) => (&o.q, o.x.desc.dtype(), None),
            _ => continue,
        };
        let between = tensor(dtype, &[q.desc.dim(0), q.desc.dim(1)], |_| 0.0);
        let before: Vec<_> = written(&op).iter().map(|(_, t)| bytes(t)).collect();
        let run = |ops: &[Op<SimTensor>], isa| {
            written(&op).iter().zip(&before).for_each(|((_, t), saved)| restore(t, saved));
            ops.iter().for_each(|op| {
                execute(op, &Context { isa, threads: 1 }).unwrap();
            });
            written(&op).iter().map(|(_, t)| bytes(t)).collect::<Vec<_>>()
        };
        let pair = pair(&op, kept.unwrap_or(between)).expect("it is a fused op");
        let expected = run(&pair, Isa::Portable);
        for isa in Isa::available() {
            assert_eq!(run(std::slice::from_ref(&op), isa), expected, "{name} on {isa:?}");
            compared += 1;
        }
    }
    assert!(compared > 0, "there are cases");
}

/// A linear op over some rows of the same activations.
fn linear_rows(dtype: DType, rows: std::ops::Range<usize>) -> Op<SimTensor> {
    let mut rng = Rng(7);
    let (k, n) = (300, 70);
    let x = tensor(dtype, &[20, k], |_| rng.normal());
    let w = tensor(dtype, &[n, k], |_| rng.normal());
    let fp8 = dtype == DType::F8E4M3;
    let mut scales = |shape: &[usize]| fp8.then(|| tensor(DType::F32, shape, |_| rng.unit() + 0.5));
    let (x_scales, w_scales) = (scales(&[20, 3]), scales(&[1, 3]));
    let part = |t: SimTensor| {
        let (offset, desc) = t.desc.narrowed(0, rows.start, rows.len());
        SimTensor { offset, desc, ..t }
    };
    let out = tensor(DType::F32, &[rows.len(), n], |_| 0.0);
    let (x, x_scales) = (part(x), x_scales.map(part));
    Linear { x, x_scales, w, w_scales, out, grid: BlockGrid::default() }.into()
}

#[test]
fn a_row_is_the_same_alone_and_in_any_batch() {
    for dtype in [DType::F32, DType::Bf16, DType::F8E4M3] {
        for isa in Isa::available() {
            let run = |rows: std::ops::Range<usize>| {
                let op = linear_rows(dtype, rows);
                execute(&op, &Context { isa, threads: 1 }).unwrap();
                let (_, out) = written(&op)[0];
                values(out)
            };
            let all = run(0..20);
            for rows in [0..1, 3..4, 19..20, 2..5, 5..12, 1..19] {
                let start = rows.start;
                let part = run(rows);
                assert_eq!(part, all[start * 70..start * 70 + part.len()], "{dtype} from {start}");
            }
        }
    }
}

#[test]
fn an_fp8_nan_reaches_the_result() {
    for isa in Isa::available() {
        for rows in [0..1, 0..20] {
            let op = linear_rows(DType::F8E4M3, rows.clone());
            let Op::Linear(o) = &op else { unreachable!("it is a linear op") };
            // Weight row 5, column 299: in the tail of the last group.
            o.w.memory.try_write(5 * 300 + 299, 1, |b| b[0] = 0xff).unwrap();
            execute(&op, &Context { isa, threads: 1 }).unwrap();
            let out = values(&o.out);
            let nans = out.iter().enumerate().filter(|(_, v)| v.is_nan()).map(|(i, _)| i % 70);
            assert_eq!(nans.collect::<Vec<_>>(), vec![5; rows.len()]);
        }
    }
}

#[test]
fn hostile_values_are_errors_not_panics() {
    for (name, op, words) in op::hostile() {
        let error = execute(&place(&op), &PLAIN).unwrap_err();
        assert!(error.contains(words), "{name}: {error}");
    }
}

#[test]
fn ties_go_to_the_lower_number() {
    let experts = tensor(DType::I32, &[2], |_| 0.0);
    let weights = tensor(DType::F32, &[1, 2], |_| 0.0);
    let logits = tensor(DType::F32, &[1, 6], |_| 0.25);
    let (groups, groups_kept, normalize, scale) = (3, 2, true, 1.0);
    let experts = SimTensor { desc: hal::TensorDesc::new(DType::I32, &[1, 2]), ..experts };
    let gate: Op<SimTensor> =
        Gate { logits, bias: None, experts, weights, groups, groups_kept, normalize, scale }.into();
    execute(&gate, &PLAIN).unwrap();
    assert_eq!(values(written(&gate)[0].1), [0.0, 1.0]);
}

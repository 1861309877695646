//! Every op on the device: values, bits, what is left alone, and values that make it fail.

use crate::backend::Feature;
use crate::lab::{
    Finding, Lab, SOON, Verdict, ensure, equal, failed, floats, is, pattern, read, refused, upload,
};
use crate::op::{self, HostMemory, HostTensor, reference};
use crate::run::Case;
use hal::op::{AttentionWork, BlockGrid, Linear, MlaDecode, RmsNorm};
use hal::{Buffer, Cause, DType, Op, Stream, Support, Tensor, TensorDesc};
use std::collections::HashMap;
use std::sync::Arc;

/// Bytes on both sides of every operand that nothing may touch. A multiple of every alignment that
/// an op may ask of a view.
const GUARD: u64 = 256;

pub(crate) fn add_cases(all: &mut Vec<Case>) {
    for (name, op) in op::cases() {
        all.push(
            Case::new(format!("op/{name}"), move |lab| agrees(lab, &op)).needs(&[Feature::Values]),
        );
    }
    for (name, op, _) in op::hostile() {
        let name = name.replace(' ', "_");
        let case = Case::new(format!("op/hostile/{name}"), move |lab| hostile(lab, &op));
        all.push(case.needs(&[Feature::Values]));
    }
    for nan in NANS {
        let case = move |lab: &Lab| nan_shows(lab, nan);
        all.push(
            Case::new(format!("op/nan/linear/{}", nan.name()), case).needs(&[Feature::Values]),
        );
    }
    for dtype in [DType::F32, DType::Bf16, DType::F8E4M3] {
        // Rows shorter than any vector are what narrow parts of a weight come down to.
        for (name, columns) in [("", 300), ("/short_rows", 13)] {
            let name = format!("op/batching/linear/{dtype}{name}");
            let case = move |lab: &Lab| linear_alone_and_in_batch(lab, dtype, columns);
            all.push(Case::new(name, case).needs(&[Feature::Values]));
        }
    }
    for dtype in [DType::F32, DType::Bf16] {
        all.push(
            Case::new(format!("op/batching/rms_norm/{dtype}"), move |lab| norm_rows(lab, dtype))
                .needs(&[Feature::Values]),
        );
        all.push(
            Case::new(format!("op/batching/mla_decode/{dtype}"), move |lab| {
                decode_rows(lab, dtype)
            })
            .needs(&[Feature::Values]),
        );
    }
}

/// Operands on the device, each inside guards; aliases stay aliases.
pub(crate) struct Placed {
    pub(crate) op: Op<Tensor>,
    buffers: Vec<(Arc<HostMemory>, Buffer)>,
}

impl Placed {
    pub(crate) fn new(stream: &dyn Stream, op: &Op<HostTensor>) -> Verdict<Placed> {
        let mut buffers: Vec<(Arc<HostMemory>, Buffer)> = Vec::new();
        let mut known: HashMap<*const HostMemory, Buffer> = HashMap::new();
        let op = op.try_map(|t| {
            let buffer = match known.get(&Arc::as_ptr(&t.memory)) {
                Some(buffer) => buffer.clone(),
                None => {
                    let buffer = upload(stream, &guarded(t.memory.bytes()))?;
                    known.insert(Arc::as_ptr(&t.memory), buffer.clone());
                    buffers.push((t.memory.clone(), buffer.clone()));
                    buffer
                }
            };
            Ok::<_, Finding>(Tensor::new(buffer, t.offset + GUARD, t.desc))
        })?;
        Ok(Placed { op, buffers })
    }

    /// Puts back what was there before it ran.
    fn restore(&self, stream: &dyn Stream) -> Verdict {
        self.buffers.iter().try_for_each(|(memory, buffer)| {
            Ok(stream.write(&buffer.whole(), &guarded(memory.bytes()))?)
        })
    }

    fn contents(&self, stream: &dyn Stream) -> Verdict<Vec<Vec<u8>>> {
        self.buffers.iter().map(|(_, buffer)| read(stream, &buffer.whole())).collect()
    }
}

fn guarded(bytes: &[u8]) -> Vec<u8> {
    let guard = pattern(GUARD as usize, 99);
    [&guard, bytes, &guard].concat()
}

/// Runs an op from the same operands twice, and returns what is in its buffers afterwards.
fn run_twice(stream: &dyn Stream, placed: &Placed) -> Verdict<Vec<Vec<u8>>> {
    stream.submit(&placed.op.clone().into())?;
    let first = placed.contents(stream)?;
    placed.restore(stream)?;
    stream.submit(&placed.op.clone().into())?;
    ensure(placed.contents(stream)? == first, || "a second run gives other bits".into())?;
    Ok(first)
}

fn agrees(lab: &Lab, op: &Op<HostTensor>) -> Verdict {
    if let Support::No(reason) = lab.die(0).supports(&op.desc()) {
        return Err(format!("the device does not support it: {reason}").into());
    }
    let expected = reference::run(op);
    let stream = lab.stream(0)?;
    let placed = Placed::new(&*stream, op)?;
    let contents = run_twice(&*stream, &placed)?;
    let index = |memory: &Arc<HostMemory>| {
        placed.buffers.iter().position(|(m, _)| Arc::ptr_eq(m, memory)).unwrap_or(usize::MAX)
    };
    let outputs = op::written(op);
    equal("outputs", outputs.len(), expected.len())?;
    for ((name, tensor), expected) in outputs.iter().zip(expected) {
        let bytes = &contents[index(&tensor.memory)];
        let view = bytes.get((tensor.offset + GUARD) as usize..).unwrap_or_default();
        let got = reference::decode(&tensor.desc, view).v;
        op::compare_output(op.kind(), tensor.desc.dtype(), &got, &expected)
            .map_err(|e| format!("{name}{e}"))?;
        // Elements without an expected value are left as they were, bit by bit.
        let (before, mut elements, mut touched) = (tensor.memory.bytes(), expected.iter(), None);
        tensor.for_each_element(|range| {
            let after = &bytes[range.start + GUARD as usize..range.end + GUARD as usize];
            if elements.next().is_some_and(|v| v.is_nan()) && after != &before[range.clone()] {
                touched = touched.or(Some(range.start));
            }
        });
        ensure(touched.is_none(), || {
            format!("byte {touched:?} of {name} was written, in a row to leave alone")
        })?;
    }
    // Every byte that is no element of an output is as it was.
    for (i, (memory, _)) in placed.buffers.iter().enumerate() {
        let mut may_change = vec![false; memory.bytes().len()];
        for (_, tensor) in outputs.iter().filter(|(_, t)| Arc::ptr_eq(&t.memory, memory)) {
            tensor.for_each_element(|range| may_change[range].fill(true));
        }
        let (before, after) = (guarded(memory.bytes()), &contents[i]);
        let touched = (0..before.len()).find(|&at| {
            let inside = at.checked_sub(GUARD as usize).and_then(|at| may_change.get(at));
            before[at] != after[at] && inside != Some(&true)
        });
        ensure(touched.is_none(), || {
            format!("byte {touched:?} of operand buffer {i} ({GUARD} before it) was written")
        })?;
    }
    Ok(())
}

fn hostile(lab: &Lab, op: &Op<HostTensor>) -> Verdict {
    let stream = lab.stream(0)?;
    let placed = Placed::new(&*stream, op)?;
    let submitted = stream.submit(&placed.op.clone().label("hostile values"));
    let error = match submitted {
        // A device that looks before it accepts may say so at once.
        Err(error) => return is(&error, "Usage or Failed", |e| crate::lab::usage(e) || failed(e)),
        Ok(()) => refused("an op with hostile values", stream.synchronize(SOON))?,
    };
    is(&error, "Failed", failed)?;
    let origin = error.origin().ok_or("no origin")?;
    equal("the op of the origin", origin.op, op.kind().name())?;
    equal("the label of the origin", origin.label.as_str(), "hostile values")?;
    equal("the sequence of the origin", origin.sequence, stream.point().value())?;
    ensure(matches!(origin.cause, Cause::Data(_)), || format!("cause {:?}", origin.cause))?;
    // The die goes on.
    let other = lab.stream(0)?;
    let x = floats(&*other, &[1.0])?;
    other.submit(&crate::lab::add(&x, &x, &x).into())?;
    other.synchronize(SOON)?;
    Ok(())
}

/// Which FP8 operand holds a NaN.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Nan {
    Activation,
    Weight,
    Scale,
}

const NANS: [Nan; 3] = [Nan::Activation, Nan::Weight, Nan::Scale];

impl Nan {
    fn name(self) -> &'static str {
        match self {
            Nan::Activation => "activation",
            Nan::Weight => "weight",
            Nan::Scale => "scale",
        }
    }
}

/// A NaN in FP8 is a NaN in every sum that it is part of, and nowhere else; with few and with many
/// tokens, which devices often compute by different kernels.
fn nan_shows(lab: &Lab, nan: Nan) -> Verdict {
    let stream = lab.stream(0)?;
    for t in [2, 5, 40] {
        let (n, k) = (6, 150);
        let poke = |tensor: HostTensor, here: bool, at: usize, bytes: &[u8]| {
            let mut all = tensor.memory.bytes().to_vec();
            if here {
                all[at..at + bytes.len()].copy_from_slice(bytes);
            }
            HostTensor { memory: Arc::new(HostMemory::new(all)), ..tensor }
        };
        let one = |shape: &[usize]| op::cases::tensor(DType::F32, shape, |_| 1.0);
        let (x, w) = (random(DType::F8E4M3, &[t, k], 1), random(DType::F8E4M3, &[n, k], 2));
        let (row, column) = (1, 3);
        let linear = Linear {
            x: poke(x, nan == Nan::Activation, row * k + 149, &[0xff]),
            x_scales: Some(poke(
                one(&[t, 2]),
                nan == Nan::Scale,
                (row * 2 + 1) * 4,
                &f32::NAN.to_le_bytes(),
            )),
            w: poke(w, nan == Nan::Weight, column * k + 7, &[0x7f]),
            w_scales: Some(one(&[1, 2])),
            out: random(DType::F32, &[t, n], 3),
            grid: BlockGrid::default(),
        };
        let bytes = output(&*stream, &linear.into())?;
        for (i, v) in bytes.as_chunks::<4>().0.iter().enumerate() {
            let expected = match nan {
                Nan::Weight => i % n == column,
                Nan::Activation | Nan::Scale => i / n == row,
            };
            ensure(f32::from_le_bytes(*v).is_nan() == expected, || {
                format!("{t} tokens: element {i} is {}", f32::from_le_bytes(*v))
            })?;
        }
    }
    Ok(())
}

/// The bytes of the only output of an op.
fn output(stream: &dyn Stream, op: &Op<HostTensor>) -> Verdict<Vec<u8>> {
    let placed = Placed::new(stream, op)?;
    stream.submit(&placed.op.clone().into())?;
    let outputs = op::written(&placed.op);
    let (_, out) = outputs.first().ok_or("no output")?;
    read(stream, &out.region())
}

/// Rows of a contiguous tensor.
fn rows(t: &HostTensor, range: std::ops::Range<usize>) -> HostTensor {
    let (offset, desc) = t.desc.narrowed(0, range.start, range.len());
    HostTensor { memory: t.memory.clone(), offset: t.offset + offset, desc }
}

fn random(dtype: DType, shape: &[usize], seed: u64) -> HostTensor {
    let mut rng = op::Rng(seed);
    op::cases::tensor(dtype, shape, |_| rng.normal())
}

/// Rows of a batch have the bits that they have alone and in smaller batches.
fn same_rows(
    lab: &Lab,
    total: usize,
    op: impl Fn(std::ops::Range<usize>) -> Op<HostTensor>,
) -> Verdict {
    let stream = lab.stream(0)?;
    let whole = output(&*stream, &op(0..total))?;
    let row = whole.len() / total;
    for range in [0..1, total - 1..total, 2..5, 1..total - 1, total / 2..total / 2 + 1] {
        let part = output(&*stream, &op(range.clone()))?;
        ensure(part == whole[range.start * row..range.end * row], || {
            format!("rows {range:?} have other bits than in a batch of {total}")
        })?;
    }
    Ok(())
}

fn linear_alone_and_in_batch(lab: &Lab, dtype: DType, columns: usize) -> Verdict {
    let (t, n, k) = (20, 70, columns);
    let groups = k.div_ceil(hal::op::FP8_BLOCK);
    let (x, w) = (random(dtype, &[t, k], 1), random(dtype, &[n, k], 2));
    let fp8 = dtype == DType::F8E4M3;
    let mut rng = op::Rng(3);
    let mut scales =
        |shape: &[usize]| fp8.then(|| op::cases::tensor(DType::F32, shape, |_| rng.unit() + 0.5));
    let (x_scales, w_scales) = (scales(&[t, groups]), scales(&[1, groups]));
    same_rows(lab, t, |range| {
        Linear {
            x: rows(&x, range.clone()),
            x_scales: x_scales.as_ref().map(|s| rows(s, range.clone())),
            w: w.clone(),
            w_scales: w_scales.clone(),
            out: random(DType::F32, &[range.len(), n], 4),
            grid: BlockGrid::default(),
        }
        .into()
    })
}

fn norm_rows(lab: &Lab, dtype: DType) -> Verdict {
    let (x, weight) = (random(dtype, &[20, 300], 1), random(dtype, &[300], 2));
    same_rows(lab, 20, |range| {
        let out = random(dtype, &[range.len(), 300], 3);
        let (x, weight) = (rows(&x, range), weight.clone());
        RmsNorm { x, weight, residual: None, out, eps: 1e-6 }.into()
    })
}

/// Twenty sequences of one new token each, of different lengths.
fn decode_rows(lab: &Lab, dtype: DType) -> Verdict {
    let (heads, rank, rope, page, sequences) = (3, 40, 8, 4, 20usize);
    let lengths: Vec<i32> = (0..sequences as i32).map(|i| 1 + i * 3 % 17).collect();
    let max_pages = 5;
    let cache = random(dtype, &[sequences * max_pages, page, rank + rope], 1);
    let (q_latent, q_rope) =
        (random(dtype, &[sequences, heads, rank], 2), random(dtype, &[sequences, heads, rope], 3));
    let pages: Vec<i32> = (0..(sequences * max_pages) as i32)
        .map(|i| i * 7 % (sequences * max_pages) as i32)
        .collect();
    let table = op::cases::ints(&pages);
    let table = HostTensor { desc: TensorDesc::new(DType::I32, &[sequences, max_pages]), ..table };
    same_rows(lab, sequences, |range| {
        let starts: Vec<i32> = (0..=range.len() as i32).collect();
        let mut work = AttentionWork::default();
        lengths[range.clone()].iter().for_each(|&kv| work.add(1, kv as u64));
        MlaDecode {
            q_latent: rows(&q_latent, range.clone()),
            q_rope: rows(&q_rope, range.clone()),
            cache: cache.clone(),
            block_table: rows(&table, range.clone()),
            q_starts: op::cases::ints(&starts),
            kv_lens: op::cases::ints(&lengths[range.clone()]),
            out: random(dtype, &[range.len(), heads, rank], 4),
            scale: 0.3,
            work,
        }
        .into()
    })
}

//! Fused ops: to the bit what the two ops give that they stand for.

use crate::backend::Feature;
use crate::lab::{Lab, Verdict, ensure, equal};
use crate::op::{self, HostMemory, HostTensor};
use crate::ops::Placed;
use crate::run::Case;
use hal::op::{Quantize, RmsNorm, SwiGlu};
use hal::{DType, Op, OpKind, Stream, Support, TensorDesc};
use std::sync::Arc;

pub(crate) fn add_cases(all: &mut Vec<Case>) {
    for kind in [OpKind::RmsNormQuantize, OpKind::SwiGluQuantize] {
        for dtype in [DType::F32, DType::Bf16] {
            let case = move |lab: &Lab| as_the_pair(lab, kind, dtype);
            let name = format!("op/{}/as_the_pair/{dtype}", kind.name());
            all.push(Case::new(name, case).needs(&[Feature::Values]));
        }
    }
}

/// The first of the two ops, what it gives, and the second.
struct Pair {
    first: Op<HostTensor>,
    second: Quantize<HostTensor>,
    /// Whether what lies between the two is an output of the fused op.
    kept: bool,
}

/// The pair that a fused op stands for; `None` for other ops.
fn pair(op: &Op<HostTensor>) -> Option<Pair> {
    let between = |x: &HostTensor, q: &HostTensor| {
        op::cases::tensor(x.desc.dtype(), &[q.desc.dim(0), q.desc.dim(1)], |_| 1.0)
    };
    Some(match op.clone() {
        Op::RmsNormQuantize(o) => {
            let (kept, out) = (o.out.is_some(), o.out.unwrap_or_else(|| between(&o.x, &o.q)));
            let second = Quantize {
                x: out.clone(),
                row_offsets: None,
                q: o.q,
                scales: o.scales,
                column_offset: o.column_offset,
                scale_format: o.scale_format,
                expected_rows: 0,
            };
            let first = RmsNorm { x: o.x, weight: o.weight, residual: o.residual, out, eps: o.eps };
            Pair { first: first.into(), second, kept }
        }
        Op::SwiGluQuantize(o) => {
            let out = between(&o.x, &o.q);
            let second = Quantize {
                x: out.clone(),
                row_offsets: o.row_offsets.clone(),
                q: o.q,
                scales: o.scales,
                column_offset: o.column_offset,
                scale_format: o.scale_format,
                expected_rows: o.expected_rows,
            };
            let (row_offsets, expected_rows) = (o.row_offsets, o.expected_rows);
            let first = SwiGlu { x: o.x, row_offsets, out, expected_rows };
            Pair { first: first.into(), second, kept: false }
        }
        _ => return None,
    })
}

fn as_the_pair(lab: &Lab, kind: OpKind, dtype: DType) -> Verdict {
    let stream = lab.stream(0)?;
    let mut compared = 0;
    for (name, op) in op::cases().into_iter().filter(|(_, op)| op.kind() == kind) {
        let Some(Pair { first, second, kept }) = pair(&op) else { continue };
        if second.x.desc.dtype() != dtype || second.x.desc.elements() == 0 {
            continue;
        }
        if let Support::No(reason) = lab.die(0).supports(&op.desc()) {
            return Err(format!("the device does not support it: {reason}").into());
        }
        let fused = outputs(&*stream, &op)?;
        let mut expected = outputs(&*stream, &first)?;
        let Some(between) = expected.last().cloned() else { return Err("no output".into()) };
        if !kept {
            expected.pop();
        }
        expected.extend(outputs(
            &*stream,
            &Quantize { x: holding(&second.x, between), ..second }.into(),
        )?);
        equal("outputs", fused.len(), expected.len())?;
        for (((operand, _), fused), expected) in op::written(&op).iter().zip(&fused).zip(&expected)
        {
            ensure(fused == expected, || {
                format!("{name}: {operand} has other bits than the pair")
            })?;
        }
        compared += 1;
    }
    ensure(compared > 0, || format!("there is no case of {}", kind.name()))
}

/// The view, over memory that holds these bytes from its first element on.
fn holding(view: &HostTensor, bytes: Vec<u8>) -> HostTensor {
    let desc: TensorDesc = view.desc;
    HostTensor { memory: Arc::new(HostMemory::new(bytes)), offset: 0, desc }
}

/// Runs an op and returns the bytes of its outputs' views, in order.
fn outputs(stream: &dyn Stream, op: &Op<HostTensor>) -> Verdict<Vec<Vec<u8>>> {
    let placed = Placed::new(stream, op)?;
    stream.submit(&placed.op.clone().into())?;
    op::written(&placed.op)
        .into_iter()
        .map(|(_, tensor)| crate::lab::read(stream, &tensor.region()))
        .collect()
}

//! `supports`: that it never disagrees with execution, and the matrix that documents print.

use crate::lab::{Lab, SOON, Verdict, ensure, equal, is, refused, usage};
use crate::op;
use crate::run::Case;
use hal::op::Access;
use hal::{DType, Device, Error, Op, OpKind, Operand, Support, Tensor, TensorDesc};
use serde::Serialize;
use std::collections::BTreeMap;
use std::fmt::Write;

pub(crate) fn add_cases(all: &mut Vec<Case>) {
    let ops: Vec<Op<TensorDesc>> = op::cases().iter().map(|(_, op)| op.desc()).collect();
    for &kind in OpKind::ALL {
        let samples: Vec<_> = ops.iter().filter(|op| op.kind() == kind).take(3).cloned().collect();
        let case = move |lab: &Lab| agrees(lab, kind, &samples);
        all.push(Case::new(format!("supports/{}", kind.name()), case));
    }
}

/// Well-formed ops, and the same with one operand changed.
fn variants(samples: &[Op<TensorDesc>]) -> Vec<Op<TensorDesc>> {
    let mut all = Vec::new();
    for sample in samples {
        all.push(sample.clone());
        let mut operands = 0;
        sample.visit(|_, _, _| operands += 1);
        for changed in 0..operands {
            for change in [
                |d: &TensorDesc| TensorDesc::new(DType::U8, &shape(d)),
                |d: &TensorDesc| TensorDesc::new(DType::I32, &shape(d)),
                |d: &TensorDesc| {
                    let mut shape = shape(d);
                    shape[0] += 1;
                    TensorDesc::new(d.dtype(), &shape)
                },
                |d: &TensorDesc| {
                    let mut shape = shape(d);
                    let last = shape.len() - 1;
                    shape[last] += 1;
                    TensorDesc::new(d.dtype(), &shape)
                },
                |d: &TensorDesc| match d.rank() {
                    4 => *d,
                    _ => TensorDesc::new(d.dtype(), &[&[1], shape(d).as_slice()].concat()),
                },
            ] {
                let mut i = 0;
                all.push(sample.map(|desc| {
                    i += 1;
                    if i - 1 == changed { change(desc) } else { *desc }
                }));
            }
        }
    }
    all
}

fn shape(desc: &TensorDesc) -> Vec<usize> {
    desc.shape().iter().map(|&d| d as usize).collect()
}

/// What `supports` says of an op is what `submit` does with it. Commands that are accepted may
/// still fail on their values (all zero here), which is another matter.
fn agrees(lab: &Lab, kind: OpKind, samples: &[Op<TensorDesc>]) -> Verdict {
    let die = lab.die(0);
    let (mut yes, mut no) = (0, 0);
    for op in variants(samples) {
        let stream = lab.stream(0)?;
        let tensors = op.try_map(|desc| {
            let buffer = stream.alloc(desc.extent())?;
            stream.fill(&buffer.whole(), 0)?;
            Ok::<_, Error>(Tensor::new(buffer, 0, *desc.desc()))
        })?;
        let before = stream.point().value();
        let submitted = stream.submit(&tensors.into());
        let well_formed = hal::op::check(&op);
        match die.supports(&op) {
            Support::Yes => {
                yes += 1;
                if let Err(error) = submitted {
                    return Err(format!("supports {op:?}, and submit says: {error}").into());
                }
                ensure(well_formed.is_ok(), || format!("supports {op:?}, which is malformed"))?;
                // Wait, so that no work is left; values may be refused.
                let _ = stream.synchronize(SOON);
            }
            Support::No(reason) => {
                no += 1;
                ensure(!reason.is_empty(), || format!("no reason why {op:?} is unsupported"))?;
                let error = refused("an unsupported op", submitted)?;
                is(&error, "Unsupported", |e| matches!(e, Error::Unsupported { .. }) || usage(e))?;
                equal("commands submitted", stream.point().value(), before)?;
                stream.synchronize(SOON)?;
            }
        }
    }
    ensure(yes > 0, || format!("the device supports no {}", kind.name()))?;
    ensure(no > 0, || "no malformed op was refused".into())
}

/// One line of the support matrix: an op with operands of one class of dtypes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Row {
    /// The op.
    pub op: &'static str,
    /// Dtypes that are read, in the order of the operands.
    pub reads: Vec<&'static str>,
    /// Dtypes that are written.
    pub writes: Vec<&'static str>,
    /// Why the device does not run it; absent where it does.
    pub unsupported: Option<String>,
}

/// Which ops a device runs, on which dtypes, by asking it about every op that the suite has a case
/// for. Combinations of dtypes of which some ops run and some do not count as unsupported.
pub fn support_matrix(device: &dyn Device) -> Vec<Row> {
    let mut rows: BTreeMap<(usize, Vec<&'static str>, Vec<&'static str>), Row> = BTreeMap::new();
    for (_, op) in op::cases() {
        let (mut reads, mut writes) = (Vec::new(), Vec::new());
        op.visit(|_, access: Access, t| {
            let list = if access == Access::Read { &mut reads } else { &mut writes };
            list.push(t.desc.dtype().name());
        });
        reads.dedup();
        writes.dedup();
        let place = OpKind::ALL.iter().position(|&kind| kind == op.kind()).unwrap_or_default();
        let unsupported = match device.supports(&op.desc()) {
            Support::Yes => None,
            Support::No(reason) => Some(reason),
        };
        let row = Row { op: op.kind().name(), reads, writes, unsupported };
        let kept =
            rows.entry((place, row.reads.clone(), row.writes.clone())).or_insert(row.clone());
        // One op that does not run is what a reader must know of.
        if kept.unsupported.is_none() {
            *kept = row;
        }
    }
    rows.into_values().collect()
}

/// The matrix in Markdown, one column per device.
pub fn support_table(devices: &[(&str, Vec<Row>)]) -> String {
    let mut out = String::from("| op | reads | writes |");
    for (name, _) in devices {
        let _ = write!(out, " {name} |");
    }
    let _ = writeln!(out, "\n|---|---|---|{}", "---|".repeat(devices.len()));
    let Some((_, first)) = devices.first() else { return out };
    for row in first {
        let _ =
            write!(out, "| `{}` | {} | {} |", row.op, row.reads.join(", "), row.writes.join(", "));
        for (_, rows) in devices {
            let same = rows
                .iter()
                .find(|r| (r.op, &r.reads, &r.writes) == (row.op, &row.reads, &row.writes));
            let answer = match same.map(|r| &r.unsupported) {
                Some(None) => "yes",
                Some(Some(reason)) => reason,
                None => "not asked",
            };
            let _ = write!(out, " {answer} |");
        }
        out.push('\n');
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_are_matched_by_op_and_dtypes() {
        let row = |op, reads: &[&'static str], unsupported: Option<&str>| Row {
            op,
            reads: reads.to_vec(),
            writes: vec!["f32"],
            unsupported: unsupported.map(str::to_string),
        };
        let one = vec![row("add", &["f32"], None), row("add", &["bf16"], None)];
        let two = vec![row("add", &["bf16"], Some("no BF16 unit"))];
        let table = support_table(&[("one", one), ("two", two)]);
        let lines: Vec<&str> = table.lines().collect();
        assert_eq!(lines[0], "| op | reads | writes | one | two |");
        assert_eq!(lines[2], "| `add` | f32 | f32 | yes | not asked |");
        assert_eq!(lines[3], "| `add` | bf16 | f32 | yes | no BF16 unit |");
    }

    #[test]
    fn every_op_has_a_row_on_a_device_that_refuses_none() {
        let device = hal::NullDevice::new(hal::DeviceId(0), 1 << 20);
        let rows = support_matrix(&*device);
        for kind in OpKind::ALL {
            assert!(rows.iter().any(|r| r.op == kind.name()), "no row about {}", kind.name());
        }
        let keys: std::collections::BTreeSet<_> =
            rows.iter().map(|r| (r.op, &r.reads, &r.writes)).collect();
        assert_eq!(keys.len(), rows.len(), "a combination has one row");
    }
}

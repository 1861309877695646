//! What a recorded command must keep to before a device sees it: a file is not to be trusted.

use super::{Player, Stop};
use crate::record::{Part, Span, View};
use hal::{
    Collective, CollectiveKind, Location, Op, Operand, PeerCounts, Region, Tensor, TensorDesc,
};
use std::sync::Arc;

/// The most ranks that a communicator is made for.
pub(super) const MOST_RANKS: usize = 1 << 16;

fn refuse<T>(problem: impl Into<String>) -> Result<T, Stop> {
    Err(Stop::Refused(problem.into()))
}

impl Player<'_> {
    /// A region of memory that is there, within its bounds.
    pub(super) fn region(&self, span: &Span) -> Result<Region, Stop> {
        let memory = self.memory(span.buffer)?;
        memory.buffer.region(span.offset, span.len).map_err(|e| Stop::Refused(e.to_string()))
    }

    /// A tensor on `die`, within its memory and aligned.
    pub(super) fn tensor(&self, view: &View, die: u32) -> Result<Tensor, Stop> {
        let memory = self.memory(view.buffer)?;
        let desc = view.desc().map_err(Stop::Bad)?;
        let buffer = &memory.buffer;
        if !matches!(buffer.location(), Location::Device(id) if id.0 == die) {
            return refuse(format!("{desc:?} lies in {buffer:?}, not in the memory of die {die}"));
        }
        let end = view.offset.checked_add(desc.extent());
        if end.is_none_or(|end| end > buffer.size()) {
            return refuse(format!("{desc:?} at byte {} leaves {buffer:?}", view.offset));
        }
        if !view.offset.is_multiple_of(desc.dtype().size() as u64) {
            return refuse(format!("{desc:?} at byte {} is not aligned", view.offset));
        }
        Ok(Tensor::new(buffer.clone(), view.offset, desc))
    }

    /// An op on `die` that keeps the shape rules.
    pub(super) fn op(&self, op: &Op<View>, die: u32) -> Result<Op<Tensor>, Stop> {
        let op = op.try_map(|view| self.tensor(view, die))?;
        hal::op::check(&op.desc()).map_err(Stop::Refused)?;
        countable(&op.desc()).map_err(Stop::Refused)?;
        Ok(op)
    }

    /// One rank's batch that keeps the rules of collectives.
    pub(super) fn batch(
        &self,
        parts: &[Part],
        (die, rank, size): (u32, usize, usize),
    ) -> Result<Vec<Collective>, Stop> {
        let batch =
            parts.iter().map(|part| self.collective(part, die)).collect::<Result<Vec<_>, _>>()?;
        for collective in &batch {
            if let Collective::AllToAll { send, recv, counts: Some(counts) } = collective {
                let most = send.desc().elements().max(recv.desc().elements());
                // Before sums are taken that might not fit.
                if counts.send.iter().chain(&counts.recv).any(|&count| count > most) {
                    return refuse(format!("a count exceeds the {most} elements of the tensors"));
                }
            }
        }
        hal::collective::check(&batch, rank, size).map_err(Stop::Refused)?;
        Ok(batch)
    }

    fn collective(&self, part: &Part, die: u32) -> Result<Collective, Stop> {
        let lacks = |what: &str| Stop::Bad(format!("{} without {what}", part.kind.name()));
        let tensor = |view: &Option<View>, what: &str| {
            self.tensor(view.as_ref().ok_or_else(|| lacks(what))?, die)
        };
        let (send, recv) = (
            || tensor(&part.send, "a tensor to send"),
            || tensor(&part.recv, "a tensor to receive"),
        );
        let reduction = || part.reduction.ok_or_else(|| lacks("a reduction"));
        let peer = || part.peer.ok_or_else(|| lacks("a rank"));
        Ok(match part.kind {
            CollectiveKind::AllReduce => {
                Collective::AllReduce { send: send()?, recv: recv()?, reduction: reduction()? }
            }
            CollectiveKind::AllGather => Collective::AllGather { send: send()?, recv: recv()? },
            CollectiveKind::ReduceScatter => {
                Collective::ReduceScatter { send: send()?, recv: recv()?, reduction: reduction()? }
            }
            CollectiveKind::AllToAll => {
                let counts = part.counts.clone().map(|(send, recv)| PeerCounts { send, recv });
                Collective::AllToAll { send: send()?, recv: recv()?, counts: counts.map(Arc::new) }
            }
            CollectiveKind::AllToAllV => {
                let offsets = part.offsets.as_ref().ok_or_else(|| lacks("offsets"))?;
                Collective::AllToAllV {
                    send: send()?,
                    recv: recv()?,
                    send_offsets: self.tensor(&offsets.send, die)?,
                    recv_offsets: offsets
                        .recv
                        .as_ref()
                        .map(|view| self.tensor(view, die))
                        .transpose()?,
                    expected_rows: offsets.expected_rows,
                }
            }
            CollectiveKind::Broadcast => Collective::Broadcast { tensor: send()?, root: peer()? },
            CollectiveKind::Send => Collective::Send { tensor: send()?, peer: peer()? },
            CollectiveKind::Recv => Collective::Recv { tensor: recv()?, peer: peer()? },
        })
    }
}

/// Refuses hints about an op's work that no run can have given, and with which cost models would
/// count beyond 64 bits. Shapes need no such rule: they lie in memory.
fn countable(op: &Op<TensorDesc>) -> Result<(), String> {
    let last = |desc: &TensorDesc| desc.last_dim() as u128;
    let size = |desc: &TensorDesc| desc.dtype().size() as u128;
    let (operations, bytes) = match op {
        Op::MlaPrefill(o) => {
            let pairs = u128::from(o.work.pairs) * o.q.dim(1) as u128;
            (pairs * (2 * (last(&o.q) + last(&o.out)) + 8), 0)
        }
        Op::MlaDecode(o) => {
            let pairs = u128::from(o.work.pairs) * o.q_latent.dim(1) as u128;
            let bytes = u128::from(o.work.keys) * last(&o.cache) * size(&o.cache);
            (pairs * (2 * (last(&o.cache) + last(&o.q_latent)) + 8), bytes)
        }
        Op::GroupedLinear(o) => {
            let (n, k, rows) = (o.w.dim(1) as u128, last(&o.w), u128::from(o.routing.rows));
            (2 * rows * n * k, rows * (k * size(&o.x) + 4 * k + n * size(&o.out)))
        }
        _ => (0, 0),
    };
    let most = 1u128 << 60;
    if operations.max(bytes) <= most {
        return Ok(());
    }
    Err(format!("{} of {operations} operations and {bytes} bytes", op.kind().name()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use hal::DType;
    use hal::op::{AttentionWork, GroupedLinear, MlaDecode, Routing};

    #[test]
    fn hints_beyond_counting_are_refused() {
        let d = |shape: &[usize]| TensorDesc::new(DType::Bf16, shape);
        let i = |shape: &[usize]| TensorDesc::new(DType::I32, shape);
        let decode = |pairs, keys| {
            Op::from(MlaDecode {
                q_latent: d(&[1, 16, 512]),
                q_rope: d(&[1, 16, 64]),
                cache: d(&[4, 64, 576]),
                block_table: i(&[1, 4]),
                q_starts: i(&[2]),
                kv_lens: i(&[1]),
                out: d(&[1, 16, 512]),
                scale: 1.0,
                work: AttentionWork { pairs, keys },
            })
        };
        let grouped = |rows| {
            Op::from(GroupedLinear {
                x: d(&[4, 1 << 14]),
                x_scales: None,
                w: d(&[2, 1 << 14, 1 << 14]),
                w_scales: None,
                offsets: i(&[3]),
                out: d(&[4, 1 << 14]),
                grid: Default::default(),
                routing: Routing { rows, active_experts: 2 },
            })
        };
        for (op, allowed) in [
            (decode(256, 256), true),
            // A million tokens with all their keys, which no run exceeds.
            (decode(1 << 40, 1 << 20), true),
            (decode(u64::MAX, 256), false),
            (decode(256, u64::MAX), false),
            (decode(u64::MAX, u64::MAX), false),
            (grouped(4), true),
            (grouped(u32::MAX), false),
        ] {
            assert_eq!(hal::op::check(&op), Ok(()));
            assert_eq!(countable(&op).is_ok(), allowed, "{op:?}");
            if allowed {
                // Counting it does not overflow.
                assert!(hal::op::work(&op, None).matrix_ops > 0);
            }
        }
    }
}

//! Communicators.

use crate::device::{Child, DEVICES};
use crate::error::{Outcome, Refused, give, guard, text};
use crate::handles::Table;
use crate::memory::tensor;
use crate::stream::{STREAMS, label};
use hal::{
    Collective, CollectiveKind, Communicator, CommunicatorId, PeerCounts, Reduction, Tensor,
};
use std::ffi::c_char;
use std::sync::Arc;
use vacc::sys::*;
use vacc::wire;

/// A rank that a caller owns.
#[derive(Debug)]
pub(crate) struct Owned {
    pub(crate) communicator: Arc<dyn Communicator>,
    child: Child,
}

pub(crate) static COMMUNICATORS: Table<Owned> = Table::new("communicator", 5);

/// The most collectives in a batch: more is a mistake, not a batch.
const MOST: u32 = 1 << 16;

/// See `vacc.h`.
#[expect(unsafe_code, reason = "exported")]
#[unsafe(no_mangle)]
pub(crate) extern "C" fn vacc_comm_create_id(
    device: vacc_device,
    id: *mut vacc_comm_id,
) -> vacc_status {
    guard(|| {
        let die = DEVICES.get(device)?;
        let CommunicatorId([high, low]) =
            die.device.communicator_id().map_err(|e| die.refused(e))?;
        let mut wire = vacc_comm_id::default();
        wire.bytes[..8].copy_from_slice(&high.to_le_bytes());
        wire.bytes[8..].copy_from_slice(&low.to_le_bytes());
        give(id, "id", wire)
    })
}

/// See `vacc.h`.
#[expect(unsafe_code, reason = "exported")]
#[unsafe(no_mangle)]
pub(crate) extern "C" fn vacc_comm_init(
    device: vacc_device,
    id: *const vacc_comm_id,
    rank: u32,
    ranks: u32,
    comm: *mut vacc_comm,
) -> vacc_status {
    guard(|| {
        let die = DEVICES.get(device)?;
        if id.is_null() || comm.is_null() {
            return Err(Refused::null(if id.is_null() { "id" } else { "comm" }));
        }
        // SAFETY: not null, and the header obliges callers to pass one.
        let id = unsafe { id.read_unaligned() };
        let half = |at: usize| u64::from_le_bytes(std::array::from_fn(|i| id.bytes[at + i]));
        let id = CommunicatorId([half(0), half(8)]);
        let joined = die.device.communicator(id, rank as usize, ranks as usize);
        let communicator = joined.map_err(|e| die.refused(e))?;
        let owned = Owned { communicator, child: Child::of(die) };
        give(comm, "comm", COMMUNICATORS.add(Arc::new(owned))?)
    })
}

/// See `vacc.h`.
#[expect(unsafe_code, reason = "exported")]
#[unsafe(no_mangle)]
pub(crate) extern "C" fn vacc_comm_destroy(comm: vacc_comm) -> vacc_status {
    guard(|| COMMUNICATORS.remove(comm, |_| Ok(())).map(drop))
}

/// See `vacc.h`.
#[expect(unsafe_code, reason = "exported")]
#[unsafe(no_mangle)]
pub(crate) extern "C" fn vacc_comm_submit(
    comm: vacc_comm,
    stream: vacc_stream,
    batch: *const vacc_collective,
    count: u32,
    label_text: *const c_char,
    label_length: u64,
) -> vacc_status {
    guard(|| {
        let (rank, owned) = (COMMUNICATORS.get(comm)?, STREAMS.get(stream)?);
        let _alone = owned.alone()?;
        let label = label(label_text, label_length)?;
        let collectives = self::batch(batch, count, rank.communicator.size())?;
        let submitted = owned.stream.submit_collectives(&rank.communicator, &collectives, &label);
        submitted.map_err(|e| owned.refused(e))
    })
}

/// The batch that a caller passes.
#[expect(unsafe_code, reason = "reads a caller's array")]
pub(crate) fn batch(
    batch: *const vacc_collective,
    count: u32,
    ranks: usize,
) -> Outcome<Vec<Collective>> {
    if count > MOST {
        return Err(Refused::invalid(format!("a batch of {count}; at most {MOST}")));
    }
    let least = std::mem::offset_of!(vacc_collective, send_offsets);
    let one = |i: usize| {
        // SAFETY: the header obliges callers to pass `count` structs, each as large as the first
        // says.
        let wire = unsafe { read_element(batch, i, least) }?;
        collective(&wire, ranks)
    };
    (0..count as usize).map(one).collect()
}

fn present(wire: &vacc_tensor, name: &str) -> Outcome<Tensor> {
    match wire::optional(wire)? {
        Some(wire) => tensor(&wire),
        None => Err(Refused::invalid(format!("{name} is absent"))),
    }
}

fn collective(wire: &vacc_collective, ranks: usize) -> Outcome<Collective> {
    let Some(kind) = wire::collective_of(wire.kind) else {
        let text = format!("collective {} is not known here", wire.kind);
        return Err(Refused::new(VACC_ERROR_UNSUPPORTED, text));
    };
    let reduction = || -> Outcome<Reduction> {
        wire::reduction_of(wire.reduction).ok_or_else(|| {
            let text = format!("reduction {} is not known here", wire.reduction);
            Refused::new(VACC_ERROR_UNSUPPORTED, text)
        })
    };
    let send = || present(&wire.send, "send");
    let recv = || present(&wire.recv, "recv");
    let peer = wire.peer as usize;
    Ok(match kind {
        CollectiveKind::AllReduce => {
            Collective::AllReduce { send: send()?, recv: recv()?, reduction: reduction()? }
        }
        CollectiveKind::AllGather => Collective::AllGather { send: send()?, recv: recv()? },
        CollectiveKind::ReduceScatter => {
            Collective::ReduceScatter { send: send()?, recv: recv()?, reduction: reduction()? }
        }
        CollectiveKind::AllToAll => {
            Collective::AllToAll { send: send()?, recv: recv()?, counts: counts(wire, ranks)? }
        }
        CollectiveKind::AllToAllV => Collective::AllToAllV {
            send: send()?,
            recv: recv()?,
            send_offsets: present(&wire.send_offsets, "send_offsets")?,
            recv_offsets: match wire::optional(&wire.recv_offsets)? {
                Some(offsets) => Some(tensor(&offsets)?),
                None => None,
            },
            expected_rows: wire.expected_rows,
        },
        CollectiveKind::Broadcast => Collective::Broadcast { tensor: send()?, root: peer },
        CollectiveKind::Send => Collective::Send { tensor: send()?, peer },
        CollectiveKind::Recv => Collective::Recv { tensor: recv()?, peer },
    })
}

#[expect(unsafe_code, reason = "reads a caller's arrays")]
fn counts(wire: &vacc_collective, ranks: usize) -> Outcome<Option<Arc<PeerCounts>>> {
    let read = |at: *const u64| -> Outcome<Vec<usize>> {
        let one = |i: usize| {
            // SAFETY: not null, and the header obliges callers to pass one count per rank.
            let count = unsafe { at.add(i).read_unaligned() };
            usize::try_from(count).map_err(|_| Refused::invalid(format!("a count of {count}")))
        };
        (0..ranks).map(one).collect()
    };
    match (wire.send_counts.is_null(), wire.recv_counts.is_null()) {
        (true, true) => Ok(None),
        (false, false) => {
            let counts =
                PeerCounts { send: read(wire.send_counts)?, recv: read(wire.recv_counts)? };
            Ok(Some(Arc::new(counts)))
        }
        _ => Err(Refused::null("one of send_counts and recv_counts")),
    }
}

/// See `vacc.h`.
#[expect(unsafe_code, reason = "exported")]
#[unsafe(no_mangle)]
pub(crate) extern "C" fn vacc_comm_abort(
    comm: vacc_comm,
    reason: *const c_char,
    reason_length: u64,
) -> vacc_status {
    guard(|| {
        let owned = COMMUNICATORS.get(comm)?;
        owned.communicator.abort(text(reason, reason_length, "reason")?);
        Ok(())
    })
}

/// See `vacc.h`.
#[expect(unsafe_code, reason = "exported")]
#[unsafe(no_mangle)]
pub(crate) extern "C" fn vacc_comm_get_status(comm: vacc_comm) -> vacc_status {
    guard(|| {
        let owned = COMMUNICATORS.get(comm)?;
        owned.communicator.status().map_err(|e| owned.child.0.refused(e))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_and_absent_tensors_are_refused() {
        let wire = vacc_collective { kind: 1, ..vacc_collective::default() };
        let refused = collective(&wire, 2).unwrap_err();
        assert_eq!(refused.status(), VACC_ERROR_UNSUPPORTED as i32);
        let wire = vacc_collective { kind: VACC_COLLECTIVE_SEND, ..wire };
        let refused = collective(&wire, 2).unwrap_err();
        assert_eq!(refused.status(), VACC_ERROR_INVALID_ARGUMENT as i32);
        assert!(wire::WireTensor::try_from(&wire.send).is_err(), "a tensor without dtype is none");
    }
}

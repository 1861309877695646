//! Communicators behind the library.

use crate::device::DeviceShared;
use crate::memory::handle_of;
use crate::sys::*;
use crate::wire;
use hal::{Collective, Communicator, CommunicatorId, DeviceId, Error, Operand, Result, Tensor};
use std::any::Any;
use std::ptr::{null, null_mut};
use std::sync::Arc;

/// One rank's handle.
#[derive(Debug)]
pub(crate) struct VaccCommunicator {
    device: Arc<DeviceShared>,
    pub(crate) handle: vacc_comm,
    id: CommunicatorId,
    rank: usize,
    size: usize,
}

// SAFETY: a handle is a name that only the library reads, and the header lets any thread use it.
#[expect(unsafe_code, reason = "handles are raw pointers")]
unsafe impl Send for VaccCommunicator {}
// SAFETY: as above; nothing in here changes.
#[expect(unsafe_code, reason = "handles are raw pointers")]
unsafe impl Sync for VaccCommunicator {}

impl VaccCommunicator {
    #[expect(unsafe_code, reason = "calls the library")]
    pub(crate) fn join(
        device: Arc<DeviceShared>,
        id: CommunicatorId,
        rank: usize,
        size: usize,
    ) -> Result<VaccCommunicator> {
        let (Ok(wire_rank), Ok(ranks)) = (u32::try_from(rank), u32::try_from(size)) else {
            let problem = format!("rank {rank} of {size} does not fit 32 bits");
            return Err(Error::usage(device.id(), problem));
        };
        let mut wire_id = vacc_comm_id::default();
        for (to, from) in wire_id.bytes.chunks_exact_mut(8).zip(id.0) {
            to.copy_from_slice(&from.to_le_bytes());
        }
        let mut handle = null_mut();
        let api = device.instance.runtime.api();
        // SAFETY: the device is alive, the id and the result are locals.
        let status = unsafe {
            api.vacc_comm_init(device.handle, &raw const wire_id, wire_rank, ranks, &raw mut handle)
        };
        device.check("vacc_comm_init", status)?;
        Ok(VaccCommunicator { device, handle, id, rank, size })
    }
}

impl Communicator for VaccCommunicator {
    fn as_any(&self) -> &dyn Any {
        self
    }

    fn id(&self) -> CommunicatorId {
        self.id
    }

    fn rank(&self) -> usize {
        self.rank
    }

    fn size(&self) -> usize {
        self.size
    }

    fn device(&self) -> DeviceId {
        self.device.id()
    }

    #[expect(unsafe_code, reason = "calls the library")]
    fn abort(&self, reason: &str) {
        let (text, length) = (reason.as_ptr().cast(), reason.len() as u64);
        // SAFETY: the handle is alive, the text has this length.
        let status =
            unsafe { self.device.instance.runtime.api.vacc_comm_abort(self.handle, text, length) };
        self.device.deferred.keep(self.device.check("vacc_comm_abort", status));
    }

    #[expect(unsafe_code, reason = "calls the library")]
    fn status(&self) -> Result<()> {
        self.device.deferred.tell()?;
        // SAFETY: the handle is alive.
        let status = unsafe { self.device.instance.runtime.api.vacc_comm_get_status(self.handle) };
        self.device.check("vacc_comm_get_status", status)
    }
}

impl Drop for VaccCommunicator {
    #[expect(unsafe_code, reason = "calls the library")]
    fn drop(&mut self) {
        // SAFETY: the handle is ours and nobody else has it any more.
        let status = unsafe { self.device.instance.runtime.api.vacc_comm_destroy(self.handle) };
        self.device.deferred.keep(self.device.check("vacc_comm_destroy", status));
    }
}

/// A batch as the ABI writes it, with the counts that it points to.
pub(crate) struct Wires {
    batch: Vec<vacc_collective>,
    /// Behind boxes that do not move: the batch points into them.
    _counts: Vec<Box<[u64]>>,
}

impl Wires {
    pub(crate) fn new(device: &DeviceShared, batch: &[Collective]) -> Result<Wires> {
        let mut wires = Wires { batch: Vec::with_capacity(batch.len()), _counts: Vec::new() };
        for collective in batch {
            let wire = wires.one(device, collective)?;
            wires.batch.push(wire);
        }
        Ok(wires)
    }

    pub(crate) fn as_ptr(&self) -> *const vacc_collective {
        self.batch.as_ptr()
    }

    fn one(&mut self, device: &DeviceShared, collective: &Collective) -> Result<vacc_collective> {
        let tensor = |t: &Tensor| {
            Ok::<_, Error>(wire::tensor(t.desc(), handle_of(device, t.buffer())?, t.offset()))
        };
        let mut wire = vacc_collective {
            size: struct_size::<vacc_collective>(),
            kind: wire::collective(collective.kind()),
            send_counts: null(),
            recv_counts: null(),
            ..vacc_collective::default()
        };
        let number = |peer: &usize| u32::try_from(*peer).unwrap_or(u32::MAX);
        match collective {
            Collective::AllReduce { send, recv, reduction }
            | Collective::ReduceScatter { send, recv, reduction } => {
                (wire.send, wire.recv) = (tensor(send)?, tensor(recv)?);
                wire.reduction = wire::reduction(*reduction);
            }
            Collective::AllGather { send, recv } => {
                (wire.send, wire.recv) = (tensor(send)?, tensor(recv)?);
            }
            Collective::AllToAll { send, recv, counts } => {
                (wire.send, wire.recv) = (tensor(send)?, tensor(recv)?);
                if let Some(counts) = counts {
                    // The ABI has no length: the two lists are as long as there are ranks.
                    wire.send_counts = self.keep(&counts.send);
                    wire.recv_counts = self.keep(&counts.recv);
                }
            }
            Collective::AllToAllV { send, recv, send_offsets, recv_offsets, expected_rows } => {
                (wire.send, wire.recv) = (tensor(send)?, tensor(recv)?);
                wire.send_offsets = tensor(send_offsets)?;
                wire.recv_offsets =
                    recv_offsets.as_ref().map_or_else(|| Ok(vacc_tensor::default()), tensor)?;
                wire.expected_rows = *expected_rows;
            }
            Collective::Broadcast { tensor: t, root } => {
                (wire.send, wire.peer) = (tensor(t)?, number(root));
            }
            Collective::Send { tensor: t, peer } => {
                (wire.send, wire.peer) = (tensor(t)?, number(peer));
            }
            Collective::Recv { tensor: t, peer } => {
                (wire.recv, wire.peer) = (tensor(t)?, number(peer));
            }
        }
        Ok(wire)
    }

    fn keep(&mut self, counts: &[usize]) -> *const u64 {
        let counts: Box<[u64]> = counts.iter().map(|&n| n as u64).collect();
        let at = counts.as_ptr();
        self._counts.push(counts);
        at
    }
}

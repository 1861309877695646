//! Simulated streams: queues that worker threads drain.
//!
//! [`queue`] is the state of one stream and how commands enter it, [`advance`] how they are carried
//! out, [`timeline`] how far it has come; [`work`] is what a queued command is and does; [`list`]
//! launches many of them at once, [`prepared`] for launches to come, by [`recipe`]s. This file is the [`Stream`] that callers see.

mod advance;
mod list;
mod prepared;
mod queue;
mod recipe;
mod timeline;
mod work;

pub(crate) use advance::Held;
pub(crate) use list::execute;
pub(crate) use prepared::Script;
pub(crate) use queue::{Launch, StreamShared, Touch};
pub(crate) use recipe::{Recipe, Recipes};
pub(crate) use timeline::SPIN;
pub(crate) use work::Work;

use crate::collective::SimCommunicator;
use crate::device::{SimBuffer, memory_of};
use crate::memory::SimTensor;
use crate::{cost::Path, kernels};
use hal::op::Access;
use hal::trace::CommandKind;
use hal::{
    Buffer, Collective, Command, Communicator, Error, Label, LinkKind, Op, Operand, Point, Region,
    Result, Stream, StreamId, Tensor,
};
use parking_lot::Mutex;
use std::any::Any;
use std::sync::Arc;
use std::time::Duration;

/// The handle through which a stream is used.
#[derive(Debug)]
pub(crate) struct SimStream {
    shared: Arc<StreamShared>,
}

impl SimStream {
    pub(crate) fn new(shared: Arc<StreamShared>) -> Self {
        SimStream { shared }
    }

    fn misuse(&self, command: CommandKind, label: &Label, problem: String) -> Error {
        Error::misuse(self.shared.id.device, command.name(), label, problem)
    }

    /// The memory behind a region, after checking that the region lies inside.
    fn region<'b>(&self, region: &'b Region) -> Result<&'b Arc<crate::memory::Memory>> {
        let memory = memory_of(&self.shared.system, &region.buffer)?;
        if region.offset.checked_add(region.len).is_none_or(|end| end > memory.size) {
            let Region { offset, len, .. } = region;
            let problem = format!("bytes {offset}..+{len} leave {:?}", region.buffer);
            return Err(Error::usage(self.shared.id.device, problem));
        }
        Ok(memory)
    }

    fn same_size(&self, kind: CommandKind, dst: u64, src: u64) -> Result<()> {
        if dst == src {
            return Ok(());
        }
        let problem = format!("{src} bytes do not fill a destination of {dst} bytes");
        Err(self.misuse(kind, &kind.name().into(), problem))
    }

    /// An operand of a queued command. Checks what memory safety and typed views rest on, whether
    /// or not the caller uses the validating wrapper.
    fn operand(&self, tensor: &Tensor) -> Result<SimTensor> {
        let memory = memory_of(&self.shared.system, tensor.buffer())?;
        let desc = tensor.desc();
        if tensor.offset().checked_add(desc.extent()).is_none_or(|end| end > memory.size)
            || !tensor.offset().is_multiple_of(desc.dtype().size() as u64)
        {
            let problem = format!(
                "a view of {} bytes at byte {} leaves {:?} or is not aligned to {desc:?}",
                desc.extent(),
                tensor.offset(),
                tensor.buffer()
            );
            return Err(Error::usage(self.shared.id.device, problem));
        }
        Ok(SimTensor::new(tensor, memory.clone()))
    }

    fn launch_fill(&self, dst: &Region, byte: u8, launch: &Launch) -> Result<u64> {
        let memory = self.region(dst)?.clone();
        let touches =
            [Touch { memory: &memory, offset: dst.offset, len: dst.len, access: Access::Write }];
        let work = Work::Fill { memory: memory.clone(), offset: dst.offset, len: dst.len, byte };
        self.shared.submit(CommandKind::Fill, "fill".into(), &touches, work, launch)
    }

    /// An op over the simulator's memory, after checking that it can run.
    fn resolve_op(&self, command: &Command) -> Result<Op<SimTensor>> {
        if let Err(reason) = kernels::supports(&command.op.desc()) {
            return Err(Error::Unsupported {
                device: self.shared.id.device,
                op: format!("{} {:?}", command.op.kind().name(), command.label),
                reason,
            });
        }
        command.op.try_map(|tensor| self.operand(tensor))
    }

    fn launch_op(&self, command: &Command, launch: &Launch) -> Result<u64> {
        let op = self.resolve_op(command)?;
        let mut touches = arrayvec::ArrayVec::<Touch<'_>, { crate::memory::MAX_OPERANDS }>::new();
        op.visit(|_, access, t| {
            touches.push(Touch {
                memory: &t.memory,
                offset: t.offset,
                len: t.desc.extent(),
                access,
            });
        });
        let kind = CommandKind::Op(op.kind());
        // The touches borrow the op that is about to move into the queue.
        let admitted = self.shared.admit(kind, &command.label, &touches, launch)?;
        drop(touches);
        Ok(admitted.push(Work::Op(Box::new(op))))
    }

    /// A batch, which is not empty, over the simulator's memory, after checking that it is this
    /// die's.
    fn resolve_collectives<'c>(
        &self,
        communicator: &'c Arc<dyn Communicator>,
        batch: &[Collective],
        label: &Label,
    ) -> Result<Batch<'c>> {
        let kind = CommandKind::Collective(batch[0].kind());
        let Some(communicator) = communicator.as_any().downcast_ref::<SimCommunicator>() else {
            return Err(self.misuse(kind, label, "the communicator is another backend's".into()));
        };
        communicator.check_device(self.shared.id.device, kind, label)?;
        let placed = batch
            .iter()
            .map(|collective| collective.try_map(|t| self.operand(t)))
            .collect::<Result<Vec<_>>>()?;
        Ok(Batch { kind, communicator, placed })
    }

    fn launch_collectives(
        &self,
        communicator: &Arc<dyn Communicator>,
        batch: &[Collective],
        label: &Label,
        launch: &Launch,
    ) -> Result<u64> {
        if batch.is_empty() {
            return Ok(self.shared.submitted());
        }
        let Batch { kind, communicator, placed } =
            self.resolve_collectives(communicator, batch, label)?;
        let mut touches = Vec::with_capacity(2 * batch.len());
        for collective in &placed {
            collective.visit(communicator.rank(), |_, access, t| {
                let (offset, len) = (t.offset, t.desc.extent());
                touches.push(Touch { memory: &t.memory, offset, len, access });
            });
        }
        communicator.submit(&self.shared, kind, label, batch, &placed, &touches, launch)
    }
}

/// A batch of collectives over the simulator's memory.
struct Batch<'c> {
    kind: CommandKind,
    communicator: &'c SimCommunicator,
    placed: Vec<Collective<SimTensor>>,
}

impl Stream for SimStream {
    fn as_any(&self) -> &dyn Any {
        self
    }

    fn id(&self) -> StreamId {
        self.shared.id
    }

    fn label(&self) -> &str {
        &self.shared.label
    }

    fn alloc(&self, bytes: u64) -> Result<Buffer> {
        self.shared.usable()?;
        let buffer = SimBuffer::alloc(&self.shared.system, self.shared.id.device, bytes, false)?;
        // Another stream's use must be ordered after the commands submitted here so far, which the
        // memory may have belonged to.
        let memory = memory_of(&self.shared.system, &buffer)?;
        self.shared.note_allocation(memory);
        Ok(buffer)
    }

    fn write(&self, dst: &Region, src: &[u8]) -> Result<()> {
        let memory = self.region(dst)?;
        self.same_size(CommandKind::Write, dst.len, src.len() as u64)?;
        self.shared.write(memory, dst.offset, src)
    }

    fn read(&self, src: &Region, dst: &mut [u8], timeout: Duration) -> Result<()> {
        let memory = self.region(src)?.clone();
        self.same_size(CommandKind::Read, dst.len() as u64, src.len)?;
        let touches =
            [Touch { memory: &memory, offset: src.offset, len: src.len, access: Access::Read }];
        let reply = Arc::new(Mutex::new(Vec::new()));
        let work = Work::Read {
            memory: memory.clone(),
            offset: src.offset,
            len: src.len,
            reply: reply.clone(),
        };
        let value = self.shared.submit(
            CommandKind::Read,
            "read".into(),
            &touches,
            work,
            &Launch::default(),
        )?;
        self.shared.synchronize_value(value, timeout)?;
        let bytes = reply.lock();
        if bytes.len() == dst.len() {
            dst.copy_from_slice(&bytes);
        } else {
            // Timing only: there are no values.
            dst.fill(0);
        }
        Ok(())
    }

    fn copy(&self, dst: &Region, src: &Region) -> Result<()> {
        let kind = CommandKind::Transfer;
        self.same_size(kind, dst.len, src.len)?;
        let (to, from) = (self.region(dst)?.clone(), self.region(src)?.clone());
        let here = self.shared.id.device;
        let (dst_at, src_at) = (dst.buffer.location(), src.buffer.location());
        if dst_at.device() != here && src_at.device() != here {
            let problem = format!("neither {:?} nor {:?} is on this die", dst.buffer, src.buffer);
            return Err(self.misuse(kind, &kind.name().into(), problem));
        }
        let path = match (dst_at, src_at) {
            (hal::Location::Device(a), hal::Location::Device(b)) if a == b => Path::Local,
            (hal::Location::Device(a), hal::Location::Device(b)) => Path::Peer(b, a),
            _ => Path::Host,
        };
        if let Path::Peer(a, b) = path
            && self.shared.system.topology.link(a, b).is_none()
        {
            let link = self.shared.system.topology.kind(a, b).unwrap_or(LinkKind::Network);
            return Err(Error::Unsupported {
                device: here,
                op: format!("copy from {a} to {b}"),
                reason: format!("this machine has no {link} link"),
            });
        }
        if Arc::ptr_eq(&to, &from)
            && src.offset < dst.offset + dst.len
            && dst.offset < src.offset + src.len
        {
            return Err(self.misuse(
                kind,
                &kind.name().into(),
                "source and destination overlap".into(),
            ));
        }
        let touches = [
            Touch { memory: &from, offset: src.offset, len: src.len, access: Access::Read },
            Touch { memory: &to, offset: dst.offset, len: dst.len, access: Access::Write },
        ];
        let work = Work::Transfer {
            dst: (to.clone(), dst.offset),
            src: (from.clone(), src.offset),
            len: dst.len,
            path,
        };
        self.shared.submit(kind, "transfer".into(), &touches, work, &Launch::default()).map(|_| ())
    }

    fn fill(&self, dst: &Region, byte: u8) -> Result<()> {
        self.launch_fill(dst, byte, &Launch::default()).map(|_| ())
    }

    fn submit(&self, command: &Command) -> Result<()> {
        self.launch_op(command, &Launch::default()).map(|_| ())
    }

    fn submit_collectives(
        &self,
        communicator: &Arc<dyn Communicator>,
        batch: &[Collective],
        label: &Label,
    ) -> Result<()> {
        self.launch_collectives(communicator, batch, label, &Launch::default()).map(|_| ())
    }

    fn wait(&self, point: &Point) -> Result<()> {
        let Some(target) = point.timeline().as_any().downcast_ref::<StreamShared>() else {
            let problem = format!("the point on {} is another backend's", point.stream());
            return Err(self.misuse(CommandKind::Wait, &"wait".into(), problem));
        };
        self.shared.wait_for(target, point.value(), &Launch::default()).map(|_| ())
    }

    fn point(&self) -> Point {
        let value = self.shared.submitted();
        Point::new(self.shared.clone(), value)
    }
}

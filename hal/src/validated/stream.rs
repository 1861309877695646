//! Checked streams and timelines.

use super::Shared;
use super::memory::Refused;
use crate::op::Access;
use crate::{
    Buffer, Collective, Command, Communicator, Error, Label, Location, Op, OpKind, Operand, Point,
    Region, Result, Stream, StreamId, Tensor, Timeline, Timestamp,
};
use parking_lot::Mutex;
use std::any::Any;
use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

/// A stream whose every command is checked.
#[derive(Debug)]
pub(super) struct CheckedStream {
    pub(super) inner: Arc<dyn Stream>,
    pub(super) shared: Arc<Shared>,
    /// Held from the check of a command until it is submitted, so that its sequence number is known.
    pub(super) submission: Mutex<()>,
}

/// A command under examination.
struct Subject<'a> {
    op: &'static str,
    label: &'a Label,
}

/// Bytes that it touches.
struct Touch<'a> {
    name: &'static str,
    buffer: &'a Buffer,
    range: Range<u64>,
    access: Access,
    /// Whether reading demands that the bytes were written before.
    needs_contents: bool,
}

impl CheckedStream {
    pub(super) fn new(inner: Arc<dyn Stream>, shared: Arc<Shared>) -> Self {
        CheckedStream { inner, shared, submission: Mutex::new(()) }
    }

    fn refuse(&self, subject: &Subject<'_>, problem: String) -> Error {
        Error::misuse(self.inner.id().device, subject.op, subject.label, problem)
    }

    fn bounds(
        &self,
        subject: &Subject<'_>,
        name: &str,
        buffer: &Buffer,
        range: &Range<u64>,
    ) -> Result<()> {
        if range.end <= buffer.size() {
            return Ok(());
        }
        let problem = format!("{name}: bytes {}..{} leave {buffer:?}", range.start, range.end);
        Err(self.refuse(subject, problem))
    }

    /// The number of the next command.
    fn next(&self) -> u64 {
        self.inner.point().value() + 1
    }

    /// Checks what each touch of command `number` asks of order and contents, and notes them.
    fn touch(&self, subject: &Subject<'_>, number: u64, touches: &[Touch<'_>]) -> Result<()> {
        let at = (self.inner.id(), number);
        let Shared { order, registry } = &*self.shared;
        for t in touches {
            let flags = (t.access.reads() && t.needs_contents, t.access.writes());
            let checked = registry.check(order, at.0, t.buffer.id(), &t.range, flags);
            checked.map_err(|refused| {
                let what = format!(
                    "{} touches bytes {}..{} of {:?}",
                    t.name, t.range.start, t.range.end, t.buffer
                );
                self.refuse(
                    subject,
                    match refused {
                        Refused::Unwritten => format!("{what}, which nothing wrote"),
                        Refused::Hazard(past) => format!(
                            "hazard: {what}, and nothing orders it after command {} of {}; wait for a point of that stream first",
                            past.sequence, past.stream
                        ),
                    },
                )
            })?;
        }
        for t in touches {
            registry.note(at, t.buffer.id(), t.range.clone(), t.access.writes());
        }
        Ok(())
    }

    /// A region as a touch, after checking its bounds.
    fn region<'a>(
        &self,
        subject: &Subject<'_>,
        name: &'static str,
        region: &'a Region,
        access: Access,
    ) -> Result<Touch<'a>> {
        let range = region.offset..region.offset.saturating_add(region.len);
        self.bounds(subject, name, &region.buffer, &range)?;
        Ok(Touch { name, buffer: &region.buffer, range, access, needs_contents: true })
    }

    /// A tensor as a touch, after checking place, bounds and alignment.
    fn tensor<'a>(
        &self,
        subject: &Subject<'_>,
        name: &'static str,
        tensor: &'a Tensor,
        access: Access,
    ) -> Result<Touch<'a>> {
        let here = self.inner.id().device;
        if tensor.buffer().location() != Location::Device(here) {
            let problem =
                format!("{name} lies in {:?}, not in the memory of {here}", tensor.buffer());
            return Err(self.refuse(subject, problem));
        }
        let size = tensor.desc().dtype().size() as u64;
        if !tensor.offset().is_multiple_of(size) {
            let (offset, desc) = (tensor.offset(), tensor.desc());
            let problem =
                format!("{name} {desc:?} begins at byte {offset}, which is not aligned to {size}");
            return Err(self.refuse(subject, problem));
        }
        let range = tensor.offset()..tensor.offset().saturating_add(tensor.desc().extent());
        self.bounds(subject, name, tensor.buffer(), &range)?;
        Ok(Touch { name, buffer: tensor.buffer(), range, access, needs_contents: true })
    }

    fn op_touches<'a>(&self, subject: &Subject<'_>, op: &'a Op<Tensor>) -> Result<Vec<Touch<'a>>> {
        let mut touches = Vec::new();
        let mut result = Ok(());
        op.visit(|name, access, tensor| {
            if result.is_ok() {
                match self.tensor(subject, name, tensor, access) {
                    Ok(mut touch) => {
                        // A cache is filled slot by slot; the rest of it is never read.
                        touch.needs_contents =
                            !(op.kind() == OpKind::CacheWrite && access == Access::Update);
                        touches.push(touch);
                    }
                    Err(error) => result = Err(error),
                }
            }
        });
        result?;
        self.overlaps(subject, &touches, op.kind() == OpKind::Add)?;
        Ok(touches)
    }

    /// Refuses a written operand that overlaps another, except the very same bytes where an op may
    /// work in place.
    fn overlaps(&self, subject: &Subject<'_>, touches: &[Touch<'_>], in_place: bool) -> Result<()> {
        for (i, a) in touches.iter().enumerate().filter(|(_, t)| t.access.writes()) {
            for (j, b) in touches.iter().enumerate() {
                let overlap = i != j
                    && a.buffer.id() == b.buffer.id()
                    && a.range.start < b.range.end
                    && b.range.start < a.range.end;
                if overlap && !(in_place && a.range == b.range) {
                    let problem = format!(
                        "{} (bytes {}..{}) overlaps {} (bytes {}..{}) of {:?}",
                        a.name,
                        a.range.start,
                        a.range.end,
                        b.name,
                        b.range.start,
                        b.range.end,
                        a.buffer
                    );
                    return Err(self.refuse(subject, problem));
                }
            }
        }
        Ok(())
    }

    fn same_size(&self, subject: &Subject<'_>, dst: u64, src: u64) -> Result<()> {
        if dst == src {
            return Ok(());
        }
        Err(self.refuse(subject, format!("{src} bytes do not fill a destination of {dst} bytes")))
    }

    /// Checks a fill that is to be command `number`.
    pub(super) fn check_fill(&self, number: u64, dst: &Region) -> Result<()> {
        let subject = Subject { op: "fill", label: &Label::Static("fill") };
        let touch = self.region(&subject, "dst", dst, Access::Write)?;
        self.touch(&subject, number, &[touch])
    }

    /// Checks an op that is to be command `number`.
    pub(super) fn check_op(&self, number: u64, command: &Command) -> Result<()> {
        let subject = Subject { op: command.op.kind().name(), label: &command.label };
        crate::op::check(&command.op.desc()).map_err(|problem| self.refuse(&subject, problem))?;
        let touches = self.op_touches(&subject, &command.op)?;
        self.touch(&subject, number, &touches)
    }

    /// Checks a batch that is to be command `number`.
    pub(super) fn check_collectives(
        &self,
        number: u64,
        communicator: &Arc<dyn Communicator>,
        batch: &[Collective],
        label: &Label,
    ) -> Result<()> {
        let op = batch.first().map_or("collective", |c| c.kind().name());
        let subject = Subject { op, label };
        if communicator.device() != self.inner.id().device {
            let (rank, device) = (communicator.rank(), communicator.device());
            let problem = format!("rank {rank} of the communicator is {device}");
            return Err(self.refuse(&subject, problem));
        }
        crate::collective::check(batch, communicator.rank(), communicator.size())
            .map_err(|problem| self.refuse(&subject, problem))?;
        let mut touches = Vec::with_capacity(2 * batch.len());
        for collective in batch {
            collective.visit(communicator.rank(), |name, access, tensor| {
                touches.push(self.tensor(&subject, name, tensor, access));
            });
        }
        let touches = touches.into_iter().collect::<Result<Vec<_>>>()?;
        self.touch(&subject, number, &touches)
    }
}

impl Stream for CheckedStream {
    fn as_any(&self) -> &dyn Any {
        self
    }

    fn id(&self) -> StreamId {
        self.inner.id()
    }

    fn label(&self) -> &str {
        self.inner.label()
    }

    fn alloc(&self, bytes: u64) -> Result<Buffer> {
        let _submission = self.submission.lock();
        let buffer = self.inner.alloc(bytes)?;
        let at = (self.inner.id(), self.inner.point().value());
        self.shared.registry.add(&buffer, self.inner.label());
        self.shared.registry.note_allocation(at, &buffer);
        Ok(buffer)
    }

    fn write(&self, dst: &Region, src: &[u8]) -> Result<()> {
        let _submission = self.submission.lock();
        let subject = Subject { op: "write", label: &Label::Static("write") };
        self.same_size(&subject, dst.len, src.len() as u64)?;
        let touch = self.region(&subject, "dst", dst, Access::Write)?;
        self.touch(&subject, self.next(), &[touch])?;
        self.inner.write(dst, src)
    }

    fn read(&self, src: &Region, dst: &mut [u8], timeout: Duration) -> Result<()> {
        let subject = Subject { op: "read", label: &Label::Static("read") };
        {
            let _submission = self.submission.lock();
            self.same_size(&subject, dst.len() as u64, src.len)?;
            let touch = self.region(&subject, "src", src, Access::Read)?;
            self.touch(&subject, self.next(), &[touch])?;
        }
        self.inner.read(src, dst, timeout)?;
        self.shared.order.host_synchronized(self.inner.id(), self.inner.point().value());
        Ok(())
    }

    fn copy(&self, dst: &Region, src: &Region) -> Result<()> {
        let _submission = self.submission.lock();
        let subject = Subject { op: "transfer", label: &Label::Static("transfer") };
        self.same_size(&subject, dst.len, src.len)?;
        let here = self.inner.id().device;
        if dst.buffer.device() != here && src.buffer.device() != here {
            let problem = format!("neither {:?} nor {:?} is on this die", dst.buffer, src.buffer);
            return Err(self.refuse(&subject, problem));
        }
        let touches = [
            self.region(&subject, "src", src, Access::Read)?,
            self.region(&subject, "dst", dst, Access::Write)?,
        ];
        self.overlaps(&subject, &touches, false)?;
        self.touch(&subject, self.next(), &touches)?;
        self.inner.copy(dst, src)
    }

    fn fill(&self, dst: &Region, byte: u8) -> Result<()> {
        let _submission = self.submission.lock();
        self.check_fill(self.next(), dst)?;
        self.inner.fill(dst, byte)
    }

    fn submit(&self, command: &Command) -> Result<()> {
        let _submission = self.submission.lock();
        self.check_op(self.next(), command)?;
        self.inner.submit(command)
    }

    fn submit_collectives(
        &self,
        communicator: &Arc<dyn Communicator>,
        batch: &[Collective],
        label: &Label,
    ) -> Result<()> {
        let _submission = self.submission.lock();
        self.check_collectives(self.next(), communicator, batch, label)?;
        self.inner.submit_collectives(communicator, batch, label)
    }

    fn wait(&self, point: &Point) -> Result<()> {
        let _submission = self.submission.lock();
        let subject = Subject { op: "wait", label: &Label::Static("wait") };
        let Some(timeline) = point.timeline().as_any().downcast_ref::<CheckedTimeline>() else {
            let problem = format!("the point on {} is not of this system", point.stream());
            return Err(self.refuse(&subject, problem));
        };
        if !Arc::ptr_eq(&timeline.shared, &self.shared) {
            let problem = format!("the point on {} is of another system", point.stream());
            return Err(self.refuse(&subject, problem));
        }
        let (waiter, next) = (self.inner.id(), self.inner.point().value() + 1);
        self.inner.wait(&Point::new(timeline.inner.clone(), point.value()))?;
        self.shared.order.wait(waiter, next, point.stream(), point.value());
        Ok(())
    }

    fn point(&self) -> Point {
        let point = self.inner.point();
        let inner = point.timeline().clone();
        let timeline = CheckedTimeline { inner, shared: self.shared.clone() };
        Point::new(Arc::new(timeline), point.value())
    }
}

/// A timeline that tells the wrapper what the host has waited for.
#[derive(Debug)]
struct CheckedTimeline {
    inner: Arc<dyn Timeline>,
    shared: Arc<Shared>,
}

impl Timeline for CheckedTimeline {
    fn as_any(&self) -> &dyn Any {
        self
    }

    fn stream(&self) -> StreamId {
        self.inner.stream()
    }

    fn reached(&self) -> u64 {
        self.inner.reached()
    }

    fn synchronize(&self, value: u64, timeout: Duration) -> Result<()> {
        self.inner.synchronize(value, timeout)?;
        self.shared.order.host_synchronized(self.inner.stream(), value);
        Ok(())
    }

    fn failure(&self) -> Option<Error> {
        self.inner.failure()
    }

    fn completed_at(&self, value: u64) -> Option<Timestamp> {
        self.inner.completed_at(value)
    }
}

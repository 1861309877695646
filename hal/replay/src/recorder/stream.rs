//! Recorded streams and timelines.

use super::Shared;
use super::communicator::RecordedCommunicator;
use super::log::Numbered;
use super::memory::RecordedBuffer;
use crate::record::{Call, Definition, Offsets, Part, Span, View};
use hal::{
    Buffer, Collective, Command, Communicator, Device, Error, Label, Point, Region, Result, Stream,
    StreamId, Tensor, Timeline, Timestamp,
};
use parking_lot::Mutex;
use std::any::Any;
use std::sync::Arc;
use std::time::Duration;

/// A stream whose calls are recorded.
#[derive(Debug)]
pub(super) struct RecordedStream {
    inner: Arc<dyn Stream>,
    device: Arc<dyn Device>,
    number: u64,
    shared: Arc<Shared>,
    /// Held by what submits. What may block holds it until it returns, so that its record, which
    /// stands there, is in its place on the stream.
    turn: Mutex<()>,
    /// The stream's value before the blocking call that is going on.
    before: Mutex<Option<u64>>,
}

fn nanos(timeout: Duration) -> u64 {
    u64::try_from(timeout.as_nanos()).unwrap_or(u64::MAX)
}

impl RecordedStream {
    pub(super) fn new(
        inner: Arc<dyn Stream>,
        device: Arc<dyn Device>,
        number: u64,
        shared: Arc<Shared>,
    ) -> Self {
        let (turn, before) = (Mutex::default(), Mutex::default());
        RecordedStream { inner, device, number, shared, turn, before }
    }

    /// Makes a call that may block the host, and records it when it returns: not as one step, since
    /// what it waits for may have to be submitted first, by another thread.
    fn blocking<T>(
        &self,
        call: impl FnOnce() -> Result<T>,
        describe: impl FnOnce(&mut super::Log, &Result<T>) -> Call,
    ) -> Result<T> {
        let _turn = self.turn.lock();
        *self.before.lock() = Some(self.inner.point().value());
        let result = call();
        let result = self.shared.step(|| result, describe);
        *self.before.lock() = None;
        result
    }

    fn refuse(&self, problem: &str) -> Error {
        Error::usage(self.inner.id().device, problem)
    }

    /// Hashes what a command wrote, where that is asked for.
    fn probe<'t>(&self, outputs: impl Iterator<Item = (&'static str, &'t Tensor)>) {
        let Some(probes) = &self.shared.probes else { return };
        for (operand, tensor) in outputs {
            if let (Ok(inner), Ok(raw)) =
                (self.shared.inner_tensor(tensor), self.shared.buffer(tensor.buffer()))
            {
                let view = View::of(tensor, raw.number());
                let on = (&*self.inner, &*self.device, self.number);
                probes.take(&self.shared.log, on, operand, &inner, view);
            }
        }
    }

    fn part(&self, collective: &Collective) -> Result<Part> {
        let view = |tensor: &Tensor| {
            Ok::<_, Error>(View::of(tensor, self.shared.buffer(tensor.buffer())?.number()))
        };
        let mut part = Part {
            kind: collective.kind(),
            send: None,
            recv: None,
            reduction: None,
            peer: None,
            counts: None,
            offsets: None,
        };
        match collective {
            Collective::AllReduce { send, recv, reduction }
            | Collective::ReduceScatter { send, recv, reduction } => {
                (part.send, part.recv) = (Some(view(send)?), Some(view(recv)?));
                part.reduction = Some(*reduction);
            }
            Collective::AllGather { send, recv } => {
                (part.send, part.recv) = (Some(view(send)?), Some(view(recv)?));
            }
            Collective::AllToAll { send, recv, counts } => {
                (part.send, part.recv) = (Some(view(send)?), Some(view(recv)?));
                part.counts = counts.as_ref().map(|c| (c.send.clone(), c.recv.clone()));
            }
            Collective::AllToAllV { send, recv, send_offsets, recv_offsets, expected_rows } => {
                (part.send, part.recv) = (Some(view(send)?), Some(view(recv)?));
                part.offsets = Some(Offsets {
                    send: view(send_offsets)?,
                    recv: recv_offsets.as_ref().map(view).transpose()?,
                    expected_rows: *expected_rows,
                });
            }
            Collective::Broadcast { tensor, root: peer } | Collective::Send { tensor, peer } => {
                (part.send, part.peer) = (Some(view(tensor)?), Some(*peer));
            }
            Collective::Recv { tensor, peer } => {
                (part.recv, part.peer) = (Some(view(tensor)?), Some(*peer));
            }
        }
        Ok(part)
    }

    fn inner_collective(&self, collective: &Collective) -> Result<Collective> {
        collective.try_map(|tensor| self.shared.inner_tensor(tensor))
    }
}

impl Stream for RecordedStream {
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
        let _turn = self.turn.lock();
        let mut number = 0;
        let inner = self.shared.step(
            || self.inner.alloc(bytes),
            |log, _| {
                number = log.number(Numbered::Buffer);
                Call::Alloc { buffer: number, stream: self.number, bytes }
            },
        )?;
        if self.shared.probes.is_some() {
            // Ops may leave parts of an output as they are, and those parts are hashed too.
            let region = inner.whole();
            let to = Span::of(&region, number);
            let fill = || self.inner.fill(&region, 0);
            self.shared.step(fill, |_, _| Call::Fill { stream: self.number, to, byte: 0 })?;
        }
        Ok(RecordedBuffer::wrap(inner, number, self.shared.clone()))
    }

    fn write(&self, dst: &Region, src: &[u8]) -> Result<()> {
        let (region, buffer) = self.shared.inner_region(dst)?;
        let to = Span::of(&region, buffer);
        let write = || self.inner.write(&region, src);
        self.blocking(write, |log, _| Call::Write {
            stream: self.number,
            to,
            payload: log.payload(src),
        })
    }

    fn read(&self, src: &Region, dst: &mut [u8], timeout: Duration) -> Result<()> {
        let (region, buffer) = self.shared.inner_region(src)?;
        let from = Span::of(&region, buffer);
        let into = Some(dst.len() as u64).filter(|&len| len != from.len);
        self.shared.log.lock().flush();
        // Given in place, for the closure to hand `dst` on.
        let result = self.blocking(
            || self.inner.read(&region, dst, timeout).map(|()| &*dst),
            |log, result| {
                let values = self.device.properties().functional;
                let read = result.as_ref().ok().filter(|_| values);
                let payload = read.map(|bytes| log.payload(bytes));
                Call::Read { stream: self.number, from, timeout: nanos(timeout), payload, into }
            },
        );
        if let (Some(probes), Ok(_)) = (&self.shared.probes, &result) {
            probes.collect(&self.shared.log, self.number);
        }
        result.map(drop)
    }

    fn copy(&self, dst: &Region, src: &Region) -> Result<()> {
        let (to, to_buffer) = self.shared.inner_region(dst)?;
        let (from, from_buffer) = self.shared.inner_region(src)?;
        let _turn = self.turn.lock();
        let copy = || self.inner.copy(&to, &from);
        self.shared.step(copy, |_, _| Call::Copy {
            stream: self.number,
            to: Span::of(&to, to_buffer),
            from: Span::of(&from, from_buffer),
        })
    }

    fn fill(&self, dst: &Region, byte: u8) -> Result<()> {
        let (region, buffer) = self.shared.inner_region(dst)?;
        let _turn = self.turn.lock();
        let fill = || self.inner.fill(&region, byte);
        let to = Span::of(&region, buffer);
        self.shared.step(fill, |_, _| Call::Fill { stream: self.number, to, byte })
    }

    fn submit(&self, command: &Command) -> Result<()> {
        let op = command.op.try_map(|tensor| self.shared.inner_tensor(tensor))?;
        let views = command.op.try_map(|tensor| {
            Ok::<_, Error>(View::of(tensor, self.shared.buffer(tensor.buffer())?.number()))
        })?;
        let inner = Command { op, label: command.label.clone() };
        let _turn = self.turn.lock();
        let submit = || self.inner.submit(&inner);
        self.shared.step(submit, |log, _| {
            let what = Definition::Op { op: Box::new(views), label: command.label.to_string() };
            Call::Submit { stream: self.number, command: log.define(what) }
        })?;
        if self.shared.probes.is_some() {
            let mut written = Vec::new();
            command.op.visit(|name, access, tensor| {
                if access.writes() {
                    written.push((name, tensor));
                }
            });
            self.probe(written.into_iter());
        }
        Ok(())
    }

    fn submit_collectives(
        &self,
        communicator: &Arc<dyn Communicator>,
        batch: &[Collective],
        label: &Label,
    ) -> Result<()> {
        let communicator = match communicator.as_any().downcast_ref::<RecordedCommunicator>() {
            Some(c) if Arc::ptr_eq(&c.shared, &self.shared) => c,
            _ => return Err(self.refuse("the communicator is not of this system")),
        };
        let inner: Vec<_> =
            batch.iter().map(|c| self.inner_collective(c)).collect::<Result<_>>()?;
        let parts = batch.iter().map(|c| self.part(c)).collect::<Result<Vec<_>>>()?;
        let _turn = self.turn.lock();
        let submit = || self.inner.submit_collectives(&communicator.inner, &inner, label);
        self.shared.step(submit, |log, _| {
            let what = Definition::Batch {
                communicator: communicator.number,
                batch: parts,
                label: label.to_string(),
            };
            Call::Submit { stream: self.number, command: log.define(what) }
        })?;
        let rank = communicator.inner.rank();
        self.probe(batch.iter().filter_map(|c| Some(("recv", c.tensors(rank).1?))));
        Ok(())
    }

    fn wait(&self, point: &Point) -> Result<()> {
        let timeline = match point.timeline().as_any().downcast_ref::<RecordedTimeline>() {
            Some(t) if Arc::ptr_eq(&t.shared, &self.shared) => t,
            _ => {
                let problem = format!("the point on {} is not of this system", point.stream());
                return Err(self.refuse(&problem));
            }
        };
        let value = point.value();
        let _turn = self.turn.lock();
        let wait = || self.inner.wait(&Point::new(timeline.inner.clone(), value));
        let on = timeline.number;
        self.shared.step(wait, |_, _| Call::Wait { stream: self.number, on, value })
    }

    fn point(&self) -> Point {
        // What is going on is not recorded yet, so nothing can be recorded as waiting for it.
        let before = *self.before.lock();
        let point = self.inner.point();
        let value = before.map_or(point.value(), |before| before.min(point.value()));
        let inner = point.timeline().clone();
        let (number, shared) = (self.number, self.shared.clone());
        Point::new(Arc::new(RecordedTimeline { inner, number, shared }), value)
    }
}

impl Drop for RecordedStream {
    fn drop(&mut self) {
        self.shared.log.lock().record(Call::CloseStream { stream: self.number }, None);
    }
}

/// A timeline whose host waits are recorded.
#[derive(Debug)]
struct RecordedTimeline {
    inner: Arc<dyn Timeline>,
    number: u64,
    shared: Arc<Shared>,
}

impl Timeline for RecordedTimeline {
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
        self.shared.log.lock().flush();
        let result = self.inner.synchronize(value, timeout);
        let call = Call::Synchronize { stream: self.number, value, timeout: nanos(timeout) };
        self.shared.log.lock().record(call, result.as_ref().err());
        if let (Some(probes), Ok(())) = (&self.shared.probes, &result) {
            probes.collect(&self.shared.log, self.number);
        }
        result
    }

    fn failure(&self) -> Option<Error> {
        let failure = self.inner.failure();
        if failure.is_some() {
            let call = Call::Failure { stream: self.number };
            self.shared.log.lock().record(call, failure.as_ref());
        }
        failure
    }

    fn completed_at(&self, value: u64) -> Option<Timestamp> {
        self.inner.completed_at(value)
    }
}

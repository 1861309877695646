//! Streams and timelines behind the library.

use crate::collective::{VaccCommunicator, Wires};
use crate::device::DeviceShared;
use crate::error::status;
use crate::memory::{VaccBuffer, handle_of, region};
use crate::sys::*;
use crate::wire;
use hal::trace::CommandKind;
use hal::{
    Buffer, Collective, Command, Communicator, Error, Label, Operand, Point, Region, Result,
    Stream, StreamId, Tensor, Timeline, Timestamp,
};
use parking_lot::Mutex;
use std::any::Any;
use std::ptr::null_mut;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// A stream's handle, as its users and the points on its timeline share it.
#[derive(Debug)]
pub(crate) struct StreamShared {
    pub(crate) device: Arc<DeviceShared>,
    pub(crate) handle: vacc_stream,
    id: StreamId,
    label: Box<str>,
    /// The header wants one submitter at a time; the HAL lets callers take turns.
    pub(crate) submitter: Mutex<()>,
    /// The last point that the library told.
    last_point: AtomicU64,
}

// SAFETY: a handle is a name that only the library reads; calls that must not meet take the lock.
#[expect(unsafe_code, reason = "handles are raw pointers")]
unsafe impl Send for StreamShared {}
// SAFETY: as above.
#[expect(unsafe_code, reason = "handles are raw pointers")]
unsafe impl Sync for StreamShared {}

/// As the ABI counts time; what does not fit never ends.
fn nanos(timeout: Duration) -> u64 {
    u64::try_from(timeout.as_nanos()).unwrap_or(u64::MAX)
}

impl StreamShared {
    pub(crate) fn check(&self, call: &'static str, status: i32) -> Result<()> {
        self.device.check_stream(self.handle, call, status)
    }

    /// Calls what submits, alone.
    #[inline]
    pub(crate) fn submitting(&self, call: impl FnOnce(&Api, vacc_stream) -> i32) -> i32 {
        let _alone = self.submitter.lock();
        call(self.device.instance.runtime.api(), self.handle)
    }

    fn misuse(&self, kind: CommandKind, problem: String) -> Error {
        Error::misuse(self.device.id(), kind.name(), &kind.name().into(), problem)
    }

    /// Timeouts are told by whoever knows how long was waited.
    fn waited(
        &self,
        result: Result<()>,
        what: impl Fn() -> String,
        timeout: Duration,
    ) -> Result<()> {
        self.device.drain_trace();
        result.map_err(|error| match error {
            Error::Timeout { waiting_for, pending, stuck, .. } => {
                let waiting_for = if waiting_for.is_empty() { what() } else { waiting_for };
                Error::Timeout { waiting_for, after: timeout, pending, stuck }
            }
            other => other,
        })
    }
}

impl Drop for StreamShared {
    #[expect(unsafe_code, reason = "calls the library")]
    fn drop(&mut self) {
        // SAFETY: the handle is ours and nobody else has it any more.
        let status = unsafe { self.device.instance.runtime.api.vacc_stream_destroy(self.handle) };
        self.device.deferred.keep(self.device.check("vacc_stream_destroy", status));
    }
}

impl Timeline for StreamShared {
    fn as_any(&self) -> &dyn Any {
        self
    }

    fn stream(&self) -> StreamId {
        self.id
    }

    #[expect(unsafe_code, reason = "calls the library")]
    fn reached(&self) -> u64 {
        let mut value = 0;
        let api = self.device.instance.runtime.api();
        // SAFETY: the handle is alive, the result is a local.
        match unsafe { api.vacc_stream_get_reached(self.handle, &raw mut value) } {
            status::OK => value,
            failed => {
                self.device.deferred.keep(self.check("vacc_stream_get_reached", failed));
                0
            }
        }
    }

    #[expect(unsafe_code, reason = "calls the library")]
    fn synchronize(&self, value: u64, timeout: Duration) -> Result<()> {
        self.device.deferred.tell()?;
        let api = self.device.instance.runtime.api();
        // SAFETY: the handle is alive. Not a submission: others may submit meanwhile.
        let status = unsafe { api.vacc_stream_synchronize(self.handle, value, nanos(timeout)) };
        let what = || format!("command {value} of stream {:?} on {}", self.label, self.id.device);
        self.waited(self.check("vacc_stream_synchronize", status), what, timeout)
    }

    #[expect(unsafe_code, reason = "calls the library")]
    fn failure(&self) -> Option<Error> {
        let mut told = crate::error::blank();
        let api = self.device.instance.runtime.api();
        // SAFETY: the handle is alive, the struct says its size.
        let status = unsafe { api.vacc_stream_get_error(self.handle, &raw mut told) };
        match status {
            status::OK if told.status == status::OK => None,
            status::OK => Some(self.device.told(self.handle, "vacc_stream_get_error", &told)),
            failed => self.check("vacc_stream_get_error", failed).err(),
        }
    }

    #[expect(unsafe_code, reason = "calls the library")]
    fn completed_at(&self, value: u64) -> Option<Timestamp> {
        let api = self.device.instance.runtime.api();
        if api.vacc_stream_get_completion.is_err() {
            return None;
        }
        let mut told =
            vacc_timestamp { size: struct_size::<vacc_timestamp>(), ..Default::default() };
        // SAFETY: it is exported, the handle is alive, the struct says its size.
        let status = unsafe { api.vacc_stream_get_completion(self.handle, value, &raw mut told) };
        if status != status::OK {
            if !DeviceShared::is_nothing(status) {
                self.device.deferred.keep(self.check("vacc_stream_get_completion", status));
            }
            return None;
        }
        Some(Timestamp { clock: wire::clock_of(told.clock)?, picos: told.picoseconds })
    }
}

/// The handle through which a stream is used.
#[derive(Debug)]
pub(crate) struct VaccStream {
    pub(crate) shared: Arc<StreamShared>,
}

impl VaccStream {
    #[expect(unsafe_code, reason = "calls the library")]
    pub(crate) fn create(device: Arc<DeviceShared>, label: &str) -> Result<VaccStream> {
        let (mut handle, mut index) = (null_mut(), 0);
        let (text, length) = (label.as_ptr().cast(), label.len() as u64);
        let api = device.instance.runtime.api();
        // SAFETY: the device is alive, the text has this length, the results are locals.
        let status = unsafe {
            api.vacc_stream_create(device.handle, text, length, &raw mut handle, &raw mut index)
        };
        device.check("vacc_stream_create", status)?;
        let id = StreamId { device: device.id(), index };
        let shared = StreamShared {
            device,
            handle,
            id,
            label: label.into(),
            submitter: Mutex::new(()),
            last_point: AtomicU64::new(0),
        };
        Ok(VaccStream { shared: Arc::new(shared) })
    }

    fn same_size(&self, kind: CommandKind, dst: u64, src: u64) -> Result<()> {
        if dst == src {
            return Ok(());
        }
        let problem = format!("{src} bytes do not fill a destination of {dst} bytes");
        Err(self.shared.misuse(kind, problem))
    }
}

impl Stream for VaccStream {
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
        self.shared.device.deferred.tell()?;
        VaccBuffer::alloc(&self.shared, bytes)
    }

    #[expect(unsafe_code, reason = "calls the library")]
    fn write(&self, dst: &Region, src: &[u8]) -> Result<()> {
        self.shared.device.deferred.tell()?;
        self.same_size(CommandKind::Write, dst.len, src.len() as u64)?;
        let to = region(&self.shared.device, dst)?;
        // SAFETY: alone on the stream; `src` has the region's length and is read during the call.
        let status = self.shared.submitting(|api, stream| unsafe {
            api.vacc_stream_write(stream, &raw const to, src.as_ptr().cast())
        });
        self.shared.check("vacc_stream_write", status)
    }

    #[expect(unsafe_code, reason = "calls the library")]
    fn read(&self, src: &Region, dst: &mut [u8], timeout: Duration) -> Result<()> {
        self.shared.device.deferred.tell()?;
        self.same_size(CommandKind::Read, dst.len() as u64, src.len)?;
        let from = region(&self.shared.device, src)?;
        // SAFETY: alone on the stream; `dst` has the region's length, and the library does not
        // touch it after the call.
        let status = self.shared.submitting(|api, stream| unsafe {
            api.vacc_stream_read(stream, &raw const from, dst.as_mut_ptr().cast(), nanos(timeout))
        });
        let what = || format!("a read on stream {:?} of {}", self.shared.label, self.id().device);
        self.shared.waited(self.shared.check("vacc_stream_read", status), what, timeout)
    }

    #[expect(unsafe_code, reason = "calls the library")]
    fn copy(&self, dst: &Region, src: &Region) -> Result<()> {
        self.shared.device.deferred.tell()?;
        self.same_size(CommandKind::Transfer, dst.len, src.len)?;
        let (to, from) = (region(&self.shared.device, dst)?, region(&self.shared.device, src)?);
        // SAFETY: alone on the stream; both regions are locals.
        let status = self.shared.submitting(|api, stream| unsafe {
            api.vacc_stream_copy(stream, &raw const to, &raw const from)
        });
        self.shared.check("vacc_stream_copy", status)
    }

    #[expect(unsafe_code, reason = "calls the library")]
    fn fill(&self, dst: &Region, byte: u8) -> Result<()> {
        self.shared.device.deferred.tell()?;
        let to = region(&self.shared.device, dst)?;
        // SAFETY: alone on the stream; the region is a local.
        let status = self
            .shared
            .submitting(|api, stream| unsafe { api.vacc_stream_fill(stream, &raw const to, byte) });
        self.shared.check("vacc_stream_fill", status)
    }

    #[expect(unsafe_code, reason = "calls the library")]
    fn submit(&self, command: &Command) -> Result<()> {
        let StreamShared { device, .. } = &*self.shared;
        device.deferred.tell()?;
        let label = command.label.as_str();
        let operand = |tensor: &Tensor| {
            let buffer = handle_of(device, tensor.buffer())?;
            Ok::<_, Error>(wire::tensor(tensor.desc(), buffer, tensor.offset()))
        };
        let status = wire::encode(&command.op, operand, |code, descriptor| match code {
            0 => None,
            code => Some(self.shared.submitting(|api, stream| {
                let (text, length) = (label.as_ptr().cast(), label.len() as u64);
                // SAFETY: alone on the stream; the descriptor is that of the code, and both it and
                // the label are read during the call.
                unsafe { api.vacc_stream_launch(stream, code, descriptor, text, length) }
            })),
        })?;
        match status {
            Some(status) => self.shared.check("vacc_stream_launch", status),
            None => Err(Error::Unsupported {
                device: device.id(),
                op: format!("{} {label:?}", command.op.kind().name()),
                reason: "the ABI has no code for it".to_string(),
            }),
        }
    }

    #[expect(unsafe_code, reason = "calls the library")]
    fn submit_collectives(
        &self,
        communicator: &Arc<dyn Communicator>,
        batch: &[Collective],
        label: &Label,
    ) -> Result<()> {
        let Some(first) = batch.first() else { return Ok(()) };
        self.shared.device.deferred.tell()?;
        let kind = CommandKind::Collective(first.kind());
        let Some(communicator) = communicator.as_any().downcast_ref::<VaccCommunicator>() else {
            return Err(self.shared.misuse(kind, "the communicator is another backend's".into()));
        };
        let wires = Wires::new(&self.shared.device, batch)?;
        let text = label.as_str();
        // SAFETY: alone on the stream; the batch, its counts and the label outlive the call.
        let status = self.shared.submitting(|api, stream| unsafe {
            api.vacc_comm_submit(
                communicator.handle,
                stream,
                wires.as_ptr(),
                batch.len() as u32,
                text.as_ptr().cast(),
                text.len() as u64,
            )
        });
        self.shared.check("vacc_comm_submit", status)
    }

    #[expect(unsafe_code, reason = "calls the library")]
    fn wait(&self, point: &Point) -> Result<()> {
        self.shared.device.deferred.tell()?;
        let Some(target) = point.timeline().as_any().downcast_ref::<StreamShared>() else {
            let problem = format!("the point on {} is another backend's", point.stream());
            return Err(self.shared.misuse(CommandKind::Wait, problem));
        };
        // SAFETY: alone on this stream; the other one is only named.
        let status = self.shared.submitting(|api, stream| unsafe {
            api.vacc_stream_wait(stream, target.handle, point.value())
        });
        self.shared.check("vacc_stream_wait", status)
    }

    #[expect(unsafe_code, reason = "calls the library")]
    fn point(&self) -> Point {
        let stream = &self.shared;
        let mut value = 0;
        let api = stream.device.instance.runtime.api();
        // SAFETY: the handle is alive, the result is a local.
        match unsafe { api.vacc_stream_get_point(stream.handle, &raw mut value) } {
            status::OK => stream.last_point.store(value, Ordering::Relaxed),
            failed => {
                value = stream.last_point.load(Ordering::Relaxed);
                stream.device.deferred.keep(stream.check("vacc_stream_get_point", failed));
            }
        }
        Point::new(stream.clone(), value)
    }
}

//! A device that does nothing, at once: for measuring what everything above it costs.
//!
//! Never a default. A green test on it proves that commands were well-formed and submitted, not
//! that values are right, that anything was ordered, or that it would run elsewhere.

use crate::fault::FaultPlan;
use crate::trace::TraceSink;
use crate::{
    Buffer, Collective, Command, Communicator, CommunicatorId, Device, DeviceId, DeviceProperties,
    DiePlacement, Error, Label, Location, MemoryInfo, Op, Point, RawBuffer, Region, Result, Stream,
    StreamId, Support, TensorDesc, Timeline, Timestamp,
};
use parking_lot::Mutex;
use std::any::Any;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::time::Duration;

/// Allocations are rounded up to this.
const ALIGNMENT: u64 = 256;

/// See the module: does nothing, at once.
#[derive(Debug)]
pub struct NullDevice {
    shared: Arc<Shared>,
    streams: AtomicU32,
}

#[derive(Debug)]
struct Shared {
    properties: DeviceProperties,
    memory: Mutex<MemoryInfo>,
}

impl NullDevice {
    /// A die with this much memory, which is counted but not there.
    pub fn new(id: DeviceId, memory_bytes: u64) -> Arc<Self> {
        let properties = DeviceProperties {
            id,
            name: "null".to_string(),
            backend: "null",
            placement: DiePlacement { host: 0, card: id.0, die_on_card: 0 },
            memory_bytes,
            allocation_alignment: ALIGNMENT,
            cores: 0,
            matrix_alignment: 1,
            functional: false,
            clock: None,
        };
        let memory = Mutex::new(MemoryInfo { capacity: memory_bytes, used: 0, peak: 0 });
        let shared = Arc::new(Shared { properties, memory });
        Arc::new(NullDevice { shared, streams: AtomicU32::new(0) })
    }

    fn id(&self) -> DeviceId {
        self.shared.properties.id
    }

    fn unsupported(&self, what: &str) -> Error {
        Error::Unsupported {
            device: self.id(),
            op: what.to_string(),
            reason: "the null device does nothing".to_string(),
        }
    }
}

impl Device for NullDevice {
    fn properties(&self) -> &DeviceProperties {
        &self.shared.properties
    }

    fn memory_info(&self) -> Result<MemoryInfo> {
        Ok(*self.shared.memory.lock())
    }

    fn supports(&self, op: &Op<TensorDesc>) -> Support {
        crate::op::check(op).map_or_else(Support::No, |()| Support::Yes)
    }

    fn stream(&self, label: &str) -> Result<Arc<dyn Stream>> {
        let index = self.streams.fetch_add(1, Ordering::Relaxed);
        let timeline = Arc::new(NullTimeline {
            id: StreamId { device: self.id(), index },
            reached: AtomicU64::new(0),
        });
        Ok(Arc::new(NullStream { shared: self.shared.clone(), label: label.into(), timeline }))
    }

    fn alloc_host(&self, bytes: u64) -> Result<Buffer> {
        let raw = NullBuffer {
            shared: None,
            reserved: 0,
            host: Some(Mutex::new(vec![0; bytes as usize])),
        };
        Ok(Buffer::from_raw(bytes, Location::Host(self.id()), Box::new(raw)))
    }

    fn communicator_id(&self) -> Result<CommunicatorId> {
        Ok(CommunicatorId([u64::from(self.id().0), 0]))
    }

    fn communicator(
        &self,
        id: CommunicatorId,
        rank: usize,
        size: usize,
    ) -> Result<Arc<dyn Communicator>> {
        if rank >= size {
            let problem = format!("rank {rank} is not one of {size}");
            return Err(Error::usage(self.id(), problem));
        }
        Ok(Arc::new(NullCommunicator { id, rank, size, device: self.id() }))
    }

    fn set_trace(&self, sink: Option<Arc<dyn TraceSink>>) -> Result<()> {
        sink.map_or(Ok(()), |_| Err(self.unsupported("tracing")))
    }

    fn set_faults(&self, faults: Option<Arc<FaultPlan>>) -> Result<()> {
        faults.map_or(Ok(()), |_| Err(self.unsupported("fault injection")))
    }
}

#[derive(Debug)]
struct NullBuffer {
    shared: Option<Arc<Shared>>,
    reserved: u64,
    host: Option<Mutex<Vec<u8>>>,
}

impl NullBuffer {
    fn host(&self, offset: u64, len: usize, f: impl FnOnce(&mut [u8])) -> Result<()> {
        let device = self.shared.as_ref().map_or(DeviceId(0), |s| s.properties.id);
        let Some(host) = &self.host else {
            return Err(Error::usage(device, "device memory is not host memory: copy it"));
        };
        let mut bytes = host.lock();
        let end = usize::try_from(offset).ok().and_then(|start| start.checked_add(len));
        match end.filter(|&end| end <= bytes.len()) {
            Some(end) => f(&mut bytes[end - len..end]),
            None => {
                let size = bytes.len();
                let problem = format!("bytes {offset}..+{len} leave a buffer of {size} bytes");
                return Err(Error::usage(device, problem));
            }
        }
        Ok(())
    }
}

impl RawBuffer for NullBuffer {
    fn as_any(&self) -> &dyn Any {
        self
    }

    fn read_host(&self, offset: u64, bytes: &mut [u8]) -> Result<()> {
        self.host(offset, bytes.len(), |mine| bytes.copy_from_slice(mine))
    }

    fn write_host(&self, offset: u64, bytes: &[u8]) -> Result<()> {
        self.host(offset, bytes.len(), |mine| mine.copy_from_slice(bytes))
    }
}

impl Drop for NullBuffer {
    fn drop(&mut self) {
        if let Some(shared) = &self.shared {
            shared.memory.lock().used -= self.reserved;
        }
    }
}

#[derive(Debug)]
struct NullTimeline {
    id: StreamId,
    reached: AtomicU64,
}

impl Timeline for NullTimeline {
    fn as_any(&self) -> &dyn Any {
        self
    }

    fn stream(&self) -> StreamId {
        self.id
    }

    fn reached(&self) -> u64 {
        self.reached.load(Ordering::Acquire)
    }

    fn synchronize(&self, _value: u64, _timeout: Duration) -> Result<()> {
        Ok(())
    }

    fn failure(&self) -> Option<Error> {
        None
    }

    fn completed_at(&self, _value: u64) -> Option<Timestamp> {
        None
    }
}

#[derive(Debug)]
struct NullStream {
    shared: Arc<Shared>,
    label: Box<str>,
    timeline: Arc<NullTimeline>,
}

impl NullStream {
    fn count(&self) -> Result<()> {
        self.timeline.reached.fetch_add(1, Ordering::AcqRel);
        Ok(())
    }
}

impl Stream for NullStream {
    fn as_any(&self) -> &dyn Any {
        self
    }

    fn id(&self) -> StreamId {
        self.timeline.id
    }

    fn label(&self) -> &str {
        &self.label
    }

    fn alloc(&self, bytes: u64) -> Result<Buffer> {
        let device = self.timeline.id.device;
        let requested = bytes.max(1).checked_next_multiple_of(ALIGNMENT).unwrap_or(u64::MAX);
        {
            let mut memory = self.shared.memory.lock();
            let (free, capacity) = (memory.free(), memory.capacity);
            if requested > free {
                return Err(Error::OutOfMemory { device, requested, free, capacity });
            }
            memory.used += requested;
            memory.peak = memory.peak.max(memory.used);
        }
        let shared = Some(self.shared.clone());
        let raw = NullBuffer { shared, reserved: requested, host: None };
        Ok(Buffer::from_raw(bytes, Location::Device(device), Box::new(raw)))
    }

    fn write(&self, _dst: &Region, _src: &[u8]) -> Result<()> {
        self.count()
    }

    fn read(&self, _src: &Region, dst: &mut [u8], _timeout: Duration) -> Result<()> {
        dst.fill(0);
        self.count()
    }

    fn copy(&self, _dst: &Region, _src: &Region) -> Result<()> {
        self.count()
    }

    fn fill(&self, _dst: &Region, _byte: u8) -> Result<()> {
        self.count()
    }

    fn submit(&self, _command: &Command) -> Result<()> {
        self.count()
    }

    fn submit_collectives(
        &self,
        _communicator: &Arc<dyn Communicator>,
        _batch: &[Collective],
        _label: &Label,
    ) -> Result<()> {
        self.count()
    }

    fn wait(&self, _point: &Point) -> Result<()> {
        self.count()
    }

    fn point(&self) -> Point {
        Point::new(self.timeline.clone(), self.timeline.reached())
    }
}

#[derive(Debug)]
struct NullCommunicator {
    id: CommunicatorId,
    rank: usize,
    size: usize,
    device: DeviceId,
}

impl Communicator for NullCommunicator {
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
        self.device
    }

    fn abort(&self, _reason: &str) {}

    fn status(&self) -> Result<()> {
        Ok(())
    }
}

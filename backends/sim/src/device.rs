//! A simulated die.

use crate::collective::{Group, SimCommunicator};
use crate::kernels;
use crate::machine::Machine;
use crate::memory::{ALIGNMENT, Memory};
use crate::stream::{SimStream, StreamShared, execute};
use crate::system::{Mode, Shared};
use hal::fault::FaultPlan;
use hal::trace::TraceSink;
use hal::{
    Buffer, Clock, CommandList, Communicator, CommunicatorId, Device, DeviceId, DeviceProperties,
    Error, Location, MemoryInfo, Op, RawBuffer, Result, Stream, StreamId, Support, TensorDesc,
    Topology,
};
use parking_lot::{Mutex, RwLock};
use std::any::Any;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock, Weak};

/// What belongs to one die.
#[derive(Debug)]
pub(crate) struct DieState {
    pub(crate) properties: DeviceProperties,
    pool: Mutex<MemoryInfo>,
    streams: Mutex<Vec<Weak<StreamShared>>>,
    pub(crate) lost: OnceLock<Arc<str>>,
    /// Picoseconds on the clock of the host thread that drives this die.
    pub(crate) host_clock: AtomicU64,
    tracing: AtomicBool,
    trace: RwLock<Option<Arc<dyn TraceSink>>>,
    faulty: AtomicBool,
    faults: RwLock<Option<Arc<FaultPlan>>>,
}

impl DieState {
    pub(crate) fn new(id: DeviceId, machine: &Machine, topology: &Topology, mode: Mode) -> Self {
        let properties = DeviceProperties {
            id,
            name: machine.name.clone(),
            backend: "sim",
            placement: topology.placement(id).unwrap_or_default(),
            memory_bytes: machine.memory_bytes(),
            allocation_alignment: ALIGNMENT,
            cores: machine.die.cores.value as u32,
            matrix_alignment: machine.die.matrix_alignment.value as u32,
            functional: mode.functional(),
            clock: mode.timed().then_some(Clock::Simulated),
        };
        let pool = MemoryInfo { capacity: properties.memory_bytes, used: 0, peak: 0 };
        DieState {
            properties,
            pool: Mutex::new(pool),
            streams: Mutex::default(),
            lost: OnceLock::new(),
            host_clock: AtomicU64::new(0),
            tracing: AtomicBool::new(false),
            trace: RwLock::default(),
            faulty: AtomicBool::new(false),
            faults: RwLock::default(),
        }
    }

    pub(crate) fn id(&self) -> DeviceId {
        self.properties.id
    }

    /// An error if the die is lost.
    pub(crate) fn alive(&self) -> Result<()> {
        match self.lost.get() {
            Some(reason) => Err(Error::Lost { device: self.id(), reason: reason.clone() }),
            None => Ok(()),
        }
    }

    /// A stream of this die, if anybody still holds it.
    pub(crate) fn stream(&self, id: StreamId) -> Option<Arc<StreamShared>> {
        self.streams.lock().get(id.index as usize)?.upgrade()
    }

    /// The streams that somebody still holds, in the order in which they were made.
    pub(crate) fn streams(&self) -> Vec<Arc<StreamShared>> {
        self.streams.lock().iter().filter_map(Weak::upgrade).collect()
    }

    /// Whether there is a receiver of traces; without touching it, which all workers would.
    pub(crate) fn is_traced(&self) -> bool {
        self.tracing.load(Ordering::Acquire)
    }

    /// The receiver of traces, if there is one.
    pub(crate) fn trace(&self) -> Option<Arc<dyn TraceSink>> {
        self.tracing.load(Ordering::Acquire).then(|| self.trace.read().clone()).flatten()
    }

    /// The fault rules, if there are any.
    pub(crate) fn faults(&self) -> Option<Arc<FaultPlan>> {
        self.faulty.load(Ordering::Acquire).then(|| self.faults.read().clone()).flatten()
    }

    /// Takes memory out of the pool, in the order in which the host asks.
    fn reserve(&self, bytes: u64) -> Result<u64> {
        let requested = bytes.max(1).checked_next_multiple_of(ALIGNMENT).unwrap_or(u64::MAX);
        let mut pool = self.pool.lock();
        if requested > pool.free() {
            let (free, capacity) = (pool.free(), pool.capacity);
            return Err(Error::OutOfMemory { device: self.id(), requested, free, capacity });
        }
        pool.used += requested;
        pool.peak = pool.peak.max(pool.used);
        Ok(requested)
    }

    fn release(&self, bytes: u64) {
        self.pool.lock().used -= bytes;
    }

    /// Takes the die away: every stream of it fails, now and from now on.
    pub(crate) fn lose(&self, reason: Arc<str>) {
        let _ = self.lost.set(reason.clone());
        let streams: Vec<_> = self.streams.lock().iter().filter_map(Weak::upgrade).collect();
        for stream in streams {
            stream.fail(Error::Lost { device: self.id(), reason: reason.clone() });
        }
    }
}

/// The handle through which a die is used.
#[derive(Debug)]
pub(crate) struct SimDevice {
    shared: Arc<Shared>,
    id: DeviceId,
}

impl SimDevice {
    pub(crate) fn new(shared: Arc<Shared>, id: DeviceId) -> Self {
        SimDevice { shared, id }
    }

    fn die(&self) -> &DieState {
        &self.shared.dies[self.id.0 as usize]
    }
}

/// A buffer's side of the simulator.
#[derive(Debug)]
pub(crate) struct SimBuffer {
    shared: Arc<Shared>,
    pub(crate) memory: Arc<Memory>,
    /// Bytes to give back to the die's pool; 0 for host memory.
    reserved: u64,
    host: bool,
}

impl SimBuffer {
    /// Allocates on a die, or in the memory of its host.
    pub(crate) fn alloc(
        shared: &Arc<Shared>,
        device: DeviceId,
        bytes: u64,
        host: bool,
    ) -> Result<Buffer> {
        let die = &shared.dies[device.0 as usize];
        die.alive()?;
        let reserved = if host { 0 } else { die.reserve(bytes)? };
        // Host memory always has storage: a timing-only program may still fill it.
        let with_values = host || shared.mode.functional();
        let Some(memory) = Memory::new(device, bytes, with_values) else {
            die.release(reserved);
            // The simulated die has room, the simulating host has not.
            return Err(Error::OutOfMemory { device, requested: bytes, free: 0, capacity: 0 });
        };
        let memory = Arc::new(memory);
        let location = if host { Location::Host(device) } else { Location::Device(device) };
        let raw = SimBuffer { shared: shared.clone(), memory, reserved, host };
        Ok(Buffer::from_raw(bytes, location, Box::new(raw)))
    }

    fn host_only(&self) -> Result<()> {
        if self.host {
            return Ok(());
        }
        Err(Error::usage(self.memory.device, "device memory is not host memory: copy it"))
    }

    fn in_range(&self, offset: u64, len: usize) -> Result<()> {
        if offset.checked_add(len as u64).is_some_and(|end| end <= self.memory.size) {
            return Ok(());
        }
        let size = self.memory.size;
        let problem = format!("bytes {offset}..+{len} leave a buffer of {size} bytes");
        Err(Error::usage(self.memory.device, problem))
    }

    fn busy(&self) -> Error {
        Error::usage(self.memory.device, "a command is using this host memory: synchronise first")
    }
}

impl RawBuffer for SimBuffer {
    fn as_any(&self) -> &dyn Any {
        self
    }

    fn read_host(&self, offset: u64, bytes: &mut [u8]) -> Result<()> {
        self.host_only()?;
        self.in_range(offset, bytes.len())?;
        let read = self.memory.try_read(offset, bytes.len() as u64, |m| bytes.copy_from_slice(m));
        read.ok_or_else(|| self.busy())
    }

    fn write_host(&self, offset: u64, bytes: &[u8]) -> Result<()> {
        self.host_only()?;
        self.in_range(offset, bytes.len())?;
        let wrote = self.memory.try_write(offset, bytes.len() as u64, |m| m.copy_from_slice(bytes));
        wrote.ok_or_else(|| self.busy())
    }
}

impl Drop for SimBuffer {
    fn drop(&mut self) {
        // The pool counts in program order: commands in flight hold the memory, not this handle.
        self.shared.dies[self.memory.device.0 as usize].release(self.reserved);
    }
}

/// The simulator's memory behind a buffer.
///
/// # Errors
///
/// [`Error::Usage`] for another backend's buffer, or another system's.
pub(crate) fn memory_of<'b>(shared: &Arc<Shared>, buffer: &'b Buffer) -> Result<&'b Arc<Memory>> {
    match buffer.raw().as_any().downcast_ref::<SimBuffer>() {
        Some(raw) if Arc::ptr_eq(&raw.shared, shared) => Ok(&raw.memory),
        _ => Err(Error::usage(buffer.device(), format!("{buffer:?} is not of this system"))),
    }
}

impl Device for SimDevice {
    fn properties(&self) -> &DeviceProperties {
        &self.die().properties
    }

    fn memory_info(&self) -> Result<MemoryInfo> {
        self.die().alive()?;
        Ok(*self.die().pool.lock())
    }

    fn supports(&self, op: &Op<TensorDesc>) -> Support {
        match kernels::supports(op) {
            Ok(()) => Support::Yes,
            Err(reason) => Support::No(reason),
        }
    }

    fn stream(&self, label: &str) -> Result<Arc<dyn Stream>> {
        self.die().alive()?;
        let mut streams = self.die().streams.lock();
        let id = StreamId { device: self.id, index: streams.len() as u32 };
        let stream = Arc::new(StreamShared::new(self.shared.clone(), id, label));
        streams.push(Arc::downgrade(&stream));
        Ok(Arc::new(SimStream::new(stream)))
    }

    fn execute(&self, list: &CommandList, streams: &[Arc<dyn Stream>]) -> Result<()> {
        list.check_streams(self.id, streams)?;
        execute(&self.shared, list, streams)
    }

    fn alloc_host(&self, bytes: u64) -> Result<Buffer> {
        SimBuffer::alloc(&self.shared, self.id, bytes, true)
    }

    fn communicator_id(&self) -> Result<CommunicatorId> {
        self.die().alive()?;
        let n = self.shared.next_communicator.fetch_add(1, Ordering::Relaxed);
        Ok(CommunicatorId([u64::from(self.id.0), n]))
    }

    fn communicator(
        &self,
        id: CommunicatorId,
        rank: usize,
        size: usize,
    ) -> Result<Arc<dyn Communicator>> {
        self.die().alive()?;
        let mut groups = self.shared.groups.lock();
        let group = groups.entry(id).or_insert_with(|| Arc::new(Group::new(id, size)));
        group.join(self.id, rank, size)?;
        Ok(Arc::new(SimCommunicator::new(self.shared.clone(), group.clone(), self.id, rank)))
    }

    fn set_trace(&self, sink: Option<Arc<dyn TraceSink>>) -> Result<()> {
        if sink.is_some() && !self.shared.mode.timed() {
            return Err(Error::Unsupported {
                device: self.id,
                op: "tracing".to_string(),
                reason: "timing is off, so there are no times to trace".to_string(),
            });
        }
        let die = self.die();
        if self.shared.mode.timed() {
            // What has run by now is the former receiver's, or nobody's.
            self.shared.clock.play(&self.shared);
        }
        die.tracing.store(sink.is_some(), Ordering::Release);
        *die.trace.write() = sink;
        Ok(())
    }

    fn set_faults(&self, faults: Option<Arc<FaultPlan>>) -> Result<()> {
        let die = self.die();
        die.faulty.store(faults.is_some(), Ordering::Release);
        *die.faults.write() = faults;
        Ok(())
    }
}

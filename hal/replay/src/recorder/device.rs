//! Recorded devices.

use super::Shared;
use super::communicator::RecordedCommunicator;
use super::log::Numbered;
use super::memory::RecordedBuffer;
use super::stream::RecordedStream;
use crate::record::Call;
use hal::fault::FaultPlan;
use hal::trace::TraceSink;
use hal::{
    Buffer, Communicator, CommunicatorId, Device, DeviceProperties, MemoryInfo, Op, Result, Stream,
    Support, TensorDesc,
};
use std::sync::Arc;

/// A die whose calls are recorded. Questions and hooks go straight through.
#[derive(Debug)]
pub(super) struct RecordedDevice {
    inner: Arc<dyn Device>,
    shared: Arc<Shared>,
}

impl RecordedDevice {
    pub(super) fn new(inner: Arc<dyn Device>, shared: Arc<Shared>) -> Self {
        RecordedDevice { inner, shared }
    }

    fn die(&self) -> u32 {
        self.inner.properties().id.0
    }
}

impl Device for RecordedDevice {
    fn properties(&self) -> &DeviceProperties {
        self.inner.properties()
    }

    fn memory_info(&self) -> Result<MemoryInfo> {
        self.inner.memory_info()
    }

    fn supports(&self, op: &Op<TensorDesc>) -> Support {
        self.inner.supports(op)
    }

    fn stream(&self, label: &str) -> Result<Arc<dyn Stream>> {
        let mut number = 0;
        let create = || self.inner.stream(label);
        let inner = self.shared.step(create, |log, _| {
            number = log.number(Numbered::Stream);
            Call::Stream { stream: number, die: self.die(), label: label.to_string() }
        })?;
        let (device, shared) = (self.inner.clone(), self.shared.clone());
        Ok(Arc::new(RecordedStream::new(inner, device, number, shared)))
    }

    fn alloc_host(&self, bytes: u64) -> Result<Buffer> {
        let mut number = 0;
        let alloc = || self.inner.alloc_host(bytes);
        let inner = self.shared.step(alloc, |log, _| {
            number = log.number(Numbered::Buffer);
            Call::AllocHost { buffer: number, die: self.die(), bytes }
        })?;
        Ok(RecordedBuffer::wrap(inner, number, self.shared.clone()))
    }

    fn communicator_id(&self) -> Result<CommunicatorId> {
        self.inner.communicator_id()
    }

    fn communicator(
        &self,
        id: CommunicatorId,
        rank: usize,
        size: usize,
    ) -> Result<Arc<dyn Communicator>> {
        let mut number = 0;
        let join = || self.inner.communicator(id, rank, size);
        let inner = self.shared.step(join, |log, _| {
            number = log.number(Numbered::Communicator);
            Call::Join { communicator: number, die: self.die(), id: id.0, rank, size }
        })?;
        Ok(Arc::new(RecordedCommunicator { inner, number, shared: self.shared.clone() }))
    }

    fn set_trace(&self, sink: Option<Arc<dyn TraceSink>>) -> Result<()> {
        self.inner.set_trace(sink)
    }

    fn set_faults(&self, faults: Option<Arc<FaultPlan>>) -> Result<()> {
        self.inner.set_faults(faults)
    }
}

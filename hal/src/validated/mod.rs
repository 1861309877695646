//! The checked layer: a device around a device that refuses what breaks the contract, before the
//! backend sees it.
//!
//! It checks shapes and dtypes ([`crate::op::check`]), alignment and bounds of views, which die
//! memory belongs to, overlap of operands, reads of memory that nothing wrote, the order between
//! streams ([`crate::hazard`]), and collectives; and it knows what was not freed. It costs about as
//! much as the commands themselves, so it is on in tests and behind a flag elsewhere.

mod list;
mod memory;
mod stream;

use crate::fault::FaultPlan;
use crate::hazard::StreamOrder;
use crate::trace::TraceSink;
use crate::{
    Buffer, CommandList, Communicator, CommunicatorId, Device, DeviceProperties, MemoryInfo, Op,
    Result, Stream, Support, TensorDesc,
};
use memory::Registry;
use std::sync::Arc;
use stream::CheckedStream;

pub use memory::Leak;

/// A device whose every command is checked.
#[derive(Debug)]
pub struct Validated {
    inner: Arc<dyn Device>,
    shared: Arc<Shared>,
}

/// What the checked dies of one system share.
#[derive(Debug, Default)]
struct Shared {
    order: StreamOrder,
    registry: Registry,
}

impl Validated {
    /// Wraps a die that works alone.
    pub fn wrap(device: Arc<dyn Device>) -> Arc<Validated> {
        Arc::new(Validated { inner: device, shared: Arc::default() })
    }

    /// Wraps the dies of one system, so that order between them is known too.
    pub fn wrap_all(devices: impl IntoIterator<Item = Arc<dyn Device>>) -> Vec<Arc<Validated>> {
        let shared: Arc<Shared> = Arc::default();
        let wrap = |inner| Arc::new(Validated { inner, shared: shared.clone() });
        devices.into_iter().map(wrap).collect()
    }

    /// Memory of this die that is still allocated: what leaked, once everything is dropped.
    pub fn leaks(&self) -> Vec<Leak> {
        self.shared.registry.alive(self.inner.properties().id)
    }
}

impl Device for Validated {
    fn properties(&self) -> &DeviceProperties {
        self.inner.properties()
    }

    fn memory_info(&self) -> Result<MemoryInfo> {
        self.inner.memory_info()
    }

    fn supports(&self, op: &Op<TensorDesc>) -> Support {
        match crate::op::check(op) {
            Ok(()) => self.inner.supports(op),
            Err(problem) => Support::No(problem),
        }
    }

    fn stream(&self, label: &str) -> Result<Arc<dyn Stream>> {
        Ok(Arc::new(CheckedStream::new(self.inner.stream(label)?, self.shared.clone())))
    }

    fn execute(&self, list: &CommandList, streams: &[Arc<dyn Stream>]) -> Result<()> {
        list::execute(self, list, streams)
    }

    fn alloc_host(&self, bytes: u64) -> Result<Buffer> {
        let buffer = self.inner.alloc_host(bytes)?;
        self.shared.registry.add(&buffer, "host");
        Ok(buffer)
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
        self.inner.communicator(id, rank, size)
    }

    fn set_trace(&self, sink: Option<Arc<dyn TraceSink>>) -> Result<()> {
        self.inner.set_trace(sink)
    }

    fn set_faults(&self, faults: Option<Arc<FaultPlan>>) -> Result<()> {
        self.inner.set_faults(faults)
    }
}

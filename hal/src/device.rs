//! Devices: one die each.

use crate::{
    Buffer, CommandList, Communicator, CommunicatorId, Op, Result, Stream, TensorDesc,
    fault::FaultPlan, topology::DiePlacement, trace::TraceSink,
};
use serde::{Deserialize, Serialize};
use std::fmt;
use std::sync::Arc;

/// A die, numbered from 0 within its system; also its rank where ranks and dies are one to one.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize,
)]
pub struct DeviceId(pub u32);

impl fmt::Display for DeviceId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "die {}", self.0)
    }
}

/// Which clock a time was read from. Every reported figure names its clock.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Clock {
    /// Computed by a performance model; the same on every host, every time.
    Simulated,
    /// A counter of the device.
    Device,
    /// The host's monotonic clock.
    Host,
}

impl fmt::Display for Clock {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Clock::Simulated => "simulated",
            Clock::Device => "device",
            Clock::Host => "host",
        })
    }
}

/// What a device is and can do: a plain value, read once.
#[derive(Clone, Debug, Serialize)]
pub struct DeviceProperties {
    /// The die.
    pub id: DeviceId,
    /// Product name: `va16`, `h800`.
    pub name: String,
    /// The backend that drives it: `sim`, `vacc`, `null`.
    pub backend: &'static str,
    /// Where the die sits.
    pub placement: DiePlacement,
    /// Bytes of device memory.
    pub memory_bytes: u64,
    /// Allocations start at multiples of this many bytes.
    pub allocation_alignment: u64,
    /// Compute cores of the die (AI cores, SMs).
    pub cores: u32,
    /// Matrix operands run best with dimensions that are multiples of this.
    pub matrix_alignment: u32,
    /// Whether commands compute values. A timing-only simulation does not.
    pub functional: bool,
    /// The clock of [`crate::Timeline::completed_at`] and of traces, if the device has one.
    pub clock: Option<Clock>,
}

/// How a die's memory is used.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct MemoryInfo {
    /// Bytes in all.
    pub capacity: u64,
    /// Bytes allocated now, rounded up to the allocation granularity. Memory whose free is ordered
    /// behind unfinished commands still counts.
    pub used: u64,
    /// The most bytes ever allocated at once.
    pub peak: u64,
}

impl MemoryInfo {
    /// Bytes that can still be allocated.
    pub const fn free(&self) -> u64 {
        self.capacity - self.used
    }
}

/// Whether a device can run an op, and if not, why not.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Support {
    /// It can.
    Yes,
    /// It cannot: the reason, in words.
    No(String),
}

impl Support {
    /// Whether it can.
    pub fn is_supported(&self) -> bool {
        matches!(self, Support::Yes)
    }
}

/// One die: one memory pool, one rank.
///
/// Object-safe: everything above the HAL holds `Arc<dyn Device>`, and a dynamic call is noise next
/// to a launch. Streams and buffers keep their device alive.
///
/// # Errors
///
/// After the device is lost every call returns [`crate::Error::Lost`].
#[doc(alias = "CUdevice")]
pub trait Device: Send + Sync + fmt::Debug {
    /// What it is.
    fn properties(&self) -> &DeviceProperties;

    /// How full its memory is.
    #[doc(alias = "cudaMemGetInfo")]
    fn memory_info(&self) -> Result<MemoryInfo>;

    /// Whether this concrete op would run. Never disagrees with [`Stream::submit`].
    fn supports(&self, op: &Op<TensorDesc>) -> Support;

    /// Creates a stream. The label appears in traces and errors.
    #[doc(alias = "cudaStreamCreate")]
    fn stream(&self, label: &str) -> Result<Arc<dyn Stream>>;

    /// Submits every command of a list, each to the stream of `streams` that its entry names, as if
    /// one by one in the list's order; a device that has lists of its own takes them all at the
    /// host's cost of one call. This default issues them one by one.
    ///
    /// # Threads
    ///
    /// As with submitting to each of the streams: one thread at a time on each. Two threads may
    /// launch one list on different streams.
    ///
    /// # Errors
    ///
    /// What the stream's own method returns for the first command that is refused; the error names
    /// that command. Those before it were submitted and run, it and those after it were not. If
    /// the streams do not fit the list ([`CommandList::check_streams`]), nothing was submitted.
    /// A command that fails while it runs poisons its stream as always.
    #[doc(alias = "cudaGraphLaunch")]
    fn execute(&self, list: &CommandList, streams: &[Arc<dyn Stream>]) -> Result<()> {
        list.issue(self.properties().id, streams)
    }

    /// Allocates pinned host memory, which copies reach without staging.
    ///
    /// # Errors
    ///
    /// [`crate::Error::OutOfMemory`].
    #[doc(alias = "cudaMallocHost")]
    fn alloc_host(&self, bytes: u64) -> Result<Buffer>;

    /// Makes an id for a new communicator. One rank makes it and gives it to the others.
    #[doc(alias = "ncclGetUniqueId")]
    fn communicator_id(&self) -> Result<CommunicatorId>;

    /// Joins a communicator as one rank. Returns at once: ranks meet at their first collective.
    ///
    /// # Errors
    ///
    /// [`crate::Error::Usage`] if the rank is taken, not below `size`, or `size` differs from what
    /// the other ranks said.
    #[doc(alias = "ncclCommInitRank")]
    fn communicator(
        &self,
        id: CommunicatorId,
        rank: usize,
        size: usize,
    ) -> Result<Arc<dyn Communicator>>;

    /// Installs a receiver for every command that completes from now on; `None` removes it.
    ///
    /// A device may tell of a command later than it completes. Of all that completed until then it
    /// has told when the receiver has been removed or replaced, by the same one too.
    ///
    /// # Errors
    ///
    /// [`crate::Error::Unsupported`] where the device keeps no timestamps: asking for a trace and
    /// getting an empty one would be worse.
    fn set_trace(&self, sink: Option<Arc<dyn TraceSink>>) -> Result<()>;

    /// Installs fault rules; `None` removes them.
    ///
    /// # Errors
    ///
    /// [`crate::Error::Unsupported`] where faults cannot be injected.
    fn set_faults(&self, faults: Option<Arc<FaultPlan>>) -> Result<()>;
}

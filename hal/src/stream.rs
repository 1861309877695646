//! Streams: ordered queues of commands, and the timelines by which they wait for each other.

use crate::{
    Buffer, Clock, Collective, Communicator, DType, DeviceId, Error, Op, Region, Result, Tensor,
    TensorDesc,
};
use std::any::Any;
use std::fmt;
use std::sync::Arc;
use std::time::Duration;

/// Identity of a stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct StreamId {
    /// The die.
    pub device: DeviceId,
    /// Its number on the die, in order of creation.
    pub index: u32,
}

impl fmt::Display for StreamId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} stream {}", self.device, self.index)
    }
}

/// A name that a command carries into traces and errors: "layer 4 input norm".
#[derive(Clone)]
pub enum Label {
    /// Known at compile time.
    Static(&'static str),
    /// Built once and shared, so that submitting allocates nothing.
    Shared(Arc<str>),
}

impl Label {
    /// The text.
    pub fn as_str(&self) -> &str {
        match self {
            Label::Static(text) => text,
            Label::Shared(text) => text,
        }
    }
}

impl From<&'static str> for Label {
    fn from(text: &'static str) -> Self {
        Label::Static(text)
    }
}

impl From<String> for Label {
    fn from(text: String) -> Self {
        Label::Shared(text.into())
    }
}

impl From<Arc<str>> for Label {
    fn from(text: Arc<str>) -> Self {
        Label::Shared(text)
    }
}

impl fmt::Debug for Label {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(self.as_str(), f)
    }
}

impl fmt::Display for Label {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// An op with its label: what a stream takes.
#[derive(Clone, Debug)]
pub struct Command {
    /// What to do.
    pub op: Op<Tensor>,
    /// How traces and errors call it.
    pub label: Label,
}

impl Op<Tensor> {
    /// Names the op for traces and errors.
    pub fn label(self, label: impl Into<Label>) -> Command {
        Command { op: self, label: label.into() }
    }
}

impl From<Op<Tensor>> for Command {
    fn from(op: Op<Tensor>) -> Self {
        let label = Label::Static(op.kind().name());
        Command { op, label }
    }
}

/// A moment on a clock.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Timestamp {
    /// Which clock. Timestamps of different clocks are never compared.
    pub clock: Clock,
    /// Picoseconds since that clock's start.
    pub picos: u64,
}

/// The backend's side of a stream's progress. The value counts the commands completed; it never
/// falls.
pub trait Timeline: Send + Sync + fmt::Debug {
    /// For the backend to find its own type again.
    fn as_any(&self) -> &dyn Any;

    /// The stream.
    fn stream(&self) -> StreamId;

    /// The value reached so far. Poisoned streams stop here.
    fn reached(&self) -> u64;

    /// Blocks the host until the timeline reaches `value`.
    ///
    /// # Errors
    ///
    /// [`crate::Error::Timeout`]; [`crate::Error::Failed`] with the origin if a command at or
    /// before `value`, or one that it depends on, failed; [`crate::Error::Lost`].
    fn synchronize(&self, value: u64, timeout: Duration) -> Result<()>;

    /// The failure that poisoned the stream, if one has, without waiting and without ordering the
    /// host after anything.
    #[doc(alias = "cudaStreamQuery")]
    fn failure(&self) -> Option<Error>;

    /// When the command with this sequence number completed, on the device's clock; `None` if it
    /// has not, if its record has expired, or if the device has no clock.
    fn completed_at(&self, value: u64) -> Option<Timestamp>;
}

/// A value on a stream's timeline: "everything submitted so far is done".
#[doc(alias = "cudaEvent_t")]
#[derive(Clone, Debug)]
pub struct Point {
    timeline: Arc<dyn Timeline>,
    value: u64,
}

impl Point {
    /// Called by backends.
    pub fn new(timeline: Arc<dyn Timeline>, value: u64) -> Self {
        Point { timeline, value }
    }

    /// The stream whose timeline this is on.
    pub fn stream(&self) -> StreamId {
        self.timeline.stream()
    }

    /// The timeline value.
    pub fn value(&self) -> u64 {
        self.value
    }

    /// The timeline.
    pub fn timeline(&self) -> &Arc<dyn Timeline> {
        &self.timeline
    }

    /// Whether the point has passed, without waiting.
    #[doc(alias = "cudaEventQuery")]
    pub fn is_reached(&self) -> bool {
        self.timeline.reached() >= self.value
    }

    /// Blocks the host until the point has passed.
    ///
    /// # Errors
    ///
    /// As [`Timeline::synchronize`].
    #[doc(alias = "cudaEventSynchronize")]
    pub fn synchronize(&self, timeout: Duration) -> Result<()> {
        self.timeline.synchronize(self.value, timeout)
    }

    /// When it passed. See [`Timeline::completed_at`].
    #[doc(alias = "cudaEventElapsedTime")]
    pub fn completed_at(&self) -> Option<Timestamp> {
        self.timeline.completed_at(self.value)
    }
}

/// An ordered queue of commands on one die.
///
/// # Order
///
/// Commands of one stream run in submission order and see each other's results. Commands of
/// different streams are unordered unless one stream [waits](Stream::wait) for a point of the
/// other, or the host synchronised in between. Accesses that conflict without such an order are a
/// mistake of the caller; the simulator and [`crate::Validated`] report them.
///
/// # Threads
///
/// A stream may be used from any thread, one at a time: the order of two threads' submissions is
/// the order in which they got there. Simulated time is deterministic if each die is driven by one
/// thread.
///
/// # Errors
///
/// Every method that submits returns [`crate::Error::Failed`] with the origin once the stream is
/// poisoned, [`crate::Error::Lost`] once the device is lost, and [`crate::Error::Usage`] for what
/// the backend itself found wrong; beyond these, what its own documentation says. A method that
/// fails has submitted nothing.
#[doc(alias = "cudaStream_t")]
pub trait Stream: Send + Sync + fmt::Debug {
    /// For the backend to find its own type again.
    fn as_any(&self) -> &dyn Any;

    /// Identity.
    fn id(&self) -> StreamId;

    /// The name given at creation.
    fn label(&self) -> &str;

    /// Allocates device memory that commands of this stream may use from now on. Another stream
    /// must first wait for a point of this one. Contents are undefined.
    ///
    /// # Errors
    ///
    /// [`crate::Error::OutOfMemory`] with the sizes.
    #[doc(alias = "cudaMallocAsync")]
    fn alloc(&self, bytes: u64) -> Result<Buffer>;

    /// Copies pageable host memory to the device. `src` may be reused as soon as the call returns.
    ///
    /// # Errors
    ///
    /// Sizes that differ are a [`crate::Error::Usage`].
    #[doc(alias = "cudaMemcpyAsync")]
    fn write(&self, dst: &Region, src: &[u8]) -> Result<()>;

    /// Copies from the device to pageable host memory, after everything submitted so far, and
    /// returns when the bytes are there.
    ///
    /// # Errors
    ///
    /// As [`Timeline::synchronize`]. Sizes that differ are a [`crate::Error::Usage`].
    fn read(&self, src: &Region, dst: &mut [u8], timeout: Duration) -> Result<()>;

    /// Copies between buffers: within the die, from and to pinned host memory, and from die to
    /// die. One of the two belongs to this stream's die.
    ///
    /// # Errors
    ///
    /// Sizes that differ or ranges that overlap are a [`crate::Error::Usage`];
    /// [`crate::Error::Unsupported`] where no link joins the two dies.
    fn copy(&self, dst: &Region, src: &Region) -> Result<()>;

    /// Sets every byte of `dst`.
    #[doc(alias = "cudaMemsetAsync")]
    fn fill(&self, dst: &Region, byte: u8) -> Result<()>;

    /// Submits an op.
    ///
    /// # Errors
    ///
    /// [`crate::Error::Unsupported`] exactly where [`crate::Device::supports`] says no.
    fn submit(&self, command: &Command) -> Result<()>;

    /// Submits collectives of this stream's rank as one batch, which runs as a unit: sends and
    /// receives of one batch do not wait for each other. A batch holds either one or more group
    /// collectives, or only sends and receives.
    ///
    /// # Errors
    ///
    /// Execution errors flow as with any command: a rank that fails, a batch that differs between
    /// ranks or an abort of the communicator fails the batch on every rank.
    #[doc(alias = "ncclGroupEnd")]
    fn submit_collectives(
        &self,
        communicator: &Arc<dyn Communicator>,
        batch: &[Collective],
        label: &Label,
    ) -> Result<()>;

    /// Makes later commands of this stream wait for `point`. Points of streams that already
    /// passed cost nothing. The point must have been submitted (signal before wait).
    #[doc(alias = "cudaStreamWaitEvent")]
    fn wait(&self, point: &Point) -> Result<()>;

    /// The point at which everything submitted so far is done.
    #[doc(alias = "cudaEventRecord")]
    fn point(&self) -> Point;

    /// Waits for everything submitted so far.
    ///
    /// # Errors
    ///
    /// As [`Timeline::synchronize`].
    #[doc(alias = "cudaStreamSynchronize")]
    fn synchronize(&self, timeout: Duration) -> Result<()> {
        self.point().synchronize(timeout)
    }
}

impl dyn Stream + '_ {
    /// Allocates a contiguous tensor.
    ///
    /// # Errors
    ///
    /// As [`Stream::alloc`].
    pub fn alloc_tensor(&self, dtype: DType, shape: &[usize]) -> Result<Tensor> {
        let desc = TensorDesc::new(dtype, shape);
        Ok(Tensor::new(self.alloc(desc.bytes())?, 0, desc))
    }
}

//! Memory: who owns it, where it lies, when it is freed.

use crate::{DeviceId, Error, Result};
use std::any::Any;
use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Weak};

/// Identity of a buffer, unique in the process and never reused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct BufferId(pub u64);

impl BufferId {
    /// A fresh id.
    pub fn next() -> Self {
        static NEXT: AtomicU64 = AtomicU64::new(1);
        BufferId(NEXT.fetch_add(1, Ordering::Relaxed))
    }
}

/// Where a buffer's bytes lie.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Location {
    /// In the memory of a die.
    Device(DeviceId),
    /// In host memory that this die can reach by DMA (pinned, page-locked).
    Host(DeviceId),
}

impl Location {
    /// The die that the memory belongs to.
    pub const fn device(self) -> DeviceId {
        match self {
            Location::Device(id) | Location::Host(id) => id,
        }
    }
}

/// What a backend keeps behind a [`Buffer`]. Dropping it frees the memory in stream order: after
/// the work submitted so far to the stream that it was allocated on.
pub trait RawBuffer: Send + Sync + fmt::Debug {
    /// For the backend to find its own type again.
    fn as_any(&self) -> &dyn Any;

    /// Copies bytes out of pinned host memory.
    ///
    /// The caller has synchronised with the last command that wrote them.
    ///
    /// # Errors
    ///
    /// For device memory, and for a range outside the buffer.
    fn read_host(&self, offset: u64, bytes: &mut [u8]) -> Result<()>;

    /// Copies bytes into pinned host memory.
    ///
    /// The caller has synchronised with the last command that reads or writes them.
    ///
    /// # Errors
    ///
    /// For device memory, and for a range outside the buffer.
    fn write_host(&self, offset: u64, bytes: &[u8]) -> Result<()>;
}

/// Reference-counted memory. The last clone dropped frees it, in stream order; commands in flight
/// hold clones of their own, so memory outlives every command that names it.
///
/// Contents are undefined until written.
#[doc(alias = "cudaMallocAsync")]
#[derive(Clone)]
pub struct Buffer(Arc<Inner>);

struct Inner {
    id: BufferId,
    size: u64,
    location: Location,
    raw: Box<dyn RawBuffer>,
}

impl Buffer {
    /// Wraps a backend's memory. Called by backends and wrappers only.
    pub fn from_raw(size: u64, location: Location, raw: Box<dyn RawBuffer>) -> Self {
        Buffer(Arc::new(Inner { id: BufferId::next(), size, location, raw }))
    }

    /// Identity.
    pub fn id(&self) -> BufferId {
        self.0.id
    }

    /// Bytes.
    pub fn size(&self) -> u64 {
        self.0.size
    }

    /// Where the bytes lie.
    pub fn location(&self) -> Location {
        self.0.location
    }

    /// The die that the memory belongs to.
    pub fn device(&self) -> DeviceId {
        self.0.location.device()
    }

    /// The backend's side.
    pub fn raw(&self) -> &dyn RawBuffer {
        &*self.0.raw
    }

    /// How many handles share the memory, commands in flight included.
    pub fn handles(&self) -> usize {
        Arc::strong_count(&self.0)
    }

    /// A reference that does not keep the memory.
    pub fn downgrade(&self) -> WeakBuffer {
        WeakBuffer(Arc::downgrade(&self.0))
    }

    /// `len` bytes from `offset`.
    ///
    /// # Errors
    ///
    /// [`Error::Usage`] if the range leaves the buffer.
    pub fn region(&self, offset: u64, len: u64) -> Result<Region> {
        match offset.checked_add(len) {
            Some(end) if end <= self.size() => Ok(Region { buffer: self.clone(), offset, len }),
            _ => Err(Error::usage(
                self.device(),
                format!("bytes {offset}..+{len} leave a buffer of {} bytes", self.size()),
            )),
        }
    }

    /// The whole buffer.
    pub fn whole(&self) -> Region {
        Region { buffer: self.clone(), offset: 0, len: self.size() }
    }
}

/// Tells whether a buffer is still alive, without keeping it so.
#[derive(Clone)]
pub struct WeakBuffer(Weak<Inner>);

impl WeakBuffer {
    /// Whether anybody holds the buffer.
    pub fn is_alive(&self) -> bool {
        self.0.strong_count() > 0
    }
}

impl fmt::Debug for WeakBuffer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(if self.is_alive() { "alive" } else { "freed" })
    }
}

impl fmt::Debug for Buffer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Buffer#{}({} B, {:?})", self.id().0, self.size(), self.location())
    }
}

/// A byte range of a buffer: what copies and fills work on.
#[derive(Clone, Debug)]
pub struct Region {
    /// The memory.
    pub buffer: Buffer,
    /// First byte.
    pub offset: u64,
    /// Number of bytes.
    pub len: u64,
}

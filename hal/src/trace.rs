//! What was executed when: the hook that profilers, reports and trace files hang on.

use crate::{Clock, CollectiveKind, CommunicatorId, DeviceId, Label, OpKind, StreamId};

/// The kind of a command.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[non_exhaustive]
pub enum CommandKind {
    /// An op.
    Op(OpKind),
    /// A batch of collectives, by its first.
    Collective(CollectiveKind),
    /// A copy between buffers.
    Transfer,
    /// Host memory to device.
    Write,
    /// Device to host memory.
    Read,
    /// A fill.
    Fill,
    /// A wait for another stream.
    Wait,
    /// An allocation or a free.
    Memory,
}

impl CommandKind {
    /// The name used in traces, fault rules and messages.
    pub const fn name(self) -> &'static str {
        match self {
            CommandKind::Op(kind) => kind.name(),
            CommandKind::Collective(kind) => kind.name(),
            CommandKind::Transfer => "transfer",
            CommandKind::Write => "write",
            CommandKind::Read => "read",
            CommandKind::Fill => "fill",
            CommandKind::Wait => "wait",
            CommandKind::Memory => "memory",
        }
    }
}

/// What bounded a command's time.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Bound {
    /// Memory bandwidth.
    Memory,
    /// Matrix units.
    Matrix,
    /// Vector units.
    Vector,
    /// A link between dies or to the host.
    Link,
    /// Launching it.
    Launch,
    /// Not known.
    Unknown,
}

impl Bound {
    /// The name used in reports.
    pub const fn name(self) -> &'static str {
        match self {
            Bound::Memory => "memory",
            Bound::Matrix => "matrix",
            Bound::Vector => "vector",
            Bound::Link => "link",
            Bound::Launch => "launch",
            Bound::Unknown => "unknown",
        }
    }
}

/// What a command waited for besides what was before it on its stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum WaitedFor {
    /// A command of another stream: the one that a wait names, or the counterpart of a send or
    /// receive (of a batch's first).
    Command {
        /// The stream.
        stream: StreamId,
        /// The command's sequence number there.
        sequence: u64,
    },
    /// The other ranks of a communicator. Spans that have both in common are one collective.
    Ranks {
        /// The communicator.
        communicator: CommunicatorId,
        /// The batch's number among the communicator's group collectives.
        round: u64,
    },
}

/// One completed command.
#[derive(Clone, Debug)]
pub struct Span {
    /// The stream it ran on.
    pub stream: StreamId,
    /// Its sequence number there.
    pub sequence: u64,
    /// What it was.
    pub kind: CommandKind,
    /// Its label.
    pub label: Label,
    /// The clock of `start` and `end`.
    pub clock: Clock,
    /// Picoseconds at which its own stream was ready for it: what was before it was done, and the
    /// host had issued it. From then until `start` it waited for others. Equal to `start` where the
    /// device does not tell.
    pub ready: u64,
    /// Picoseconds at which the device began it.
    pub start: u64,
    /// Picoseconds at which it was done.
    pub end: u64,
    /// Operations it did.
    pub operations: u64,
    /// Bytes it read and wrote in device memory, or moved over links.
    pub bytes: u64,
    /// What bounded it.
    pub bound: Bound,
    /// What it waited for; `None` if for nothing, or where the device does not tell.
    pub waited_for: Option<WaitedFor>,
}

impl Span {
    /// The die.
    pub fn device(&self) -> DeviceId {
        self.stream.device
    }

    /// Picoseconds it took.
    pub fn duration(&self) -> u64 {
        self.end - self.start
    }
}

/// Receives completed commands.
///
/// Called from the backend's threads, in order within a stream and in any order between streams;
/// it must be quick and must not call the device.
pub trait TraceSink: Send + Sync + std::fmt::Debug {
    /// One command completed.
    fn record(&self, span: &Span);
}

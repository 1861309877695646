//! Errors: what a caller could not foresee, what it did wrong, and which command was the origin.

use crate::trace::WaitedFor;
use crate::{DeviceId, Label, StreamId};
use std::fmt;
use std::sync::Arc;
use std::time::Duration;

/// The result of a HAL call.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Why a HAL call failed. Cheap to clone: a failure is told to everyone who waits for it.
#[derive(Clone, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The device is gone. A state: every later call on it returns this at once.
    #[error("{device} is lost: {reason}")]
    Lost {
        /// The lost die.
        device: DeviceId,
        /// What took it away.
        reason: Arc<str>,
    },
    /// The allocation does not fit in what is free.
    #[error(
        "{device} is out of memory: {requested} bytes requested, {free} of {capacity} bytes free"
    )]
    OutOfMemory {
        /// The die whose memory (or whose pinned host memory) is exhausted.
        device: DeviceId,
        /// Bytes asked for, rounded up to the allocation granularity.
        requested: u64,
        /// Bytes free.
        free: u64,
        /// Bytes in all.
        capacity: u64,
    },
    /// A host wait ran out of time. The work is still queued; the stream is not poisoned.
    #[error("timed out after {after:?} waiting for {waiting_for}; {pending}")]
    Timeout {
        /// The point waited for.
        waiting_for: String,
        /// How long the caller was ready to wait.
        after: Duration,
        /// What the stream's oldest unfinished command is, and what it waits for, in words.
        pending: String,
        /// The same as data; `None` where the device has no more than words.
        stuck: Option<Arc<Stuck>>,
    },
    /// The device cannot run this op with these operands; [`crate::Device::supports`] says so too.
    #[error("{device} does not support {op}: {reason}")]
    Unsupported {
        /// The die asked.
        device: DeviceId,
        /// Name of the op, with its operands.
        op: String,
        /// What about it is not supported.
        reason: String,
    },
    /// A command failed after it was submitted; this names the first one that did, wherever it was.
    #[error(transparent)]
    Failed(Arc<Failure>),
    /// A vendor runtime's call failed.
    #[error("{call} failed on {device}: {text} (code {code})")]
    Runtime {
        /// The die concerned.
        device: DeviceId,
        /// The runtime function.
        call: &'static str,
        /// Its status, as returned.
        code: i64,
        /// The runtime's text for it.
        text: String,
    },
    /// The caller broke a rule of the contract. Nothing was submitted.
    #[error(transparent)]
    Usage(Arc<UsageError>),
}

impl Error {
    /// A contract violation without a command.
    pub fn usage(device: DeviceId, problem: impl Into<String>) -> Self {
        Error::Usage(Arc::new(UsageError { device, command: None, problem: problem.into() }))
    }

    /// A contract violation by a command.
    pub fn misuse(
        device: DeviceId,
        op: impl fmt::Display,
        label: &Label,
        problem: impl Into<String>,
    ) -> Self {
        let command = Some(format!("{op} {label:?}"));
        Error::Usage(Arc::new(UsageError { device, command, problem: problem.into() }))
    }

    /// The command that failed first, if this error came along a stream.
    pub fn origin(&self) -> Option<&Failure> {
        match self {
            Error::Failed(failure) => Some(failure),
            _ => None,
        }
    }
}

/// The oldest unfinished command of a stream that a host wait gave up on.
#[derive(Clone, Debug)]
pub struct Stuck {
    /// The stream.
    pub stream: StreamId,
    /// Its sequence number on the stream.
    pub sequence: u64,
    /// What kind of command it is.
    pub op: &'static str,
    /// The label that it was submitted with.
    pub label: Label,
    /// Whom it waits for; `None` if nobody keeps it but itself. For sends and receives whose
    /// counterpart has not come it is the communicator's round 0.
    pub waits_for: Option<WaitedFor>,
}

/// A rule of the contract that the caller broke: shape, dtype, alignment, lifetime, order.
#[derive(Clone, Debug)]
pub struct UsageError {
    /// The die asked.
    pub device: DeviceId,
    /// The op and its label, where a command was concerned.
    pub command: Option<String>,
    /// What is wrong, with the values.
    pub problem: String,
}

impl fmt::Display for UsageError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "invalid use of {}", self.device)?;
        if let Some(command) = &self.command {
            write!(f, " by {command}")?;
        }
        write!(f, ": {}", self.problem)
    }
}

impl std::error::Error for UsageError {}

/// A command that failed while running: the origin of every error that flows from it.
#[derive(Clone, Debug)]
pub struct Failure {
    /// The stream it ran on.
    pub stream: StreamId,
    /// That stream's label.
    pub stream_label: Arc<str>,
    /// Its sequence number on the stream: the timeline value that it would have reached.
    pub sequence: u64,
    /// What kind of command it was (`linear`, `all_reduce`, `copy`).
    pub op: &'static str,
    /// The label that it was submitted with.
    pub label: Label,
    /// What happened.
    pub cause: Cause,
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{} {:?} (command {} of stream {:?} on {}) failed: {}",
            self.op, self.label, self.sequence, self.stream_label, self.stream.device, self.cause
        )
    }
}

impl std::error::Error for Failure {}

/// Why a running command failed.
#[derive(Clone, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Cause {
    /// The device was lost while or before it ran.
    #[error("the device was lost ({0})")]
    Lost(Arc<str>),
    /// A fault rule said so.
    #[error("injected fault: {0}")]
    Injected(Arc<str>),
    /// The values in memory made it impossible: an index outside its table, for one.
    #[error("{0}")]
    Data(String),
    /// Ranks of a communicator disagree about the collective.
    #[error("collective mismatch: {0}")]
    Mismatch(String),
    /// The communicator was aborted.
    #[error("the communicator was aborted: {0}")]
    Aborted(Arc<str>),
    /// A vendor runtime reported it.
    #[error("{text} (code {code})")]
    Runtime {
        /// The runtime's status.
        code: i64,
        /// Its text.
        text: String,
    },
}

//! Errors in recordings.

use hal::Error;
use serde::{Deserialize, Serialize};

/// An error that a call returned.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Failed {
    /// Its kind.
    pub kind: FailedKind,
    /// Its text.
    pub text: String,
    /// The die that it names, where it names one.
    pub die: Option<u32>,
    /// The command that failed, if it came along a stream.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub origin: Option<Origin>,
}

/// The variants of [`hal::Error`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum FailedKind {
    /// [`hal::Error::Lost`], or a failure caused by it: which of the two is a matter of moments.
    Lost,
    /// [`hal::Error::OutOfMemory`]
    OutOfMemory,
    /// [`hal::Error::Timeout`]
    Timeout,
    /// [`hal::Error::Unsupported`]
    Unsupported,
    /// [`hal::Error::Failed`]
    Failed,
    /// [`hal::Error::Runtime`]
    Runtime,
    /// [`hal::Error::Usage`]
    Usage,
    /// One that this version does not know.
    Other,
}

/// The command that failed first.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Origin {
    /// Its die.
    pub die: u32,
    /// Its stream's number on the die.
    pub stream: u32,
    /// Its number on the stream.
    pub sequence: u64,
    /// What it was.
    pub op: String,
    /// Its label.
    pub label: String,
}

impl From<&Error> for Failed {
    fn from(error: &Error) -> Self {
        let (kind, die) = match error {
            Error::Lost { device, .. } => (FailedKind::Lost, Some(device)),
            Error::OutOfMemory { device, .. } => (FailedKind::OutOfMemory, Some(device)),
            Error::Timeout { .. } => (FailedKind::Timeout, None),
            Error::Unsupported { device, .. } => (FailedKind::Unsupported, Some(device)),
            Error::Failed(failure) => match failure.cause {
                hal::Cause::Lost(_) => (FailedKind::Lost, Some(&failure.stream.device)),
                _ => (FailedKind::Failed, Some(&failure.stream.device)),
            },
            Error::Runtime { device, .. } => (FailedKind::Runtime, Some(device)),
            Error::Usage(usage) => (FailedKind::Usage, Some(&usage.device)),
            _ => (FailedKind::Other, None),
        };
        let origin = error.origin().map(|failure| Origin {
            die: failure.stream.device.0,
            stream: failure.stream.index,
            sequence: failure.sequence,
            op: failure.op.to_string(),
            label: failure.label.to_string(),
        });
        Failed { kind, text: error.to_string(), die: die.map(|d| d.0), origin }
    }
}

impl Failed {
    /// Whether the error flows along streams, so that every later call on them returns it too.
    pub fn flows(&self) -> bool {
        matches!(self.kind, FailedKind::Lost | FailedKind::Failed)
    }
}

//! The file: a magic number, a version, and frames with checksums.
//!
//! ```text
//! 8 bytes    89 'H' 'A' 'L' 'R' 0d 0a 1a     (what text transfers damage is found at once)
//! 4 bytes    version, little-endian
//! frames     kind: 1 byte, 'H' header, 'P' payload, 'R' record
//!            length of the body: LEB128
//!            body: JSON of `Header` or `Record`; a payload's bytes
//!            checksum: lower 4 bytes of xxh64(body, seed = kind), little-endian
//! ```
//!
//! Payloads are numbered in order and stand before the records that name them.

mod reader;
mod writer;

pub use reader::{Reader, Stored};
pub use writer::Writer;

use serde::{Deserialize, Serialize};

/// First bytes of every recording.
pub(crate) const MAGIC: [u8; 8] = [0x89, b'H', b'A', b'L', b'R', 0x0d, 0x0a, 0x1a];

/// The version that this crate reads and writes.
pub const VERSION: u32 = 1;

/// Kinds of frame.
pub(crate) mod kind {
    pub(crate) const HEADER: u8 = b'H';
    pub(crate) const PAYLOAD: u8 = b'P';
    pub(crate) const RECORD: u8 = b'R';
}

/// The first frame.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Header {
    /// The program that recorded, with its version.
    pub program: String,
    /// Its command line.
    pub command: Vec<String>,
    /// Whether every op's outputs were hashed.
    pub all_outputs: bool,
}

/// What is wrong with a recording, and at which byte.
#[derive(Debug, thiserror::Error)]
#[error("byte {offset}: {problem}")]
pub struct FormatError {
    /// Where the damaged or impossible part begins.
    pub offset: u64,
    /// What about it.
    #[source]
    pub problem: Problem,
}

/// What can be wrong with a recording.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Problem {
    /// Another kind of file.
    #[error("this is no recording: it does not begin with the magic number of one")]
    NotARecording,
    /// Another version.
    #[error(
        "this recording has format version {found}, this program reads {VERSION}: replay it with \
         the version of the program that recorded it"
    )]
    Version {
        /// The file's.
        found: u32,
    },
    /// The file ends inside a frame.
    #[error("the file ends inside a frame: it was cut off, or its recording is still going on")]
    Truncated,
    /// The file ends between frames, but before its end record.
    #[error(
        "the file ends before its end record: the recording process was killed, or is still \
         running"
    )]
    Unfinished,
    /// A checksum is wrong.
    #[error("the file is damaged here: the checksum says {expected:08x}, the bytes {found:08x}")]
    Damaged {
        /// As the file says.
        expected: u32,
        /// As computed.
        found: u32,
    },
    /// A frame that makes no sense.
    #[error("{0}")]
    Invalid(String),
    /// The file cannot be read.
    #[error("reading failed: {0}")]
    Io(std::io::Error),
}

impl FormatError {
    pub(crate) fn invalid(offset: u64, problem: impl Into<String>) -> Self {
        FormatError { offset, problem: Problem::Invalid(problem.into()) }
    }
}

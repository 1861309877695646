//! What a replay found.

use crate::record::{Die, Failed};
use serde::Serialize;
use std::fmt;

/// What a replay found.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Report {
    /// The dies as they were.
    pub recorded_dies: Vec<Die>,
    /// The dies as they are.
    pub replayed_dies: Vec<Die>,
    /// Whether the recorded run came to its end.
    pub run_finished: bool,
    /// Whether the recording has its end; where not, its process was killed.
    pub recording_complete: bool,
    /// Commands that were recorded.
    pub recorded_commands: u64,
    /// Commands that were issued again.
    pub commands: u64,
    /// Commands that were not: refused at recording because of an earlier failure, or naming
    /// memory that could not be had.
    pub skipped: u64,
    /// Reads that were compared.
    pub reads: u64,
    /// Bytes that were compared.
    pub compared_bytes: u64,
    /// Hashes of outputs that were compared.
    pub hashes: u64,
    /// Reads and hashes for which there are no values on one side, or no number to compare: timing
    /// without values, or hashes that differ where a tolerance was asked for.
    pub not_compared: u64,
    /// Reads and hashes that differ.
    pub different: u64,
    /// The first of them.
    pub differences: Vec<Difference>,
    /// Failures of either side.
    pub failures: Vec<FailureReport>,
}

impl Report {
    /// Whether the replay did what the recorded run did.
    pub fn is_equal(&self) -> bool {
        self.different == 0 && self.failures.iter().all(|f| f.outcome == Outcome::Same)
    }
}

/// Values that came out otherwise.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Difference {
    /// Number of the record, from 0, as in a dump.
    pub record: u64,
    /// What was looked at: `read of 512 bytes at byte 0 of buffer 7`.
    pub what: String,
    /// The first byte that differs, in the buffer; absent for a hash.
    pub byte: Option<u64>,
    /// How many elements differ, bytes where the dtype is not known; absent for a hash.
    pub differ: Option<u64>,
    /// Of how many.
    pub of: Option<u64>,
    /// The first value or the hash that was recorded.
    pub recorded: String,
    /// What it is now.
    pub replayed: String,
    /// The largest difference relative to the largest recorded magnitude, for floats.
    pub relative: Option<f64>,
    /// The command that last wrote the first byte that differs.
    pub wrote: Option<Wrote>,
}

/// A command that wrote memory.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Wrote {
    /// Number of its record.
    pub record: u64,
    /// The die it ran on.
    pub die: u32,
    /// Its stream's label.
    pub stream: String,
    /// Its number on the stream.
    pub sequence: u64,
    /// The op: `linear`, `write`, `all_reduce`.
    pub op: String,
    /// Its label.
    pub label: String,
    /// The operand that is the memory.
    pub operand: String,
    /// For a transfer, what last wrote the first byte that it took.
    pub source: Option<Box<Wrote>>,
}

/// A failure, and on which sides it was seen.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct FailureReport {
    /// Number of the record that told of it first.
    pub record: u64,
    /// On which sides.
    pub outcome: Outcome,
    /// As it was recorded.
    pub recorded: Option<Failed>,
    /// As it is now.
    pub replayed: Option<Failed>,
}

/// On which sides a failure was seen.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Outcome {
    /// On both.
    Same,
    /// Only at recording.
    DidNotHappenAgain,
    /// Only now.
    New,
}

impl fmt::Display for Wrote {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Wrote { record, die, stream, sequence, op, label, operand, source } = self;
        write!(f, "{op} ")?;
        if !label.is_empty() {
            write!(f, "{label:?} ")?;
        }
        write!(
            f,
            "({operand}; command {sequence} of stream {stream:?} on die {die}, record {record})"
        )?;
        match source {
            Some(source) => write!(f, " from memory last written by {source}"),
            None => Ok(()),
        }
    }
}

impl fmt::Display for Difference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "record {}: {} differs", self.record, self.what)?;
        if let (Some(differ), Some(of), Some(byte)) = (self.differ, self.of, self.byte) {
            write!(f, " in {differ} of {of} values, the first at byte {byte} of the buffer")?;
        }
        write!(f, ": recorded {}, now {}", self.recorded, self.replayed)?;
        if let Some(relative) = self.relative {
            write!(f, "; at most {relative:.2e} of the largest")?;
        }
        match &self.wrote {
            Some(wrote) => write!(f, "; last written by {wrote}"),
            None => write!(f, "; nothing recorded wrote it"),
        }
    }
}

impl fmt::Display for FailureReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let text = |failed: &Option<Failed>| {
            failed.as_ref().map_or(String::new(), |failed| failed.text.clone())
        };
        let (recorded, replayed) = (text(&self.recorded), text(&self.replayed));
        match self.outcome {
            Outcome::Same if recorded == replayed => {
                write!(f, "the recorded failure happened again: {recorded}")
            }
            Outcome::Same => write!(
                f,
                "the recorded failure happened again, in other words: {recorded}; now: {replayed}"
            ),
            Outcome::DidNotHappenAgain => {
                write!(f, "the recorded failure did not happen again: {recorded}")
            }
            Outcome::New => {
                write!(f, "record {}: fails only now: {replayed}", self.record)
            }
        }
    }
}

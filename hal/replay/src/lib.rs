//! Recording and replaying the commands that reach devices.
//!
//! A recording is the bug report of somebody whose card gives wrong answers or fails: it holds
//! every call that reached the devices of a run, with the weights and inputs that were written and
//! the bytes that were read back, so that the same calls can be made again, without the model and
//! on another machine or backend, and the results compared.
//!
//! - [`Recorder`] wraps the devices of a system and writes the file as the run goes on.
//! - [`replay`] makes the calls again and reports what came out otherwise.
//! - [`dump()`] prints a recording as text.
//!
//! The file's layout is described in [`file`](mod@file), its contents in [`record`].
//!
//! # What is compared
//!
//! Every read, byte for byte or within a [`Tolerance`]; with [`file::Header::all_outputs`] the
//! hash of every op's outputs as well, which finds the first op that differs; and every error, as
//! a set of failures with their origins, since the moment at which a failure is told differs from
//! run to run. Where a recorded call failed because an earlier command had, it is not made again.
//!
//! # What is not recorded
//!
//! Questions (properties, memory, support, progress) and hooks (traces, fault rules).

mod compare;
mod dump;
pub mod file;
mod hash;
mod player;
pub mod record;
mod recorder;
mod report;

pub use compare::Tolerance;
pub use dump::{DumpError, dump};
pub use file::{FormatError, Header, Problem};
pub use hash::xxh64;
pub use player::{Options, ReplayError, replay};
pub use recorder::{Recorder, Summary};
pub use report::{Difference, FailureReport, Outcome, Report, Wrote};

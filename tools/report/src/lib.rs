//! What a run's spans say.
//!
//! - [`SpanLog`] receives them from devices and keeps them on disk;
//! - [`trace::write`] makes a Chrome/Perfetto trace file of them;
//! - [`analysis::StepTime`] adds up where a step's time went: by op, by part of the model, by what
//!   bounds it, and how much of the communication hides behind computation.
//!
//! Times are integer picoseconds throughout, and nothing is printed. The same spans give the same
//! file and the same figures, whatever the order in which they came from different streams.

pub mod analysis;
mod log;
mod partial;
pub mod trace;

pub use log::{Recorded, SpanLog, Spans};
pub use partial::PartialFile;

//! What a run's spans say.
//!
//! - [`SpanLog`] receives them from devices and keeps them on disk;
//! - [`trace::write`] makes a Chrome/Perfetto trace file of them.
//!
//! Times are integer picoseconds throughout, and nothing is printed. The same spans give the same
//! file and the same figures, whatever the order in which they came from different streams.

mod log;
mod partial;
pub mod trace;

pub use log::{Recorded, SpanLog, Spans};
pub use partial::PartialFile;

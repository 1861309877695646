//! How long a step of DeepSeek-V3 takes on a described machine.
//!
//! No second model of the network: [`Estimator::step`] builds the graph of every kind of rank of the
//! plan, schedules it as the engine does, and plays its commands on the simulator's timeline
//! ([`sim::timeline`]), each at the cost that the simulated device would give it. The same commands
//! sent to simulated dies take the same picoseconds (`tests/unfolded.rs`).
//!
//! What makes it fast is that nothing is done twice:
//!
//! | what is alike | file |
//! |---|---|
//! | ranks that hold parts of the same sizes, in groups that lie alike: one is played for all | `fold.rs` |
//! | layers that begin and end alike, on all lanes: one is played, the others are counted | `repeat.rs` |
//! | ops of the same shapes: costed once | the simulator's own cache |
//!
//! | the rest | file |
//! |---|---|
//! | what is asked | `workload.rs`, `routing.rs` |
//! | what each micro-batch looks like | `batch.rs` |
//! | commands on the timeline, and as spans | `play.rs`, `trace.rs` |
//! | what came out, where the time went, and what bounds it from below | `step.rs`, `breakdown.rs`, `floor.rs` |
//! | which assumed constants decide | `sensitivity.rs` |
//! | many steps at once, and the best of them | `sweep.rs` |
//! | published figures of whole systems | `published.rs` |

mod batch;
mod breakdown;
mod floor;
mod fold;
mod play;
mod published;
mod repeat;
mod routing;
mod sensitivity;
mod step;
mod sweep;
mod trace;
mod workload;

pub use breakdown::{Breakdown, Part};
pub use floor::Floor;
pub use published::{Published, published};
pub use routing::{Routing, RoutingError};
pub use sensitivity::sensitivity;
pub use step::{Estimate, Estimator, Folding, PerfError};
pub use sweep::{Grid, Outcome, Point, SweepError, on_threads, pareto, run};
pub use trace::TracedRank;
pub use workload::{Phase, Workload};

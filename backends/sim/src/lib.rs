//! A simulated accelerator: it computes the values of every op, and the time that a described
//! machine would have taken.
//!
//! * [`Machine`] is a machine file: a data sheet in TOML, each constant with its provenance.
//! * [`System`] is that machine, running: open a die and use it as a [`hal::Device`].
//! * Values come from the kernels, time from [`cost`]. They are separate and both optional
//!   ([`Mode`]), and the same commands are issued in every mode.
//!
//! Commands really run asynchronously: each stream is a queue that worker threads drain in order,
//! waits and collectives join queues, and no worker ever blocks. Results and simulated times are a
//! function of the submitted program alone, whatever the threads do.
//!
//! # What a green test here does not prove
//!
//! That a card computes the same bits (it will differ by rounding), that it takes the predicted
//! time (constants marked `assumed` are guesses), or that its runtime accepts the same calls.

mod clock;
mod collective;
pub mod cost;
mod device;
pub mod host;
mod kernels;
pub mod machine;
mod memory;
mod stream;
mod system;
pub mod timeline;
mod workers;

pub use machine::{Machine, MachineError};
pub use system::{Mode, Options, System};

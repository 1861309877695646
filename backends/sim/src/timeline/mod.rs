//! When commands run: the event engine behind simulated time.
//!
//! A [`Timeline`] knows dies, their streams, and the commands of each stream in order, with what each
//! would cost alone and which part of its die it would use ([`crate::cost::Cost`]). It plays them:
//!
//! * A command is ready when the one before it on its stream has ended, when what it waits for has
//!   ended, and when the host has issued it.
//! * Commands that run on a die at the same time share its compute units, its memory and its links
//!   (`share.rs`), so that communication that hides behind computation slows it, and is slowed by it.
//! * A collective begins when its last rank is ready, goes as fast as the slowest of its dies lets it,
//!   and ends everywhere at once.
//!
//! Times are integers, and rates are exact fractions: a program takes the same number of picoseconds
//! whenever it begins, and whoever pushes its commands in whichever order.

mod engine;
mod share;

pub use engine::{Done, MeetKey, PairKey, Step, StreamIndex, Timeline};
pub use share::{Resource, Shares};

#[cfg(test)]
mod tests;

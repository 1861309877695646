//! From a graph to a schedule: which node runs on which stream, what waits for what, and where
//! values lie in the workspace.
//!
//! A graph says what depends on what; nothing in it mentions streams. [`Schedule::new`] decides,
//! for one rank:
//!
//! 1. **Lanes.** Computation goes to lane 0. A collective goes to a lane of its own, and one inside a
//!    node to another one (it passes other ports than those between nodes), where nodes
//!    stand between it and the first one that needs it: there it hides behind them. Elsewhere a
//!    second stream would only cost two waits.
//! 2. **Waits**, the fewest: none that order within a lane, or another wait, implies (vector clocks).
//!    Taking any one away leaves two conflicting accesses unordered.
//! 3. **Places.** Scratch values share bytes where one's last use is ordered before the other's
//!    first, by lanes and waits as they are: sharing never adds a wait.
//!
//! Before that, [`fuse()`] merges neighbours that a device can run as one op.
//!
//! [`interleave()`] merges the graphs of two micro-batches, so that one's collectives hide behind the
//! other's computation (DeepSeek-V3 report, section 3.2; DeepSeek's two-micro-batch overlap).

mod access;
mod arena;
mod clock;
mod dump;
mod fuse;
mod interleave;
mod wait;

pub use arena::Arena;
pub use fuse::fuse;
pub use interleave::interleave;

use crate::graph::{Graph, Node, Work};
use crate::plan::Group;
use access::Accesses;

/// A stream of a rank, by number: 0 computes.
pub type Lane = usize;

/// The lane of computation.
pub const COMPUTE: Lane = 0;
/// The lane of collectives that hide behind computation.
pub const COMMUNICATION: Lane = 1;
/// The lane of exchanges inside a node that hide: they pass other ports than those between nodes, and
/// need not wait for them.
pub const NODE_COMMUNICATION: Lane = 2;

/// What a lane's stream is called.
pub const fn lane_label(lane: Lane) -> &'static str {
    match lane {
        COMPUTE => "compute",
        COMMUNICATION => "communication",
        NODE_COMMUNICATION => "node communication",
        _ => "side",
    }
}

/// One command of a schedule, in the order of issue.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Item {
    /// Runs a node.
    Run {
        /// On this lane.
        lane: Lane,
        /// Its number in the graph.
        node: usize,
    },
    /// Makes a lane wait for a node of another one.
    Wait {
        /// The lane that waits.
        lane: Lane,
        /// For what.
        event: Event,
    },
}

/// What can be waited for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Event {
    /// Everything that was submitted to [`COMPUTE`] before the schedule began.
    Start,
    /// A node has run.
    Node(usize),
}

/// A graph's order of issue, with lanes, waits and places.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Schedule {
    /// Commands in the order of issue. The last ones make [`COMPUTE`] wait for what other lanes do
    /// to the end, so that whoever comes next on it comes after all of it.
    pub items: Vec<Item>,
    /// Lanes in use.
    pub lanes: usize,
    /// Where scratch values lie.
    pub arena: Arena,
}

impl Schedule {
    /// Schedules a graph in the order of its nodes.
    pub fn new(graph: &Graph) -> Self {
        let accesses = Accesses::of(graph);
        let lane = |(number, node): (usize, &Node)| match node.work {
            Work::Collectives { group, .. } => {
                let hides = accesses.first_dependant(number).is_some_and(|next| next > number + 1);
                match (hides, group) {
                    (false, _) => COMPUTE,
                    (true, Group::ExpertNode) => NODE_COMMUNICATION,
                    (true, _) => COMMUNICATION,
                }
            }
            Work::Op(_) => COMPUTE,
        };
        let lanes: Vec<Lane> = graph.nodes().iter().enumerate().map(lane).collect();
        Self::of(graph, &accesses, &lanes)
    }

    /// Schedules a graph in the order of its nodes, on given lanes.
    pub fn on_lanes(graph: &Graph, lane_of: &[Lane]) -> Self {
        Self::of(graph, &Accesses::of(graph), lane_of)
    }

    fn of(graph: &Graph, accesses: &Accesses, lane_of: &[Lane]) -> Self {
        let (items, order) = wait::issue(graph.values().len(), accesses, lane_of);
        let arena = arena::plan(graph, accesses, &order);
        Schedule { items, lanes: order.lanes, arena }
    }
}

#[cfg(test)]
mod tests;

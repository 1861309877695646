//! From a graph to a schedule: which node runs on which stream, what waits for what, and where
//! values lie in the workspace.
//!
//! A graph says what depends on what; nothing in it mentions streams. [`Schedule::new`] decides,
//! for one rank:
//!
//! 1. **Lanes.** Computation goes to lane 0. A collective goes to a lane of its own where nodes
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

mod arena;
mod clock;
mod dump;
mod fuse;
mod interleave;

pub use arena::Arena;
pub use fuse::fuse;
pub use interleave::interleave;

use crate::graph::{Graph, Source, ValueId, Work};
use clock::Clock;
use hal::Operand;
use hal::op::Access;
use std::collections::HashMap;
use std::ops::Range;

/// A stream of a rank, by number: 0 computes.
pub type Lane = usize;

/// The lane of computation.
pub const COMPUTE: Lane = 0;
/// The lane of collectives that hide behind computation.
pub const COMMUNICATION: Lane = 1;

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

/// An access to a value: the node, the bytes, and whether it writes.
#[derive(Clone, Debug)]
struct Touch {
    node: usize,
    range: Range<u64>,
    writes: bool,
}

impl Touch {
    fn conflicts(&self, other: &Touch) -> bool {
        (self.writes || other.writes)
            && self.range.start < other.range.end
            && other.range.start < self.range.end
    }
}

/// Accesses of each value in order, and of each node.
struct Accesses {
    of_value: HashMap<ValueId, Vec<Touch>>,
    of_node: Vec<Vec<(ValueId, Touch)>>,
}

impl Accesses {
    fn of(graph: &Graph) -> Self {
        let mut accesses =
            Accesses { of_value: HashMap::new(), of_node: vec![Vec::new(); graph.nodes().len()] };
        graph.visit(|node, access: Access, slot| {
            // What is never written in a step needs no order.
            let source = graph.value(slot.value).source;
            if matches!(source, Source::Weight(_) | Source::Scales(_) | Source::Input(..)) {
                return;
            }
            let range = slot.offset..slot.offset + slot.desc().extent();
            if range.is_empty() {
                return;
            }
            let touch = Touch { node, range, writes: access.writes() };
            accesses.of_value.entry(slot.value).or_default().push(touch.clone());
            accesses.of_node[node].push((slot.value, touch));
        });
        accesses
    }

    /// The first later node that conflicts with a node, if there is one.
    fn first_dependant(&self, node: usize) -> Option<usize> {
        let later = |(value, touch): &(ValueId, Touch)| {
            self.of_value[value]
                .iter()
                .filter(|t| t.node > node && t.conflicts(touch))
                .map(|t| t.node)
                .min()
        };
        self.of_node[node].iter().filter_map(later).min()
    }
}

impl Schedule {
    /// Schedules a graph in the order of its nodes.
    pub fn new(graph: &Graph) -> Self {
        let accesses = Accesses::of(graph);
        let lane = |node: usize| match graph.nodes()[node].work {
            Work::Collectives { .. } => {
                let hides = accesses.first_dependant(node).is_some_and(|next| next > node + 1);
                if hides { COMMUNICATION } else { COMPUTE }
            }
            _ => COMPUTE,
        };
        let lanes: Vec<Lane> = (0..graph.nodes().len()).map(lane).collect();
        Self::on_lanes(graph, &lanes)
    }

    /// Schedules a graph in the order of its nodes, on given lanes.
    pub fn on_lanes(graph: &Graph, lane_of: &[Lane]) -> Self {
        let accesses = Accesses::of(graph);
        let count = lane_of.iter().max().map_or(1, |lane| lane + 1);
        let mut items = Vec::with_capacity(graph.nodes().len());
        // Position 1 of the first lane is the start; nodes follow.
        let mut knowledge = vec![Clock::new(count); count];
        let mut length = vec![0u32; count];
        length[COMPUTE] = 1;
        knowledge[COMPUTE].learn(COMPUTE, 1);
        let start = knowledge[COMPUTE].clone();
        let mut places: Vec<(Lane, u32)> = Vec::with_capacity(lane_of.len());
        let mut clocks: Vec<Clock> = Vec::with_capacity(lane_of.len());
        let mut nodes_at: Vec<Vec<usize>> = vec![Vec::new(); count];
        let event_at = |nodes_at: &[Vec<usize>], lane: Lane, position: u32| {
            let before_first = u32::from(lane == COMPUTE);
            match (position - before_first).checked_sub(1) {
                Some(index) => Event::Node(nodes_at[lane][index as usize]),
                None => Event::Start,
            }
        };
        let clock_of = |clocks: &[Clock], event: Event| match event {
            Event::Start => start.clone(),
            Event::Node(node) => clocks[node].clone(),
        };
        let wait = |needs: &[u32],
                    lane: Lane,
                    knowledge: &mut Clock,
                    clocks: &[Clock],
                    nodes_at: &[Vec<usize>],
                    items: &mut Vec<Item>| {
            let needed: Vec<(Lane, u32, Event, Clock)> = (0..count)
                .filter(|&other| other != lane && needs[other] > knowledge.of(other))
                .map(|other| {
                    let event = event_at(nodes_at, other, needs[other]);
                    (other, needs[other], event, clock_of(clocks, event))
                })
                .collect();
            for (other, position, event, clock) in &needed {
                let implied = needed
                    .iter()
                    .any(|(another, .., clock)| another != other && clock.of(*other) >= *position);
                if !implied {
                    items.push(Item::Wait { lane, event: *event });
                }
                knowledge.join(clock);
            }
        };
        let mut needs = vec![0u32; count];
        for (node, &lane) in lane_of.iter().enumerate() {
            needs.fill(0);
            // Memory comes from earlier steps.
            needs[COMPUTE] = 1;
            for (value, touch) in &accesses.of_node[node] {
                for earlier in accesses.of_value[value].iter().take_while(|t| t.node < node) {
                    if earlier.conflicts(touch) {
                        let (on, position) = places[earlier.node];
                        needs[on] = needs[on].max(position);
                    }
                }
            }
            wait(&needs, lane, &mut knowledge[lane], &clocks, &nodes_at, &mut items);
            length[lane] += 1;
            knowledge[lane].learn(lane, length[lane]);
            places.push((lane, length[lane]));
            clocks.push(knowledge[lane].clone());
            nodes_at[lane].push(node);
            items.push(Item::Run { lane, node });
        }
        let ends = length.clone();
        wait(&ends, COMPUTE, &mut knowledge[COMPUTE], &clocks, &nodes_at, &mut items);
        let order = Order { places, clocks };
        let arena = arena::plan(graph, &accesses, &order);
        Schedule { items, lanes: count, arena }
    }
}

/// Which node runs before which, by lanes and waits.
struct Order {
    places: Vec<(Lane, u32)>,
    clocks: Vec<Clock>,
}

impl Order {
    /// Whether a node is done when another begins, or is that node.
    fn is_before(&self, earlier: usize, later: usize) -> bool {
        let (lane, position) = self.places[earlier];
        self.clocks[later].of(lane) >= position
    }
}

#[cfg(test)]
mod tests;

//! Which waits the nodes of several lanes need.

use super::access::{Accesses, NONE};
use super::clock::{Clock, Clocks, covers, join};
use super::{COMPUTE, Event, Item, Lane};

/// Which node runs before which, by lanes and waits.
pub(super) struct Order {
    /// Lanes in use.
    pub(super) lanes: usize,
    /// The lane of each node and its position there. Position 1 of the compute lane is the start;
    /// nodes follow.
    pub(super) places: Vec<(Lane, u32)>,
    /// What each node knows to be done when it is done itself.
    pub(super) clocks: Clocks,
}

/// The items of a schedule, and the order that they give.
pub(super) fn issue(values: usize, accesses: &Accesses, lane_of: &[Lane]) -> (Vec<Item>, Order) {
    let lanes = lane_of.iter().max().map_or(1, |lane| lane + 1);
    let mut issue = Issue::new(lanes, lane_of.len());
    let mut recent = Recent::new(values, accesses);
    let mut needs = vec![0; lanes];
    for (node, &lane) in lane_of.iter().enumerate() {
        needs.fill(0);
        // Memory comes from earlier steps.
        needs[COMPUTE] = 1;
        recent.touch(node, lane, &issue.order.places, &mut needs);
        issue.wait(lane, &needs);
        issue.run(lane, node);
    }
    needs.copy_from_slice(&issue.lengths);
    issue.wait(COMPUTE, &needs);
    (issue.items, issue.order)
}

/// Of each value, the touches that later ones may have to wait for. Those are few: a touch is
/// forgotten where another one takes its place.
struct Recent<'a> {
    accesses: &'a Accesses,
    /// The newest of each value, or [`NONE`].
    newest: Vec<u32>,
    /// Of each touch, the next older one of the same value that is not forgotten, or [`NONE`].
    older: Vec<u32>,
}

impl<'a> Recent<'a> {
    fn new(values: usize, accesses: &'a Accesses) -> Self {
        let older = vec![NONE; accesses.all().len()];
        Recent { accesses, newest: vec![NONE; values], older }
    }

    /// Adds the touches of the next node, and to `needs` what it has to come after.
    fn touch(&mut self, node: usize, lane: Lane, places: &[(Lane, u32)], needs: &mut Clock) {
        let touches = self.accesses.all();
        for number in self.accesses.of_node(node) {
            let touch = &touches[number];
            let value = touch.value.0 as usize;
            let newest = std::mem::replace(&mut self.newest[value], number as u32);
            self.older[number] = newest;
            // The touch after the one that is looked at.
            let mut newer = number;
            let mut at = newest;
            while let Some(earlier) = touches.get(at as usize) {
                let this = at as usize;
                at = self.older[this];
                let on = match places.get(earlier.node as usize) {
                    Some(&(on, position)) => {
                        if earlier.conflicts(touch) {
                            needs[on] = needs[on].max(position);
                        }
                        on
                    }
                    // Another operand of this node.
                    None => lane,
                };
                // A write comes after all that it overwrites, and a read after earlier ones on its
                // lane: who waits for the later touch has waited for the earlier one.
                let replaced =
                    touch.contains(earlier) && (touch.writes || (!earlier.writes && on == lane));
                if replaced {
                    self.older[newer] = at;
                } else {
                    newer = this;
                }
            }
        }
    }
}

/// Items as they are issued, and what each lane knows by then.
struct Issue {
    items: Vec<Item>,
    order: Order,
    /// Of each lane, what it knows to be done.
    knowledge: Clocks,
    /// Of each lane, its last position.
    lengths: Vec<u32>,
    /// Of each lane, its nodes.
    nodes: Vec<Vec<usize>>,
    /// The clock of the start.
    start: Vec<u32>,
    /// What one node waits for; kept for its memory.
    events: Vec<(Lane, Event)>,
}

impl Issue {
    fn new(lanes: usize, nodes: usize) -> Self {
        let mut start = vec![0; lanes];
        start[COMPUTE] = 1;
        let mut knowledge = Clocks::all(lanes, lanes, 0);
        knowledge.of_mut(COMPUTE).copy_from_slice(&start);
        Issue {
            items: Vec::with_capacity(nodes + nodes / 4),
            order: Order {
                lanes,
                places: Vec::with_capacity(nodes),
                clocks: Clocks::with_capacity(lanes, nodes),
            },
            knowledge,
            lengths: start.clone(),
            nodes: vec![Vec::new(); lanes],
            start,
            events: Vec::new(),
        }
    }

    /// Makes a lane wait for all that is needed and that it does not know to be done.
    fn wait(&mut self, lane: Lane, needs: &Clock) {
        let known = self.knowledge.of_mut(lane);
        if covers(known, needs) {
            return;
        }
        self.events.clear();
        for (other, (&needed, &known)) in needs.iter().zip(&*known).enumerate() {
            if needed > known {
                let before_first = u32::from(other == COMPUTE);
                let event = match (needed - before_first).checked_sub(1) {
                    Some(index) => Event::Node(self.nodes[other][index as usize]),
                    None => Event::Start,
                };
                self.events.push((other, event));
            }
        }
        let clock_of = |event: Event| match event {
            Event::Start => &self.start[..],
            Event::Node(node) => self.order.clocks.of(node),
        };
        for &(other, event) in &self.events {
            let implied = self.events.iter().any(|&(another, event)| {
                another != other && clock_of(event)[other] >= needs[other]
            });
            if !implied {
                self.items.push(Item::Wait { lane, event });
            }
            join(known, clock_of(event));
        }
    }

    /// Runs the next node.
    fn run(&mut self, lane: Lane, node: usize) {
        self.lengths[lane] += 1;
        let position = self.lengths[lane];
        let known = self.knowledge.of_mut(lane);
        known[lane] = position;
        self.order.places.push((lane, position));
        self.order.clocks.push(known);
        self.nodes[lane].push(node);
        self.items.push(Item::Run { lane, node });
    }
}

//! Places for scratch values in one workspace: values of which one is done with before the other
//! begins share bytes.

use super::clock::Clock;
use super::{Accesses, COMPUTE, Order};
use crate::graph::{Graph, Source, ValueId};
use std::collections::HashMap;

/// Values start at multiples of this many bytes.
const ALIGNMENT: u64 = 256;

/// Where each scratch value lies.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Arena {
    /// Bytes from the start of the workspace.
    pub offsets: HashMap<ValueId, u64>,
    /// Bytes of the workspace.
    pub size: u64,
    /// The most bytes that values need at once that can never share: no plan for this order of issue
    /// and these waits is smaller.
    pub lower_bound: u64,
}

/// A scratch value: its bytes, and the first and last node that touches it.
struct Life {
    value: ValueId,
    size: u64,
    first: usize,
    last: usize,
}

/// What values are placed by.
type Key = (std::cmp::Reverse<u64>, std::cmp::Reverse<usize>);

/// Plans the workspace by best fit, in several orders, and takes the smallest.
pub(super) fn plan(graph: &Graph, accesses: &Accesses, order: &Order) -> Arena {
    let mut lives: Vec<Life> = Vec::new();
    for (number, value) in graph.values().iter().enumerate() {
        let id = ValueId(number as u32);
        if value.source != Source::Scratch {
            continue;
        }
        let Some(touches) = accesses.of_value.get(&id) else { continue };
        let size = value.desc.bytes().next_multiple_of(ALIGNMENT);
        let (first, last) = (touches[0].node, touches[touches.len() - 1].node);
        lives.push(Life { value: id, size, first, last });
    }
    // Large ones first where several begin at once, and in a fixed order: a plan is a function of
    // the graph.
    lives.sort_by_key(|l| (l.first, std::cmp::Reverse(l.size), l.value));
    let lower_bound = alive(&lives).max(not_done(&lives, accesses, order));
    let mut best = place(&lives, accesses, order);
    // Good enough for most graphs; where several lanes keep values apart, other orders may pack
    // better: large ones first, or from the end of the graph.
    let orders: [fn(&Life) -> Key; 2] = [
        |l| (std::cmp::Reverse(l.size), std::cmp::Reverse(l.last)),
        |l| (std::cmp::Reverse(l.last as u64), std::cmp::Reverse(l.size as usize)),
    ];
    for key in orders {
        if best.1 * 20 <= lower_bound * 21 {
            break;
        }
        lives.sort_by_key(|l| (key(l), l.value));
        let other = place(&lives, accesses, order);
        if other.1 < best.1 {
            best = other;
        }
    }
    let (offsets, size) = best;
    Arena { offsets, size, lower_bound }
}

/// The most bytes alive at one place in the order of issue: such values can never share.
fn alive(lives: &[Life]) -> u64 {
    let mut changes: Vec<(usize, i64)> = Vec::with_capacity(2 * lives.len());
    for life in lives {
        changes.push((2 * life.first, life.size as i64));
        changes.push((2 * life.last + 1, -(life.size as i64)));
    }
    changes.sort_unstable();
    let mut live = 0;
    let peak = changes.iter().map(|(_, change)| {
        live += change;
        live
    });
    peak.max().unwrap_or(0) as u64
}

/// The most bytes that a node of the compute lane does not know to be done with, of values that began
/// on that lane: what one of them was ordered after, so is the node, so none of them can share.
fn not_done(lives: &[Life], accesses: &Accesses, order: &Order) -> u64 {
    let began = |life: &&Life| order.places[life.first].0 == COMPUTE;
    let mut known: Vec<&Life> = Vec::new();
    let mut most = 0;
    let mut began = lives.iter().filter(began).peekable();
    for (node, clock) in order.clocks.iter().enumerate() {
        if order.places[node].0 != COMPUTE {
            continue;
        }
        while let Some(life) = began.next_if(|life| life.first <= node) {
            known.push(life);
        }
        known.retain(|life| {
            life.last >= node
                || accesses.of_value[&life.value].iter().any(|use_| {
                    let (lane, position) = order.places[use_.node];
                    clock.of(lane) < position
                })
        });
        most = most.max(known.iter().map(|life| life.size).sum());
    }
    most
}

/// Whether all of a value's uses are ordered before all of another's.
fn done_before(earlier: &Life, later: &Life, accesses: &Accesses, order: &Order) -> bool {
    earlier.last < later.first
        && accesses.of_value[&later.value].iter().all(|l| {
            // Order is transitive: what comes after the first use needs no look of its own.
            (l.node != later.first && order.is_before(later.first, l.node))
                || accesses.of_value[&earlier.value]
                    .iter()
                    .rev()
                    .all(|e| order.is_before(e.node, l.node))
        })
}

/// Of each node, what is done before it and before every node after it, whatever the lane.
fn floors(order: &Order) -> Vec<Clock> {
    let Some(lanes) = order.clocks.first().map(Clock::lanes) else { return Vec::new() };
    let mut latest = vec![Clock::new(lanes); lanes];
    let floor = |(node, clock): (usize, &Clock)| {
        latest[order.places[node].0] = clock.clone();
        latest[1..].iter().fold(latest[0].clone(), |floor, clock| floor.meet(clock))
    };
    order.clocks.iter().enumerate().map(floor).collect()
}

/// Best fit: each value in turn goes to the smallest gap between those it cannot share with.
fn place(lives: &[Life], accesses: &Accesses, order: &Order) -> (HashMap<ValueId, u64>, u64) {
    let mut offsets = HashMap::with_capacity(lives.len());
    let mut placed: Vec<(u64, &Life)> = Vec::new();
    let mut total = 0;
    let floors = match lives.is_sorted_by_key(|l| l.first) {
        true => floors(order),
        false => Vec::new(),
    };
    let mut taken: Vec<(u64, u64)> = Vec::new();
    for life in lives {
        taken.clear();
        placed.retain(|&(offset, other)| {
            if !done_before(other, life, accesses, order) {
                if !done_before(life, other, accesses, order) {
                    taken.push((offset, offset + other.size));
                }
                return true;
            }
            // In the order of time, what is done before all that comes need not be looked at again.
            let done = |floor: &Clock| {
                let uses = &accesses.of_value[&other.value];
                uses.iter().all(|u| floor.of(order.places[u.node].0) >= order.places[u.node].1)
            };
            !floors.get(life.first).is_some_and(done)
        });
        taken.sort_unstable();
        let (mut best, mut end): (Option<(u64, u64)>, u64) = (None, 0);
        for &(start, stop) in &taken {
            let gap = start.saturating_sub(end);
            if gap >= life.size && best.is_none_or(|(size, _)| gap < size) {
                best = Some((gap, end));
            }
            end = end.max(stop);
        }
        let offset = best.map_or(end, |(_, offset)| offset);
        total = total.max(offset + life.size);
        offsets.insert(life.value, offset);
        placed.push((offset, life));
    }
    (offsets, total)
}

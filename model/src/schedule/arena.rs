//! Places for scratch values in one workspace: values of which one is done with before the other
//! begins share bytes.

use super::{Accesses, Order};
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
    /// The most bytes that values need at any node of the order of issue: no plan for this order is
    /// smaller.
    pub lower_bound: u64,
}

/// A scratch value: its bytes, and the first and last node that touches it.
struct Life {
    value: ValueId,
    size: u64,
    first: usize,
    last: usize,
}

/// Plans the workspace, in the order of first use and in that of size, and takes the better.
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
    let lower_bound = lower_bound(&lives);
    let by_time = place(&lives, accesses, order);
    let (offsets, size) = if by_time.1 * 20 <= lower_bound * 21 {
        by_time
    } else {
        let mut by_size: Vec<Life> = lives;
        by_size.sort_by_key(|l| (std::cmp::Reverse(l.size), l.first, l.value));
        let by_size = place(&by_size, accesses, order);
        if by_size.1 < by_time.1 { by_size } else { by_time }
    };
    Arena { offsets, size, lower_bound }
}

/// Values alive at the same place in the order of issue can never share.
fn lower_bound(lives: &[Life]) -> u64 {
    let mut changes: Vec<(usize, i64)> = Vec::with_capacity(2 * lives.len());
    for life in lives {
        changes.push((2 * life.first, life.size as i64));
        changes.push((2 * life.last + 1, -(life.size as i64)));
    }
    changes.sort_unstable();
    let mut live = 0;
    changes
        .iter()
        .map(|(_, change)| {
            live += change;
            live
        })
        .max()
        .unwrap_or(0) as u64
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

/// Best fit: each value in turn goes to the smallest gap between those it cannot share with.
fn place(lives: &[Life], accesses: &Accesses, order: &Order) -> (HashMap<ValueId, u64>, u64) {
    let mut offsets = HashMap::with_capacity(lives.len());
    let mut placed: Vec<(u64, &Life)> = Vec::new();
    let mut total = 0;
    let in_time = lives.is_sorted_by_key(|l| l.first);
    let mut taken: Vec<(u64, u64)> = Vec::new();
    for life in lives {
        taken.clear();
        placed.retain(|&(offset, other)| {
            let free = done_before(other, life, accesses, order);
            if !free && !done_before(life, other, accesses, order) {
                taken.push((offset, offset + other.size));
            }
            // In the order of time, what is done before this one on a single lane is done before
            // all later ones too; with several lanes it may not be, and stays.
            !(free && in_time && order.clocks.first().is_some_and(|c| c.lanes() == 1))
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

//! Places for scratch values in one workspace: values of which one is done with before the other
//! begins share bytes.

use super::COMPUTE;
use super::access::Accesses;
use super::clock::{Clocks, covers, meet};
use super::wait::Order;
use crate::graph::{Graph, Source, ValueId};
use std::cmp::Reverse;
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

/// Scratch values in the order in which they begin, and how lanes and waits order them.
struct Lives {
    all: Vec<Life>,
    /// Of each life, what must have run for it to be done with: of each lane its last use.
    ends: Clocks,
    /// Of each life, what each of its uses knows to be done.
    begins: Clocks,
}

impl Lives {
    fn of(graph: &Graph, accesses: &Accesses, order: &Order) -> Self {
        let mut all: Vec<Life> = Vec::new();
        // The life of each value, by number in `all`.
        let mut life_of: Vec<Option<usize>> = vec![None; graph.values().len()];
        for touch in accesses.all() {
            let (node, at) = (touch.node as usize, touch.value.0 as usize);
            let value = &graph.values()[at];
            match life_of[at] {
                Some(life) => all[life].last = node,
                None if value.source == Source::Scratch => {
                    life_of[at] = Some(all.len());
                    let size = value.desc.bytes().next_multiple_of(ALIGNMENT);
                    all.push(Life { value: touch.value, size, first: node, last: node });
                }
                None => {}
            }
        }
        // Large ones first where several begin at once, and in a fixed order: a plan is a function
        // of the graph.
        for together in all.chunk_by_mut(|a, b| a.first == b.first) {
            together.sort_unstable_by_key(|life| (Reverse(life.size), life.value));
        }
        for (number, life) in all.iter().enumerate() {
            life_of[life.value.0 as usize] = Some(number);
        }
        let mut ends = Clocks::all(order.lanes, all.len(), 0);
        let mut begins = Clocks::all(order.lanes, all.len(), u32::MAX);
        for touch in accesses.all() {
            let Some(life) = life_of[touch.value.0 as usize] else { continue };
            let (lane, position) = order.places[touch.node as usize];
            let end = &mut ends.of_mut(life)[lane];
            *end = position.max(*end);
            meet(begins.of_mut(life), order.clocks.of(touch.node as usize));
        }
        Lives { all, ends, begins }
    }

    /// Whether all uses of a life are ordered before all of a later one.
    fn done_before(&self, earlier: usize, later: usize) -> bool {
        self.all[earlier].last < self.all[later].first
            && covers(self.begins.of(later), self.ends.of(earlier))
    }

    /// The most bytes alive at one place in the order of issue: such values can never share.
    fn alive(&self, nodes: usize) -> u64 {
        let mut changes = vec![0i64; nodes + 1];
        for life in &self.all {
            changes[life.first] += life.size as i64;
            changes[life.last + 1] -= life.size as i64;
        }
        let mut live = 0;
        let peak = changes.iter().map(|change| {
            live += change;
            live
        });
        peak.max().unwrap_or(0) as u64
    }

    /// The most bytes that a node of the compute lane does not know to be done with, of values that
    /// began on that lane: what one of them was ordered after, so is the node, so none of them can
    /// share.
    fn not_done(&self, order: &Order) -> u64 {
        let lane_of = |node: usize| order.places[node].0;
        let began = |&life: &usize| lane_of(self.all[life].first) == COMPUTE;
        let mut began = (0..self.all.len()).filter(began).peekable();
        let mut known: Vec<usize> = Vec::new();
        let (mut bytes, mut most) = (0, 0);
        for node in (0..order.places.len()).filter(|&node| lane_of(node) == COMPUTE) {
            while let Some(life) = began.next_if(|&life| self.all[life].first <= node) {
                bytes += self.all[life].size;
                known.push(life);
            }
            let clock = order.clocks.of(node);
            known.retain(|&life| {
                let keep = self.all[life].last >= node || !covers(clock, self.ends.of(life));
                bytes -= if keep { 0 } else { self.all[life].size };
                keep
            });
            most = most.max(bytes);
        }
        most
    }

    /// Of each life, the earlier ones that it cannot share bytes with.
    fn conflicts(&self, order: &Order) -> Lists {
        // Of each node, what is done before it and before every node after it, whatever the lane.
        let mut floors = order.clocks.clone();
        let mut floor = vec![u32::MAX; order.lanes];
        for node in (0..order.places.len()).rev() {
            meet(&mut floor, order.clocks.of(node));
            floors.of_mut(node).copy_from_slice(&floor);
        }
        let mut conflicts =
            Lists { starts: vec![0], items: Vec::with_capacity(16 * self.all.len()) };
        let mut open: Vec<u32> = Vec::new();
        for (number, life) in self.all.iter().enumerate() {
            let floor = floors.of(life.first);
            open.retain(|&other| {
                if !self.done_before(other as usize, number) {
                    conflicts.items.push(other);
                    return true;
                }
                // What is done before all that comes need not be looked at again.
                !covers(floor, self.ends.of(other as usize))
            });
            open.push(number as u32);
            conflicts.starts.push(conflicts.items.len());
        }
        conflicts
    }
}

/// A list of lives for each life.
struct Lists {
    /// Where each list begins, and the end of the last one.
    starts: Vec<usize>,
    items: Vec<u32>,
}

impl Lists {
    fn of(&self, life: usize) -> &[u32] {
        &self.items[self.starts[life]..self.starts[life + 1]]
    }

    /// Of each life, those in whose lists it is.
    fn transposed(&self) -> Lists {
        let count = self.starts.len() - 1;
        // Each list is filled from its end, so that its end becomes its start.
        let mut starts = vec![0; count + 1];
        self.items.iter().for_each(|&life| starts[life as usize] += 1);
        let mut end = 0;
        for start in &mut starts {
            end += *start;
            *start = end;
        }
        let mut items = vec![0; self.items.len()];
        for of in 0..count {
            for &life in self.of(of) {
                let at = &mut starts[life as usize];
                *at -= 1;
                items[*at] = of as u32;
            }
        }
        Lists { starts, items }
    }
}

/// What lives are placed by, where not by time.
type Key = (Reverse<u64>, Reverse<u64>, ValueId);
type KeyOf = fn(&Life) -> Key;

/// Plans the workspace by best fit, in several orders, and takes the smallest.
pub(super) fn plan(graph: &Graph, accesses: &Accesses, order: &Order) -> Arena {
    let lives = Lives::of(graph, accesses, order);
    let lower_bound = lives.alive(order.places.len()).max(lives.not_done(order));
    let earlier = lives.conflicts(order);
    let mut later = None;
    // The order of time is good enough for most graphs; where several lanes keep values apart, other
    // orders may pack better: large ones first, or from the end of the graph.
    let orders: [Option<KeyOf>; 3] = [
        None,
        Some(|l| (Reverse(l.size), Reverse(l.last as u64), l.value)),
        Some(|l| (Reverse(l.last as u64), Reverse(l.size), l.value)),
    ];
    let mut turns: Vec<usize> = (0..lives.all.len()).collect();
    let (mut offsets, mut size) = (Vec::new(), u64::MAX);
    for key in orders {
        let plan = match key {
            // Only earlier ones have a place yet.
            None => place(&lives, &[&earlier], &turns, size),
            Some(key) => {
                turns.sort_by_cached_key(|&life| key(&lives.all[life]));
                let later = later.get_or_insert_with(|| earlier.transposed());
                place(&lives, &[&earlier, later], &turns, size)
            }
        };
        if let Some(smaller) = plan {
            (offsets, size) = smaller;
        }
        if size * 20 <= lower_bound * 21 {
            break;
        }
    }
    let offsets = lives.all.iter().map(|life| life.value).zip(offsets).collect();
    Arena { offsets, size, lower_bound }
}

/// Best fit: each life in turn goes to the smallest gap between those it cannot share with, which
/// `conflicts` lists. Gives where each lies and the size of it all, or nothing where that is not
/// below `limit`.
fn place(
    lives: &Lives,
    conflicts: &[&Lists],
    turns: &[usize],
    limit: u64,
) -> Option<(Vec<u64>, u64)> {
    const NOWHERE: u64 = u64::MAX;
    // Where each life begins and ends.
    let mut places = vec![(NOWHERE, NOWHERE); lives.all.len()];
    let mut total = 0;
    let mut taken: Vec<(u64, u64)> = Vec::new();
    for &life in turns {
        let size = lives.all[life].size;
        taken.clear();
        for lists in conflicts {
            let with = lists.of(life).iter().map(|&other| places[other as usize]);
            taken.extend(with.filter(|&(start, _)| start != NOWHERE));
        }
        taken.sort_unstable_by_key(|&(start, _)| start);
        let (mut best, mut end): (Option<(u64, u64)>, u64) = (None, 0);
        for &(start, stop) in &taken {
            let gap = start.saturating_sub(end);
            if gap >= size && best.is_none_or(|(smallest, _)| gap < smallest) {
                best = Some((gap, end));
            }
            end = end.max(stop);
        }
        let offset = best.map_or(end, |(_, offset)| offset);
        total = total.max(offset + size);
        if total >= limit {
            return None;
        }
        places[life] = (offset, offset + size);
    }
    Some((places.into_iter().map(|(start, _)| start).collect(), total))
}

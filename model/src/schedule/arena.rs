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
        let mut lives: Vec<Option<Life>> = Vec::new();
        lives.resize_with(graph.values().len(), || None);
        for touch in accesses.all() {
            let (node, at) = (touch.node as usize, touch.value.0 as usize);
            let value = &graph.values()[at];
            match &mut lives[at] {
                Some(life) => life.last = node,
                None if value.source == Source::Scratch => {
                    let size = value.desc.bytes().next_multiple_of(ALIGNMENT);
                    lives[at] = Some(Life { value: touch.value, size, first: node, last: node });
                }
                None => {}
            }
        }
        let mut all: Vec<Life> = lives.into_iter().flatten().collect();
        // Large ones first where several begin at once, and in a fixed order: a plan is a function
        // of the graph.
        all.sort_unstable_by_key(|l| (l.first, Reverse(l.size), l.value));
        let mut number_of = vec![None; graph.values().len()];
        for (number, life) in all.iter().enumerate() {
            number_of[life.value.0 as usize] = Some(number);
        }
        let mut ends = Clocks::all(order.lanes, all.len(), 0);
        let mut begins = Clocks::all(order.lanes, all.len(), u32::MAX);
        for touch in accesses.all() {
            let Some(life) = number_of[touch.value.0 as usize] else { continue };
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

    /// Pairs of lives that cannot share bytes.
    fn pairs(&self, order: &Order) -> Vec<(u32, u32)> {
        // Of each node, what is done before it and before every node after it, whatever the lane.
        let nodes = order.places.len();
        let mut floors = order.clocks.clone();
        let mut floor = vec![u32::MAX; order.lanes];
        for node in (0..nodes).rev() {
            meet(&mut floor, order.clocks.of(node));
            floors.of_mut(node).copy_from_slice(&floor);
        }
        let mut pairs = Vec::new();
        let mut open: Vec<u32> = Vec::new();
        for (number, life) in self.all.iter().enumerate() {
            let floor = floors.of(life.first);
            open.retain(|&other| {
                if !self.done_before(other as usize, number) {
                    pairs.push((other, number as u32));
                    return true;
                }
                // What is done before all that comes need not be looked at again.
                !covers(floor, self.ends.of(other as usize))
            });
            open.push(number as u32);
        }
        pairs
    }
}

/// Of each life, those that it cannot share bytes with.
struct Conflicts {
    starts: Vec<u32>,
    with: Vec<u32>,
}

impl Conflicts {
    fn of(lives: &Lives, order: &Order) -> Self {
        let pairs = lives.pairs(order);
        let mut ends = vec![0u32; lives.all.len() + 1];
        for &(a, b) in &pairs {
            ends[a as usize] += 1;
            ends[b as usize] += 1;
        }
        let mut sum = 0;
        for end in &mut ends {
            sum += *end;
            *end = sum;
        }
        // Each life's part is filled from its end, so that its end becomes its start.
        let mut with = vec![0u32; 2 * pairs.len()];
        for &(a, b) in &pairs {
            for (of, other) in [(a, b), (b, a)] {
                ends[of as usize] -= 1;
                with[ends[of as usize] as usize] = other;
            }
        }
        Conflicts { starts: ends, with }
    }

    fn of_life(&self, life: usize) -> &[u32] {
        &self.with[self.starts[life] as usize..self.starts[life + 1] as usize]
    }
}

/// What values are placed by, where not by time.
type Key = (Reverse<u64>, Reverse<u64>, ValueId);

/// Plans the workspace by best fit, in several orders, and takes the smallest.
pub(super) fn plan(graph: &Graph, accesses: &Accesses, order: &Order) -> Arena {
    let lives = Lives::of(graph, accesses, order);
    let lower_bound = lives.alive(order.places.len()).max(lives.not_done(order));
    let conflicts = Conflicts::of(&lives, order);
    // The order of time is good enough for most graphs; where several lanes keep values apart, other
    // orders may pack better: large ones first, or from the end of the graph.
    let orders: [Option<fn(&Life) -> Key>; 3] = [
        None,
        Some(|l| (Reverse(l.size), Reverse(l.last as u64), l.value)),
        Some(|l| (Reverse(l.last as u64), Reverse(l.size), l.value)),
    ];
    let mut turns: Vec<usize> = (0..lives.all.len()).collect();
    let (mut offsets, mut size) = (Vec::new(), u64::MAX);
    for key in orders {
        if let Some(key) = key {
            turns.sort_unstable_by_key(|&life| key(&lives.all[life]));
        }
        if let Some(smaller) = place(&lives, &conflicts, &turns, size) {
            (offsets, size) = smaller;
        }
        if size * 20 <= lower_bound * 21 {
            break;
        }
    }
    let offsets = lives.all.iter().map(|life| life.value).zip(offsets).collect();
    Arena { offsets, size, lower_bound }
}

/// Best fit: each life in turn goes to the smallest gap between those it cannot share with. Gives
/// where each lies and the size of it all, or nothing where that is not below `limit`.
fn place(
    lives: &Lives,
    conflicts: &Conflicts,
    turns: &[usize],
    limit: u64,
) -> Option<(Vec<u64>, u64)> {
    const NOWHERE: u64 = u64::MAX;
    let mut offsets = vec![NOWHERE; lives.all.len()];
    let mut total = 0;
    let mut taken: Vec<(u64, u64)> = Vec::new();
    for &life in turns {
        let size = lives.all[life].size;
        taken.clear();
        for &other in conflicts.of_life(life) {
            let start = offsets[other as usize];
            if start != NOWHERE {
                taken.push((start, start + lives.all[other as usize].size));
            }
        }
        taken.sort_unstable();
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
        offsets[life] = offset;
    }
    Some((offsets, total))
}

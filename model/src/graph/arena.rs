//! Places for scratch values in one workspace: values whose lives do not overlap share bytes.

use super::{Graph, Source, ValueId};
use std::collections::BTreeMap;
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
    /// The most bytes that live values need at any op: no plan is smaller.
    pub lower_bound: u64,
}

/// Plans a graph's workspace for execution in order: best fit over the gaps that ended lives leave.
pub fn plan_arena(graph: &Graph) -> Arena {
    let lives = lives(graph);
    let mut starting: BTreeMap<usize, Vec<ValueId>> = BTreeMap::new();
    let mut ending: BTreeMap<usize, Vec<ValueId>> = BTreeMap::new();
    for (&value, &(first, last)) in &lives {
        starting.entry(first).or_default().push(value);
        ending.entry(last).or_default().push(value);
    }
    let mut arena = Arena::default();
    let mut gaps = Gaps::default();
    let mut live = 0u64;
    let size_of = |value: ValueId| graph.value(value).desc.bytes().next_multiple_of(ALIGNMENT);
    for (op, mut values) in starting {
        // Values whose last use is before this op are free. Those that end at this very op are its
        // operands and stay apart from its results.
        let ended: Vec<_> = ending.range(..op).map(|(at, _)| *at).collect();
        for at in ended {
            for value in ending.remove(&at).into_iter().flatten() {
                gaps.give(arena.offsets[&value], size_of(value));
                live -= size_of(value);
            }
        }
        // Large ones first, and in a fixed order: a plan is a function of the graph.
        values.sort_unstable_by_key(|&v| (std::cmp::Reverse(size_of(v)), v));
        for value in values {
            let size = size_of(value);
            live += size;
            let offset = gaps.take(size).unwrap_or_else(|| {
                let offset = gaps.take_end(arena.size);
                arena.size = offset + size;
                offset
            });
            arena.offsets.insert(value, offset);
        }
        arena.lower_bound = arena.lower_bound.max(live);
    }
    arena
}

/// First and last op that touches each scratch value.
pub(super) fn lives(graph: &Graph) -> HashMap<ValueId, (usize, usize)> {
    let mut lives: HashMap<ValueId, (usize, usize)> = HashMap::new();
    graph.visit(|op, _, slot| {
        if graph.value(slot.value).source == Source::Scratch {
            lives.entry(slot.value).and_modify(|life| life.1 = op).or_insert((op, op));
        }
    });
    lives
}

/// Free bytes below the arena's end, by offset.
#[derive(Debug, Default)]
struct Gaps(BTreeMap<u64, u64>);

impl Gaps {
    fn give(&mut self, mut offset: u64, mut size: u64) {
        if let Some((&before, &len)) = self.0.range(..offset).next_back()
            && before + len == offset
        {
            self.0.remove(&before);
            (offset, size) = (before, len + size);
        }
        if let Some(len) = self.0.remove(&(offset + size)) {
            size += len;
        }
        self.0.insert(offset, size);
    }

    /// The smallest gap that is large enough.
    fn take(&mut self, size: u64) -> Option<u64> {
        let (&offset, &len) = self
            .0
            .iter()
            .filter(|(_, len)| **len >= size)
            .min_by_key(|(offset, len)| (**len, **offset))?;
        self.0.remove(&offset);
        if len > size {
            self.0.insert(offset + size, len - size);
        }
        Some(offset)
    }

    /// The gap that reaches the arena's end, to be grown, or the end itself.
    fn take_end(&mut self, end: u64) -> u64 {
        match self.0.last_key_value() {
            Some((&offset, &len)) if offset + len == end => {
                self.0.remove(&offset);
                offset
            }
            _ => end,
        }
    }
}

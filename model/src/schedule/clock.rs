//! Vector clocks over lanes, in tables: a schedule has one for every node.

/// For each lane, a position: up to which its nodes are known to be done, or have to be.
pub(super) type Clock = [u32];

/// Whether what is known is all that is needed.
pub(super) fn covers(known: &Clock, needed: &Clock) -> bool {
    known.iter().zip(needed).all(|(known, needed)| known >= needed)
}

/// Adds what another one knows.
pub(super) fn join(mine: &mut Clock, theirs: &Clock) {
    mine.iter_mut().zip(theirs).for_each(|(mine, theirs)| *mine = (*mine).max(*theirs));
}

/// Leaves what another one knows too.
pub(super) fn meet(mine: &mut Clock, theirs: &Clock) {
    mine.iter_mut().zip(theirs).for_each(|(mine, theirs)| *mine = (*mine).min(*theirs));
}

/// Clocks, one after the other.
#[derive(Clone, Debug)]
pub(super) struct Clocks {
    lanes: usize,
    positions: Vec<u32>,
}

impl Clocks {
    /// So many clocks with the same position on every lane.
    pub(super) fn all(lanes: usize, count: usize, position: u32) -> Self {
        Clocks { lanes, positions: vec![position; lanes * count] }
    }

    /// No clocks, and room for so many.
    pub(super) fn with_capacity(lanes: usize, count: usize) -> Self {
        Clocks { lanes, positions: Vec::with_capacity(lanes * count) }
    }

    pub(super) fn push(&mut self, clock: &Clock) {
        self.positions.extend_from_slice(clock);
    }

    pub(super) fn of(&self, number: usize) -> &Clock {
        &self.positions[number * self.lanes..][..self.lanes]
    }

    pub(super) fn of_mut(&mut self, number: usize) -> &mut Clock {
        &mut self.positions[number * self.lanes..][..self.lanes]
    }
}

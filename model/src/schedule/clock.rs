//! Vector clocks over lanes.

use super::Lane;

/// For each lane, the position up to which its nodes are known to be done.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Clock(Vec<u32>);

impl Clock {
    pub(super) fn new(lanes: usize) -> Self {
        Clock(vec![0; lanes])
    }

    pub(super) fn lanes(&self) -> usize {
        self.0.len()
    }

    pub(super) fn of(&self, lane: Lane) -> u32 {
        self.0[lane]
    }

    pub(super) fn learn(&mut self, lane: Lane, position: u32) {
        self.0[lane] = self.0[lane].max(position);
    }

    /// What either knows.
    pub(super) fn join(&mut self, other: &Clock) {
        self.0.iter_mut().zip(&other.0).for_each(|(mine, &theirs)| *mine = (*mine).max(theirs));
    }

    /// What both know.
    pub(super) fn meet(&self, other: &Clock) -> Clock {
        Clock(self.0.iter().zip(&other.0).map(|(&a, &b)| a.min(b)).collect())
    }
}

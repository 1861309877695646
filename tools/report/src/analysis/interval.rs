//! How much time a set of intervals covers.

/// Half-open intervals of time, in any order; they may overlap.
#[derive(Clone, Debug, Default)]
pub(super) struct Intervals(Vec<(u64, u64)>);

impl Intervals {
    /// Adds `start..end`. What follows on the last one is joined with it.
    pub(super) fn add(&mut self, start: u64, end: u64) {
        match self.0.last_mut() {
            _ if start >= end => {}
            Some((_, last)) if *last == start => *last = end,
            _ => self.0.push((start, end)),
        }
    }

    /// These and others.
    pub(super) fn and(mut self, mut others: Intervals) -> Intervals {
        self.0.append(&mut others.0);
        self
    }

    /// The length of their union.
    pub(super) fn covered(&self) -> u64 {
        let mut sorted = self.0.clone();
        sorted.sort_unstable();
        let (mut sum, mut reached) = (0, 0);
        for (start, end) in sorted {
            let fresh = start.max(reached);
            if end > fresh {
                sum += end - fresh;
                reached = end;
            }
        }
        sum
    }
}

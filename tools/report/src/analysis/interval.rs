//! How much time a set of intervals covers.

/// Half-open intervals of time, in any order; they may overlap.
#[derive(Clone, Debug, Default)]
pub struct Intervals(Vec<(u64, u64)>);

impl Intervals {
    /// Adds `start..end`. What follows on the last one is joined with it.
    pub fn add(&mut self, start: u64, end: u64) {
        match self.0.last_mut() {
            _ if start >= end => {}
            Some((_, last)) if *last == start => *last = end,
            _ => self.0.push((start, end)),
        }
    }

    /// These and others.
    pub fn and(mut self, mut others: Intervals) -> Intervals {
        self.0.append(&mut others.0);
        self
    }

    /// The length of their union. Puts them in order and joins them.
    pub fn covered(&mut self) -> u64 {
        self.0.sort_unstable();
        self.0.dedup_by(|next, kept| {
            let joins = next.0 <= kept.1;
            if joins {
                kept.1 = kept.1.max(next.1);
            }
            joins
        });
        self.0.iter().map(|(start, end)| end - start).sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_overlaps_and_what_touches_counts_once() {
        let mut all = Intervals::default();
        for (start, end) in [(5, 7), (1, 3), (2, 4), (7, 9), (8, 8), (6, 7)] {
            all.add(start, end);
        }
        assert_eq!(all.covered(), 7);
        assert_eq!(all.0, [(1, 4), (5, 9)]);
        assert_eq!(all.and(Intervals::default()).covered(), 7);
        assert_eq!(Intervals::default().covered(), 0);
    }
}

//! When a step fails: one error that names the origin, and nobody left waiting.

use super::{Engine, EngineError};
use std::time::Duration;

impl Engine {
    /// Ends a failed step on every rank that took part, and says whose fault it was. Data ranks that
    /// took no part go on.
    ///
    /// A failed command has already failed whoever waits for it, on every rank of its collectives.
    /// A command that never ends has not: the laggard is found, and the communicators are aborted so
    /// that the others are released.
    pub(super) fn failed(&mut self, error: EngineError, took_part: &[usize]) -> EngineError {
        let error = match error {
            EngineError::Device(hal::Error::Timeout { .. }) => {
                self.laggard(took_part).unwrap_or(error)
            }
            error => error,
        };
        let reason = error.to_string();
        for &number in took_part {
            let rank = &self.ranks[number];
            for communicator in rank.communicators.values() {
                communicator.abort(&reason);
            }
            self.pools[rank.plan.data.rank].fail();
        }
        error
    }

    /// The rank that the others wait for: of those that are not done, the one whose oldest command
    /// waits for nobody, or else the one that has come least far.
    fn laggard(&self, took_part: &[usize]) -> Option<EngineError> {
        let ranks = took_part.iter().map(|&number| &self.ranks[number]);
        let pending = ranks.flat_map(|rank| {
            let lanes = rank.lanes.iter().map(|lane| lane.point());
            lanes.map(move |point| (rank, point))
        });
        let pending = pending.filter_map(|(rank, point)| match point.synchronize(Duration::ZERO) {
            Err(hal::Error::Timeout { pending, stuck, .. }) => {
                let waits = match stuck {
                    Some(stuck) => stuck.waits_for.is_some(),
                    // Through the C ABI there are words alone.
                    None => pending.contains("waits for"),
                };
                Some((waits, point.timeline().reached(), rank.device.properties().id, pending))
            }
            _ => None,
        });
        let (.., device, pending) =
            pending.min_by_key(|(waits, reached, ..)| (*waits, *reached))?;
        Some(EngineError::Hangs { device, after: self.options.timeout, pending })
    }
}

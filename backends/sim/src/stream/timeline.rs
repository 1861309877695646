//! How far a stream has come: completion times, host waits, and the [`Timeline`] that callers see.

use super::queue::{Activity, Brief, Queue, Queued, StreamShared};
use hal::{Clock, Error, Result, StreamId, Timeline, Timestamp};
use std::any::Any;
use std::collections::VecDeque;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

/// How many completion times a stream remembers beyond those that the host has not seen.
const REMEMBERED: usize = 1 << 16;

/// How long a host wait spins before it sleeps: about what going to sleep and waking costs.
const SPIN: Duration = Duration::from_micros(30);

/// Completion times of a stream's commands, oldest first.
#[derive(Debug, Default)]
pub(super) struct Ends {
    /// Sequence number of the first one kept.
    first: u64,
    times: VecDeque<u64>,
    /// The host has synchronised with this value.
    seen: u64,
}

impl Ends {
    pub(super) fn push(&mut self, end: u64) {
        if self.times.is_empty() && self.first == 0 {
            self.first = 1;
        }
        self.times.push_back(end);
        while self.times.len() > REMEMBERED && self.first < self.seen {
            self.times.pop_front();
            self.first += 1;
        }
    }

    /// The last sequence number completed.
    pub(super) fn last(&self) -> u64 {
        (self.first + self.times.len() as u64).saturating_sub(1)
    }

    pub(super) fn get(&self, sequence: u64) -> Option<u64> {
        self.times.get(sequence.checked_sub(self.first)? as usize).copied()
    }
}

impl Queue {
    /// Whether `value` was reached, and when; or the failure because of which it never will be.
    pub(super) fn passed(&self, value: u64) -> Option<Result<u64>> {
        if self.ends.last() >= value {
            return Some(Ok(self.ends.get(value).unwrap_or(0)));
        }
        self.failure.clone().map(Err)
    }
}

impl StreamShared {
    /// What the stream is doing, for a timeout's message.
    fn pending_text(queue: &Queue) -> String {
        let next = queue.pending.front().map(Queued::brief);
        let brief = match &queue.activity {
            Activity::Held(brief) | Activity::Hung(brief) => Some(brief.clone()),
            _ => next,
        };
        match brief {
            None => "its last command is still running".to_string(),
            Some(Brief { sequence, kind, label, waits_for }) => {
                let mut text = format!(
                    "its oldest unfinished command is {sequence} ({} {label:?})",
                    kind.name()
                );
                if matches!(queue.activity, Activity::Hung(_)) {
                    text += ", which hangs by a fault rule";
                }
                if let Some(what) = waits_for {
                    text += &format!(", which waits for {what}");
                }
                text
            }
        }
    }

    /// Blocks the host until `value` is reached, and moves the host's clock to then.
    pub(crate) fn synchronize_value(&self, value: u64, timeout: Duration) -> Result<()> {
        let began = Instant::now();
        while self.reached.load(Ordering::Acquire) < value && began.elapsed() < SPIN {
            std::hint::spin_loop();
        }
        let mut queue = self.queue.lock();
        loop {
            match queue.passed(value) {
                Some(Ok(end)) => {
                    queue.ends.seen = queue.ends.seen.max(value);
                    drop(queue);
                    if self.timed() {
                        let known = end + self.system.cost.host_sync();
                        self.die().host_clock.fetch_max(known, Ordering::Relaxed);
                    }
                    self.system.order.host_synchronized(self.id, value);
                    return Ok(());
                }
                Some(Err(error)) => return Err(error),
                None => {}
            }
            let left = timeout.saturating_sub(began.elapsed());
            if left.is_zero() {
                return Err(Error::Timeout {
                    waiting_for: format!("command {value} of {}", self.describe()),
                    after: timeout,
                    pending: Self::pending_text(&queue),
                });
            }
            queue.host_waits_for = Some(queue.host_waits_for.map_or(value, |v| v.min(value)));
            self.changed.wait_for(&mut queue, left);
        }
    }
}

impl Timeline for StreamShared {
    fn as_any(&self) -> &dyn Any {
        self
    }

    fn stream(&self) -> StreamId {
        self.id
    }

    fn reached(&self) -> u64 {
        self.reached.load(Ordering::Acquire)
    }

    fn synchronize(&self, value: u64, timeout: Duration) -> Result<()> {
        self.synchronize_value(value, timeout)
    }

    fn failure(&self) -> Option<Error> {
        self.queue.lock().failure.clone()
    }

    fn completed_at(&self, value: u64) -> Option<Timestamp> {
        if !self.timed() {
            return None;
        }
        let picos = match value {
            0 => 0,
            _ => self.queue.lock().ends.get(value)?,
        };
        Some(Timestamp { clock: Clock::Simulated, picos })
    }
}

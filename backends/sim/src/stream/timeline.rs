//! How far a stream has come: completion times, host waits, and the [`Timeline`] that callers see.

use super::queue::{Activity, Blocker, Brief, Queue, Queued, StreamShared};
use hal::{Clock, Error, Result, StreamId, Stuck, Timeline, Timestamp};
use std::any::Any;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

/// How long a host wait spins before it sleeps: about what going to sleep and waking costs.
pub(crate) const SPIN: Duration = Duration::from_micros(30);

impl Queue {
    /// Whether `value` was reached; or the failure because of which it never will be.
    pub(super) fn passed(&self, value: u64) -> Option<Result<()>> {
        if self.completed >= value {
            return Some(Ok(()));
        }
        self.failure.clone().map(Err)
    }
}

impl StreamShared {
    /// The oldest unfinished command, unless a worker has it in hand.
    fn oldest(queue: &Queue) -> Option<Brief> {
        let next = queue.pending.front().map(Queued::brief);
        match &queue.activity {
            Activity::Held(brief) | Activity::Hung(brief) => Some(brief.clone()),
            _ => next,
        }
    }

    /// What the stream is doing, for a timeout's message.
    fn pending_text(queue: &Queue, oldest: Option<&Brief>) -> String {
        match oldest {
            None => "its last command is still running".to_string(),
            Some(Brief { sequence, kind, label, waits_for }) => {
                let mut text = format!(
                    "its oldest unfinished command is {sequence} ({} {label:?})",
                    kind.name()
                );
                if matches!(queue.activity, Activity::Hung(_)) {
                    text += ", which hangs by a fault rule";
                }
                if let Some(Blocker { words, .. }) = waits_for {
                    text += &format!(", which waits for {words}");
                }
                text
            }
        }
    }

    /// The same as data.
    fn stuck(&self, oldest: Brief) -> Stuck {
        let Brief { sequence, kind, label, waits_for } = oldest;
        let waits_for = waits_for.map(|blocker| blocker.who);
        Stuck { stream: self.id, sequence, op: kind.name(), label, waits_for }
    }

    /// Whether a command has been carried out.
    pub(crate) fn has_reached(&self, value: u64) -> bool {
        self.reached.load(Ordering::Acquire) >= value
    }

    /// Blocks the host until `value` is reached, and moves the host's clock to then.
    pub(crate) fn synchronize_value(&self, value: u64, timeout: Duration) -> Result<()> {
        let began = Instant::now();
        if self.timed() && !self.has_reached(value) {
            self.system.clock.tell(&self.system);
        }
        while !self.has_reached(value) && began.elapsed() < SPIN {
            std::hint::spin_loop();
        }
        let mut queue = self.queue.lock();
        loop {
            match queue.passed(value) {
                Some(Ok(())) => {
                    drop(queue);
                    if self.timed() {
                        let end = self.system.clock.end(self, value).unwrap_or(0);
                        let known = end + self.system.cost.host_sync();
                        self.die().host_clock.fetch_max(known, Ordering::Relaxed);
                        self.system.clock.seen(self.index, value);
                    }
                    self.system.order.host_synchronized(self.id, value);
                    return Ok(());
                }
                Some(Err(error)) => return Err(error),
                None => {}
            }
            let left = timeout.saturating_sub(began.elapsed());
            if left.is_zero() {
                let oldest = Self::oldest(&queue);
                return Err(Error::Timeout {
                    waiting_for: format!("command {value} of {}", self.describe()),
                    after: timeout,
                    pending: Self::pending_text(&queue, oldest.as_ref()),
                    stuck: oldest.map(|oldest| Arc::new(self.stuck(oldest))),
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
            _ if self.reached.load(Ordering::Acquire) < value => return None,
            _ => self.system.clock.end(self, value)?,
        };
        Some(Timestamp { clock: Clock::Simulated, picos })
    }
}

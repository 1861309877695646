//! What is known about each buffer: who touched it last, which bytes were ever written, and
//! whether it is still alive.

use crate::buffer::WeakBuffer;
use crate::hazard::{AccessLog, PastAccess, StreamOrder};
use crate::{Buffer, BufferId, DeviceId, Location, StreamId};
use parking_lot::Mutex;
use std::collections::HashMap;
use std::ops::Range;

/// A buffer that is still allocated.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Leak {
    /// Which one.
    pub buffer: BufferId,
    /// Its bytes.
    pub bytes: u64,
    /// The stream that it was allocated on, or "host".
    pub allocated_on: String,
}

#[derive(Debug)]
struct Tracked {
    buffer: WeakBuffer,
    location: Location,
    bytes: u64,
    allocated_on: String,
    log: AccessLog,
    written: Ranges,
}

/// All buffers that were allocated through the wrapper.
#[derive(Debug, Default)]
pub(super) struct Registry {
    buffers: Mutex<HashMap<BufferId, Tracked>>,
}

/// Why an access is refused.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Refused {
    /// Nothing orders it after this one.
    Hazard(PastAccess),
    /// Bytes that nothing wrote.
    Unwritten,
}

impl Registry {
    pub(super) fn add(&self, buffer: &Buffer, allocated_on: &str) {
        let mut buffers = self.buffers.lock();
        // Forgetting the dead here keeps the map as small as what is alive.
        buffers.retain(|_, tracked| tracked.buffer.is_alive());
        let mut written = Ranges::default();
        if matches!(buffer.location(), Location::Host(_)) {
            // The host writes its memory without asking.
            written.add(0..buffer.size());
        }
        let tracked = Tracked {
            buffer: buffer.downgrade(),
            location: buffer.location(),
            bytes: buffer.size(),
            allocated_on: allocated_on.to_string(),
            log: AccessLog::default(),
            written,
        };
        buffers.insert(buffer.id(), tracked);
    }

    /// Says why an access is refused, if it is. Buffers that came from elsewhere are not known and
    /// not checked.
    pub(super) fn check(
        &self,
        order: &StreamOrder,
        stream: StreamId,
        buffer: BufferId,
        range: &Range<u64>,
        (needs_contents, writes): (bool, bool),
    ) -> Result<(), Refused> {
        let buffers = self.buffers.lock();
        let Some(tracked) = buffers.get(&buffer) else { return Ok(()) };
        if needs_contents && !tracked.written.contains(range) {
            return Err(Refused::Unwritten);
        }
        match tracked.log.conflict(order, stream, range, writes) {
            Some(past) => Err(Refused::Hazard(past.clone())),
            None => Ok(()),
        }
    }

    /// Notes an access of a command whose accesses were all checked.
    pub(super) fn note(
        &self,
        at: (StreamId, u64),
        buffer: BufferId,
        range: Range<u64>,
        writes: bool,
    ) {
        let mut buffers = self.buffers.lock();
        let Some(tracked) = buffers.get_mut(&buffer) else { return };
        tracked.log.note(at.0, at.1, range.clone(), writes);
        if writes {
            tracked.written.add(range);
        }
    }

    /// Fresh memory belongs to its stream until others wait for it.
    pub(super) fn note_allocation(&self, at: (StreamId, u64), buffer: &Buffer) {
        let mut buffers = self.buffers.lock();
        if let Some(tracked) = buffers.get_mut(&buffer.id()) {
            tracked.log.note(at.0, at.1, 0..buffer.size(), true);
        }
    }

    pub(super) fn alive(&self, device: DeviceId) -> Vec<Leak> {
        let buffers = self.buffers.lock();
        let alive =
            buffers.iter().filter(|(_, t)| t.buffer.is_alive() && t.location.device() == device);
        let mut leaks: Vec<Leak> = alive
            .map(|(&buffer, t)| Leak {
                buffer,
                bytes: t.bytes,
                allocated_on: t.allocated_on.clone(),
            })
            .collect();
        leaks.sort_by_key(|leak| leak.buffer);
        leaks
    }
}

/// A set of bytes, as disjoint ranges in ascending order.
#[derive(Debug, Default)]
struct Ranges(Vec<Range<u64>>);

impl Ranges {
    fn contains(&self, range: &Range<u64>) -> bool {
        range.is_empty() || self.0.iter().any(|r| r.start <= range.start && range.end <= r.end)
    }

    fn add(&mut self, mut range: Range<u64>) {
        if range.is_empty() || self.contains(&range) {
            return;
        }
        self.0.retain(|r| {
            let touches = r.start <= range.end && range.start <= r.end;
            if touches {
                range = r.start.min(range.start)..r.end.max(range.end);
            }
            !touches
        });
        let at = self.0.partition_point(|r| r.start < range.start);
        self.0.insert(at, range);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn ranges_agree_with_a_set_of_bytes(
            added in prop::collection::vec((0u64..60, 0u64..12), 0..20),
            asked in (0u64..60, 0u64..12),
        ) {
            let mut ranges = Ranges::default();
            let mut bytes = [false; 80];
            for (start, len) in added {
                ranges.add(start..start + len);
                bytes[start as usize..(start + len) as usize].fill(true);
            }
            let range = asked.0..asked.0 + asked.1;
            let all = bytes[range.start as usize..range.end as usize].iter().all(|&b| b);
            prop_assert_eq!(ranges.contains(&range), all);
            prop_assert!(ranges.0.windows(2).all(|pair| pair[0].end < pair[1].start));
        }
    }
}

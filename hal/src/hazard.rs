//! Detection of accesses that nothing orders: the device's counterpart of a borrow checker.
//!
//! Each stream knows how far it has waited for every other stream (a vector clock). Each buffer
//! remembers its latest accesses. A new access conflicts with a former one if they overlap, at
//! least one writes, they are on different streams, and the later stream does not know that the
//! former access is done.
//!
//! The simulator applies this to every command, and [`crate::Validated`] to every command of any
//! backend.

use crate::StreamId;
use parking_lot::{Mutex, RwLock};
use std::collections::HashMap;
use std::ops::Range;

/// What one stream knows: for each other stream, the timeline value up to which its work is known
/// to be done.
#[derive(Clone, Debug, Default)]
struct Knowledge(Vec<(StreamId, u64)>);

impl Knowledge {
    fn of(&self, stream: StreamId) -> u64 {
        self.0.iter().find(|(s, _)| *s == stream).map_or(0, |(_, value)| *value)
    }

    fn learn(&mut self, stream: StreamId, value: u64) {
        match self.0.iter_mut().find(|(s, _)| *s == stream) {
            Some((_, known)) => *known = value.max(*known),
            None => self.0.push((stream, value)),
        }
    }
}

#[derive(Debug, Default)]
struct StreamState {
    knows: Knowledge,
    /// What the stream knew from some sequence number on; grows only when it waits.
    history: Vec<(u64, Knowledge)>,
}

/// The order between the streams of a system, as established by waits and host synchronisation.
#[derive(Debug, Default)]
pub struct StreamOrder {
    streams: RwLock<HashMap<StreamId, Mutex<StreamState>>>,
    /// What the host has synchronised with: known to everything submitted afterwards.
    host: RwLock<Knowledge>,
}

impl StreamOrder {
    /// `waiter`, whose next command has sequence number `next`, waits for `value` of `signaller`.
    pub fn wait(&self, waiter: StreamId, next: u64, signaller: StreamId, value: u64) {
        if waiter == signaller {
            return;
        }
        // What the signaller knew when it submitted that value is known to the waiter too.
        let inherited = self.with(signaller, |s| {
            let upto = s.history.partition_point(|(from, _)| *from <= value);
            upto.checked_sub(1).map(|last| s.history[last].1.clone())
        });
        self.with(waiter, |s| {
            for (stream, value) in inherited.iter().flat_map(|k| &k.0) {
                s.knows.learn(*stream, *value);
            }
            s.knows.learn(signaller, value);
            match s.history.last_mut() {
                Some((from, knows)) if *from == next => *knows = s.knows.clone(),
                _ => s.history.push((next, s.knows.clone())),
            }
        });
    }

    /// The host has seen `value` of `stream` reached.
    pub fn host_synchronized(&self, stream: StreamId, value: u64) {
        let inherited = self.with(stream, |s| {
            let upto = s.history.partition_point(|(from, _)| *from <= value);
            let knowledge = upto.checked_sub(1).map(|last| s.history[last].1.clone());
            // Whoever asks later learns the same from the host.
            s.history.drain(..upto.saturating_sub(1));
            knowledge
        });
        let mut host = self.host.write();
        host.learn(stream, value);
        for (stream, value) in inherited.iter().flat_map(|k| &k.0) {
            host.learn(*stream, *value);
        }
    }

    /// Whether a command submitted now to `later` runs after command `value` of `earlier`.
    pub fn is_ordered(&self, earlier: StreamId, value: u64, later: StreamId) -> bool {
        earlier == later
            || self.host.read().of(earlier) >= value
            || self.with(later, |s| s.knows.of(earlier)) >= value
    }

    fn with<R>(&self, stream: StreamId, f: impl FnOnce(&mut StreamState) -> R) -> R {
        if let Some(state) = self.streams.read().get(&stream) {
            return f(&mut state.lock());
        }
        f(&mut self.streams.write().entry(stream).or_default().lock())
    }
}

/// One past access to a range of a buffer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PastAccess {
    /// The stream that the command was on.
    pub stream: StreamId,
    /// The command's sequence number.
    pub sequence: u64,
    /// Bytes touched.
    pub range: Range<u64>,
    /// Whether it wrote.
    pub wrote: bool,
}

/// The accesses of one buffer that a new one could conflict with.
#[derive(Debug, Default)]
pub struct AccessLog {
    past: Vec<PastAccess>,
}

impl AccessLog {
    /// The former access that nothing orders a new one after, if there is one.
    pub fn conflict(
        &self,
        order: &StreamOrder,
        stream: StreamId,
        range: &Range<u64>,
        write: bool,
    ) -> Option<&PastAccess> {
        self.past.iter().find(|p| {
            (write || p.wrote)
                && p.stream != stream
                && p.range.start < range.end
                && range.start < p.range.end
                && !order.is_ordered(p.stream, p.sequence, stream)
        })
    }

    /// Notes an access that does not conflict. A command notes its accesses only when all of them
    /// were found free of conflict: one that is refused leaves no trace.
    pub fn note(&mut self, stream: StreamId, sequence: u64, range: Range<u64>, write: bool) {
        if range.is_empty() {
            return;
        }
        // The common case: the same stream repeats the access it made last. A read does not stand
        // for an earlier write, which others may know of without knowing of the read.
        if let [only] = self.past.as_mut_slice()
            && only.stream == stream
            && only.range == range
            && (write || !only.wrote)
        {
            only.sequence = sequence;
            only.wrote = write;
            return;
        }
        let covers = |p: &PastAccess| range.start <= p.range.start && p.range.end <= range.end;
        // A write stands for everything it covers, since it is ordered after all of it. A read
        // stands for earlier reads of its own stream.
        self.past.retain(|p| !(covers(p) && (write || (p.stream == stream && !p.wrote))));
        self.past.push(PastAccess { stream, sequence, range, wrote: write });
    }

    /// The accesses that a new one could conflict with, oldest first. Noted on another log, they
    /// leave it as all that were noted here would.
    pub fn past(&self) -> &[PastAccess] {
        &self.past
    }

    /// Notes an access, or returns the former access that it conflicts with.
    ///
    /// # Errors
    ///
    /// The conflicting access. The new one is then not noted.
    pub fn access(
        &mut self,
        order: &StreamOrder,
        stream: StreamId,
        sequence: u64,
        range: Range<u64>,
        write: bool,
    ) -> Result<(), PastAccess> {
        if let Some(conflict) = self.conflict(order, stream, &range, write) {
            return Err(conflict.clone());
        }
        self.note(stream, sequence, range, write);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::DeviceId;
    use proptest::prelude::*;

    fn stream(index: u32) -> StreamId {
        StreamId { device: DeviceId(0), index }
    }

    #[test]
    fn write_then_read_needs_a_wait() {
        let order = StreamOrder::default();
        let mut log = AccessLog::default();
        log.access(&order, stream(0), 1, 0..8, true).unwrap();
        let conflict = log.access(&order, stream(1), 1, 4..6, false).unwrap_err();
        assert_eq!((conflict.stream, conflict.sequence), (stream(0), 1));
        log.access(&order, stream(1), 1, 8..9, false).expect("disjoint ranges do not conflict");
        order.wait(stream(1), 2, stream(0), 1);
        log.access(&order, stream(1), 2, 4..6, false).unwrap();
        log.access(&order, stream(0), 2, 5..6, true).expect_err("read on stream 1 is not awaited");
    }

    #[test]
    fn waits_are_transitive_and_as_of_their_time() {
        let order = StreamOrder::default();
        let mut log = AccessLog::default();
        log.access(&order, stream(0), 5, 0..1, true).unwrap();
        // Stream 1 waits for stream 0 at its command 3; stream 2 waits for stream 1.
        order.wait(stream(1), 3, stream(0), 5);
        order.wait(stream(2), 1, stream(1), 2);
        assert!(!order.is_ordered(stream(0), 5, stream(2)), "command 2 was before the wait");
        order.wait(stream(2), 2, stream(1), 3);
        assert!(order.is_ordered(stream(0), 5, stream(2)));
        log.access(&order, stream(2), 2, 0..1, true).unwrap();
    }

    #[test]
    fn host_synchronisation_orders_everything_after_it() {
        let order = StreamOrder::default();
        order.wait(stream(1), 1, stream(0), 7);
        order.host_synchronized(stream(1), 1);
        assert!(order.is_ordered(stream(1), 1, stream(9)));
        assert!(order.is_ordered(stream(0), 7, stream(9)), "what stream 1 knew, the host knows");
        assert!(!order.is_ordered(stream(0), 8, stream(9)));
    }

    proptest! {
        #[test]
        fn what_is_left_of_many_accesses_stands_for_all(
            before in accesses(), after in accesses(),
        ) {
            let note = |log: &mut AccessLog, accesses: &[PastAccess]| {
                for PastAccess { stream, sequence, range, wrote } in accesses.iter().cloned() {
                    log.note(stream, sequence, range, wrote);
                }
            };
            let [mut all, mut few, mut left] = [0; 3].map(|_| AccessLog::default());
            note(&mut all, &before);
            note(&mut few, &before);
            note(&mut all, &after);
            note(&mut left, &after);
            note(&mut few, left.past());
            prop_assert_eq!(all.past(), few.past());
        }
    }

    /// Accesses of two streams, numbered as they come.
    fn accesses() -> impl Strategy<Value = Vec<PastAccess>> {
        let one = (0u32..2, 0u64..4, 1u64..4, any::<bool>());
        prop::collection::vec(one, 0..12).prop_map(|all| {
            let access = |(n, (s, start, len, wrote))| PastAccess {
                stream: stream(s),
                sequence: n as u64,
                range: start..start + len,
                wrote,
            };
            all.into_iter().enumerate().map(access).collect()
        })
    }

    type Waits = Vec<(StreamId, u64)>;

    /// A naive model: every past access kept, order by reachability in an explicit graph.
    #[derive(Default)]
    struct Naive {
        /// Per command its place, and the points that it waited for.
        commands: Vec<(StreamId, u64, Waits)>,
        accesses: Vec<PastAccess>,
    }

    impl Naive {
        fn ordered(&self, from: (StreamId, u64), to: (StreamId, u64)) -> bool {
            if from.0 == to.0 {
                return from.1 <= to.1;
            }
            self.commands
                .iter()
                .filter(|(s, n, _)| *s == to.0 && *n <= to.1)
                .flat_map(|(_, _, waits)| waits)
                .any(|&wait| self.ordered(from, wait))
        }
    }

    proptest! {
        #[test]
        fn agrees_with_reachability(
            steps in prop::collection::vec((0u32..3, 0u32..3, 0u64..4, 1u64..4, any::<bool>(), any::<bool>()), 1..40)
        ) {
            let order = StreamOrder::default();
            let mut log = AccessLog::default();
            let mut naive = Naive::default();
            let mut next = [1u64; 3];
            for (s, other, start, len, write, is_wait) in steps {
                let (id, seq) = (stream(s), next[s as usize]);
                let range = start..start + len;
                if is_wait {
                    // Signal before wait: any value already submitted.
                    let value = (next[other as usize] - 1).min(start * 3 + len);
                    if s == other || value == 0 { continue; }
                    order.wait(id, seq, stream(other), value);
                    naive.commands.push((id, seq, vec![(stream(other), value)]));
                    continue;
                }
                let expected = naive.accesses.iter().any(|p| {
                    (p.wrote || write) && p.range.start < range.end && range.start < p.range.end
                        && !naive.ordered((p.stream, p.sequence), (id, seq))
                });
                let got = log.access(&order, id, seq, range.clone(), write);
                prop_assert_eq!(got.is_err(), expected);
                if got.is_ok() {
                    naive.accesses.push(PastAccess { stream: id, sequence: seq, range, wrote: write });
                    naive.commands.push((id, seq, vec![]));
                    next[s as usize] += 1;
                }
            }
        }
    }
}

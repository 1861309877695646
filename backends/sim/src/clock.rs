//! The simulated clock: when commands that have been carried out would have run.
//!
//! Commands are carried out by whichever thread is free, and say then what they would have cost and
//! what they waited for. When they would have run is worked out when somebody asks, on one
//! [`Timeline`] for all dies, from everything that has been carried out by then: only there is known
//! what runs at the same time, and slows each other.
//!
//! Who asks waits until no worker has anything to do, so that what is known is a function of what the
//! host has submitted, and not of how fast threads are. Where several host threads submit and ask at
//! once, a command may be worked out before another one is submitted that would have overlapped it on
//! its die; times of dies with one stream each do not depend on that.

use crate::stream::StreamShared;
use crate::timeline::{Done, Step, StreamIndex, Timeline};
use hal::trace::Span;
use parking_lot::Mutex;
use std::collections::VecDeque;
use std::time::{Duration, Instant};

/// How long other ranks may be behind before they count as failed, while workers are never idle.
const PATIENCE: Duration = Duration::from_secs(10);

/// Ends of commands that a stream remembers, beyond those that the host has not seen.
const REMEMBERED: u64 = 1 << 16;

/// A command that has been carried out.
#[derive(Debug)]
pub(crate) struct Carried {
    /// When the host had issued it.
    pub(crate) issued: u64,
    /// How much longer it took than it should, by a fault rule.
    pub(crate) delay: u64,
    pub(crate) step: Step,
    /// What its trace will say, where somebody traces; times are filled in.
    pub(crate) span: Option<Span>,
}

/// See the module.
#[derive(Debug)]
pub(crate) struct SimClock {
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    timeline: Timeline,
    /// Of each stream, spans without times of commands that have none yet.
    spans: Vec<VecDeque<Option<Span>>>,
}

impl SimClock {
    pub(crate) fn new(dies: usize) -> Self {
        let state = State { timeline: Timeline::new(dies), spans: Vec::new() };
        SimClock { state: Mutex::new(state) }
    }

    /// A new stream of a die.
    pub(crate) fn stream(&self, die: u32) -> StreamIndex {
        let mut state = self.state.lock();
        state.spans.push(VecDeque::new());
        state.timeline.stream(die)
    }

    /// Takes in what a stream has carried out.
    pub(crate) fn take_in(&self, stream: StreamIndex, carried: impl Iterator<Item = Carried>) {
        let mut state = self.state.lock();
        for Carried { issued, delay, step, span } in carried {
            state.spans[stream.0 as usize].push_back(span);
            state.timeline.push(stream, issued, delay, step);
        }
    }

    /// When a command ended; [`None`] if it has not been carried out, or is forgotten.
    pub(crate) fn end(&self, stream: &StreamShared, value: u64) -> Option<u64> {
        let known = |state: &State| {
            let ended = state.timeline.ended(stream.index) >= value;
            ended.then(|| state.timeline.end(stream.index, value))
        };
        let told = known(&self.state.lock());
        if let Some(end) = told {
            return end;
        }
        let began = Instant::now();
        let mut state = loop {
            let complete = stream.system.settle();
            let mut state = self.state.lock();
            // While workers are at it, the other ranks of a collective may be a moment behind.
            let known = state.timeline.play_until(stream.index, value);
            if known || complete || began.elapsed() > PATIENCE {
                break state;
            }
            drop(state);
            std::thread::yield_now();
        };
        if !state.timeline.play_until(stream.index, value) {
            // Ranks whose streams have failed do not come any more.
            while state.timeline.give_up_on_others()
                && !state.timeline.play_until(stream.index, value)
            {}
        }
        state.tell(&stream.system);
        known(&state).flatten()
    }

    /// Works out everything that has been carried out, for those who trace.
    pub(crate) fn play(&self, system: &crate::system::Shared) {
        system.settle();
        let mut state = self.state.lock();
        state.timeline.play();
        state.tell(system);
    }

    /// Forgets old ends of a stream whose command `seen` the host has seen.
    pub(crate) fn seen(&self, stream: StreamIndex, seen: u64) {
        if seen > REMEMBERED {
            self.state.lock().timeline.forget_before(stream, seen - REMEMBERED);
        }
    }
}

impl State {
    /// Tells those who trace what has ended.
    fn tell(&mut self, system: &crate::system::Shared) {
        let State { timeline, spans } = self;
        // Receivers by die, asked for once.
        let sinks: Vec<_> = system.dies.iter().map(|die| die.trace()).collect();
        for Done { stream, ready, start, end, .. } in timeline.take_done() {
            let span = spans[stream.0 as usize].pop_front().flatten();
            if let Some(mut span) = span
                && let Some(sink) = &sinks[span.stream.device.0 as usize]
            {
                (span.ready, span.start, span.end) = (ready, start, end);
                sink.record(&span);
            }
        }
    }
}

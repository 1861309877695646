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

use crate::cost::Cost;
use crate::stream::{Recipe, Script, StreamShared};
use crate::timeline::{Done, Step, StreamIndex, Timeline};
use hal::StreamId;
use hal::trace::{CommandKind, Span};
use parking_lot::Mutex;
use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// How long other ranks may be behind before they count as failed, while workers are never idle.
const PATIENCE: Duration = Duration::from_secs(10);

/// Ends of commands that a stream remembers, beyond those that the host has not seen.
const REMEMBERED: u64 = 1 << 16;

/// What a stream has carried out, in order. Short, since there is one for every command, on its way
/// from a worker to the clock.
#[derive(Debug)]
pub(crate) enum Carried {
    /// A list begins, issued then; those of its ops that follow are told by their place.
    Launch(Box<(Arc<Script>, u64)>),
    /// An op of a list, at its usual cost.
    Listed(u32),
    /// An op of a list, at a cost of its own.
    ListedAt(u32, Box<Cost>),
    /// Any other command.
    One(Box<Single>),
}

/// A command that is not told by a list.
#[derive(Debug)]
pub(crate) struct Single {
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
    /// Of each stream, what has been carried out and has no times yet.
    open: Vec<Open>,
    /// Empty; its room is used again and again.
    taken: Vec<Carried>,
}

/// What a stream has carried out and has no times yet.
#[derive(Debug)]
struct Open {
    id: StreamId,
    carried: VecDeque<Carried>,
    /// The list that the first of them belong to, and the one that the last belong to.
    first: Arc<Script>,
    last: (Arc<Script>, u64),
}

impl Open {
    /// The span of the first command, without times, if it has one.
    fn next(&mut self, sequence: u64, traced: bool) -> Option<Span> {
        let listed = |script: &Script, at: u32, cost: Option<&Cost>| {
            let recipe = script.recipe(at).filter(|_| traced)?;
            let (kind, label) = (CommandKind::Op(recipe.kind()), recipe.label.clone());
            Some(cost.unwrap_or(recipe.usual_cost()).span(self.id, sequence, kind, label))
        };
        loop {
            match self.carried.pop_front()? {
                Carried::Launch(launch) => self.first = launch.0,
                Carried::Listed(at) => return listed(&self.first, at, None),
                Carried::ListedAt(at, cost) => return listed(&self.first, at, Some(&cost)),
                Carried::One(single) => return single.span,
            }
        }
    }
}

impl SimClock {
    pub(crate) fn new(dies: usize) -> Self {
        let timeline = Timeline::new(dies);
        let state = State { timeline, open: Vec::new(), taken: Vec::new() };
        SimClock { state: Mutex::new(state) }
    }

    /// A new stream.
    pub(crate) fn stream(&self, id: StreamId) -> StreamIndex {
        let mut state = self.state.lock();
        state.open.push(Open {
            id,
            carried: VecDeque::new(),
            first: Arc::default(),
            last: (Arc::default(), 0),
        });
        state.timeline.stream(id.device.0)
    }

    /// Takes in what a stream has carried out.
    pub(crate) fn take_in(&self, stream: &StreamShared) {
        self.state.lock().take_in(stream);
    }

    /// As [`SimClock::take_in`], unless somebody is busy with the clock: then later will do.
    pub(crate) fn take_in_if_free(&self, stream: &StreamShared) {
        if let Some(mut state) = self.state.try_lock() {
            state.take_in(stream);
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
        known(&state).flatten()
    }

    /// Tells those who trace what has ended by former looks: while workers are at what comes next,
    /// rather than before the host can give them that.
    pub(crate) fn tell(&self, system: &crate::system::Shared) {
        self.state.lock().tell(system);
    }

    /// Works out everything that has been carried out, and tells those who trace.
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
    fn take_in(&mut self, stream: &StreamShared) {
        let State { timeline, open, taken } = self;
        // With the clock locked, so that what is taken first is also pushed first.
        stream.take_carried(taken);
        let Open { carried: kept, last, .. } = &mut open[stream.index.0 as usize];
        for mut carried in taken.drain(..) {
            match &mut carried {
                Carried::Launch(launch) => *last = (**launch).clone(),
                Carried::Listed(at) => {
                    let cost = last.0.recipe(*at).map_or(&Cost::NOTHING, Recipe::usual_cost);
                    timeline.push(stream.index, last.1, 0, Step::Run(*cost));
                }
                Carried::ListedAt(_, cost) => {
                    timeline.push(stream.index, last.1, 0, Step::Run(**cost));
                }
                Carried::One(single) => {
                    let step = std::mem::replace(&mut single.step, Step::Run(Cost::NOTHING));
                    timeline.push(stream.index, single.issued, single.delay, step);
                }
            }
            kept.push_back(carried);
        }
    }

    /// Tells those who trace what has ended.
    fn tell(&mut self, system: &crate::system::Shared) {
        let State { timeline, open, .. } = self;
        // Receivers by die, asked for once.
        let sinks: Vec<_> = system.dies.iter().map(|die| die.trace()).collect();
        for Done { stream, value, ready, start, end } in timeline.take_done() {
            let open = &mut open[stream.0 as usize];
            let sink = &sinks[open.id.device.0 as usize];
            if let (Some(span), Some(sink)) = (open.next(value, sink.is_some()), sink) {
                sink.record(&Span { ready, start, end, ..span });
            }
        }
    }
}

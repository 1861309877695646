//! Where a step's time went.
//!
//! Sums are exact, in picoseconds. A stream is busy while one of its commands runs, and idle for the
//! rest of the step; a die is busy while any of its streams is. Communication is exposed while a
//! collective runs on a die and no computation does; the rest of it is hidden.

mod interval;
mod layer;

pub use interval::Intervals;
pub use layer::LayerKind;

use crate::log::Recorded;
use hal::StreamId;
use hal::trace::{CommandKind, Span};
use serde::Serialize;
use std::collections::BTreeMap;
use std::io;

/// Where the time of a step, or of any stretch of a run, went.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct StepTime {
    /// Picoseconds at which the first command began, on the devices' clock.
    pub begin_ps: u64,
    /// Picoseconds at which the last one ended.
    pub end_ps: u64,
    /// The mean over dies, each figure rounded down.
    pub mean: Times,
    /// Each die's, by number.
    pub dies: Vec<DieTime>,
}

/// Where one die's time went.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct DieTime {
    /// The die.
    pub die: u32,
    /// Its times.
    #[serde(flatten)]
    pub times: Times,
    /// Each stream's, by number.
    pub streams: Vec<StreamTime>,
}

/// How long one stream was busy.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct StreamTime {
    /// Its number on the die.
    pub stream: u32,
    /// Picoseconds in which a command of it ran.
    pub busy_ps: u64,
    /// The rest of the step.
    pub idle_ps: u64,
}

/// Times of a die, or means over dies.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Times {
    /// Picoseconds in which any command ran.
    pub busy_ps: u64,
    /// The rest of the step.
    pub idle_ps: u64,
    /// Picoseconds in which ops, fills and copies ran.
    pub computation_ps: u64,
    /// Collectives.
    pub communication: Communication,
    /// Commands by kind.
    pub by_op: BTreeMap<&'static str, OpTime>,
    /// Picoseconds of commands by part of the model.
    pub by_layer: BTreeMap<LayerKind, u64>,
    /// Commands by what bounds them.
    pub by_bound: BTreeMap<&'static str, BoundTime>,
}

/// How much of the communication hides.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Communication {
    /// Picoseconds in which collectives ran.
    pub busy_ps: u64,
    /// Those of them in which no computation ran.
    pub exposed_ps: u64,
    /// `1 - exposed / busy`; `None` without communication.
    pub hidden_share: Option<f64>,
    /// Picoseconds in which collectives waited for other ranks before they ran.
    pub waiting_ps: u64,
}

/// The commands of one kind.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct OpTime {
    /// How many.
    pub calls: u64,
    /// Picoseconds of all of them.
    pub time_ps: u64,
    /// Operations done.
    pub operations: u64,
    /// Bytes moved.
    pub bytes: u64,
}

/// The commands that one thing bounds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct BoundTime {
    /// Picoseconds of all of them.
    pub time_ps: u64,
    /// Of the picoseconds of all commands.
    pub share: f64,
}

impl StepTime {
    /// Adds up spans, from whatever source, in any order. Layers from number `first_moe_layer` on
    /// are MoE layers. `None` if there are no spans.
    pub fn of(spans: &[Span], first_moe_layer: usize) -> Option<StepTime> {
        let mut dies: BTreeMap<u32, Die> = BTreeMap::new();
        for span in spans {
            dies.entry(span.device().0).or_default().add(span, first_moe_layer);
        }
        StepTime::of_dies(dies)
    }

    /// Adds up one phase of a recording; see [`SpanLog::next_phase`](crate::SpanLog::next_phase).
    /// Of each command, 32 bytes are held in memory.
    ///
    /// # Errors
    ///
    /// If the recording cannot be read.
    pub fn of_phase(
        recorded: &Recorded,
        phase: usize,
        first_moe_layer: usize,
    ) -> io::Result<Option<StepTime>> {
        let mut dies: BTreeMap<u32, Die> = BTreeMap::new();
        for stream in recorded.streams() {
            for span in recorded.spans_of_phase(stream, phase) {
                dies.entry(stream.device.0).or_default().add(&span?, first_moe_layer);
            }
        }
        Ok(StepTime::of_dies(dies))
    }

    /// Picoseconds from beginning to end.
    pub fn duration_ps(&self) -> u64 {
        self.end_ps - self.begin_ps
    }

    fn of_dies(dies: BTreeMap<u32, Die>) -> Option<StepTime> {
        let begin_ps = dies.values().map(|die| die.begin).min()?;
        let end_ps = dies.values().map(|die| die.end).max()?;
        let finish = |(number, die): (u32, Die)| die.finish(number, end_ps - begin_ps);
        let dies: Vec<DieTime> = dies.into_iter().map(finish).collect();
        Some(StepTime { begin_ps, end_ps, mean: mean(&dies), dies })
    }
}

/// A die's spans, being added up.
#[derive(Debug)]
struct Die {
    begin: u64,
    end: u64,
    streams: BTreeMap<u32, Intervals>,
    computation: Intervals,
    communication: Intervals,
    times: Times,
}

impl Default for Die {
    fn default() -> Self {
        Die {
            begin: u64::MAX,
            end: 0,
            streams: BTreeMap::new(),
            computation: Intervals::default(),
            communication: Intervals::default(),
            times: Times::default(),
        }
    }
}

impl Die {
    fn add(&mut self, span: &Span, first_moe_layer: usize) {
        let Span { stream: StreamId { index, .. }, start, end, .. } = *span;
        let took = end - start;
        (self.begin, self.end) = (self.begin.min(start), self.end.max(end));
        self.streams.entry(index).or_default().add(start, end);
        match span.kind {
            CommandKind::Collective(_) => {
                self.communication.add(start, end);
                self.times.communication.waiting_ps += start - span.ready.min(start);
            }
            CommandKind::Op(_) | CommandKind::Fill | CommandKind::Transfer => {
                self.computation.add(start, end);
            }
            _ => {}
        }
        let op = self.times.by_op.entry(span.kind.name()).or_default();
        op.calls += 1;
        op.time_ps += took;
        op.operations += span.operations;
        op.bytes += span.bytes;
        let layer = LayerKind::of(span.label.as_str(), |number| number >= first_moe_layer);
        *self.times.by_layer.entry(layer).or_default() += took;
        self.times.by_bound.entry(span.bound.name()).or_default().time_ps += took;
    }

    fn finish(self, die: u32, step: u64) -> DieTime {
        let Die { mut streams, mut computation, mut communication, mut times, .. } = self;
        let stream = |(stream, intervals): (&u32, &mut Intervals)| {
            let busy_ps = intervals.covered();
            StreamTime { stream: *stream, busy_ps, idle_ps: step - busy_ps }
        };
        let of_streams = streams.iter_mut().map(stream).collect();
        let mut all = streams.into_values().fold(Intervals::default(), Intervals::and);
        times.busy_ps = all.covered();
        times.idle_ps = step - times.busy_ps;
        times.computation_ps = computation.covered();
        times.communication.busy_ps = communication.covered();
        let either = communication.and(computation).covered();
        times.communication.exposed_ps = either - times.computation_ps;
        times.set_shares();
        DieTime { die, times, streams: of_streams }
    }
}

impl Times {
    fn set_shares(&mut self) {
        let Communication { busy_ps, exposed_ps, .. } = self.communication;
        self.communication.hidden_share =
            (busy_ps > 0).then(|| (busy_ps - exposed_ps) as f64 / busy_ps as f64);
        let all: u64 = self.by_bound.values().map(|bound| bound.time_ps).sum();
        for bound in self.by_bound.values_mut() {
            bound.share = bound.time_ps as f64 / all.max(1) as f64;
        }
    }

    fn add(&mut self, other: &Times) {
        self.busy_ps += other.busy_ps;
        self.idle_ps += other.idle_ps;
        self.computation_ps += other.computation_ps;
        self.communication.busy_ps += other.communication.busy_ps;
        self.communication.exposed_ps += other.communication.exposed_ps;
        self.communication.waiting_ps += other.communication.waiting_ps;
        for (name, time) in &other.by_op {
            let op = self.by_op.entry(name).or_default();
            op.calls += time.calls;
            op.time_ps += time.time_ps;
            op.operations += time.operations;
            op.bytes += time.bytes;
        }
        for (layer, time) in &other.by_layer {
            *self.by_layer.entry(*layer).or_default() += time;
        }
        for (name, time) in &other.by_bound {
            self.by_bound.entry(name).or_default().time_ps += time.time_ps;
        }
    }

    fn each_mut(&mut self) -> impl Iterator<Item = &mut u64> {
        let Times { busy_ps, idle_ps, computation_ps, communication, by_op, by_layer, by_bound } =
            self;
        let Communication { busy_ps: all, exposed_ps, waiting_ps, .. } = communication;
        let ops = by_op.values_mut();
        let ops = ops.flat_map(|o| [&mut o.calls, &mut o.time_ps, &mut o.operations, &mut o.bytes]);
        [busy_ps, idle_ps, computation_ps, all, exposed_ps, waiting_ps]
            .into_iter()
            .chain(ops)
            .chain(by_layer.values_mut())
            .chain(by_bound.values_mut().map(|bound| &mut bound.time_ps))
    }
}

fn mean(dies: &[DieTime]) -> Times {
    let mut mean = Times::default();
    dies.iter().for_each(|die| mean.add(&die.times));
    // From the sums, so that they are exact.
    mean.set_shares();
    mean.each_mut().for_each(|sum| *sum /= dies.len().max(1) as u64);
    mean
}

#[cfg(test)]
mod tests;

//! Completion times and traces.

use crate::backend::Feature;
use crate::lab::{Lab, SOON, Verdict, add, ensure, equal, floats, upload};
use crate::run::Case;
use hal::trace::{CommandKind, Span, TraceSink};
use hal::{OpKind, Point};
use std::sync::{Arc, Mutex, PoisonError};

pub(super) fn add_cases(all: &mut Vec<Case>) {
    all.extend([
        Case::new("streams/clock/completion_times_ascend", completion).needs(&[Feature::Clock]),
        Case::new("streams/clock/waits_carry_time", waits_carry_time).needs(&[Feature::Clock]),
        Case::new("streams/clock/same_program_same_time", same_time)
            .needs(&[Feature::Clock])
            .alone(),
        Case::new("streams/trace/every_command_in_order", trace).needs(&[Feature::Clock]).alone(),
        Case::new("streams/trace/ends_when_taken_away", trace_ends)
            .needs(&[Feature::Clock])
            .alone(),
    ]);
}

/// When a point passed, on the device's clock.
fn at(point: &Point) -> Verdict<u64> {
    let clock = point.completed_at().ok_or("no completion time")?;
    Ok(clock.picos)
}

fn completion(lab: &Lab) -> Verdict {
    let stream = lab.stream(0)?;
    let buffer = stream.alloc(1 << 16)?;
    let mut points = Vec::new();
    for i in 0..40 {
        stream.fill(&buffer.whole(), i)?;
        points.push(stream.point());
    }
    stream.synchronize(SOON)?;
    let times = points.iter().map(at).collect::<Verdict<Vec<_>>>()?;
    ensure(times.windows(2).all(|t| t[0] < t[1]), || format!("times do not ascend: {times:?}"))?;
    let clock = points[0].completed_at().map(|t| t.clock);
    equal("the clock", clock, lab.die(0).properties().clock)?;
    stream.fill(&buffer.whole(), 0)?;
    let pending = Point::new(points[0].timeline().clone(), stream.point().value() + 10);
    ensure(pending.completed_at().is_none(), || "a command that never was has completed".into())
}

fn waits_carry_time(lab: &Lab) -> Verdict {
    let (a, b) = (lab.stream(0)?, lab.stream(0)?);
    let large = a.alloc(8 << 20)?;
    for i in 0..10 {
        a.fill(&large.whole(), i)?;
    }
    let signal = a.point();
    b.wait(&signal)?;
    let small = b.alloc(4)?;
    b.fill(&small.whole(), 1)?;
    b.synchronize(SOON)?;
    let (early, late) = (at(&signal)?, at(&b.point())?);
    ensure(late > early, || format!("the waiter was done at {late}, the signal came at {early}"))
}

/// A program over streams of one die; returns the completion times.
fn program(lab: &Lab) -> Verdict<Vec<u64>> {
    let streams = (0..3).map(|_| lab.stream(0)).collect::<Verdict<Vec<_>>>()?;
    let buffers =
        streams.iter().map(|s| Ok(s.alloc(1 << 14)?)).collect::<Verdict<Vec<hal::Buffer>>>()?;
    for round in 0..20 {
        for (stream, buffer) in streams.iter().zip(&buffers) {
            stream.fill(&buffer.whole(), round)?;
        }
        streams[1].wait(&streams[0].point())?;
        streams[1].copy(&buffers[1].whole(), &buffers[0].whole())?;
        streams[0].wait(&streams[1].point())?;
    }
    streams.iter().try_for_each(|s| s.synchronize(SOON))?;
    streams.iter().map(|s| at(&s.point())).collect()
}

fn same_time(lab: &Lab) -> Verdict {
    // Only a simulated clock promises this; the second die has not been used either.
    if lab.die(0).properties().clock != Some(hal::Clock::Simulated) {
        return Ok(());
    }
    let spans = |times: &[u64]| times.windows(2).map(|t| t[1].abs_diff(t[0])).collect::<Vec<_>>();
    let first = program(lab)?;
    let second = program(lab)?;
    equal("differences of completion times", spans(&second), spans(&first))
}

/// Keeps what it is told.
#[derive(Debug, Default)]
struct Spans(Mutex<Vec<Span>>);

impl TraceSink for Spans {
    fn record(&self, span: &Span) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).push(span.clone());
    }
}

impl Spans {
    fn taken(&self) -> Vec<Span> {
        std::mem::take(&mut *self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

fn trace(lab: &Lab) -> Verdict {
    let spans = Arc::new(Spans::default());
    let die = lab.die(0);
    let stream = lab.stream(0)?;
    let x = floats(&*stream, &[1.0; 64])?;
    stream.synchronize(SOON)?;
    die.set_trace(Some(spans.clone()))?;
    let first = stream.point().value();
    stream.fill(&x.region(), 0)?;
    stream.submit(&add(&x, &x, &x).label("traced add"))?;
    upload(&*stream, &[1, 2, 3])?;
    stream.synchronize(SOON)?;
    die.set_trace(None)?;
    let spans: Vec<Span> = spans.taken().into_iter().filter(|s| s.stream == stream.id()).collect();
    let last = stream.point().value();
    let sequences: Vec<u64> = spans.iter().map(|s| s.sequence).collect();
    ensure(sequences.windows(2).all(|s| s[0] < s[1]), || format!("out of order: {sequences:?}"))?;
    ensure(sequences.iter().all(|&s| s > first && s <= last), || format!("{sequences:?}"))?;
    let find = |kind: CommandKind| spans.iter().find(|s| s.kind == kind);
    let traced = find(CommandKind::Op(OpKind::Add)).ok_or("the add is not in the trace")?;
    equal("label", traced.label.as_str(), "traced add")?;
    ensure(find(CommandKind::Fill).is_some(), || "the fill is not in the trace".into())?;
    ensure(find(CommandKind::Write).is_some(), || "the write is not in the trace".into())?;
    for span in &spans {
        ensure(span.start <= span.end, || format!("{span:?} ends before it starts"))?;
        equal("clock", Some(span.clock), die.properties().clock)?;
    }
    let end = Point::new(stream.point().timeline().clone(), traced.sequence);
    equal("the add's end", traced.end, at(&end)?)
}

fn trace_ends(lab: &Lab) -> Verdict {
    let spans = Arc::new(Spans::default());
    let (die, stream) = (lab.die(0), lab.stream(0)?);
    let buffer = stream.alloc(64)?;
    die.set_trace(Some(spans.clone()))?;
    stream.fill(&buffer.whole(), 1)?;
    stream.synchronize(SOON)?;
    die.set_trace(None)?;
    ensure(!spans.taken().is_empty(), || "nothing was traced".into())?;
    stream.fill(&buffer.whole(), 2)?;
    stream.synchronize(SOON)?;
    equal("spans after the trace was taken away", spans.taken().len(), 0)
}

//! How much of a die's memory and links is in use, over time.
//!
//! A command uses its bytes over its duration evenly, so that the sum is constant between the
//! beginnings and ends of commands.

use super::event::{Events, Thread};
use super::number::mega_per_second;
use crate::log::{Recorded, Spans};
use hal::StreamId;
use hal::trace::{Bound, CommandKind, Span};
use std::io;

/// The counters' names, in the order of their values.
const NAMES: [&str; 2] = ["device memory", "links"];
const MEMORY: usize = 0;
const LINKS: usize = 1;

/// A moment at which a command begins or ends.
#[derive(Clone, Copy, Debug)]
struct Change {
    at: u64,
    counter: usize,
    /// Megabytes a second.
    rate: u64,
    begins: bool,
}

/// A stream's changes, in the order of its commands.
struct Changes<'a> {
    spans: Spans<'a>,
    end: Option<Change>,
    next: Option<Change>,
}

impl<'a> Changes<'a> {
    fn of(spans: Spans<'a>) -> io::Result<Changes<'a>> {
        let mut changes = Changes { spans, end: None, next: None };
        changes.advance()?;
        Ok(changes)
    }

    fn advance(&mut self) -> io::Result<()> {
        self.next = self.end.take();
        while self.next.is_none() {
            let Some(span) = self.spans.next() else { return Ok(()) };
            let span = span?;
            if span.bytes == 0 || span.duration() == 0 {
                continue;
            }
            let (counter, rate) = (counter(&span), mega_per_second(span.bytes, span.duration()));
            self.next = Some(Change { at: span.start, counter, rate, begins: true });
            self.end = Some(Change { at: span.end, counter, rate, begins: false });
        }
        Ok(())
    }
}

fn counter(span: &Span) -> usize {
    match span.kind {
        CommandKind::Collective(_) => LINKS,
        _ if span.bound == Bound::Link => LINKS,
        _ => MEMORY,
    }
}

/// Writes the counters of the die whose streams these are.
pub(super) fn write(
    recorded: &Recorded,
    streams: &[StreamId],
    thread: &Thread,
    events: &mut Events<'_>,
) -> io::Result<()> {
    let changes = streams.iter().map(|&stream| Changes::of(recorded.spans(stream)));
    let mut changes = changes.collect::<io::Result<Vec<_>>>()?;
    let (mut shown, mut values) = ([0u64; 2], [0u64; 2]);
    let earliest = |changes: &[Changes<'_>]| {
        let times = changes.iter().enumerate();
        times.filter_map(|(i, c)| Some((c.next?.at, i))).min()
    };
    while let Some((at, stream)) = earliest(&changes) {
        if let Some(Change { counter, rate, begins, .. }) = changes[stream].next {
            values[counter] = match begins {
                true => values[counter].saturating_add(rate),
                false => values[counter].saturating_sub(rate),
            };
        }
        changes[stream].advance()?;
        // One event for all that changes at one time.
        if earliest(&changes).is_some_and(|(next, _)| next == at) {
            continue;
        }
        for (counter, name) in NAMES.iter().enumerate() {
            if shown[counter] != values[counter] {
                events.counter(thread, name, at, values[counter])?;
            }
        }
        shown = values;
    }
    Ok(())
}

//! Trace files in the Trace Event Format, for ui.perfetto.dev and chrome://tracing.
//!
//! A process per die, a thread per stream, a complete event per command. Arrows lead from a command
//! to what waited for it, on this rank or on others; counters show the use of memory and links. The
//! file is written stream by stream, in the order of dies and streams, and is the same byte for
//! byte whenever the spans are.
//!
//! Viewers count in nanoseconds, and drop events of a thread that overlap when rounded so. `ts` is
//! exact to the picosecond all the same; `dur` is, or up to two nanoseconds less where rounding
//! would make an overlap; `args.picoseconds` is the exact duration always.

mod arrows;
mod counters;
mod event;
mod number;

use crate::log::Recorded;
use arrows::Arrows;
use event::{Events, Thread};
use hal::trace::Span;
use hal::{DeviceId, DiePlacement, StreamId};
use std::collections::BTreeMap;
use std::io::{self, Write};

/// How dies and streams are called, and what else the file is to say.
#[derive(Clone, Debug, Default)]
pub struct Names {
    /// Where each die sits.
    pub dies: BTreeMap<DeviceId, DiePlacement>,
    /// What else is to be said of a die, where there is something.
    pub notes: BTreeMap<DeviceId, String>,
    /// The labels of streams.
    pub streams: BTreeMap<StreamId, String>,
    /// What the trace is of, in the file's `otherData`: names and values.
    pub about: Vec<(String, String)>,
}

/// Writes what was recorded as a trace, and returns how many events it has.
///
/// In memory are some 100 bytes for each wait and each rank's part of a collective, for the arrows;
/// spans are read from disk as they are written.
///
/// # Errors
///
/// If the log cannot be read or `out` not written.
pub fn write(recorded: &Recorded, names: &Names, out: &mut dyn Write) -> io::Result<u64> {
    let arrows = Arrows::find(recorded)?;
    let threads = threads(recorded, names);
    let mut events = Events::begin(out, &names.about)?;
    let mut streams = recorded.streams().peekable();
    while let Some(first) = streams.next() {
        let die = first.device;
        let mut of_die = vec![first];
        while let Some(stream) = streams.next_if(|stream| stream.device == die) {
            of_die.push(stream);
        }
        events.process(&threads[&first], &die_name(die, names))?;
        for stream in &of_die {
            events.thread(&threads[stream])?;
            stream_events(recorded, *stream, &threads, &arrows, &mut events)?;
        }
        counters::write(recorded, &of_die, &threads[&first], &mut events)?;
    }
    events.end()
}

fn die_name(die: DeviceId, names: &Names) -> String {
    let mut name = die.to_string();
    if let Some(DiePlacement { host, card, .. }) = names.dies.get(&die) {
        name += &format!(" (card {card}, host {host})");
    }
    if let Some(note) = names.notes.get(&die) {
        name += &format!(", {note}");
    }
    name
}

/// A thread for each stream. No number stands for two of them, or for a process and a thread, nor
/// is any of them 0: viewers know numbers of operating systems.
fn threads(recorded: &Recorded, names: &Names) -> BTreeMap<StreamId, Thread> {
    let dies = recorded.streams().map(|s| u64::from(s.device.0) + 1).max().unwrap_or(0);
    let numbered = recorded.streams().zip(dies + 1..);
    let thread = |(id, number): (StreamId, u64)| {
        let name = names.streams.get(&id).cloned();
        let name = name.unwrap_or_else(|| format!("stream {}", id.index));
        let process = u64::from(id.device.0) + 1;
        (id, Thread { process, number, order: id.index, name })
    };
    numbered.map(thread).collect()
}

fn stream_events(
    recorded: &Recorded,
    stream: StreamId,
    threads: &BTreeMap<StreamId, Thread>,
    arrows: &Arrows,
    events: &mut Events<'_>,
) -> io::Result<()> {
    let thread = &threads[&stream];
    for span in recorded.spans(stream) {
        let span: Span = span?;
        // An arrow ends at the next event of its thread, and begins at the one before.
        for (number, arrow) in arrows.ending_at(stream, span.sequence) {
            events.arrow_end(thread, arrow.why, number, span.start)?;
        }
        events.command(thread, &span, &|stream| threads.get(&stream), arrows)?;
        for (number, arrow) in arrows.beginning_at(stream, span.sequence) {
            let last_nanosecond = span.end.saturating_sub(1000).max(span.start);
            events.arrow_begin(thread, arrow.why, number, last_nanosecond)?;
        }
    }
    Ok(())
}

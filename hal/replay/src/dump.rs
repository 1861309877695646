//! A recording as text: one call a line.

use crate::file::{FormatError, Problem, Reader};
use crate::record::{Call, Definition, Part, Record, Span, View};
use std::collections::HashMap;
use std::fmt::Write as _;
use std::io::{self, Read, Seek, Write};

/// Why a recording cannot be printed.
#[derive(Debug, thiserror::Error)]
pub enum DumpError {
    /// The file.
    #[error(transparent)]
    Format(#[from] FormatError),
    /// Whoever reads it.
    #[error(transparent)]
    Io(#[from] io::Error),
}

/// Prints every record of a recording, one a line: its number, its die and stream, the call, and
/// the error that it returned. A recording without an end is printed as far as it goes.
///
/// # Errors
///
/// A damaged file, after what stands before the damage; those of the sink.
pub fn dump<R: Read + Seek>(
    reader: &mut Reader<R>,
    allow_unfinished: bool,
    to: &mut dyn Write,
) -> Result<(), DumpError> {
    let header = reader.header();
    writeln!(to, "# recorded by {}: {}", header.program, header.command.join(" "))?;
    let mut names = Names::default();
    let mut number = 0u64;
    loop {
        match reader.next_record() {
            Ok(Some(stored)) => {
                if let Some(line) = names.line(&stored.record) {
                    writeln!(to, "{number:>7} {line}")?;
                }
                number += 1;
            }
            Ok(None) => return Ok(()),
            Err(FormatError { problem: Problem::Unfinished | Problem::Truncated, offset })
                if allow_unfinished =>
            {
                writeln!(to, "# the recording ends here, at byte {offset}, unfinished")?;
                return Ok(());
            }
            Err(error) => return Err(error.into()),
        }
    }
}

/// What numbers mean.
#[derive(Default)]
struct Names {
    streams: HashMap<u64, (u32, String)>,
    commands: HashMap<u64, String>,
}

impl Names {
    /// The line of a record; none for a definition, which is printed where it is submitted.
    fn line(&mut self, record: &Record) -> Option<String> {
        let mut line = match &record.call {
            Call::Define { command, what } => {
                self.commands.insert(*command, definition(what));
                return None;
            }
            Call::Die(die) => {
                let values = if die.functional { "" } else { ", timing only: no values" };
                format!(
                    "die {} opened: {} by {}, {} bytes{values}",
                    die.die, die.name, die.backend, die.memory_bytes
                )
            }
            Call::Stream { stream, die, label } => {
                self.streams.insert(*stream, (*die, label.clone()));
                format!("{} created", self.stream(*stream))
            }
            Call::CloseStream { stream } => format!("{} closed", self.stream(*stream)),
            Call::Alloc { buffer, stream, bytes } => {
                format!("{} alloc {bytes} bytes as b{buffer}", self.stream(*stream))
            }
            Call::AllocHost { buffer, die, bytes } => {
                format!("die {die} alloc_host {bytes} bytes as b{buffer}")
            }
            Call::Free { buffer } => format!("free b{buffer}"),
            Call::Write { stream, to, payload } => {
                format!("{} write {} from payload {payload}", self.stream(*stream), span(to))
            }
            Call::Read { stream, from, payload, .. } => {
                format!("{} read {}{}", self.stream(*stream), span(from), seen(*payload))
            }
            Call::Copy { stream, to, from } => {
                format!("{} transfer {} to {}", self.stream(*stream), span(from), span(to))
            }
            Call::Fill { stream, to, byte } => {
                format!("{} fill {} with {byte:#04x}", self.stream(*stream), span(to))
            }
            Call::Submit { stream, command } => {
                let stream = self.stream(*stream);
                match self.commands.get(command) {
                    Some(what) => format!("{stream} {what}"),
                    None => format!("{stream} command {command}, which is not defined"),
                }
            }
            Call::Wait { stream, on, value } => {
                format!("{} wait for {value} of {}", self.stream(*stream), self.stream(*on))
            }
            Call::Synchronize { stream, value, .. } => {
                format!("{} synchronize with {value}", self.stream(*stream))
            }
            Call::Failure { stream } => format!("{} asked for its failure", self.stream(*stream)),
            Call::HostWrite { to, payload } => {
                format!("host write {} from payload {payload}", span(to))
            }
            Call::HostRead { from, payload } => {
                format!("host read {}{}", span(from), seen(*payload))
            }
            Call::Join { communicator, die, rank, size, id } => format!(
                "die {die} joins communicator {:x}.{:x} as rank {rank} of {size}: c{communicator}",
                id[0], id[1]
            ),
            Call::Leave { communicator } => format!("leave c{communicator}"),
            Call::Abort { communicator, reason } => format!("abort c{communicator}: {reason}"),
            Call::Probe { probe, stream, operand, view: v } => {
                format!("{} probe {probe} of {operand}={}", self.stream(*stream), view(v))
            }
            Call::Probed { probe, hash } => format!("probe {probe} has hash {hash:016x}"),
            Call::End(end) => {
                let run = if end.finished { "the run finished" } else { "the run stopped early" };
                format!("end: {} commands, {run}", end.commands)
            }
        };
        if let Some(failed) = &record.error {
            let _ = write!(line, " -> {}", failed.text);
        }
        // One record, one line, whatever labels hold.
        Some(line.replace('\n', "\\n"))
    }

    fn stream(&self, stream: u64) -> String {
        match self.streams.get(&stream) {
            Some((die, label)) => format!("die {die} {label:?}"),
            None => format!("stream {stream}"),
        }
    }
}

fn seen(payload: Option<u64>) -> String {
    payload.map_or(String::new(), |payload| format!(": payload {payload}"))
}

fn span(span: &Span) -> String {
    format!("b{}[{}..+{}]", span.buffer, span.offset, span.len)
}

fn view(view: &View) -> String {
    let strides = view.strides.as_ref().map_or(String::new(), |s| format!(" strides {s:?}"));
    format!("{}{:?}{strides}@b{}+{}", view.dtype, view.shape, view.buffer, view.offset)
}

fn definition(what: &Definition) -> String {
    let mut text = format!("{} {:?}", what.name(), what.label());
    match what {
        Definition::Op { op, .. } => op.visit(|name, access, v| {
            let arrow = if access.writes() { "->" } else { "" };
            let _ = write!(text, " {arrow}{name}={}", view(v));
        }),
        Definition::Batch { communicator, batch, .. } => {
            let _ = write!(text, " on c{communicator}");
            batch.iter().for_each(|part| collective(part, &mut text));
        }
    }
    text
}

fn collective(part: &Part, text: &mut String) {
    let _ = write!(text, " {}", part.kind.name());
    for (name, operand) in [(" send=", &part.send), (" ->recv=", &part.recv)] {
        if let Some(operand) = operand {
            let _ = write!(text, "{name}{}", view(operand));
        }
    }
    if let Some(reduction) = part.reduction {
        let _ = write!(text, " {reduction:?}");
    }
    if let Some(peer) = part.peer {
        let _ = write!(text, " rank {peer}");
    }
    if let Some(offsets) = &part.offsets {
        let _ = write!(text, " offsets {:?} {:?}", offsets.send, offsets.recv);
    }
    if let Some((send, recv)) = &part.counts {
        let _ = write!(text, " counts {send:?} {recv:?}");
    }
}

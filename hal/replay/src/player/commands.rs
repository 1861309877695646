//! Putting recorded commands on streams again.

use super::{Player, Stop};
use crate::file::Reader;
use crate::record::{Call, Definition, Failed, FailedKind, Span, View};
use crate::report::Wrote;
use hal::{Command, DType, Label, Point, Region};
use std::io::{Read, Seek};
use std::rc::Rc;
use std::time::Duration;

impl Player<'_> {
    /// Makes a call that concerns a stream or a buffer's contents.
    pub(super) fn issue<R: Read + Seek>(
        &mut self,
        reader: &mut Reader<R>,
        call: &Call,
        failed: Option<&Failed>,
    ) -> Result<(), Stop> {
        match call {
            Call::Write { stream, to, payload } => {
                let (handle, _) = self.stream(*stream)?;
                let region = self.region(to)?;
                let bytes = payload_of(reader, *payload, to)?;
                if self.issued(*stream, failed, handle.write(&region, bytes)) {
                    let by = self.wrote(*stream, "write", "", "dst");
                    self.note(to, None, &by);
                }
            }
            Call::Read { stream, from, timeout, payload, into } => {
                let (handle, die) = self.stream(*stream)?;
                if let Some(into) = into {
                    let problem = format!("{} bytes do not fill {into} bytes", from.len);
                    return Err(Stop::Refused(problem));
                }
                let mut region = self.region(from)?;
                let timeout = self.timeout(*timeout, failed);
                let mut bytes = room(reader, from, *payload)?;
                region.len = bytes.len() as u64;
                let read = handle.read(&region, &mut bytes, timeout);
                if self.issued(*stream, failed, read) && failed.is_none() {
                    self.compare_read(reader, die, from, *payload, &bytes)?;
                }
            }
            Call::Copy { stream, to, from } => {
                let (handle, die) = self.stream(*stream)?;
                let regions = (self.region(to)?, self.region(from)?);
                copyable(&regions.0, &regions.1, die)?;
                let writers = &self.memory(from.buffer)?.writers;
                let dtype = writers.dtype(&range(from));
                let source = writers.of(from.offset).map(|by| Box::new((**by).clone()));
                if self.issued(*stream, failed, handle.copy(&regions.0, &regions.1)) {
                    let by = self.wrote(*stream, "transfer", "", "dst");
                    self.note(to, dtype, &Rc::new(Wrote { source, ..(*by).clone() }));
                }
            }
            Call::Fill { stream, to, byte } => {
                let (handle, _) = self.stream(*stream)?;
                let region = self.region(to)?;
                if self.issued(*stream, failed, handle.fill(&region, *byte)) {
                    let by = self.wrote(*stream, "fill", "", "dst");
                    self.note(to, None, &by);
                }
            }
            Call::Submit { stream, command } => self.submit(*stream, *command, failed)?,
            Call::Wait { stream, on, value } => {
                let (handle, _) = self.stream(*stream)?;
                let point = self.point(*on, *value, failed)?;
                self.issued(*stream, failed, handle.wait(&point));
            }
            Call::Synchronize { stream, value, timeout } => {
                let point = self.point(*stream, *value, failed)?;
                let timeout = self.timeout(*timeout, failed);
                let result = point.synchronize(timeout);
                self.outcome(failed, result);
            }
            Call::HostWrite { to, payload } => {
                let region = self.region(to)?;
                let bytes = payload_of(reader, *payload, to)?;
                let result = region.buffer.raw().write_host(to.offset, bytes);
                if self.outcome(failed, result).is_some() {
                    let by = Wrote {
                        record: self.now,
                        die: region.buffer.device().0,
                        stream: "host".to_string(),
                        sequence: 0,
                        op: "write_host".to_string(),
                        label: String::new(),
                        operand: "dst".to_string(),
                        source: None,
                    };
                    self.note(to, None, &Rc::new(by));
                }
            }
            Call::HostRead { from, payload } => {
                let region = self.region(from)?;
                let mut bytes = room(reader, from, *payload)?;
                let result = region.buffer.raw().read_host(from.offset, &mut bytes);
                if self.outcome(failed, result).is_some() && failed.is_none() {
                    let die = region.buffer.device().0;
                    self.compare_read(reader, die, from, *payload, &bytes)?;
                }
            }
            Call::Probe { probe, stream, operand, view } => {
                self.probe(*probe, *stream, operand, view, failed)?;
            }
            Call::Probed { probe, hash } => self.probed(*probe, *hash)?,
            other => return Err(Stop::Bad(format!("{other:?} is no command"))),
        }
        Ok(())
    }

    fn submit(&mut self, stream: u64, command: u64, failed: Option<&Failed>) -> Result<(), Stop> {
        let (handle, die) = self.stream(stream)?;
        let Some(definition) = self.commands.get(&command) else {
            return Err(Stop::Bad(format!("there is no command {command}")));
        };
        let definition = definition.clone();
        let label = definition.label();
        match &*definition {
            Definition::Op { op, .. } => {
                let command =
                    Command { op: self.op(op, die)?, label: Label::from(label.to_string()) };
                if self.issued(stream, failed, handle.submit(&command)) {
                    op.visit(|operand, access, view| {
                        if access.writes() {
                            let by = self.wrote(stream, definition.name(), label, operand);
                            self.note_view(view, by);
                        }
                    });
                }
            }
            Definition::Batch { communicator, batch: parts, .. } => {
                let rank = self.rank(*communicator)?;
                if rank.die != die {
                    let problem = format!("the communicator's rank is die {}", rank.die);
                    return Err(Stop::Refused(problem));
                }
                let communicator = rank.communicator.clone();
                let (rank, size) = (communicator.rank(), communicator.size());
                let batch = self.batch(parts, (die, rank, size))?;
                let label = Label::from(label.to_string());
                let result = handle.submit_collectives(&communicator, &batch, &label);
                if self.issued(stream, failed, result) {
                    for view in parts.iter().filter_map(|part| part.written(rank)) {
                        let by = self.wrote(stream, definition.name(), label.as_str(), "recv");
                        self.note_view(view, by);
                    }
                }
            }
        }
        Ok(())
    }

    /// Counts a command that was put on a stream, and says whether it was accepted.
    pub(super) fn issued(
        &mut self,
        stream: u64,
        failed: Option<&Failed>,
        result: hal::Result<()>,
    ) -> bool {
        self.report.commands += 1;
        let accepted = self.outcome(failed, result).is_some();
        if let Some(Some(lane)) = self.streams.get_mut(&stream) {
            lane.deviates |= accepted != failed.is_none();
            if let Some(stream) = &lane.stream {
                lane.value = stream.point().value();
            }
        }
        accepted
    }

    /// How long to wait: as long as then for what did not come then.
    fn timeout(&self, recorded: u64, failed: Option<&Failed>) -> Duration {
        match failed {
            Some(Failed { kind: FailedKind::Timeout, .. }) => {
                Duration::from_nanos(recorded).min(self.options.timeout)
            }
            _ => self.options.timeout,
        }
    }

    /// A value on a stream's timeline, as far as it has been submitted.
    fn point(&self, stream: u64, value: u64, failed: Option<&Failed>) -> Result<Point, Stop> {
        let lane = self.lane(stream)?;
        if value > lane.value && !lane.deviates && failed.is_none() {
            let submitted = lane.value;
            let problem =
                format!("value {value} of stream {stream}, which has come to {submitted}");
            return Err(Stop::Bad(problem));
        }
        Ok(Point::new(lane.timeline.clone(), value.min(lane.value)))
    }

    /// The command just issued to a stream, as a writer.
    pub(super) fn wrote(&self, stream: u64, op: &str, label: &str, operand: &str) -> Rc<Wrote> {
        let lane = self.streams.get(&stream).and_then(Option::as_ref);
        Rc::new(Wrote {
            record: self.now,
            die: lane.map_or(0, |lane| lane.die),
            stream: lane.map_or(String::new(), |lane| lane.label.clone()),
            sequence: lane.map_or(0, |lane| lane.value),
            op: op.to_string(),
            label: label.to_string(),
            operand: operand.to_string(),
            source: None,
        })
    }

    fn note(&mut self, span: &Span, dtype: Option<DType>, by: &Rc<Wrote>) {
        if let Some(Some(memory)) = self.buffers.get_mut(&span.buffer) {
            memory.writers.bytes(range(span), dtype, by.clone());
        }
    }

    fn note_view(&mut self, view: &View, by: Rc<Wrote>) {
        if let (Some(Some(memory)), Ok(desc)) = (self.buffers.get_mut(&view.buffer), view.desc()) {
            memory.writers.view(view.offset, &desc, by);
        }
    }
}

fn range(span: &Span) -> std::ops::Range<u64> {
    span.offset..span.offset + span.len
}

/// A payload that fills a span.
fn payload_of<'r, R: Read + Seek>(
    reader: &'r mut Reader<R>,
    payload: u64,
    span: &Span,
) -> Result<&'r [u8], Stop> {
    let Some(bytes) = reader.payload(payload)? else {
        return Err(Stop::Bad(format!("there is no payload {payload}")));
    };
    if bytes.len() as u64 != span.len {
        let problem = format!("{} bytes do not fill {} bytes", bytes.len(), span.len);
        return Err(Stop::Refused(problem));
    }
    Ok(bytes)
}

/// The most bytes that are read where there is nothing to compare them with.
const NOT_COMPARED: u64 = 1 << 20;

/// Memory for what is read: as much as the file holds, so that a length that a file only claims
/// costs nothing.
fn room<R: Read + Seek>(
    reader: &Reader<R>,
    from: &Span,
    payload: Option<u64>,
) -> Result<Vec<u8>, Stop> {
    let len = match payload {
        None => from.len.min(NOT_COMPARED),
        Some(payload) => match reader.payload_len(payload) {
            Some(len) if len == from.len => len,
            Some(len) => {
                let problem = format!("a read of {} bytes gave {len}", from.len);
                return Err(Stop::Bad(problem));
            }
            None => return Err(Stop::Bad(format!("there is no payload {payload}"))),
        },
    };
    Ok(vec![0; len as usize])
}

/// Whether a stream of `die` may copy between these.
fn copyable(to: &Region, from: &Region, die: u32) -> Result<(), Stop> {
    let problem = if to.len != from.len {
        format!("{} bytes do not fill {} bytes", from.len, to.len)
    } else if to.buffer.device().0 != die && from.buffer.device().0 != die {
        format!("neither {:?} nor {:?} is on die {die}", to.buffer, from.buffer)
    } else if to.buffer.id() == from.buffer.id()
        && to.offset < from.offset + from.len
        && from.offset < to.offset + to.len
    {
        "source and destination overlap".to_string()
    } else {
        return Ok(());
    };
    Err(Stop::Refused(problem))
}

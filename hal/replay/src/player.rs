//! Replaying: making the recorded calls again, one after the other, and comparing what comes back.

mod check;
mod commands;
mod failures;
mod objects;
mod results;
mod writers;

use crate::compare::Tolerance;
use crate::file::{FormatError, Problem, Reader};
use crate::record::{Call, Definition, Failed, Record};
use crate::report::Report;
use check::MOST_RANKS;
use failures::Failures;
use hal::{Buffer, Communicator, CommunicatorId, Device, DeviceId, Error, Stream, Timeline};
use results::Copy;
use std::collections::HashMap;
use std::io::{Read, Seek};
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;
use writers::Writers;

/// How to replay.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// How far floats may be apart; absent, every byte must be equal.
    pub tolerance: Option<Tolerance>,
    /// How long the host waits for what came at recording, however long it waited then. A wait
    /// that timed out is repeated for as long as then, but no longer than this.
    pub timeout: Duration,
    /// Whether a recording without an end is replayed as far as it goes.
    pub allow_unfinished: bool,
    /// How many differences are described; all are counted.
    pub described: usize,
}

impl Default for Options {
    fn default() -> Self {
        let timeout = Duration::from_secs(60);
        Options { tolerance: None, timeout, allow_unfinished: false, described: 10 }
    }
}

/// Why a recording could not be replayed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ReplayError {
    /// The file.
    #[error(transparent)]
    Format(#[from] FormatError),
    /// A die that the recording needs.
    #[error("die {die} of the recording cannot be opened")]
    Open {
        /// Its number.
        die: u32,
        /// Why not.
        source: Error,
    },
}

/// Makes the calls of a recording again, on dies that `open` gives by their recorded numbers.
///
/// # Errors
///
/// A damaged or impossible file, with the byte, and a die that cannot be opened. What fails on a
/// device is part of the report.
pub fn replay<R: Read + Seek>(
    reader: &mut Reader<R>,
    open: &mut dyn FnMut(DeviceId) -> hal::Result<Arc<dyn Device>>,
    options: &Options,
) -> Result<Report, ReplayError> {
    let mut player = Player {
        open,
        options,
        dies: HashMap::new(),
        streams: HashMap::new(),
        buffers: HashMap::new(),
        communicators: HashMap::new(),
        ids: HashMap::new(),
        commands: HashMap::new(),
        probes: HashMap::new(),
        failures: Failures::default(),
        report: Report::default(),
        now: 0,
    };
    loop {
        match reader.next_record() {
            Ok(Some(stored)) => player.play(reader, stored.offset, &stored.record)?,
            Ok(None) => break,
            Err(FormatError { problem: Problem::Unfinished | Problem::Truncated, .. })
                if options.allow_unfinished =>
            {
                break;
            }
            Err(error) => return Err(error.into()),
        }
    }
    let mut report = std::mem::take(&mut player.report);
    report.failures = std::mem::take(&mut player.failures).report();
    Ok(report)
}

/// Why a call is not made.
enum Stop {
    /// The file makes no sense.
    Bad(String),
    /// The call breaks the contract, as far as it can be known here.
    Refused(String),
    /// It names what could not be made, here or at recording.
    Absent,
    /// Reading the file failed.
    Format(FormatError),
    /// A die cannot be opened.
    Open(u32, Error),
}

impl From<FormatError> for Stop {
    fn from(error: FormatError) -> Self {
        Stop::Format(error)
    }
}

/// A stream, and what it was at recording.
struct Lane {
    /// Absent once its handle was dropped.
    stream: Option<Arc<dyn Stream>>,
    timeline: Arc<dyn Timeline>,
    die: u32,
    label: String,
    /// The value of the last command issued.
    value: u64,
    /// Whether a recorded command was not issued, so that values differ from the recorded ones.
    deviates: bool,
}

/// A buffer, and who wrote it.
struct Memory {
    buffer: Buffer,
    writers: Writers,
}

/// A communicator's rank.
struct Rank {
    communicator: Arc<dyn Communicator>,
    die: u32,
}

/// A die, and whether it had values at recording.
struct Opened {
    device: Arc<dyn Device>,
    had_values: bool,
}

impl Opened {
    /// Whether values can be compared.
    fn has_values(&self) -> bool {
        self.had_values && self.device.properties().functional
    }
}

/// A replay under way. Numbers are those of the recording; `None` stands for what could not be
/// made.
struct Player<'a> {
    open: &'a mut dyn FnMut(DeviceId) -> hal::Result<Arc<dyn Device>>,
    options: &'a Options,
    dies: HashMap<u32, Opened>,
    streams: HashMap<u64, Option<Lane>>,
    buffers: HashMap<u64, Option<Memory>>,
    communicators: HashMap<u64, Option<Rank>>,
    ids: HashMap<[u64; 2], CommunicatorId>,
    commands: HashMap<u64, Rc<Definition>>,
    probes: HashMap<u64, Copy>,
    failures: Failures,
    report: Report,
    /// The number of the record that is being played.
    now: u64,
}

impl Player<'_> {
    fn play<R: Read + Seek>(
        &mut self,
        reader: &mut Reader<R>,
        offset: u64,
        record: &Record,
    ) -> Result<(), ReplayError> {
        let command = record.call.command_on();
        self.report.recorded_commands += u64::from(command.is_some());
        let stopped = match &record.error {
            Some(failed) if failed.flows() => {
                self.settle(&record.call, failed);
                Err(Stop::Absent)
            }
            _ => self.call(reader, record),
        };
        match stopped {
            Ok(()) => {}
            Err(Stop::Absent) => self.leave_out(&record.call),
            Err(Stop::Refused(problem)) => {
                let Some(failed) = &record.error else {
                    let problem = format!(
                        "record {}: {problem}; a run without the validating layer can record such \
                         commands, but they are not replayed",
                        self.now
                    );
                    return Err(FormatError::invalid(offset, problem).into());
                };
                self.failures.recorded(self.now, failed);
                let device = DeviceId(failed.die.unwrap_or_default());
                self.failures.replayed(self.now, &Error::usage(device, problem));
                self.leave_out(&record.call);
            }
            Err(Stop::Bad(problem)) => {
                let problem = format!("record {}: {problem}", self.now);
                return Err(FormatError::invalid(offset, problem).into());
            }
            Err(Stop::Format(error)) => return Err(error.into()),
            Err(Stop::Open(die, source)) => return Err(ReplayError::Open { die, source }),
        }
        self.now += 1;
        Ok(())
    }

    /// A recorded call failed because an earlier command had. It is not made again: whether that
    /// command fails again shows once the stream has come that far.
    fn settle(&mut self, call: &Call, failed: &Failed) {
        self.failures.recorded(self.now, failed);
        let stream = call.command_on().or(match call {
            Call::Alloc { stream, .. }
            | Call::Synchronize { stream, .. }
            | Call::Failure { stream } => Some(*stream),
            _ => None,
        });
        let result = match stream.and_then(|s| self.streams.get(&s)?.as_ref()) {
            Some(lane) => lane.timeline.synchronize(lane.value, self.options.timeout),
            None => match failed.die.and_then(|die| self.dies.get(&die)) {
                Some(die) => die.device.memory_info().map(drop),
                None => Ok(()),
            },
        };
        for result in [result, self.status(call)] {
            if let Err(error) = result {
                self.failures.replayed(self.now, &error);
            }
        }
    }

    /// What has become of the communicator of a batch: one that was aborted refuses every later
    /// batch, also on streams that are well.
    fn status(&self, call: &Call) -> hal::Result<()> {
        let Call::Submit { command, .. } = call else { return Ok(()) };
        match self.commands.get(command).map(|definition| &**definition) {
            Some(Definition::Batch { communicator, .. }) => {
                let rank = self.communicators.get(communicator).and_then(Option::as_ref);
                rank.map_or(Ok(()), |rank| rank.communicator.status())
            }
            _ => Ok(()),
        }
    }

    /// Notes that a call was not made.
    fn leave_out(&mut self, call: &Call) {
        if let Some(stream) = call.command_on() {
            self.report.skipped += 1;
            if let Some(Some(lane)) = self.streams.get_mut(&stream) {
                lane.deviates = true;
            }
        }
        match call {
            Call::Stream { stream, .. } => drop(self.streams.insert(*stream, None)),
            Call::Alloc { buffer, .. } | Call::AllocHost { buffer, .. } => {
                self.buffers.insert(*buffer, None);
            }
            Call::Join { communicator, .. } => drop(self.communicators.insert(*communicator, None)),
            _ => {}
        }
    }

    /// What a call gave, if it succeeded; both sides' errors are noted.
    fn outcome<T>(&mut self, recorded: Option<&Failed>, result: hal::Result<T>) -> Option<T> {
        if let Some(failed) = recorded {
            self.failures.recorded(self.now, failed);
        }
        result.map_err(|error| self.failures.replayed(self.now, &error)).ok()
    }

    /// Makes a call.
    fn call<R: Read + Seek>(
        &mut self,
        reader: &mut Reader<R>,
        record: &Record,
    ) -> Result<(), Stop> {
        let failed = record.error.as_ref();
        match &record.call {
            Call::Die(die) => self.open_die(die)?,
            Call::Stream { stream, die, label } => {
                let made = self.die(*die)?.device.stream(label);
                let lane = self.outcome(failed, made).map(|stream| Lane {
                    timeline: stream.point().timeline().clone(),
                    value: stream.point().value(),
                    stream: Some(stream),
                    die: *die,
                    label: label.clone(),
                    deviates: false,
                });
                self.streams.insert(*stream, lane);
            }
            Call::CloseStream { stream } => match self.streams.get_mut(stream) {
                Some(lane) => {
                    if let Some(lane) = lane {
                        lane.stream = None;
                    }
                }
                None => return Err(Stop::Bad(format!("there is no stream {stream}"))),
            },
            Call::Alloc { buffer, stream, bytes } => {
                let made = self.stream(*stream)?.0.alloc(*bytes);
                self.keep(*buffer, failed, made);
            }
            Call::AllocHost { buffer, die, bytes } => {
                let made = self.die(*die)?.device.alloc_host(*bytes);
                self.keep(*buffer, failed, made);
            }
            Call::Free { buffer } => {
                if self.buffers.remove(buffer).is_none() {
                    return Err(Stop::Bad(format!("there is no buffer {buffer}")));
                }
            }
            Call::Define { command, what } => {
                self.commands.insert(*command, Rc::new(what.clone()));
            }
            Call::Join { communicator, die, id, rank, size } => {
                if *rank >= *size || *size > MOST_RANKS {
                    return Err(Stop::Refused(format!("rank {rank} of {size}")));
                }
                let made = self.join(*die, *id, *rank, *size)?;
                let rank =
                    self.outcome(failed, made).map(|communicator| Rank { communicator, die: *die });
                self.communicators.insert(*communicator, rank);
            }
            Call::Leave { communicator } => {
                if self.communicators.remove(communicator).is_none() {
                    return Err(Stop::Bad(format!("there is no communicator {communicator}")));
                }
            }
            Call::Abort { communicator, reason } => {
                self.rank(*communicator)?.communicator.abort(reason);
            }
            Call::End(end) => {
                self.report.recording_complete = true;
                self.report.run_finished = end.finished;
            }
            Call::Failure { .. } => {
                // Without an error that flows there is nothing to see again.
                if let Some(failed) = failed {
                    self.failures.recorded(self.now, failed);
                }
            }
            call => return self.issue(reader, call, failed),
        }
        Ok(())
    }
}

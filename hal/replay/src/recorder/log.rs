//! The file under way, and the numbers given out so far.

use crate::file::Writer;
use crate::record::{Call, Definition, End, Failed, Record};
use hal::Error;
use std::collections::HashMap;
use std::fs::File;
use std::io::{self, BufWriter};

/// How many commands are remembered. A program that never repeats one would otherwise fill memory;
/// forgotten ones are written once more.
const REMEMBERED: usize = 1 << 16;

/// See the module.
#[derive(Debug)]
pub(super) struct Log {
    /// Absent once the recording has ended or failed.
    to: Option<Writer<BufWriter<File>>>,
    failed: Option<io::Error>,
    end: End,
    numbers: Numbers,
    /// Commands by their JSON.
    commands: HashMap<Vec<u8>, u64>,
}

/// What is numbered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Numbered {
    Stream,
    Buffer,
    Communicator,
    Command,
    Probe,
}

/// The next number of each.
#[derive(Debug, Default)]
struct Numbers([u64; 5]);

impl Log {
    pub(super) fn new(to: Writer<BufWriter<File>>) -> Self {
        Log {
            to: Some(to),
            failed: None,
            end: End::default(),
            numbers: Numbers::default(),
            commands: HashMap::new(),
        }
    }

    /// Whether anything is still written.
    pub(super) fn is_open(&self) -> bool {
        self.to.is_some()
    }

    pub(super) fn number(&mut self, what: Numbered) -> u64 {
        let next = &mut self.numbers.0[what as usize];
        *next += 1;
        *next - 1
    }

    pub(super) fn record(&mut self, call: Call, error: Option<&Error>) {
        self.end.commands += u64::from(call.command_on().is_some());
        let record = Record { call, error: error.map(Failed::from) };
        self.write(|to| to.record(&record));
    }

    /// Bytes as a payload; the number means nothing if writing failed, and nothing follows then.
    pub(super) fn payload(&mut self, bytes: &[u8]) -> u64 {
        self.write(|to| to.payload(bytes)).unwrap_or_default()
    }

    /// The number of a command, which is written down if it is new.
    pub(super) fn define(&mut self, what: Definition) -> u64 {
        let Some(key) = self.write(|_| Ok(serde_json::to_vec(&what)?)) else { return 0 };
        if let Some(&number) = self.commands.get(&key) {
            return number;
        }
        let number = self.number(Numbered::Command);
        if self.commands.len() == REMEMBERED {
            self.commands.clear();
        }
        self.commands.insert(key, number);
        self.record(Call::Define { command: number, what }, None);
        number
    }

    /// Counts an output that is not probed.
    pub(super) fn skip_probe(&mut self) {
        self.end.unprobed += 1;
    }

    /// Puts what was recorded into the file: called before the host may wait for long, so that a
    /// process that is killed there leaves what led to it.
    pub(super) fn flush(&mut self) {
        self.write(|to| to.flush());
    }

    /// Writes the end record and closes.
    pub(super) fn end(&mut self, finished: bool) -> io::Result<(End, u64)> {
        self.end.finished = finished;
        let end = self.end;
        self.record(Call::End(end), None);
        self.flush();
        match (self.failed.take(), self.to.take()) {
            (Some(error), _) => Err(error),
            (None, Some(to)) => {
                let bytes = to.written();
                to.into_inner()?;
                Ok((end, bytes))
            }
            (None, None) => Err(io::Error::other("the recording has ended before")),
        }
    }

    fn write<T>(
        &mut self,
        f: impl FnOnce(&mut Writer<BufWriter<File>>) -> io::Result<T>,
    ) -> Option<T> {
        match f(self.to.as_mut()?) {
            Ok(value) => Some(value),
            Err(error) => {
                // What follows would have a hole before it.
                self.failed = Some(error);
                self.to = None;
                None
            }
        }
    }
}

//! Spans as they come, kept on disk: per stream, in the order of its commands.

mod names;
mod record;

use hal::StreamId;
use hal::trace::{Span, TraceSink};
use names::Names;
use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::ops::Range;
use std::path::Path;
use std::sync::{Mutex, PoisonError};

/// Bytes of a stream that are held in memory before they go to disk.
const CHUNK: usize = 16 << 10;

/// Receives spans and keeps them in a file without a name, which goes away with this value.
///
/// In memory are up to 16 KiB a stream, and each distinct label once.
#[derive(Debug)]
pub struct SpanLog {
    /// `None` once it was closed.
    state: Mutex<Option<State>>,
}

#[derive(Debug)]
struct State {
    file: File,
    /// Bytes in the file.
    length: u64,
    lanes: BTreeMap<StreamId, Lane>,
    names: Names,
    /// How many times [`SpanLog::next_phase`] was called.
    marks: usize,
    /// The first thing that went wrong; told at the end.
    failure: Option<io::Error>,
}

/// One stream's spans.
#[derive(Debug, Default)]
struct Lane {
    buffer: Vec<u8>,
    /// Where its bytes are in the file, and how many, in order.
    chunks: Vec<(u64, usize)>,
    count: u64,
    /// How many spans there were when each phase ended.
    marks: Vec<u64>,
    /// First and last sequence number of each stretch without a gap.
    stretches: Vec<(u64, u64)>,
}

impl SpanLog {
    /// An empty log, whose file is on the same file system as `folder`.
    ///
    /// # Errors
    ///
    /// If no file can be made there.
    pub fn new(folder: &Path) -> io::Result<SpanLog> {
        let state = State {
            file: tempfile::tempfile_in(folder)?,
            length: 0,
            lanes: BTreeMap::new(),
            names: Names::default(),
            marks: 0,
            failure: None,
        };
        Ok(SpanLog { state: Mutex::new(Some(state)) })
    }

    /// Ends a phase, and begins the next: what is recorded from now on belongs to it. The first
    /// begins with the log.
    pub fn next_phase(&self) {
        if let Some(state) = &mut *self.state.lock().unwrap_or_else(PoisonError::into_inner) {
            state.marks += 1;
            let marks = state.marks;
            state.lanes.values_mut().for_each(|lane| lane.marks.resize(marks, lane.count));
        }
    }

    /// Everything that was recorded. What comes later is ignored.
    ///
    /// # Errors
    ///
    /// What went wrong first while spans were written, or that the log was closed before.
    pub fn close(&self) -> io::Result<Recorded> {
        let state = self.state.lock().unwrap_or_else(PoisonError::into_inner).take();
        let mut state = state.ok_or_else(|| io::Error::other("the log was closed before"))?;
        if let Some(error) = state.failure.take() {
            return Err(error);
        }
        let State { mut file, mut length, mut lanes, names, marks, .. } = state;
        for lane in lanes.values_mut() {
            lane.flush(&mut file, &mut length)?;
            lane.buffer = Vec::new();
        }
        Ok(Recorded { file, lanes, names, phases: marks + 1 })
    }
}

impl TraceSink for SpanLog {
    fn record(&self, span: &Span) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(state) = &mut *state else { return };
        if state.failure.is_some() {
            return;
        }
        let lane = state.lanes.entry(span.stream).or_insert_with(|| Lane {
            // It had nothing in the phases before.
            marks: vec![0; state.marks],
            ..Lane::default()
        });
        record::encode(span, &mut state.names, &mut lane.buffer);
        lane.count += 1;
        match lane.stretches.last_mut() {
            Some((_, last)) if *last + 1 == span.sequence => *last = span.sequence,
            _ => lane.stretches.push((span.sequence, span.sequence)),
        }
        if lane.buffer.len() >= CHUNK {
            state.failure = lane.flush(&mut state.file, &mut state.length).err();
        }
    }
}

impl Lane {
    /// Moves what is in memory to the end of the file.
    fn flush(&mut self, file: &mut File, length: &mut u64) -> io::Result<()> {
        if !self.buffer.is_empty() {
            file.write_all(&self.buffer)?;
            self.chunks.push((*length, self.buffer.len()));
            *length += self.buffer.len() as u64;
            self.buffer.clear();
        }
        Ok(())
    }
}

/// A closed log.
#[derive(Debug)]
pub struct Recorded {
    file: File,
    lanes: BTreeMap<StreamId, Lane>,
    names: Names,
    phases: usize,
}

impl Recorded {
    /// The streams that had commands, by die and number.
    pub fn streams(&self) -> impl Iterator<Item = StreamId> {
        self.lanes.keys().copied()
    }

    /// How many spans there are.
    pub fn len(&self) -> u64 {
        self.lanes.values().map(|lane| lane.count).sum()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// How many phases there are: one more than were ended.
    pub fn phases(&self) -> usize {
        self.phases
    }

    /// Whether the span of a command is here.
    pub fn contains(&self, stream: StreamId, sequence: u64) -> bool {
        self.lanes.get(&stream).is_some_and(|lane| {
            lane.stretches.iter().any(|(first, last)| (*first..=*last).contains(&sequence))
        })
    }

    /// A stream's spans, in the order in which they came.
    pub fn spans(&self, stream: StreamId) -> Spans<'_> {
        let count = self.lanes.get(&stream).map_or(0, |lane| lane.count);
        self.range(stream, 0..count)
    }

    /// A stream's spans of one phase, numbered from 0.
    pub fn spans_of_phase(&self, stream: StreamId, phase: usize) -> Spans<'_> {
        let Some(lane) = self.lanes.get(&stream) else { return self.range(stream, 0..0) };
        let end = |phase: usize| lane.marks.get(phase).copied().unwrap_or(lane.count);
        let start = phase.checked_sub(1).map_or(0, end);
        self.range(stream, start..end(phase))
    }

    fn range(&self, stream: StreamId, wanted: Range<u64>) -> Spans<'_> {
        let chunks = self.lanes.get(&stream).map_or(&[][..], |lane| &lane.chunks);
        let Range { start: skip, end } = wanted;
        let (left, bytes, at) = (end, Vec::new(), 0);
        Spans { recorded: self, stream, chunks: chunks.iter(), bytes, at, left, skip }
    }
}

/// The spans of a stream, read from disk.
#[derive(Debug)]
pub struct Spans<'a> {
    recorded: &'a Recorded,
    stream: StreamId,
    chunks: std::slice::Iter<'a, (u64, usize)>,
    bytes: Vec<u8>,
    at: usize,
    /// Spans to come, those to be skipped included.
    left: u64,
    skip: u64,
}

impl Spans<'_> {
    fn read(&mut self) -> io::Result<Span> {
        if self.at == self.bytes.len() {
            let &(offset, length) =
                self.chunks.next().ok_or_else(|| io::Error::other("a span is missing"))?;
            self.bytes.resize(length, 0);
            let mut file = &self.recorded.file;
            file.seek(SeekFrom::Start(offset))?;
            file.read_exact(&mut self.bytes)?;
            self.at = 0;
        }
        let mut rest = &self.bytes[self.at..];
        let span = record::decode(self.stream, &self.recorded.names, &mut rest)
            .ok_or_else(|| io::Error::other("a span cannot be read back"))?;
        self.at = self.bytes.len() - rest.len();
        Ok(span)
    }
}

impl Iterator for Spans<'_> {
    type Item = io::Result<Span>;

    fn next(&mut self) -> Option<io::Result<Span>> {
        while self.left > 0 {
            self.left -= 1;
            match self.read() {
                Ok(_) if self.skip > 0 => self.skip -= 1,
                Ok(span) => return Some(Ok(span)),
                Err(error) => {
                    self.left = 0;
                    return Some(Err(error));
                }
            }
        }
        None
    }
}

#[cfg(test)]
mod tests;

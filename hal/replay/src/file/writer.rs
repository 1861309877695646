//! Writing a recording as it comes, without holding it.

use super::{Header, MAGIC, VERSION, kind};
use crate::hash::xxh64;
use crate::record::Record;
use serde::Serialize;
use std::collections::HashMap;
use std::io::{self, Write};

/// Payloads from this size on are written once: smaller ones cost less than remembering them.
const SHARED_FROM: usize = 1024;

/// Writes a recording.
#[derive(Debug)]
pub struct Writer<W> {
    to: W,
    written: u64,
    payloads: u64,
    /// Payloads by content. 128 bits and the length: two that differ and agree in these are not to
    /// be expected in the life of the hardware.
    known: HashMap<(u64, u64, usize), u64>,
}

impl<W: Write> Writer<W> {
    /// Begins a recording.
    ///
    /// # Errors
    ///
    /// Those of the sink, here and below.
    pub fn new(to: W, header: &Header) -> io::Result<Self> {
        let mut writer = Writer { to, written: 0, payloads: 0, known: HashMap::new() };
        writer.put(&MAGIC)?;
        writer.put(&VERSION.to_le_bytes())?;
        writer.json(kind::HEADER, header)?;
        Ok(writer)
    }

    /// Bytes written so far.
    pub fn written(&self) -> u64 {
        self.written
    }

    /// Writes bytes, or finds them written, and gives their number.
    ///
    /// # Errors
    ///
    /// Those of the sink.
    pub fn payload(&mut self, bytes: &[u8]) -> io::Result<u64> {
        let shared = bytes.len() >= SHARED_FROM;
        let key = || (xxh64(bytes, 0), xxh64(bytes, 1), bytes.len());
        let key = shared.then(key);
        if let Some(&number) = key.and_then(|key| self.known.get(&key)) {
            return Ok(number);
        }
        self.frame(kind::PAYLOAD, bytes)?;
        let number = self.payloads;
        self.payloads += 1;
        if let Some(key) = key {
            self.known.insert(key, number);
        }
        Ok(number)
    }

    /// Writes a record.
    ///
    /// # Errors
    ///
    /// Those of the sink.
    pub fn record(&mut self, record: &Record) -> io::Result<()> {
        self.json(kind::RECORD, record)
    }

    /// Pushes everything to the sink's other side.
    ///
    /// # Errors
    ///
    /// Those of the sink.
    pub fn flush(&mut self) -> io::Result<()> {
        self.to.flush()
    }

    /// The sink, flushed.
    ///
    /// # Errors
    ///
    /// Those of the sink.
    pub fn into_inner(mut self) -> io::Result<W> {
        self.flush()?;
        Ok(self.to)
    }

    fn json(&mut self, kind: u8, value: &impl Serialize) -> io::Result<()> {
        let body = serde_json::to_vec(value)?;
        self.frame(kind, &body)
    }

    fn frame(&mut self, kind: u8, body: &[u8]) -> io::Result<()> {
        let mut head = vec![kind];
        let mut length = body.len() as u64;
        while length >= 0x80 {
            head.push(length as u8 | 0x80);
            length >>= 7;
        }
        head.push(length as u8);
        self.put(&head)?;
        self.put(body)?;
        self.put(&(xxh64(body, u64::from(kind)) as u32).to_le_bytes())
    }

    fn put(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.written += bytes.len() as u64;
        self.to.write_all(bytes)
    }
}

//! Reading a recording front to back, with payloads at hand.

use super::{FormatError, Header, MAGIC, Problem, VERSION, kind};
use crate::hash::xxh64;
use crate::record::{Call, Record};
use std::io::{self, BufReader, Read, Seek, SeekFrom};

/// Reads a recording.
#[derive(Debug)]
pub struct Reader<R> {
    from: BufReader<R>,
    at: u64,
    header: Header,
    payloads: Vec<Place>,
    /// The payload read last: mostly the next record asks for it.
    latest: Option<(u64, Vec<u8>)>,
    ended: bool,
}

/// Where a payload lies.
#[derive(Clone, Copy, Debug)]
struct Place {
    frame: u64,
    body: u64,
    len: u64,
}

/// A record, and the byte at which its frame begins.
#[derive(Clone, Debug, PartialEq)]
pub struct Stored {
    /// First byte of its frame.
    pub offset: u64,
    /// The record.
    pub record: Record,
}

/// A frame's kind, the first byte of its body, and the body.
type Frame = (u8, u64, Vec<u8>);

impl<R: Read + Seek> Reader<R> {
    /// Opens a recording.
    ///
    /// # Errors
    ///
    /// What is wrong with its beginning: another kind of file, another version, damage.
    pub fn new(from: R) -> Result<Self, FormatError> {
        let mut reader = Reader {
            from: BufReader::new(from),
            at: 0,
            header: Header::default(),
            payloads: Vec::new(),
            latest: None,
            ended: false,
        };
        let magic = reader.bytes(0, MAGIC.len() as u64).map_err(|error| match error.problem {
            Problem::Truncated => FormatError { offset: 0, problem: Problem::NotARecording },
            _ => error,
        })?;
        if magic != MAGIC {
            return Err(FormatError { offset: 0, problem: Problem::NotARecording });
        }
        let offset = reader.at;
        let version = reader.array::<4>(offset)?;
        let found = u32::from_le_bytes(version);
        if found != VERSION {
            return Err(FormatError { offset, problem: Problem::Version { found } });
        }
        let offset = reader.at;
        match reader.frame()? {
            Some((kind::HEADER, _, body)) => reader.header = json(offset, &body)?,
            _ => return Err(FormatError::invalid(offset, "expected the header")),
        }
        Ok(reader)
    }

    /// What the first frame says.
    pub fn header(&self) -> &Header {
        &self.header
    }

    /// The byte that is read next.
    pub fn offset(&self) -> u64 {
        self.at
    }

    /// The next record; `None` after the end record.
    ///
    /// # Errors
    ///
    /// [`Problem::Unfinished`] where the file ends without an end record, and what else is wrong.
    pub fn next_record(&mut self) -> Result<Option<Stored>, FormatError> {
        loop {
            let offset = self.at;
            match self.frame()? {
                None if self.ended => return Ok(None),
                None => return Err(FormatError { offset, problem: Problem::Unfinished }),
                Some(_) if self.ended => {
                    return Err(FormatError::invalid(offset, "something follows the end record"));
                }
                Some((kind::RECORD, _, body)) => {
                    let record: Record = json(offset, &body)?;
                    self.ended = matches!(record.call, Call::End(_));
                    return Ok(Some(Stored { offset, record }));
                }
                Some((kind::PAYLOAD, body, bytes)) => {
                    let place = Place { frame: offset, body, len: bytes.len() as u64 };
                    self.latest = Some((self.payloads.len() as u64, bytes));
                    self.payloads.push(place);
                }
                Some((other, ..)) => {
                    let problem = format!("a frame of unknown kind {other:#04x}");
                    return Err(FormatError::invalid(offset, problem));
                }
            }
        }
    }

    /// Length of a payload that stood before; `None` if none of this number did.
    pub fn payload_len(&self, number: u64) -> Option<u64> {
        let place = usize::try_from(number).ok().and_then(|n| self.payloads.get(n));
        place.map(|place| place.len)
    }

    /// Bytes of a payload that stood before; `None` if none of this number did.
    ///
    /// # Errors
    ///
    /// If the file cannot be read again, or has changed.
    pub fn payload(&mut self, number: u64) -> Result<Option<&[u8]>, FormatError> {
        if self.latest.as_ref().is_none_or(|(latest, _)| *latest != number) {
            let place = usize::try_from(number).ok().and_then(|n| self.payloads.get(n));
            let Some(&Place { frame, body, len }) = place else { return Ok(None) };
            let back = self.at;
            self.seek(frame, body)?;
            let bytes = self.bytes(frame, len)?;
            self.check(frame, kind::PAYLOAD, &bytes)?;
            self.seek(frame, back)?;
            self.latest = Some((number, bytes));
        }
        Ok(self.latest.as_ref().map(|(_, bytes)| &bytes[..]))
    }

    fn seek(&mut self, offset: u64, to: u64) -> Result<(), FormatError> {
        self.from.seek(SeekFrom::Start(to)).map_err(|e| io_error(offset, e))?;
        self.at = to;
        Ok(())
    }

    /// The next frame, its checksum verified; `None` at the end of the file.
    fn frame(&mut self) -> Result<Option<Frame>, FormatError> {
        let offset = self.at;
        let mut kind = [0];
        loop {
            match self.from.read(&mut kind) {
                Ok(0) => return Ok(None),
                Ok(_) => break,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(io_error(offset, error)),
            }
        }
        self.at += 1;
        let mut length = 0u64;
        for shift in (0..).step_by(7) {
            let [byte] = self.array::<1>(offset)?;
            if shift > 56 {
                return Err(FormatError::invalid(offset, "a frame's length has too many digits"));
            }
            length |= u64::from(byte & 0x7f) << shift;
            if byte & 0x80 == 0 {
                break;
            }
        }
        let body = self.at;
        let bytes = self.bytes(offset, length)?;
        self.check(offset, kind[0], &bytes)?;
        Ok(Some((kind[0], body, bytes)))
    }

    /// Reads the checksum that follows a body.
    fn check(&mut self, offset: u64, kind: u8, body: &[u8]) -> Result<(), FormatError> {
        let expected = u32::from_le_bytes(self.array::<4>(offset)?);
        let found = xxh64(body, u64::from(kind)) as u32;
        if expected == found {
            return Ok(());
        }
        Err(FormatError { offset, problem: Problem::Damaged { expected, found } })
    }

    /// The next bytes. Takes memory as they come, so that a false length costs nothing.
    fn bytes(&mut self, offset: u64, len: u64) -> Result<Vec<u8>, FormatError> {
        let mut bytes = Vec::new();
        (&mut self.from).take(len).read_to_end(&mut bytes).map_err(|e| io_error(offset, e))?;
        self.at += bytes.len() as u64;
        if bytes.len() as u64 == len {
            return Ok(bytes);
        }
        Err(FormatError { offset, problem: Problem::Truncated })
    }

    fn array<const N: usize>(&mut self, offset: u64) -> Result<[u8; N], FormatError> {
        let mut bytes = [0; N];
        self.from.read_exact(&mut bytes).map_err(|error| match error.kind() {
            io::ErrorKind::UnexpectedEof => FormatError { offset, problem: Problem::Truncated },
            _ => io_error(offset, error),
        })?;
        self.at += N as u64;
        Ok(bytes)
    }
}

fn io_error(offset: u64, error: io::Error) -> FormatError {
    FormatError { offset, problem: Problem::Io(error) }
}

fn json<T: serde::de::DeserializeOwned>(offset: u64, body: &[u8]) -> Result<T, FormatError> {
    serde_json::from_slice(body)
        .map_err(|e| FormatError::invalid(offset, format!("this version cannot read it: {e}")))
}

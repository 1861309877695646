//! Recording: a device around a device that writes down every call.
//!
//! A call and its record are one step under one lock, so the recorded order is the order of
//! submission, on each stream and between streams that wait for each other. What blocks the host
//! is recorded when it returns: by then everything that it rested on has been submitted, so one
//! thread can replay what several recorded.

mod communicator;
mod device;
mod log;
mod memory;
mod probe;
mod stream;

use crate::file::{Header, Writer};
use crate::record::{Call, Die};
use hal::{Device, Error, Region, Result, Tensor};
use log::Log;
use memory::RecordedBuffer;
use parking_lot::Mutex;
use probe::Probes;
pub(crate) use probe::{LARGEST_PROBE, hash_of};
use std::fs::File;
use std::io::{self, BufWriter};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// Records the dies of one system to one file.
///
/// The file is written under its name with `.partial` behind, and renamed when it is complete:
/// with [`Recorder::finish`], or when the recorder is dropped. The wrapped devices then go on
/// without being recorded.
#[derive(Debug)]
pub struct Recorder {
    shared: Arc<Shared>,
    path: PathBuf,
    partial: PathBuf,
}

/// What a recording holds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Summary {
    /// Where it is.
    pub path: PathBuf,
    /// Commands that were put on streams.
    pub commands: u64,
    /// Bytes of the file.
    pub bytes: u64,
    /// Outputs that were not hashed although all were asked for.
    pub unprobed: u64,
}

/// What the wrapped dies share.
#[derive(Debug)]
struct Shared {
    log: Mutex<Log>,
    /// There where every op's outputs are hashed.
    probes: Option<Probes>,
    finished: AtomicBool,
}

impl Recorder {
    /// Begins a recording at `path`. With [`Header::all_outputs`] every output of every op is
    /// copied to pinned memory and hashed, and fresh memory is filled with zeros so that what ops
    /// leave untouched is the same each time: this finds the first op that differs, and costs
    /// commands and time of the device's own.
    ///
    /// # Errors
    ///
    /// If the file cannot be made.
    pub fn create(path: &Path, header: &Header) -> io::Result<Recorder> {
        let mut partial = path.as_os_str().to_owned();
        partial.push(".partial");
        let partial = PathBuf::from(partial);
        let file = BufWriter::with_capacity(1 << 16, File::create(&partial)?);
        let shared = Shared {
            log: Mutex::new(Log::new(Writer::new(file, header)?)),
            probes: header.all_outputs.then(Probes::default),
            finished: AtomicBool::new(false),
        };
        Ok(Recorder { shared: Arc::new(shared), path: path.to_path_buf(), partial })
    }

    /// Wraps a die: what is done through the result is recorded. Command lists are issued and
    /// recorded command by command, so their times are those of eager issue.
    pub fn wrap(&self, inner: Arc<dyn Device>) -> Arc<dyn Device> {
        let properties = inner.properties();
        let die = Die {
            die: properties.id.0,
            backend: properties.backend.to_string(),
            name: properties.name.clone(),
            memory_bytes: properties.memory_bytes,
            cores: properties.cores,
            functional: properties.functional,
        };
        self.shared.log.lock().record(Call::Die(die), None);
        Arc::new(device::RecordedDevice::new(inner, self.shared.clone()))
    }

    /// Completes the file and gives it its name. `finished` says whether the run came to its end.
    /// A second call does nothing and gives nothing.
    ///
    /// # Errors
    ///
    /// The first error of writing, now or earlier: the run goes on when its recording fails.
    pub fn finish(&self, finished: bool) -> io::Result<Option<Summary>> {
        if self.shared.finished.swap(true, Ordering::AcqRel) {
            return Ok(None);
        }
        if let Some(probes) = &self.shared.probes {
            probes.collect_all(&self.shared.log);
        }
        let ended = self.shared.log.lock().end(finished)?;
        std::fs::rename(&self.partial, &self.path)?;
        let (end, bytes) = ended;
        let path = self.path.clone();
        Ok(Some(Summary { path, commands: end.commands, bytes, unprobed: end.unprobed }))
    }
}

impl Drop for Recorder {
    fn drop(&mut self) {
        // An error has nobody to go to; whoever wants it calls `finish`.
        let _ = self.finish(false);
    }
}

impl Shared {
    /// Makes a call and records it, as one step.
    fn step<T>(
        &self,
        call: impl FnOnce() -> Result<T>,
        describe: impl FnOnce(&mut Log, &Result<T>) -> Call,
    ) -> Result<T> {
        let mut log = self.log.lock();
        let result = call();
        if log.is_open() {
            let call = describe(&mut log, &result);
            log.record(call, result.as_ref().err());
        }
        result
    }

    /// The recorder's side of a buffer.
    ///
    /// # Errors
    ///
    /// [`Error::Usage`] for a buffer that was not allocated through it.
    fn buffer<'b>(self: &Arc<Self>, buffer: &'b hal::Buffer) -> Result<&'b RecordedBuffer> {
        match buffer.raw().as_any().downcast_ref::<RecordedBuffer>() {
            Some(raw) if Arc::ptr_eq(raw.shared(), self) => Ok(raw),
            _ => Err(Error::usage(buffer.device(), format!("{buffer:?} is not of this system"))),
        }
    }

    /// A tensor of the device behind.
    fn inner_tensor(self: &Arc<Self>, tensor: &Tensor) -> Result<Tensor> {
        let raw = self.buffer(tensor.buffer())?;
        Ok(Tensor::new(raw.inner().clone(), tensor.offset(), *hal::Operand::desc(tensor)))
    }

    /// A region of the device behind, and the buffer's number.
    fn inner_region(self: &Arc<Self>, region: &Region) -> Result<(Region, u64)> {
        let raw = self.buffer(&region.buffer)?;
        let Region { offset, len, .. } = *region;
        Ok((Region { buffer: raw.inner().clone(), offset, len }, raw.number()))
    }
}

//! Streams: copies, launches, timelines.

use crate::device::{Child, DEVICES, Die};
use crate::error::{Outcome, Refused, blank, bytes, fill, give, guard, text};
use crate::handles::Table;
use crate::memory::{lent, region, tensor};
use hal::{Error, Label, Point, Stream};
use std::ffi::{c_char, c_void};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;
use vacc::sys::*;
use vacc::wire;

/// A stream that a caller owns.
#[derive(Debug)]
pub(crate) struct Owned {
    pub(crate) stream: Arc<dyn Stream>,
    child: Child,
    /// Somebody is submitting.
    taken: AtomicBool,
}

pub(crate) static STREAMS: Table<Owned> = Table::new("stream", 3);

/// The right to submit, given back when dropped.
#[derive(Debug)]
pub(crate) struct Alone<'a>(&'a AtomicBool);

impl Drop for Alone<'_> {
    fn drop(&mut self) {
        self.0.store(false, Ordering::Release);
    }
}

impl Owned {
    pub(crate) fn die(&self) -> &Arc<Die> {
        &self.child.0
    }

    pub(crate) fn refused(&self, error: Error) -> Refused {
        self.die().refused(error)
    }

    /// Takes the right to submit, or says that another thread has it.
    pub(crate) fn alone(&self) -> Outcome<Alone<'_>> {
        match self.taken.swap(true, Ordering::Acquire) {
            false => Ok(Alone(&self.taken)),
            true => {
                let text = format!("another thread submits to stream {:?}", self.stream.label());
                Err(Refused::new(VACC_ERROR_CONCURRENT_USE, text))
            }
        }
    }
}

/// A timeout as the ABI counts it.
fn duration(nanos: u64) -> Duration {
    Duration::from_nanos(nanos)
}

/// A label that a caller lends.
pub(crate) fn label(at: *const c_char, length: u64) -> Outcome<Label> {
    Ok(Label::Shared(text(at, length, "label")?.into()))
}

/// See `vacc.h`.
#[expect(unsafe_code, reason = "exported")]
#[unsafe(no_mangle)]
pub(crate) extern "C" fn vacc_stream_create(
    device: vacc_device,
    label: *const c_char,
    label_length: u64,
    stream: *mut vacc_stream,
    index: *mut u32,
) -> vacc_status {
    guard(|| {
        let die = DEVICES.get(device)?;
        let label = text(label, label_length, "label")?;
        if stream.is_null() || index.is_null() {
            return Err(Refused::null(if stream.is_null() { "stream" } else { "index" }));
        }
        let created = die.device.stream(label).map_err(|e| die.refused(e))?;
        let number = created.id().index;
        let owned = Owned { stream: created, child: Child::of(die), taken: AtomicBool::new(false) };
        give(stream, "stream", STREAMS.add(Arc::new(owned))?)?;
        give(index, "index", number)
    })
}

/// See `vacc.h`.
#[expect(unsafe_code, reason = "exported")]
#[unsafe(no_mangle)]
pub(crate) extern "C" fn vacc_stream_destroy(stream: vacc_stream) -> vacc_status {
    guard(|| {
        // Whoever is inside a call holds a reference besides the table's.
        let idle = |owned: &Arc<Owned>| match Arc::strong_count(owned) {
            1 => Ok(()),
            _ => Err(Refused::new(VACC_ERROR_BUSY, "a call is inside the stream")),
        };
        STREAMS.remove(stream, idle).map(drop)
    })
}

/// See `vacc.h`.
#[expect(unsafe_code, reason = "exported")]
#[unsafe(no_mangle)]
pub(crate) extern "C" fn vacc_stream_write(
    stream: vacc_stream,
    destination: *const vacc_region,
    from: *const c_void,
) -> vacc_status {
    guard(|| {
        let owned = STREAMS.get(stream)?;
        let _alone = owned.alone()?;
        let to = inside(region(destination, "destination")?)?;
        let from = bytes(from, to.len, "bytes")?;
        owned.stream.write(&to, from).map_err(|e| owned.refused(e))
    })
}

/// A region that lies in its buffer: its length is about to be taken as that of a caller's memory.
fn inside(region: hal::Region) -> Outcome<hal::Region> {
    let hal::Region { buffer, offset, len } = &region;
    match offset.checked_add(*len).is_some_and(|end| end <= buffer.size()) {
        true => Ok(region),
        false => {
            let size = buffer.size();
            let text = format!("bytes {offset}..+{len} leave a buffer of {size} bytes");
            Err(Refused::invalid(text))
        }
    }
}

/// See `vacc.h`.
#[expect(unsafe_code, reason = "exported")]
#[unsafe(no_mangle)]
pub(crate) extern "C" fn vacc_stream_read(
    stream: vacc_stream,
    source: *const vacc_region,
    to: *mut c_void,
    timeout_ns: u64,
) -> vacc_status {
    guard(|| {
        let owned = STREAMS.get(stream)?;
        let _alone = owned.alone()?;
        let from = inside(region(source, "source")?)?;
        let to = lent(to, from.len)?;
        owned.stream.read(&from, to, duration(timeout_ns)).map_err(|e| owned.refused(e))
    })
}

/// See `vacc.h`.
#[expect(unsafe_code, reason = "exported")]
#[unsafe(no_mangle)]
pub(crate) extern "C" fn vacc_stream_copy(
    stream: vacc_stream,
    destination: *const vacc_region,
    source: *const vacc_region,
) -> vacc_status {
    guard(|| {
        let owned = STREAMS.get(stream)?;
        let _alone = owned.alone()?;
        let (to, from) = (region(destination, "destination")?, region(source, "source")?);
        owned.stream.copy(&to, &from).map_err(|e| owned.refused(e))
    })
}

/// See `vacc.h`.
#[expect(unsafe_code, reason = "exported")]
#[unsafe(no_mangle)]
pub(crate) extern "C" fn vacc_stream_fill(
    stream: vacc_stream,
    destination: *const vacc_region,
    byte: u8,
) -> vacc_status {
    guard(|| {
        let owned = STREAMS.get(stream)?;
        let _alone = owned.alone()?;
        let to = region(destination, "destination")?;
        owned.stream.fill(&to, byte).map_err(|e| owned.refused(e))
    })
}

/// See `vacc.h`.
#[expect(unsafe_code, reason = "exported")]
#[unsafe(no_mangle)]
pub(crate) extern "C" fn vacc_stream_launch(
    stream: vacc_stream,
    op: u32,
    descriptor: *const c_void,
    label_text: *const c_char,
    label_length: u64,
) -> vacc_status {
    guard(|| {
        let owned = STREAMS.get(stream)?;
        let _alone = owned.alone()?;
        // SAFETY: the header obliges callers to pass the descriptor of this code.
        let op = unsafe { wire::decode(op, descriptor) }?;
        let command = op.try_map(tensor)?.label(label(label_text, label_length)?);
        owned.stream.submit(&command).map_err(|e| owned.refused(e))
    })
}

/// See `vacc.h`.
#[expect(unsafe_code, reason = "exported")]
#[unsafe(no_mangle)]
pub(crate) extern "C" fn vacc_stream_get_point(
    stream: vacc_stream,
    value: *mut u64,
) -> vacc_status {
    guard(|| give(value, "value", STREAMS.get(stream)?.stream.point().value()))
}

/// See `vacc.h`.
#[expect(unsafe_code, reason = "exported")]
#[unsafe(no_mangle)]
pub(crate) extern "C" fn vacc_stream_get_reached(
    stream: vacc_stream,
    value: *mut u64,
) -> vacc_status {
    guard(|| give(value, "value", STREAMS.get(stream)?.stream.point().timeline().reached()))
}

/// A point on a stream's timeline that was submitted.
fn submitted(owned: &Owned, value: u64) -> Outcome<Point> {
    let last = owned.stream.point();
    if value > last.value() {
        let label = owned.stream.label();
        let text = format!("stream {label:?} was given {} commands, not {value}", last.value());
        return Err(Refused::invalid(text));
    }
    Ok(Point::new(last.timeline().clone(), value))
}

/// See `vacc.h`.
#[expect(unsafe_code, reason = "exported")]
#[unsafe(no_mangle)]
pub(crate) extern "C" fn vacc_stream_wait(
    stream: vacc_stream,
    other: vacc_stream,
    value: u64,
) -> vacc_status {
    guard(|| {
        let (owned, other) = (STREAMS.get(stream)?, STREAMS.get(other)?);
        let _alone = owned.alone()?;
        let point = submitted(&other, value)?;
        owned.stream.wait(&point).map_err(|e| owned.refused(e))
    })
}

/// See `vacc.h`.
#[expect(unsafe_code, reason = "exported")]
#[unsafe(no_mangle)]
pub(crate) extern "C" fn vacc_stream_synchronize(
    stream: vacc_stream,
    value: u64,
    timeout_ns: u64,
) -> vacc_status {
    guard(|| {
        let owned = STREAMS.get(stream)?;
        let point = submitted(&owned, value)?;
        point.synchronize(duration(timeout_ns)).map_err(|e| owned.refused(e))
    })
}

/// See `vacc.h`.
#[expect(unsafe_code, reason = "exported")]
#[unsafe(no_mangle)]
pub(crate) extern "C" fn vacc_stream_get_completion(
    stream: vacc_stream,
    value: u64,
    timestamp: *mut vacc_timestamp,
) -> vacc_status {
    guard(|| {
        let owned = STREAMS.get(stream)?;
        if owned.die().device.properties().clock.is_none() {
            return Err(Refused::new(VACC_ERROR_UNSUPPORTED, "timing is off"));
        }
        let point = Point::new(owned.stream.point().timeline().clone(), value);
        let Some(at) = point.completed_at() else {
            let text = format!("command {value} has not completed, or its record has expired");
            return Err(Refused::new(VACC_ERROR_NOT_READY, text));
        };
        let size = struct_size::<vacc_timestamp>();
        let told = vacc_timestamp { size, clock: wire::clock(at.clock), picoseconds: at.picos };
        fill(timestamp, &told)
    })
}

/// See `vacc.h`.
#[expect(unsafe_code, reason = "exported")]
#[unsafe(no_mangle)]
pub(crate) extern "C" fn vacc_stream_get_error(
    stream: vacc_stream,
    error: *mut vacc_error,
) -> vacc_status {
    guard(|| {
        let owned = STREAMS.get(stream)?;
        let failure = owned.stream.point().timeline().failure();
        let told = failure.map_or_else(blank, |e| owned.refused(e).into_error());
        fill(error, &told)
    })
}

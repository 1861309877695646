//! Buffers.

use crate::device::{Child, DEVICES};
use crate::error::{Outcome, Refused, bytes, give, guard};
use crate::handles::Table;
use crate::stream::STREAMS;
use hal::{Buffer, Region, Tensor};
use std::ffi::c_void;
use std::sync::Arc;
use vacc::sys::*;
use vacc::wire::WireTensor;

/// Memory that a caller owns.
#[derive(Debug)]
pub(crate) struct Owned {
    pub(crate) buffer: Buffer,
    child: Child,
}

pub(crate) static BUFFERS: Table<Owned> = Table::new("buffer", 4);

/// See `vacc.h`.
#[expect(unsafe_code, reason = "exported")]
#[unsafe(no_mangle)]
pub(crate) extern "C" fn vacc_buffer_alloc(
    stream: vacc_stream,
    bytes: u64,
    buffer: *mut vacc_buffer,
) -> vacc_status {
    guard(|| {
        let stream = STREAMS.get(stream)?;
        let _alone = stream.alone()?;
        if buffer.is_null() {
            return Err(Refused::null("buffer"));
        }
        let allocated = stream.stream.alloc(bytes).map_err(|e| stream.refused(e))?;
        let child = Child::of(stream.die().clone());
        give(buffer, "buffer", BUFFERS.add(Arc::new(Owned { buffer: allocated, child }))?)
    })
}

/// See `vacc.h`.
#[expect(unsafe_code, reason = "exported")]
#[unsafe(no_mangle)]
pub(crate) extern "C" fn vacc_buffer_alloc_host(
    device: vacc_device,
    bytes: u64,
    buffer: *mut vacc_buffer,
) -> vacc_status {
    guard(|| {
        let die = DEVICES.get(device)?;
        if buffer.is_null() {
            return Err(Refused::null("buffer"));
        }
        let allocated = die.device.alloc_host(bytes).map_err(|e| die.refused(e))?;
        let child = Child::of(die);
        give(buffer, "buffer", BUFFERS.add(Arc::new(Owned { buffer: allocated, child }))?)
    })
}

/// See `vacc.h`.
#[expect(unsafe_code, reason = "exported")]
#[unsafe(no_mangle)]
pub(crate) extern "C" fn vacc_buffer_free(buffer: vacc_buffer) -> vacc_status {
    guard(|| BUFFERS.remove(buffer, |_| Ok(())).map(drop))
}

/// See `vacc.h`.
#[expect(unsafe_code, reason = "exported")]
#[unsafe(no_mangle)]
pub(crate) extern "C" fn vacc_buffer_read_host(
    buffer: vacc_buffer,
    offset: u64,
    bytes: *mut c_void,
    length: u64,
) -> vacc_status {
    guard(|| {
        let owned = BUFFERS.get(buffer)?;
        let bytes = lent(bytes, length)?;
        let read = owned.buffer.raw().read_host(offset, bytes);
        read.map_err(|e| owned.child.0.refused(e))
    })
}

/// See `vacc.h`.
#[expect(unsafe_code, reason = "exported")]
#[unsafe(no_mangle)]
pub(crate) extern "C" fn vacc_buffer_write_host(
    buffer: vacc_buffer,
    offset: u64,
    from: *const c_void,
    length: u64,
) -> vacc_status {
    guard(|| {
        let owned = BUFFERS.get(buffer)?;
        let wrote = owned.buffer.raw().write_host(offset, bytes(from, length, "bytes")?);
        wrote.map_err(|e| owned.child.0.refused(e))
    })
}

/// Room that the caller lends for the call.
#[expect(unsafe_code, reason = "writes what the caller lends")]
pub(crate) fn lent<'a>(at: *mut c_void, length: u64) -> Outcome<&'a mut [u8]> {
    match usize::try_from(length).ok().filter(|&n| n <= isize::MAX as usize) {
        None => Err(Refused::invalid(format!("room for {length} bytes"))),
        Some(0) => Ok(&mut []),
        Some(_) if at.is_null() => Err(Refused::null("bytes")),
        // SAFETY: not null, and the header obliges callers to lend this much for the call.
        Some(n) => Ok(unsafe { std::slice::from_raw_parts_mut(at.cast(), n) }),
    }
}

/// The memory that a caller's region names.
#[expect(unsafe_code, reason = "reads a caller's struct")]
pub(crate) fn region(at: *const vacc_region, what: &str) -> Outcome<Region> {
    if at.is_null() {
        return Err(Refused::null(what));
    }
    // SAFETY: not null, and the header obliges callers to pass one.
    let wire = unsafe { at.read_unaligned() };
    let buffer = BUFFERS.get(wire.buffer)?.buffer.clone();
    Ok(Region { buffer, offset: wire.offset, len: wire.length })
}

/// The memory that an operand names.
pub(crate) fn tensor(wire: &WireTensor) -> Outcome<Tensor> {
    Ok(Tensor::new(BUFFERS.get(wire.buffer)?.buffer.clone(), wire.offset, wire.desc))
}

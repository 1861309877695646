//! Memory behind the library.

use crate::device::DeviceShared;
use crate::stream::StreamShared;
use crate::sys::*;
use hal::{Buffer, Error, Location, RawBuffer, Region, Result};
use std::any::Any;
use std::ptr::null_mut;
use std::sync::Arc;

/// A buffer's handle; dropping it frees in stream order.
#[derive(Debug)]
pub(crate) struct VaccBuffer {
    device: Arc<DeviceShared>,
    handle: vacc_buffer,
}

// SAFETY: a handle is a name that only the library reads, and the header lets any thread use it.
#[expect(unsafe_code, reason = "handles are raw pointers")]
unsafe impl Send for VaccBuffer {}
// SAFETY: as above; nothing in here changes.
#[expect(unsafe_code, reason = "handles are raw pointers")]
unsafe impl Sync for VaccBuffer {}

impl VaccBuffer {
    /// Device memory, for the commands of a stream.
    #[expect(unsafe_code, reason = "calls the library")]
    pub(crate) fn alloc(stream: &StreamShared, bytes: u64) -> Result<Buffer> {
        let device = stream.device.clone();
        let mut handle = null_mut();
        // SAFETY: the stream is alive and not submitted to by others, the result is a local.
        let status = stream.submitting(|api, stream| unsafe {
            api.vacc_buffer_alloc(stream, bytes, &raw mut handle)
        });
        stream.check("vacc_buffer_alloc", status)?;
        let location = Location::Device(device.id());
        Ok(Buffer::from_raw(bytes, location, Box::new(VaccBuffer { device, handle })))
    }

    /// Pinned host memory.
    #[expect(unsafe_code, reason = "calls the library")]
    pub(crate) fn alloc_host(device: &Arc<DeviceShared>, bytes: u64) -> Result<Buffer> {
        let mut handle = null_mut();
        let api = device.instance.runtime.api();
        // SAFETY: the device is alive, the result is a local.
        let status = unsafe { api.vacc_buffer_alloc_host(device.handle, bytes, &raw mut handle) };
        device.check("vacc_buffer_alloc_host", status)?;
        let location = Location::Host(device.id());
        let raw = VaccBuffer { device: device.clone(), handle };
        Ok(Buffer::from_raw(bytes, location, Box::new(raw)))
    }
}

impl RawBuffer for VaccBuffer {
    fn as_any(&self) -> &dyn Any {
        self
    }

    #[expect(unsafe_code, reason = "calls the library")]
    fn read_host(&self, offset: u64, bytes: &mut [u8]) -> Result<()> {
        let api = self.device.instance.runtime.api();
        let (to, length) = (bytes.as_mut_ptr().cast(), bytes.len() as u64);
        // SAFETY: the handle is alive; the library writes `length` bytes during the call.
        let status = unsafe { api.vacc_buffer_read_host(self.handle, offset, to, length) };
        self.device.check("vacc_buffer_read_host", status)
    }

    #[expect(unsafe_code, reason = "calls the library")]
    fn write_host(&self, offset: u64, bytes: &[u8]) -> Result<()> {
        let api = self.device.instance.runtime.api();
        let (from, length) = (bytes.as_ptr().cast(), bytes.len() as u64);
        // SAFETY: the handle is alive; the library reads `length` bytes during the call.
        let status = unsafe { api.vacc_buffer_write_host(self.handle, offset, from, length) };
        self.device.check("vacc_buffer_write_host", status)
    }
}

impl Drop for VaccBuffer {
    #[expect(unsafe_code, reason = "calls the library")]
    fn drop(&mut self) {
        // SAFETY: the handle is ours and nobody else has it any more.
        let status = unsafe { self.device.instance.runtime.api.vacc_buffer_free(self.handle) };
        self.device.deferred.keep(self.device.check("vacc_buffer_free", status));
    }
}

/// The handle behind a buffer.
///
/// # Errors
///
/// [`Error::Usage`] for another backend's buffer, or another system's.
#[inline]
pub(crate) fn handle_of(device: &DeviceShared, buffer: &Buffer) -> Result<vacc_buffer> {
    match buffer.raw().as_any().downcast_ref::<VaccBuffer>() {
        Some(raw) if Arc::ptr_eq(&raw.device.instance, &device.instance) => Ok(raw.handle),
        _ => Err(Error::usage(buffer.device(), format!("{buffer:?} is not of this system"))),
    }
}

/// A region's fields.
pub(crate) fn region(device: &DeviceShared, region: &Region) -> Result<vacc_region> {
    let buffer = handle_of(device, &region.buffer)?;
    Ok(vacc_region { buffer, offset: region.offset, length: region.len })
}

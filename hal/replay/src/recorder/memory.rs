//! Buffers whose end is recorded.

use super::Shared;
use crate::record::{Call, Span};
use hal::{Buffer, RawBuffer, Result};
use std::any::Any;
use std::sync::Arc;

/// A buffer of the device behind, and its number.
#[derive(Debug)]
pub(super) struct RecordedBuffer {
    /// Taken when this is dropped, and only then.
    inner: Option<Buffer>,
    number: u64,
    shared: Arc<Shared>,
}

impl RecordedBuffer {
    /// Wraps fresh memory. `number` was given out under the lock that is held.
    pub(super) fn wrap(inner: Buffer, number: u64, shared: Arc<Shared>) -> Buffer {
        let (size, location) = (inner.size(), inner.location());
        let raw = RecordedBuffer { inner: Some(inner), number, shared };
        Buffer::from_raw(size, location, Box::new(raw))
    }

    pub(super) fn inner(&self) -> &Buffer {
        self.inner.as_ref().expect("the inner buffer is there until this one is dropped")
    }

    pub(super) fn number(&self) -> u64 {
        self.number
    }

    pub(super) fn shared(&self) -> &Arc<Shared> {
        &self.shared
    }

    fn span(&self, offset: u64, bytes: &[u8]) -> Span {
        Span { buffer: self.number, offset, len: bytes.len() as u64 }
    }
}

impl RawBuffer for RecordedBuffer {
    fn as_any(&self) -> &dyn Any {
        self
    }

    fn read_host(&self, offset: u64, bytes: &mut [u8]) -> Result<()> {
        let mut log = self.shared.log.lock();
        let result = self.inner().raw().read_host(offset, bytes);
        if log.is_open() {
            let payload = result.is_ok().then(|| log.payload(bytes));
            let from = self.span(offset, bytes);
            log.record(Call::HostRead { from, payload }, result.as_ref().err());
        }
        result
    }

    fn write_host(&self, offset: u64, bytes: &[u8]) -> Result<()> {
        let call = || self.inner().raw().write_host(offset, bytes);
        self.shared.step(call, |log, _| Call::HostWrite {
            to: self.span(offset, bytes),
            payload: log.payload(bytes),
        })
    }
}

impl Drop for RecordedBuffer {
    fn drop(&mut self) {
        // Under the lock, so that an allocation that needs this memory is recorded after.
        let mut log = self.shared.log.lock();
        log.record(Call::Free { buffer: self.number }, None);
        drop(self.inner.take());
    }
}

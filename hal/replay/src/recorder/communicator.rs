//! Communicators with numbers.

use super::Shared;
use crate::record::Call;
use hal::{Communicator, CommunicatorId, DeviceId, Result};
use std::any::Any;
use std::sync::Arc;

/// A rank of the device behind.
///
/// [`Communicator::status`] is not recorded: when it tells of a failure is a matter of moments, and
/// the streams of the failed batch tell of it too.
#[derive(Debug)]
pub(super) struct RecordedCommunicator {
    pub(super) inner: Arc<dyn Communicator>,
    pub(super) number: u64,
    pub(super) shared: Arc<Shared>,
}

impl Communicator for RecordedCommunicator {
    fn as_any(&self) -> &dyn Any {
        self
    }

    fn id(&self) -> CommunicatorId {
        self.inner.id()
    }

    fn rank(&self) -> usize {
        self.inner.rank()
    }

    fn size(&self) -> usize {
        self.inner.size()
    }

    fn device(&self) -> DeviceId {
        self.inner.device()
    }

    fn abort(&self, reason: &str) {
        let mut log = self.shared.log.lock();
        let call = Call::Abort { communicator: self.number, reason: reason.to_string() };
        log.record(call, None);
        self.inner.abort(reason);
    }

    fn status(&self) -> Result<()> {
        self.inner.status()
    }
}

impl Drop for RecordedCommunicator {
    fn drop(&mut self) {
        self.shared.log.lock().record(Call::Leave { communicator: self.number }, None);
    }
}

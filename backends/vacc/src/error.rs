//! The library's errors as the HAL's.

use crate::Runtime;
use crate::sys::*;
use crate::wire;
use hal::{DeviceId, Error, Failure, Result, StreamId, UsageError};
use parking_lot::Mutex;
use std::ffi::c_char;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// The statuses that mean something to the HAL. Others are kept as numbers.
pub(crate) mod status {
    pub(crate) const OK: i32 = super::VACC_OK as i32;
    pub(crate) const INVALID_ARGUMENT: i32 = super::VACC_ERROR_INVALID_ARGUMENT as i32;
    pub(crate) const OUT_OF_MEMORY: i32 = super::VACC_ERROR_OUT_OF_MEMORY as i32;
    pub(crate) const UNSUPPORTED: i32 = super::VACC_ERROR_UNSUPPORTED as i32;
    pub(crate) const TIMEOUT: i32 = super::VACC_ERROR_TIMEOUT as i32;
    pub(crate) const DEVICE_LOST: i32 = super::VACC_ERROR_DEVICE_LOST as i32;
    pub(crate) const FAILED: i32 = super::VACC_ERROR_FAILED as i32;
    pub(crate) const NOT_READY: i32 = super::VACC_ERROR_NOT_READY as i32;
}

/// An error struct to be filled.
pub(crate) fn blank() -> vacc_error {
    vacc_error { size: struct_size::<vacc_error>(), ..vacc_error::default() }
}

/// Text from a fixed array: up to the terminator, or all of it from a careless library.
pub(crate) fn text(field: &[c_char]) -> String {
    let bytes: Vec<u8> = field.iter().take_while(|&&c| c != 0).map(|&c| c as u8).collect();
    String::from_utf8_lossy(&bytes).into_owned()
}

/// Whose call failed, and what to ask besides.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Subject {
    pub(crate) device: DeviceId,
    pub(crate) device_handle: vacc_device,
    pub(crate) stream: vacc_stream,
}

impl Runtime {
    /// Success, or what the library tells about the failure.
    #[inline]
    pub(crate) fn check(&self, subject: Subject, call: &'static str, status: i32) -> Result<()> {
        if status == status::OK { Ok(()) } else { Err(self.failure(subject, call, status)) }
    }

    #[cold]
    fn failure(&self, subject: Subject, call: &'static str, status: i32) -> Error {
        let told = self.last_error(subject, status);
        self.translate(subject, call, status, told.as_ref())
    }

    /// A status, and what was told about it, as the HAL says it.
    pub(crate) fn translate(
        &self,
        subject: Subject,
        call: &'static str,
        status: i32,
        told: Option<&vacc_error>,
    ) -> Error {
        let plain = || Error::Runtime {
            device: subject.device,
            call,
            code: i64::from(status),
            text: self.status_text(status),
        };
        let nothing = blank();
        let (told, device) = match (told, status) {
            (Some(told), _) => (told, DeviceId(told.device)),
            // Which command failed is what this error is about.
            (None, status::FAILED) => return plain(),
            (None, _) => (&nothing, subject.device),
        };
        let (mut words, detail) = (text(&told.text), text(&told.detail));
        if words.is_empty() && is_typed(status) {
            words = format!("{call} answered: {}", self.status_text(status));
        }
        match status {
            status::INVALID_ARGUMENT => Error::Usage(Arc::new(UsageError {
                device: subject.device,
                command: (!detail.is_empty()).then_some(detail),
                problem: words,
            })),
            // Without sizes, the call says more.
            status::OUT_OF_MEMORY if told.requested != 0 => Error::OutOfMemory {
                device: subject.device,
                requested: told.requested,
                free: told.free,
                capacity: told.capacity,
            },
            status::UNSUPPORTED => Error::Unsupported {
                device: subject.device,
                op: if detail.is_empty() { call.to_string() } else { detail },
                reason: words,
            },
            // The caller knows how long it waited, and for what.
            status::TIMEOUT => Error::Timeout {
                waiting_for: words,
                after: std::time::Duration::ZERO,
                pending: detail,
                // The ABI has no more than words.
                stuck: None,
            },
            status::DEVICE_LOST => Error::Lost { device, reason: words.into() },
            status::FAILED => Error::Failed(Arc::new(failure_of(told, words))),
            _ => match plain() {
                Error::Runtime { device, call, code, text } if !words.is_empty() => {
                    Error::Runtime { device, call, code, text: format!("{text}: {words}") }
                }
                plain => plain,
            },
        }
    }

    /// What the library tells about a failed call: to this thread, or else about the stream or the
    /// device.
    #[expect(unsafe_code, reason = "calls the library")]
    fn last_error(&self, subject: Subject, status: i32) -> Option<vacc_error> {
        let mut told = blank();
        let fits = |got: i32, told: &vacc_error| got == status::OK && told.status == status;
        // SAFETY: required; the struct says how large it is.
        let got = unsafe { self.api.vacc_last_error(&raw mut told) };
        if fits(got, &told) {
            return Some(told);
        }
        told = blank();
        let got = match status {
            // SAFETY: required; the handle is the library's own, the struct says its size.
            status::FAILED => unsafe {
                self.api.vacc_stream_get_error(subject.stream, &raw mut told)
            },
            // SAFETY: as above.
            status::DEVICE_LOST => unsafe {
                self.api.vacc_device_get_error(subject.device_handle, &raw mut told)
            },
            _ => return None,
        };
        fits(got, &told).then_some(told)
    }
}

/// Whether the HAL has an error of its own for the status.
fn is_typed(status: i32) -> bool {
    matches!(
        status,
        status::INVALID_ARGUMENT
            | status::UNSUPPORTED
            | status::TIMEOUT
            | status::DEVICE_LOST
            | status::FAILED
    )
}

/// The command that failed first.
fn failure_of(told: &vacc_error, mut words: String) -> Failure {
    if wire::command_of(told.command).is_none() && told.command != VACC_COMMAND_ABORT {
        words += &format!(" (command code {}, which is newer than this program)", told.command);
    }
    Failure {
        stream: StreamId { device: DeviceId(told.stream_device), index: told.stream_index },
        stream_label: text(&told.stream_label).into(),
        sequence: told.sequence,
        op: wire::command_name(told.command),
        label: text(&told.label).into(),
        cause: wire::cause_of(told.cause, words, told.code),
    }
}

/// An error that came where nobody could be told: kept for the next call that can.
#[derive(Debug, Default)]
pub(crate) struct Deferred {
    waiting: AtomicBool,
    error: Mutex<Option<Error>>,
}

impl Deferred {
    /// Keeps the first.
    pub(crate) fn keep(&self, result: Result<()>) {
        if let Err(error) = result {
            let mut kept = self.error.lock();
            kept.get_or_insert(error);
            // Under the lock, so that nobody who tells an earlier one forgets this one.
            self.waiting.store(true, Ordering::Release);
        }
    }

    /// Tells it, once.
    #[inline]
    pub(crate) fn tell(&self) -> Result<()> {
        if !self.waiting.load(Ordering::Acquire) {
            return Ok(());
        }
        let mut kept = self.error.lock();
        self.waiting.store(false, Ordering::Release);
        kept.take().map_or(Ok(()), Err)
    }
}

//! Statuses, and what `vacc_last_error` tells.

use hal::{Cause, Error};
use std::cell::RefCell;
use std::ffi::{CStr, c_char};
use std::panic::AssertUnwindSafe;
use vacc::sys::*;
use vacc::wire::{self, WireError};

/// A failure on its way to the caller.
#[derive(Debug)]
pub(crate) struct Refused(Box<vacc_error>);

/// The result of an exported function's body.
pub(crate) type Outcome<T = ()> = Result<T, Refused>;

thread_local! {
    static LAST: RefCell<vacc_error> = RefCell::new(blank());
}

pub(crate) fn blank() -> vacc_error {
    vacc_error { size: struct_size::<vacc_error>(), ..vacc_error::default() }
}

/// Copies as much text as fits, cut between characters, and terminates it.
pub(crate) fn put(field: &mut [c_char], text: &str) {
    let mut end = text.len().min(field.len() - 1);
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    for (to, &from) in field.iter_mut().zip(&text.as_bytes()[..end]) {
        *to = from as c_char;
    }
    field[end] = 0;
}

impl Refused {
    pub(crate) fn new(status: u32, text: impl AsRef<str>) -> Self {
        let mut error = Box::new(blank());
        error.status = status as i32;
        put(&mut error.text, text.as_ref());
        Refused(error)
    }

    pub(crate) fn invalid(text: impl AsRef<str>) -> Self {
        Refused::new(VACC_ERROR_INVALID_ARGUMENT, text)
    }

    pub(crate) fn null(what: &str) -> Self {
        Refused::invalid(format!("{what} is null"))
    }

    pub(crate) fn status(&self) -> i32 {
        self.0.status
    }

    pub(crate) fn into_error(self) -> vacc_error {
        *self.0
    }

    fn detail(mut self, text: &str) -> Self {
        put(&mut self.0.detail, text);
        self
    }
}

impl From<StructError> for Refused {
    fn from(error: StructError) -> Self {
        let status = match error {
            StructError::Null(_) => VACC_ERROR_INVALID_ARGUMENT,
            StructError::TooSmall { .. } | StructError::Uneven { .. } => VACC_ERROR_STRUCT_SIZE,
            StructError::Unknown { .. } => VACC_ERROR_UNSUPPORTED,
        };
        Refused::new(status, error.to_string())
    }
}

impl From<WireError> for Refused {
    fn from(error: WireError) -> Self {
        match error {
            WireError::Struct(error) => error.into(),
            WireError::Invalid(text) => Refused::invalid(text),
            WireError::Unsupported(text) => Refused::new(VACC_ERROR_UNSUPPORTED, text),
        }
    }
}

/// The simulator's errors. Dies keep their physical numbers: see [`Refused::renumber`].
impl From<Error> for Refused {
    fn from(error: Error) -> Self {
        match error {
            Error::Lost { device, reason } => {
                let mut lost = Refused::new(VACC_ERROR_DEVICE_LOST, reason);
                lost.0.device = device.0;
                lost
            }
            Error::OutOfMemory { device, requested, free, capacity } => {
                let text = format!("{requested} bytes asked for, {free} of {capacity} are free");
                let mut full = Refused::new(VACC_ERROR_OUT_OF_MEMORY, text);
                full.0.device = device.0;
                (full.0.requested, full.0.free, full.0.capacity) = (requested, free, capacity);
                full
            }
            Error::Timeout { waiting_for, pending, .. } => {
                Refused::new(VACC_ERROR_TIMEOUT, waiting_for).detail(&pending)
            }
            Error::Unsupported { op, reason, .. } => {
                Refused::new(VACC_ERROR_UNSUPPORTED, reason).detail(&op)
            }
            Error::Usage(usage) => {
                let command = usage.command.as_deref().unwrap_or_default();
                Refused::invalid(&usage.problem).detail(command)
            }
            Error::Failed(failure) => {
                let (text, code) = match &failure.cause {
                    Cause::Lost(text) | Cause::Injected(text) | Cause::Aborted(text) => {
                        (text.to_string(), 0)
                    }
                    Cause::Data(text) | Cause::Mismatch(text) => (text.clone(), 0),
                    Cause::Runtime { code, text } => (text.clone(), *code),
                    other => (other.to_string(), 0),
                };
                let mut failed = Refused::new(VACC_ERROR_FAILED, text);
                let error = &mut *failed.0;
                (error.cause, error.code) = (wire::cause(&failure.cause), code);
                error.stream_device = failure.stream.device.0;
                (error.stream_index, error.sequence) = (failure.stream.index, failure.sequence);
                error.command = wire::command_named(failure.op);
                put(&mut error.stream_label, &failure.stream_label);
                put(&mut error.label, failure.label.as_str());
                failed
            }
            other => Refused::new(VACC_ERROR_INTERNAL, other.to_string()),
        }
    }
}

impl Refused {
    /// Physical numbers of dies become the ordinals that the caller knows.
    pub(crate) fn renumber(mut self, ordinal: impl Fn(u32) -> u32) -> Self {
        self.0.device = ordinal(self.0.device);
        self.0.stream_device = ordinal(self.0.stream_device);
        self
    }
}

/// Runs the body of an exported function: its failure is kept for `vacc_last_error`, its panic
/// becomes one.
pub(crate) fn guard(body: impl FnOnce() -> Outcome) -> vacc_status {
    let outcome = std::panic::catch_unwind(AssertUnwindSafe(body)).unwrap_or_else(|panic| {
        let text = panic.downcast_ref::<&str>().map(|s| (*s).to_string());
        let text = text.or_else(|| panic.downcast_ref::<String>().cloned()).unwrap_or_default();
        Err(Refused::new(VACC_ERROR_INTERNAL, format!("a mistake in libvaccrt: {text}")))
    });
    match outcome {
        Ok(()) => VACC_OK as vacc_status,
        Err(refused) => {
            let status = refused.status();
            LAST.with(|last| *last.borrow_mut() = refused.into_error());
            status
        }
    }
}

/// Fills a caller's struct.
#[expect(unsafe_code, reason = "writes where the caller says")]
pub(crate) fn fill<T: Copy>(at: *mut T, value: &T) -> Outcome {
    // SAFETY: the header obliges callers to pass a struct as large as its size field says.
    Ok(unsafe { write_struct(at, value) }?)
}

/// Writes a result that is no struct.
#[expect(unsafe_code, reason = "writes where the caller says")]
pub(crate) fn give<T>(at: *mut T, what: &str, value: T) -> Outcome {
    if at.is_null() {
        return Err(Refused::null(what));
    }
    // SAFETY: not null, and the header obliges callers to pass room for one.
    unsafe { at.write_unaligned(value) };
    Ok(())
}

/// Bytes that the caller lends for the call.
#[expect(unsafe_code, reason = "reads what the caller lends")]
pub(crate) fn bytes<'a, T>(at: *const T, length: u64, what: &str) -> Outcome<&'a [u8]> {
    match usize::try_from(length).ok().filter(|&n| n <= isize::MAX as usize) {
        None => Err(Refused::invalid(format!("{what} of {length} bytes"))),
        Some(0) => Ok(&[]),
        Some(_) if at.is_null() => Err(Refused::null(what)),
        // SAFETY: not null, and the header obliges callers to lend this many bytes.
        Some(n) => Ok(unsafe { std::slice::from_raw_parts(at.cast(), n) }),
    }
}

/// Text that the caller lends for the call.
pub(crate) fn text<'a>(at: *const c_char, length: u64, what: &str) -> Outcome<&'a str> {
    std::str::from_utf8(bytes(at, length, what)?)
        .map_err(|_| Refused::invalid(format!("{what} is not UTF-8")))
}

/// The version of the ABI.
#[expect(unsafe_code, reason = "exported")]
#[unsafe(no_mangle)]
pub(crate) extern "C" fn vacc_abi_version() -> u32 {
    (VACC_ABI_MAJOR << 16) | VACC_ABI_MINOR
}

/// Names and texts of the statuses.
const STATUSES: &[(u32, &CStr, &CStr)] = &[
    (VACC_OK, c"VACC_OK", c"success"),
    (VACC_ERROR_INVALID_ARGUMENT, c"VACC_ERROR_INVALID_ARGUMENT", c"invalid argument"),
    (VACC_ERROR_STRUCT_SIZE, c"VACC_ERROR_STRUCT_SIZE", c"a struct is too small"),
    (VACC_ERROR_BAD_HANDLE, c"VACC_ERROR_BAD_HANDLE", c"no such handle"),
    (VACC_ERROR_CONCURRENT_USE, c"VACC_ERROR_CONCURRENT_USE", c"two threads submit to one stream"),
    (VACC_ERROR_BUSY, c"VACC_ERROR_BUSY", c"still in use"),
    (VACC_ERROR_OUT_OF_MEMORY, c"VACC_ERROR_OUT_OF_MEMORY", c"out of memory"),
    (VACC_ERROR_UNSUPPORTED, c"VACC_ERROR_UNSUPPORTED", c"not supported"),
    (VACC_ERROR_TIMEOUT, c"VACC_ERROR_TIMEOUT", c"timed out"),
    (VACC_ERROR_DEVICE_LOST, c"VACC_ERROR_DEVICE_LOST", c"the device is lost"),
    (VACC_ERROR_FAILED, c"VACC_ERROR_FAILED", c"a command failed"),
    (VACC_ERROR_NOT_READY, c"VACC_ERROR_NOT_READY", c"nothing to tell yet"),
    (VACC_ERROR_INTERNAL, c"VACC_ERROR_INTERNAL", c"a mistake inside the library"),
];

fn known(status: vacc_status) -> Option<&'static (u32, &'static CStr, &'static CStr)> {
    STATUSES.iter().find(|(code, ..)| *code as i32 == status)
}

/// A status' name.
#[expect(unsafe_code, reason = "exported")]
#[unsafe(no_mangle)]
pub(crate) extern "C" fn vacc_status_name(status: vacc_status) -> *const c_char {
    known(status).map_or(c"unknown", |(_, name, _)| name).as_ptr()
}

/// A status in words.
#[expect(unsafe_code, reason = "exported")]
#[unsafe(no_mangle)]
pub(crate) extern "C" fn vacc_status_text(status: vacc_status) -> *const c_char {
    known(status).map_or(c"unknown", |(_, _, text)| text).as_ptr()
}

/// What the last failed call on this thread has to tell.
#[expect(unsafe_code, reason = "exported")]
#[unsafe(no_mangle)]
pub(crate) extern "C" fn vacc_last_error(error: *mut vacc_error) -> vacc_status {
    // Not through `guard`: a failure here does not replace what is told.
    let last = LAST.with(|last| *last.borrow());
    fill(error, &last).map_or_else(|refused| refused.status(), |()| VACC_OK as vacc_status)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_panic_becomes_a_status_with_its_text() {
        let panics: [fn() -> Outcome; 3] = [
            || std::panic::panic_any("words"),
            || panic!("{} words", 2),
            || std::panic::panic_any(17),
        ];
        for (panics, told) in panics.into_iter().zip(["words", "2 words", ""]) {
            assert_eq!(guard(panics), VACC_ERROR_INTERNAL as i32);
            let mut error = blank();
            assert_eq!(vacc_last_error(&raw mut error), VACC_OK as i32);
            let text: Vec<u8> =
                error.text.iter().take_while(|&&c| c != 0).map(|&c| c as u8).collect();
            let text = String::from_utf8(text).unwrap();
            assert_eq!(text, format!("a mistake in libvaccrt: {told}"));
        }
    }

    /// Those that look things up and can neither fail nor panic.
    const UNGUARDED: [&str; 4] =
        ["vacc_abi_version", "vacc_status_name", "vacc_status_text", "vacc_last_error"];

    #[test]
    fn every_exported_function_is_guarded() {
        let sources = [
            include_str!("collective.rs"),
            include_str!("device.rs"),
            include_str!("error.rs"),
            include_str!("memory.rs"),
            include_str!("stream.rs"),
            include_str!("system.rs"),
            include_str!("telemetry.rs"),
        ];
        let exported = || sources.iter().flat_map(|s| s.split("extern \"C\" fn vacc_").skip(1));
        assert!(exported().count() > 40);
        for function in exported() {
            let (name, _) = function.split_once('(').unwrap();
            let (_, body) = function.split_once("-> ").unwrap();
            let (_, body) = body.split_once("{\n").unwrap();
            let guarded = body.trim_start().starts_with("guard(||");
            assert_eq!(guarded, !UNGUARDED.contains(&&*format!("vacc_{name}")), "vacc_{name}");
        }
    }

    #[test]
    fn text_is_cut_between_characters() {
        let mut field = [1; 4];
        put(&mut field, "aé€");
        assert_eq!(field.map(|c| c as u8), [b'a', 0xc3, 0xa9, 0]);
        put(&mut field, "a€");
        assert_eq!(field[..2], [b'a' as c_char, 0]);
    }
}

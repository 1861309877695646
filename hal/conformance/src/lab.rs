//! What cases work with: open dies, and short ways to do common things on them.

use hal::{DType, Device, Error, Operand, Region, Stream, Tensor, TensorDesc};
use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// How long a case waits for what must come: far beyond what any backend needs.
pub(crate) const SOON: Duration = Duration::from_secs(20);

/// How long a case waits for what must not come.
pub(crate) const BRIEFLY: Duration = Duration::from_millis(40);

/// Why a case fails, in words.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Finding(pub String);

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl From<Error> for Finding {
    fn from(error: Error) -> Self {
        Finding(format!("unexpected error: {error}"))
    }
}

impl From<String> for Finding {
    fn from(text: String) -> Self {
        Finding(text)
    }
}

impl From<&str> for Finding {
    fn from(text: &str) -> Self {
        Finding(text.to_string())
    }
}

/// What a case returns.
pub(crate) type Verdict<T = ()> = Result<T, Finding>;

/// Fails the case unless `condition` holds.
pub(crate) fn ensure(condition: bool, problem: impl FnOnce() -> String) -> Verdict {
    if condition { Ok(()) } else { Err(Finding(problem())) }
}

/// Fails the case unless both are equal.
pub(crate) fn equal<T: PartialEq + fmt::Debug>(what: &str, got: T, expected: T) -> Verdict {
    ensure(got == expected, || format!("{what} is {got:?}, expected {expected:?}"))
}

/// The error of a call that must fail.
pub(crate) fn refused<T>(what: &str, result: hal::Result<T>) -> Verdict<Error> {
    match result {
        Ok(_) => Err(Finding(format!("{what} succeeded"))),
        Err(error) => Ok(error),
    }
}

/// Fails the case unless the error is of this kind.
pub(crate) fn is(error: &Error, kind: &str, of: fn(&Error) -> bool) -> Verdict {
    ensure(of(error), || format!("expected {kind}, got: {error}"))
}

/// Whether an error is the caller's mistake.
pub(crate) fn usage(error: &Error) -> bool {
    matches!(error, Error::Usage(_))
}

/// Whether an error came along a stream.
pub(crate) fn failed(error: &Error) -> bool {
    matches!(error, Error::Failed(_))
}

/// Whether an error says that the device is gone.
pub(crate) fn lost(error: &Error) -> bool {
    matches!(error, Error::Lost { .. })
        || matches!(error, Error::Failed(f) if matches!(f.cause, hal::Cause::Lost(_)))
}

/// Whether an error is a timeout.
pub(crate) fn timeout(error: &Error) -> bool {
    matches!(error, Error::Timeout { .. })
}

/// Open dies of one system.
#[derive(Debug)]
pub struct Lab {
    dies: Vec<Arc<dyn Device>>,
    streams: AtomicU64,
}

impl Lab {
    pub(crate) fn new(dies: Vec<Arc<dyn Device>>) -> Self {
        Lab { dies, streams: AtomicU64::new(0) }
    }

    pub(crate) fn die(&self, i: usize) -> &Arc<dyn Device> {
        &self.dies[i]
    }

    pub(crate) fn dies(&self) -> &[Arc<dyn Device>] {
        &self.dies
    }

    /// A new stream on a die.
    pub(crate) fn stream(&self, die: usize) -> Verdict<Arc<dyn Stream>> {
        let n = self.streams.fetch_add(1, Ordering::Relaxed);
        Ok(self.dies[die].stream(&format!("conformance {n}"))?)
    }
}

/// Bytes that look random and are the same every time.
pub(crate) fn pattern(len: usize, seed: u64) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 24) as u8
    };
    std::iter::repeat_with(next).take(len).collect()
}

/// Reads a region.
pub(crate) fn read(stream: &dyn Stream, region: &Region) -> Verdict<Vec<u8>> {
    let mut bytes = vec![0xa5; region.len as usize];
    stream.read(region, &mut bytes, SOON)?;
    Ok(bytes)
}

/// Device memory with these bytes.
pub(crate) fn upload(stream: &dyn Stream, bytes: &[u8]) -> Verdict<hal::Buffer> {
    let buffer = stream.alloc(bytes.len() as u64)?;
    stream.write(&buffer.whole(), bytes)?;
    Ok(buffer)
}

/// An F32 vector with these values.
pub(crate) fn floats(stream: &dyn Stream, values: &[f32]) -> Verdict<Tensor> {
    let bytes: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
    let desc = TensorDesc::new(DType::F32, &[values.len()]);
    Ok(Tensor::new(upload(stream, &bytes)?, 0, desc))
}

/// The values of an F32 vector.
pub(crate) fn values(stream: &dyn Stream, tensor: &Tensor) -> Verdict<Vec<f32>> {
    let bytes = read(stream, &tensor.region())?;
    ensure(tensor.desc().dtype() == DType::F32, || "not a vector of F32".to_string())?;
    Ok(bytes.as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b)).collect())
}

/// `out = a + b`.
pub(crate) fn add(a: &Tensor, b: &Tensor, out: &Tensor) -> hal::Op {
    hal::op::Add { a: a.clone(), b: b.clone(), out: out.clone() }.into()
}

//! Hashes of what ops wrote, without making the host or other streams wait.
//!
//! After a command its outputs are copied, in stream order, to pinned memory; when the stream is
//! known to have come that far they are hashed. Reading them at once would block, and the partner
//! of a collective may have to be submitted by the very thread that would be blocked.

use super::log::{Log, Numbered};
use crate::hash::xxh64;
use crate::record::{Call, View};
use hal::{Buffer, Device, Operand, Stream, Tensor, TensorDesc, Timeline};
use parking_lot::Mutex;
use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

/// The largest output that is copied, and the most bytes that wait on one stream to be hashed:
/// pinned memory is dear.
pub(crate) const LARGEST_PROBE: u64 = 256 << 20;

/// How long the end of a recording waits for what is still running.
const AT_THE_END: Duration = Duration::from_secs(10);

/// Copies that wait to be hashed.
#[derive(Debug, Default)]
pub(super) struct Probes(Mutex<HashMap<u64, Waiting>>);

/// Those of one stream, oldest first.
#[derive(Debug)]
struct Waiting {
    timeline: Arc<dyn Timeline>,
    bytes: u64,
    copies: Vec<Copy>,
}

#[derive(Debug)]
struct Copy {
    probe: u64,
    buffer: Buffer,
    desc: TensorDesc,
    /// The stream's value once it is there.
    value: u64,
}

impl Probes {
    /// Copies an output of the command just submitted to the stream.
    pub(super) fn take(
        &self,
        log: &Mutex<Log>,
        (stream, device, number): (&dyn Stream, &dyn Device, u64),
        operand: &str,
        tensor: &Tensor,
        view: View,
    ) {
        self.collect(log, number);
        let region = tensor.region();
        if region.len == 0 || !device.properties().functional {
            return;
        }
        let mut all = self.0.lock();
        let timeline = || stream.point().timeline().clone();
        let waiting = all.entry(number).or_insert_with(|| Waiting {
            timeline: timeline(),
            bytes: 0,
            copies: Vec::new(),
        });
        let room = waiting.bytes.saturating_add(region.len) <= LARGEST_PROBE;
        let buffer = room.then(|| device.alloc_host(region.len).ok()).flatten();
        let mut log = log.lock();
        let Some(buffer) = buffer else { return log.skip_probe() };
        let result = stream.copy(&buffer.whole(), &region);
        let probe = log.number(Numbered::Probe);
        let call = Call::Probe { probe, stream: number, operand: operand.to_string(), view };
        log.record(call, result.as_ref().err());
        if result.is_ok() {
            waiting.bytes += region.len;
            let (desc, value) = (*tensor.desc(), stream.point().value());
            waiting.copies.push(Copy { probe, buffer, desc, value });
        }
    }

    /// Hashes what has arrived on a stream.
    pub(super) fn collect(&self, log: &Mutex<Log>, stream: u64) {
        let mut all = self.0.lock();
        let Some(waiting) = all.get_mut(&stream) else { return };
        let reached = waiting.timeline.reached();
        let here = waiting.copies.partition_point(|copy| copy.value <= reached);
        for copy in waiting.copies.drain(..here) {
            waiting.bytes -= copy.buffer.size();
            if let Some(hash) = hash_of(&copy.buffer, &copy.desc) {
                log.lock().record(Call::Probed { probe: copy.probe, hash }, None);
            }
        }
    }

    /// Waits for what is still running, and hashes it. What failed is not hashed.
    pub(super) fn collect_all(&self, log: &Mutex<Log>) {
        let last = |w: &Waiting| Some((w.timeline.clone(), w.copies.last()?.value));
        let streams: Vec<_> =
            self.0.lock().iter().filter_map(|(&stream, w)| Some((stream, last(w)?))).collect();
        for (stream, (timeline, value)) in streams {
            // An error is on record already, or comes from what nobody waited for.
            let _ = timeline.synchronize(value, AT_THE_END);
            self.collect(log, stream);
        }
        self.0.lock().clear();
    }
}

/// The hash of a view whose extent the buffer holds, gaps left out.
pub(crate) fn hash_of(buffer: &Buffer, desc: &TensorDesc) -> Option<u64> {
    let mut bytes = vec![0; usize::try_from(buffer.size()).ok()?];
    buffer.raw().read_host(0, &mut bytes).ok()?;
    if desc.is_contiguous() {
        return Some(xxh64(&bytes, 0));
    }
    let row = desc.last_dim() * desc.dtype().size();
    let mut packed = Vec::with_capacity(desc.bytes() as usize);
    let outer = desc.rank() - 1;
    let mut index = [0usize; 4];
    for _ in 0..desc.rows() {
        let first: usize = (0..outer).map(|axis| index[axis] * desc.stride(axis)).sum();
        let start = first * desc.dtype().size();
        packed.extend_from_slice(bytes.get(start..start + row)?);
        for axis in (0..outer).rev() {
            index[axis] += 1;
            if index[axis] < desc.dim(axis) {
                break;
            }
            index[axis] = 0;
        }
    }
    Some(xxh64(&packed, 0))
}

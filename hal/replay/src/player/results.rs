//! Comparing what comes back.

use super::{Player, Stop};
use crate::compare::compare;
use crate::file::Reader;
use crate::record::{Failed, Span, View};
use crate::recorder::{LARGEST_PROBE, hash_of};
use crate::report::{Difference, Wrote};
use hal::{Buffer, Operand, TensorDesc, Timeline};
use std::io::{Read, Seek};
use std::rc::Rc;
use std::sync::Arc;

/// A copy of an output, to be hashed.
pub(super) struct Copy {
    buffer: Buffer,
    desc: TensorDesc,
    timeline: Arc<dyn Timeline>,
    value: u64,
    by: Option<Rc<Wrote>>,
    has_values: bool,
}

impl Player<'_> {
    /// Compares a read with the recorded one.
    pub(super) fn compare_read<R: Read + Seek>(
        &mut self,
        reader: &mut Reader<R>,
        die: u32,
        from: &Span,
        payload: Option<u64>,
        replayed: &[u8],
    ) -> Result<(), Stop> {
        let (Some(payload), true) = (payload, self.die(die)?.has_values()) else {
            self.report.not_compared += 1;
            return Ok(());
        };
        let Some(recorded) = reader.payload(payload)? else {
            return Err(Stop::Bad(format!("there is no payload {payload}")));
        };
        self.report.reads += 1;
        self.report.compared_bytes += from.len;
        let writers = &self.memory(from.buffer)?.writers;
        let dtype = writers.dtype(&(from.offset..from.offset + from.len));
        let Some(mismatch) = compare(recorded, replayed, dtype, self.options.tolerance) else {
            return Ok(());
        };
        let byte = from.offset + mismatch.at as u64;
        let wrote = writers.of(byte).map(|wrote| (**wrote).clone());
        let (recorded, replayed) = mismatch.values;
        let what = match dtype {
            Some(dtype) => format!("{dtype} "),
            None => String::new(),
        };
        let Span { buffer, offset, len } = from;
        self.differs(Difference {
            record: self.now,
            what: format!("{what}read of {len} bytes at byte {offset} of buffer {buffer}"),
            byte: Some(byte),
            differ: Some(mismatch.differ as u64),
            of: Some(mismatch.of as u64),
            recorded,
            replayed,
            relative: mismatch.relative,
            wrote,
        });
        Ok(())
    }

    fn differs(&mut self, difference: Difference) {
        self.report.different += 1;
        // What was written first is nearest to the cause, whenever it was looked at.
        let written = |d: &Difference| d.wrote.as_ref().map_or(d.record, |by| by.record);
        let described = &mut self.report.differences;
        let at = described.partition_point(|d| written(d) <= written(&difference));
        if at < self.options.described {
            described.insert(at, difference);
            described.truncate(self.options.described);
        }
    }

    /// Copies an output to pinned memory, as the recorder did.
    pub(super) fn probe(
        &mut self,
        probe: u64,
        stream: u64,
        operand: &str,
        view: &View,
        failed: Option<&Failed>,
    ) -> Result<(), Stop> {
        let (handle, die) = self.stream(stream)?;
        let tensor = self.tensor(view, die)?;
        if tensor.desc().extent() > LARGEST_PROBE {
            return Err(Stop::Bad(format!("a probe of {:?}", tensor.desc())));
        }
        let by = self.memory(view.buffer)?.writers.of(view.offset).cloned();
        let by = by.filter(|by| by.operand == operand);
        let opened = self.die(die)?;
        let has_values = opened.has_values();
        let made = opened.device.alloc_host(tensor.desc().extent());
        let Some(buffer) = self.outcome(None, made) else { return Err(Stop::Absent) };
        let copied = handle.copy(&buffer.whole(), &tensor.region());
        if self.issued(stream, failed, copied) && failed.is_none() {
            let lane = self.lane(stream)?;
            let (timeline, value) = (lane.timeline.clone(), lane.value);
            let desc = *tensor.desc();
            self.probes.insert(probe, Copy { buffer, desc, timeline, value, by, has_values });
        }
        Ok(())
    }

    /// Compares the hash of an output.
    pub(super) fn probed(&mut self, probe: u64, recorded: u64) -> Result<(), Stop> {
        // Where it is not there the copy was not made, and that was told.
        let Some(copy) = self.probes.remove(&probe) else { return Ok(()) };
        let arrived = copy.timeline.synchronize(copy.value, self.options.timeout);
        if self.outcome(None, arrived).is_none() {
            return Ok(());
        }
        let hash = match copy.has_values {
            true => hash_of(&copy.buffer, &copy.desc),
            false => None,
        };
        match hash {
            None => self.report.not_compared += 1,
            Some(hash) if hash == recorded => self.report.hashes += 1,
            Some(_) if self.options.tolerance.is_some() => self.report.not_compared += 1,
            Some(hash) => {
                self.report.hashes += 1;
                self.differs(Difference {
                    record: self.now,
                    what: format!("output {:?}", copy.desc),
                    byte: None,
                    differ: None,
                    of: None,
                    recorded: format!("hash {recorded:016x}"),
                    replayed: format!("{hash:016x}"),
                    relative: None,
                    wrote: copy.by.map(|by| (*by).clone()),
                });
            }
        }
        Ok(())
    }
}

//! Command lists.

use crate::collective::{COMMUNICATORS, batch};
use crate::device::DEVICES;
use crate::error::{Outcome, Refused, guard};
use crate::memory::{region, tensor};
use crate::stream::{Owned, STREAMS, label};
use hal::{CommandList, Entry, ListAction, Stream, WaitFor};
use std::sync::Arc;
use vacc::sys::*;
use vacc::wire;

/// `VACC_LIST_START`, which bindgen does not translate.
const START: u64 = u64::MAX;

/// The most entries and streams: more is a mistake, not a list.
const MOST: u32 = 1 << 24;

/// See `vacc.h`.
#[expect(unsafe_code, reason = "exported")]
#[unsafe(no_mangle)]
pub(crate) extern "C" fn vacc_list_launch(
    device: vacc_device,
    streams: *const vacc_stream,
    stream_count: u32,
    entries: *const vacc_list_entry,
    count: u32,
) -> vacc_status {
    guard(|| {
        let die = DEVICES.get(device)?;
        if count.max(stream_count) > MOST {
            let text = format!("{count} entries on {stream_count} streams; at most {MOST}");
            return Err(Refused::invalid(text));
        }
        let owned = handles(streams, stream_count)?;
        // Before anybody is alone with one: twice the same would look like another thread's.
        for (i, stream) in owned.iter().enumerate() {
            if owned[..i].iter().any(|other| Arc::ptr_eq(other, stream)) {
                return Err(Refused::invalid(format!("stream {i} of the launch is there twice")));
            }
        }
        let _alone = owned.iter().map(|s| s.alone()).collect::<Outcome<Vec<_>>>()?;
        let streams: Vec<Arc<dyn Stream>> = owned.iter().map(|s| s.stream.clone()).collect();
        let launch = |entries: Vec<Entry>| {
            let list = CommandList::new(entries, streams.len());
            let list = list.map_err(|error| Refused::invalid(error.to_string()))?;
            die.device.execute(&list, &streams).map_err(|e| die.refused(e))
        };
        let mut read = Vec::with_capacity(count as usize);
        for i in 0..count as usize {
            match entry(entries, i).and_then(|entry| fits(&read, entry, streams.len())) {
                Ok(entry) => read.push(entry),
                // What comes before it is submitted.
                Err(refused) => return launch(read).and(Err(refused)),
            }
        }
        launch(read)
    })
}

#[expect(unsafe_code, reason = "reads a caller's array")]
fn handles(streams: *const vacc_stream, count: u32) -> Outcome<Vec<Arc<Owned>>> {
    if streams.is_null() && count > 0 {
        return Err(Refused::null("streams"));
    }
    // SAFETY: not null, and the header obliges callers to pass `count` handles.
    let handle = |i: usize| unsafe { streams.add(i).read_unaligned() };
    (0..count as usize).map(|i| STREAMS.get(handle(i))).collect()
}

/// An entry that can follow those before it.
fn fits(before: &[Entry], entry: Entry, streams: usize) -> Outcome<Entry> {
    let stream = entry.stream;
    let at = before.len();
    let problem = match &entry.action {
        _ if stream >= streams => format!("stream {stream} of {streams}"),
        ListAction::Wait(WaitFor::Start) if stream == 0 => "the start of its own stream".into(),
        ListAction::Wait(WaitFor::Entry(e))
            if before.get(*e).is_none_or(|b| b.stream == stream) =>
        {
            format!("entry {e}, which is no earlier one of another stream")
        }
        ListAction::Collectives { batch, .. } if batch.is_empty() => "an empty batch".into(),
        _ => return Ok(entry),
    };
    Err(Refused::invalid(format!("entry {at} names {problem}")))
}

#[expect(unsafe_code, reason = "reads a caller's structs")]
fn entry(entries: *const vacc_list_entry, i: usize) -> Outcome<Entry> {
    // SAFETY: the header obliges callers to pass more than `i` structs, as large as the first says.
    let wire = unsafe { read_element(entries, i, size_of::<vacc_list_entry>()) }?;
    let action = match wire.action {
        VACC_LIST_LAUNCH => {
            // SAFETY: the header obliges callers to pass the descriptor of this code.
            let op = unsafe { wire::decode(wire.op, wire.descriptor) }?;
            let command = op.try_map(tensor)?.label(label(wire.label, wire.label_length)?);
            ListAction::Op(Box::new(command))
        }
        VACC_LIST_COLLECTIVES => {
            let communicator = COMMUNICATORS.get(wire.comm)?.communicator.clone();
            let label = label(wire.label, wire.label_length)?;
            let batch = batch(wire.batch, wire.count, communicator.size())?;
            ListAction::Collectives { communicator, batch, label }
        }
        VACC_LIST_FILL => {
            let Ok(byte) = u8::try_from(wire.byte) else {
                return Err(Refused::invalid(format!("a fill with {}", wire.byte)));
            };
            ListAction::Fill { region: region(&raw const wire.region, "region")?, byte }
        }
        VACC_LIST_WAIT => ListAction::Wait(match wire.wait {
            START => WaitFor::Start,
            entry => WaitFor::Entry(usize::try_from(entry).unwrap_or(usize::MAX)),
        }),
        other => {
            let text = format!("action {other} of entry {i} is not known here");
            return Err(Refused::new(VACC_ERROR_UNSUPPORTED, text));
        }
    };
    Ok(Entry { stream: wire.stream as usize, action })
}

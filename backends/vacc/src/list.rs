//! Command lists, in one call of the library where it can launch them.

use crate::collective::{VaccCommunicator, Wires};
use crate::device::DeviceShared;
use crate::memory::{handle_of, region};
use crate::stream::{StreamShared, VaccStream};
use crate::sys::*;
use crate::wire;
use hal::{CommandList, Entry, Error, Label, ListAction, Operand, Result, Stream, Tensor, WaitFor};
use std::ffi::c_void;
use std::sync::Arc;

/// `VACC_LIST_START`, which bindgen does not translate.
const START: u64 = u64::MAX;

/// Launches a list; where the library does not export `vacc_list_launch`, its commands go one by one.
pub(crate) fn execute(
    device: &DeviceShared,
    list: &CommandList,
    streams: &[Arc<dyn Stream>],
) -> Result<()> {
    device.deferred.tell()?;
    let api = device.instance.runtime.api();
    if api.vacc_list_launch.is_err() {
        return list.issue(device.id(), streams);
    }
    list.check_streams(device.id(), streams)?;
    let streams = streams.iter().map(|s| own(device, s)).collect::<Result<Vec<_>>>()?;
    let mut wires = ListWires::default();
    // What cannot be written down is refused here, in its turn: what comes before it is launched.
    let refused = list.entries().iter().find_map(|entry| wires.push(device, entry).err());
    wires.launch(device, &streams)?;
    refused.map_or(Ok(()), Err)
}

fn own<'s>(device: &DeviceShared, stream: &'s Arc<dyn Stream>) -> Result<&'s StreamShared> {
    match stream.as_any().downcast_ref::<VaccStream>() {
        Some(own) if Arc::ptr_eq(&own.shared.device.instance, &device.instance) => Ok(&own.shared),
        _ => Err(Error::usage(device.id(), format!("{} is not of this system", stream.id()))),
    }
}

/// A list as the ABI writes it, with what it points to.
#[derive(Default)]
struct ListWires {
    entries: Vec<vacc_list_entry>,
    /// The descriptors of all ops, one behind the other, in words so that they are aligned.
    descriptors: Vec<u64>,
    /// The entries with descriptors, and where those begin.
    placed: Vec<(usize, usize)>,
    /// The batches, which do not move when this grows: see [`Wires::as_ptr`].
    batches: Vec<Wires>,
}

impl ListWires {
    fn push(&mut self, device: &DeviceShared, entry: &Entry) -> Result<()> {
        let mut wire = vacc_list_entry {
            size: struct_size::<vacc_list_entry>(),
            stream: entry.stream as u32,
            ..vacc_list_entry::default()
        };
        let named = |wire: &mut vacc_list_entry, label: &Label| {
            (wire.label, wire.label_length) =
                (label.as_str().as_ptr().cast(), label.as_str().len() as u64);
        };
        match &entry.action {
            ListAction::Op(command) => {
                wire.action = VACC_LIST_LAUNCH;
                named(&mut wire, &command.label);
                let operand = |tensor: &Tensor| {
                    let buffer = handle_of(device, tensor.buffer())?;
                    Ok::<_, Error>(wire::tensor(tensor.desc(), buffer, tensor.offset()))
                };
                let start = self.descriptors.len();
                let words = &mut self.descriptors;
                wire.op = wire::encode(&command.op, operand, |code, descriptor| {
                    if code != 0 {
                        append(words, descriptor);
                    }
                    code
                })?;
                if wire.op == 0 {
                    return Err(Error::Unsupported {
                        device: device.id(),
                        op: format!("{} {:?}", command.op.kind().name(), command.label),
                        reason: "the ABI has no code for it".to_string(),
                    });
                }
                self.placed.push((self.entries.len(), start));
            }
            ListAction::Collectives { communicator, batch, label } => {
                let Some(own) = communicator.as_any().downcast_ref::<VaccCommunicator>() else {
                    let kind = batch.first().map_or("collective", |c| c.kind().name());
                    let problem = "the communicator is another backend's";
                    return Err(Error::misuse(device.id(), kind, label, problem));
                };
                wire.action = VACC_LIST_COLLECTIVES;
                named(&mut wire, label);
                let wires = Wires::new(device, batch)?;
                (wire.comm, wire.batch) = (own.handle, wires.as_ptr());
                wire.count = batch.len() as u32;
                self.batches.push(wires);
            }
            ListAction::Fill { region: to, byte } => {
                wire.action = VACC_LIST_FILL;
                (wire.region, wire.byte) = (region(device, to)?, u32::from(*byte));
            }
            ListAction::Wait(target) => {
                wire.action = VACC_LIST_WAIT;
                wire.wait = match target {
                    WaitFor::Start => START,
                    WaitFor::Entry(entry) => *entry as u64,
                };
            }
        }
        self.entries.push(wire);
        Ok(())
    }

    #[expect(unsafe_code, reason = "calls the library")]
    fn launch(mut self, device: &DeviceShared, streams: &[&StreamShared]) -> Result<()> {
        for &(entry, start) in &self.placed {
            // Only now, since the words have moved while they became more.
            self.entries[entry].descriptor = self.descriptors[start..].as_ptr().cast();
        }
        // In one order, whatever the list's: two launches must not wait for each other.
        let mut order: Vec<&StreamShared> = streams.to_vec();
        order.sort_by_key(|stream| hal::Timeline::stream(*stream));
        let _alone: Vec<_> = order.iter().map(|stream| stream.submitter.lock()).collect();
        let handles: Vec<vacc_stream> = streams.iter().map(|stream| stream.handle).collect();
        let api = device.instance.runtime.api();
        // SAFETY: it is exported; the device is alive, and alone on the streams; entries,
        // descriptors, batches and labels outlive the call.
        let status = unsafe {
            api.vacc_list_launch(
                device.handle,
                handles.as_ptr(),
                handles.len() as u32,
                self.entries.as_ptr(),
                self.entries.len() as u32,
            )
        };
        device.check("vacc_list_launch", status)
    }
}

/// Copies a descriptor behind others.
#[expect(unsafe_code, reason = "reads a descriptor by its size")]
fn append(words: &mut Vec<u64>, descriptor: *const c_void) {
    // SAFETY: descriptors begin with their size in bytes, a multiple of 8, and are aligned to 8.
    let size = unsafe { descriptor.cast::<u32>().read() } as usize;
    // SAFETY: as above; the descriptor is alive during the call.
    let own = unsafe { std::slice::from_raw_parts(descriptor.cast::<u64>(), size / 8) };
    words.extend_from_slice(own);
}

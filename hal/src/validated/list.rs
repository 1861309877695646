//! Checked launches of command lists.

use super::Validated;
use super::stream::CheckedStream;
use crate::{CommandList, Entry, Error, ListAction, Result, Stream, Support, WaitFor};
use std::sync::Arc;

/// Checks every entry as if it were submitted alone, then hands the device behind one list. If an
/// entry is refused, those before it are submitted.
pub(super) fn execute(
    device: &Validated,
    list: &CommandList,
    streams: &[Arc<dyn Stream>],
) -> Result<()> {
    let id = device.inner.properties().id;
    list.check_streams(id, streams)?;
    let own = |stream: &Arc<dyn Stream>| -> Result<Arc<dyn Stream>> {
        checked(device, stream).map(|s| s.inner.clone())
    };
    let inner = streams.iter().map(own).collect::<Result<Vec<_>>>()?;
    let streams = streams.iter().map(|s| checked(device, s)).collect::<Result<Vec<_>>>()?;
    // From the first check until all is submitted, so that every sequence number is known. In one
    // order, whatever the list's: two lists over the same streams must not wait for each other.
    let mut order: Vec<&CheckedStream> = streams.clone();
    order.sort_by_key(|stream| stream.id());
    let _submissions: Vec<_> = order.iter().map(|stream| stream.submission.lock()).collect();

    let mut launch = Launch {
        device,
        list,
        submitted: streams.iter().map(|s| s.inner.point().value()).collect(),
        numbers: Vec::with_capacity(list.entries().len()),
        start: 0,
        streams,
    };
    launch.start = launch.submitted.first().copied().unwrap_or_default();
    for (at, entry) in list.entries().iter().enumerate() {
        if let Err(refused) = launch.check(entry) {
            device.inner.execute(&list.prefix(at), &inner)?;
            return Err(refused);
        }
    }
    device.inner.execute(list, &inner)
}

fn checked<'s>(device: &Validated, stream: &'s Arc<dyn Stream>) -> Result<&'s CheckedStream> {
    match stream.as_any().downcast_ref::<CheckedStream>() {
        Some(stream) if Arc::ptr_eq(&stream.shared, &device.shared) => Ok(stream),
        _ => {
            let problem = format!("{} is not of this system", stream.id());
            Err(Error::usage(device.inner.properties().id, problem))
        }
    }
}

/// A list under examination.
struct Launch<'a> {
    device: &'a Validated,
    list: &'a CommandList,
    streams: Vec<&'a CheckedStream>,
    /// The last command of each stream, with the entries checked so far.
    submitted: Vec<u64>,
    /// The number that each entry gets on its stream.
    numbers: Vec<u64>,
    /// The last command of stream 0 before the list.
    start: u64,
}

impl Launch<'_> {
    /// Checks the next entry, also whether the device behind will take it: the checks of those after
    /// it rest on that.
    fn check(&mut self, entry: &Entry) -> Result<()> {
        let stream = self.streams[entry.stream];
        let number = self.submitted[entry.stream] + 1;
        match &entry.action {
            ListAction::Op(command) => {
                stream.check_op(number, command)?;
                if let Support::No(reason) = self.device.inner.supports(&command.op.desc()) {
                    let op = format!("{} {:?}", command.op.kind().name(), command.label);
                    let device = stream.id().device;
                    return Err(Error::Unsupported { device, op, reason });
                }
            }
            ListAction::Collectives { communicator, batch, label } => {
                stream.check_collectives(number, communicator, batch, label)?;
            }
            ListAction::Fill { region, .. } => stream.check_fill(number, region)?,
            ListAction::Wait(target) => {
                let (other, value) = match *target {
                    WaitFor::Start => (0, self.start),
                    WaitFor::Entry(e) => (self.list.entries()[e].stream, self.numbers[e]),
                };
                let other = self.streams[other].id();
                self.device.shared.order.wait(stream.id(), number, other, value);
            }
        }
        self.submitted[entry.stream] = number;
        self.numbers.push(number);
        Ok(())
    }
}

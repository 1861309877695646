//! Launching command lists: the commands enter their queues as if submitted one by one, and the host
//! has issued all of them at once.

use super::{Launch, SimStream};
use crate::system::Shared;
use hal::{CommandList, Entry, Error, ListAction, Result, Stream, WaitFor};
use std::sync::Arc;

/// Submits the entries of a list in order. The streams were checked to fit.
pub(crate) fn execute(
    system: &Arc<Shared>,
    list: &CommandList,
    streams: &[Arc<dyn Stream>],
) -> Result<()> {
    let streams = streams.iter().map(|s| own(system, s)).collect::<Result<Vec<_>>>()?;
    let launch = Launch::default();
    let start = streams.first().map_or(0, |s| s.shared.submitted());
    // The number that each entry got on its stream: points of the list.
    let mut values = Vec::with_capacity(list.entries().len());
    for Entry { stream, action } in list.entries() {
        let stream = streams[*stream];
        values.push(match action {
            ListAction::Op(command) => stream.launch_op(command, &launch)?,
            ListAction::Collectives { communicator, batch, label } => {
                stream.launch_collectives(communicator, batch, label, &launch)?
            }
            ListAction::Fill { region, byte } => stream.launch_fill(region, *byte, &launch)?,
            ListAction::Wait(target) => {
                let (other, value) = match *target {
                    WaitFor::Start => (0, start),
                    WaitFor::Entry(e) => (list.entries()[e].stream, values[e]),
                };
                stream.shared.wait_for(&streams[other].shared, value, &launch)?
            }
        });
    }
    Ok(())
}

fn own<'s>(system: &Arc<Shared>, stream: &'s Arc<dyn Stream>) -> Result<&'s SimStream> {
    match stream.as_any().downcast_ref::<SimStream>() {
        Some(own) if Arc::ptr_eq(&own.shared.system, system) => Ok(own),
        _ => {
            let id = stream.id();
            Err(Error::usage(id.device, format!("{id} is not of this system")))
        }
    }
}

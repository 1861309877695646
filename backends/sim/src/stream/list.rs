//! Launching command lists: the commands enter their queues as if submitted one by one, and the host
//! has issued all of them at once.
//!
//! A list is taken whole where its first look ([`Prepared`]) and a look at the streams and the
//! memory as they are now leave no doubt that no command of it will be refused. Otherwise its
//! commands are submitted one by one, and the first that is refused says why.

use super::prepared::{Footprint, Launched, Prepared, Rest};
use super::queue::Queued;
use super::{Launch, SimStream};
use crate::system::Shared;
use hal::{CommandList, Entry, Error, ListAction, Result, Stream, StreamId, WaitFor};
use std::sync::Arc;

/// Launches a list. The streams were checked to fit.
pub(crate) fn execute(
    system: &Arc<Shared>,
    list: &CommandList,
    streams: &[Arc<dyn Stream>],
) -> Result<()> {
    let streams = streams.iter().map(|s| own(system, s)).collect::<Result<Vec<_>>>()?;
    let prepared = list.prepared(|| Prepared::new(system, list, &streams));
    if let Some(Some(prepared)) = prepared
        && whole(system, list, prepared, &streams).is_some()
    {
        return Ok(());
    }
    one_by_one(list, &streams)
}

/// Takes a list whole, or leaves no trace.
fn whole(
    system: &Arc<Shared>,
    list: &CommandList,
    prepared: &Arc<Prepared>,
    streams: &[&SimStream],
) -> Option<()> {
    let first = &streams.first()?.shared;
    let die = first.die();
    // Fault rules look at each command when it is submitted.
    if !prepared.fits(system, first.id.device) || die.alive().is_err() || die.faults().is_some() {
        return None;
    }
    if prepared.members.iter().any(|member| member.group.status().is_err()) {
        return None;
    }
    // All queues at once, so that the numbers are known before anything is queued. By ascending id:
    // nobody else who holds a queue waits for another.
    let mut order: Vec<usize> = (0..streams.len()).collect();
    order.sort_by_key(|&at| streams[at].shared.id);
    let mut locked: Vec<_> =
        order.iter().map(|&at| (at, streams[at].shared.queue.lock())).collect();
    locked.sort_by_key(|(at, _)| *at);
    let mut queues: Vec<_> = locked.into_iter().map(|(_, queue)| queue).collect();
    if queues.iter().any(|queue| queue.failure.is_some()) {
        return None;
    }
    let ids = || streams.iter().map(|stream| stream.shared.id);
    let numbered: Vec<_> = ids().zip(queues.iter().map(|queue| queue.submitted)).collect();
    if !unchanged(system, prepared, &numbered) {
        prepared.footprints.iter().for_each(|footprint| {
            footprint.memory.accesses.lock().log();
        });
    }
    let mut settled = prepared.standing.take_settled();
    // From the first byte that a stream touches to the last: who is not sure looks closer.
    let conflicts = settled.iter().any(|&at| {
        let Footprint { memory, reach } = &prepared.footprints[at];
        let mut accesses = memory.accesses.lock();
        let log = accesses.log();
        reach.iter().any(|(stream, range, writes)| {
            log.conflict(&system.order, numbered[*stream].0, range, *writes).is_some()
        })
    });
    if conflicts {
        prepared.standing.put_back(settled);
        return None;
    }

    prepared.standing.launched(numbered.clone());
    // Another thread may look at a buffer meanwhile.
    while !settled.is_empty() {
        for at in settled {
            prepared.footprints[at].memory.accesses.lock().stand(&prepared.standing, at);
        }
        settled = prepared.standing.take_settled();
    }
    for wait in &prepared.waits {
        let [(waiter, before), (signaller, passed)] = [wait.place, wait.target].map(|place| {
            let (id, before) = numbered[place.stream];
            (id, before + place.count)
        });
        system.order.wait(waiter, before, signaller, passed);
    }
    let rounds = prepared.members.iter().map(|m| m.group.take_rounds(m.rank, m.rounds)).collect();
    let with_waits = if prepared.waits.is_empty() { &[] } else { streams };
    let launched = Arc::new(Launched {
        prepared: prepared.clone(),
        streams: with_waits.iter().map(|stream| stream.shared.clone()).collect(),
        before: numbered.iter().map(|(_, before)| *before).collect(),
        rounds,
        attention: prepared.attention_work(list),
        issued: if list.entries().is_empty() { 0 } else { Launch::default().issued(first) },
    });
    let mut starting = Vec::new();
    for (at, queue) in queues.iter_mut().enumerate() {
        let Some(rest) = Rest::of(&launched, at) else { continue };
        for member in prepared.members_of(at) {
            queue.takes_part_in(&member.group);
        }
        queue.submitted += prepared.tracks[at].commands.len() as u64;
        queue.pending.push_back(Queued::List(rest));
        if queue.activity.start() {
            starting.push(at);
        }
    }
    drop(queues);
    starting.into_iter().for_each(|at| streams[at].shared.schedule());
    Some(())
}

/// Whether nothing that the list stood for since its latest launch can conflict with a new one: it
/// is on the same streams, and each of them knows that launch to be done on all others.
fn unchanged(system: &Arc<Shared>, prepared: &Prepared, numbered: &[(StreamId, u64)]) -> bool {
    let latest = prepared.standing.latest();
    let same = latest.len() == numbered.len()
        && latest.iter().zip(numbered).all(|((old, _), (new, _))| old == new);
    same && latest.iter().zip(&prepared.tracks).all(|((earlier, before), track)| {
        let last = before + track.commands.len() as u64;
        track.commands.is_empty()
            || latest.iter().all(|(later, _)| system.order.is_ordered(*earlier, last, *later))
    })
}

/// Submits the entries of a list in order.
fn one_by_one(list: &CommandList, streams: &[&SimStream]) -> Result<()> {
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

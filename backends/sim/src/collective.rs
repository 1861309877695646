//! Communicators: ranks meet, check that they agree, and exchange.
//!
//! The last rank to arrive carries a group collective out for all; a send and its receive are
//! carried out by whoever comes second. Nobody blocks. A failure of any rank, a disagreement or an
//! abort fails the group: the first failure stays, and every rank gets it.

mod exchange;
mod movement;
mod reduce;

use crate::cost::{Cost, Exchanged};
use crate::memory::{BorrowError, Guards, SimTensor, Slot, Slots, Span, arranged};
use crate::stream::{Held, Launch, StreamShared, Touch, Work};
use crate::system::Shared;
use crate::timeline::{PairKey, Step};
pub(crate) use exchange::Part;
use exchange::Shape;
use hal::op::Access;
use hal::trace::{CommandKind, WaitedFor};
use hal::{
    Cause, Collective, CollectiveKind, Communicator, CommunicatorId, DeviceId, Error, Label, Result,
};
use movement::Obstacle;
use parking_lot::Mutex;
use std::any::Any;
use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::sync::atomic::Ordering;

/// A communicator, as its ranks share it.
#[derive(Debug)]
pub(crate) struct Group {
    id: CommunicatorId,
    size: usize,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    /// The die of each rank that has joined.
    members: HashMap<usize, DeviceId>,
    /// Batches of group collectives that each rank has submitted.
    submitted: HashMap<usize, u64>,
    rounds: HashMap<u64, Round>,
    sends: HashMap<(usize, usize), VecDeque<Posted>>,
    receives: HashMap<(usize, usize), VecDeque<Posted>>,
    failure: Option<Error>,
}

/// The ranks that have arrived at one batch of group collectives.
#[derive(Debug, Default)]
struct Round {
    arrivals: Vec<(usize, Held, Arc<[Part]>)>,
}

/// One send or receive that waits for its counterpart.
#[derive(Debug)]
struct Posted {
    tensor: SimTensor,
    batch: Arc<PeerBatch>,
    /// Its number in the batch.
    part: usize,
}

/// A batch of sends and receives of one rank: done when each of them is.
#[derive(Debug)]
struct PeerBatch {
    held: Mutex<Option<Held>>,
    progress: Mutex<Progress>,
    /// The batch's place on its stream.
    command: WaitedFor,
}

#[derive(Debug)]
struct Progress {
    left: usize,
    pairs: Vec<(PairKey, u64)>,
    bytes: u64,
}

/// One rank's submitted batch, on its way through the stream.
#[derive(Debug)]
pub(crate) struct Submission {
    group: Arc<Group>,
    rank: usize,
    /// The batch's number among the rank's group collectives; absent for sends and receives.
    round: Option<u64>,
    parts: Arc<[Part]>,
}

impl Group {
    pub(crate) fn new(id: CommunicatorId, size: usize) -> Self {
        Group { id, size, state: Mutex::default() }
    }

    /// A rank joins.
    pub(crate) fn join(&self, device: DeviceId, rank: usize, size: usize) -> Result<()> {
        if size != self.size || rank >= size {
            let problem =
                format!("rank {rank} of {size} cannot join a communicator of {}", self.size);
            return Err(Error::usage(device, problem));
        }
        let mut state = self.state.lock();
        if let Some(other) = state.members.get(&rank) {
            let problem = format!("rank {rank} of the communicator is taken by {other}");
            return Err(Error::usage(device, problem));
        }
        state.members.insert(rank, device);
        Ok(())
    }

    /// Gives a rank numbers for its next batches of group collectives; the last one before them.
    pub(crate) fn take_rounds(&self, rank: usize, count: u64) -> u64 {
        let mut state = self.state.lock();
        let submitted = state.submitted.entry(rank).or_default();
        *submitted += count;
        *submitted - count
    }

    /// An error if it has failed.
    pub(crate) fn status(&self) -> Result<()> {
        self.state.lock().failure.clone().map_or(Ok(()), Err)
    }

    /// Fails everything pending and everything later. The first failure stays.
    pub(crate) fn fail(&self, error: Error) {
        let mut victims = Vec::new();
        {
            let mut state = self.state.lock();
            if state.failure.is_some() {
                return;
            }
            state.failure = Some(error.clone());
            for (_, round) in state.rounds.drain() {
                victims.extend(round.arrivals.into_iter().map(|(_, held, _)| held));
            }
            let posted: Vec<Posted> = {
                let State { sends, receives, .. } = &mut *state;
                sends.drain().chain(receives.drain()).flat_map(|(_, queue)| queue).collect()
            };
            victims.extend(posted.iter().filter_map(|p| p.batch.held.lock().take()));
        }
        for held in victims {
            held.fail(error.clone());
        }
    }

    fn devices(&self, state: &State) -> Vec<DeviceId> {
        (0..self.size).filter_map(|rank| state.members.get(&rank).copied()).collect()
    }
}

impl Submission {
    pub(crate) fn new(
        group: Arc<Group>,
        rank: usize,
        round: Option<u64>,
        parts: Arc<[Part]>,
    ) -> Self {
        Submission { group, rank, round, parts }
    }

    /// Whom it waits for where it is the head of its stream.
    pub(crate) fn waits_for(&self) -> WaitedFor {
        WaitedFor::Ranks { communicator: self.group.id, round: self.round.unwrap_or(0) }
    }

    /// The batch has become the head of its stream.
    pub(crate) fn arrive(self, held: Held) {
        let system = held.stream.system.clone();
        match self.round {
            Some(round) => self.arrive_at_round(&system, round, held),
            None => self.post(&system, held),
        }
    }

    fn arrive_at_round(self, system: &Arc<Shared>, number: u64, mut held: Held) {
        held.waited_for = Some(self.waits_for());
        let complete = {
            let mut state = self.group.state.lock();
            if let Some(failure) = state.failure.clone() {
                drop(state);
                return held.fail(failure);
            }
            let round = state.rounds.entry(number).or_default();
            round.arrivals.push((self.rank, held, self.parts));
            if round.arrivals.len() < self.group.size {
                return;
            }
            let devices = self.group.devices(&state);
            state.rounds.remove(&number).map(|round| (round, devices))
        };
        if let Some((mut round, devices)) = complete {
            round.arrivals.sort_by_key(|(rank, ..)| *rank);
            run_round(system.clone(), self.group, number, round, devices);
        }
    }

    /// Matches each send and receive with its counterpart, or leaves it to wait.
    fn post(self, system: &Arc<Shared>, held: Held) {
        let batch = Arc::new(PeerBatch {
            command: WaitedFor::Command { stream: held.stream.id, sequence: held.sequence },
            progress: Mutex::new(Progress { left: self.parts.len(), pairs: Vec::new(), bytes: 0 }),
            held: Mutex::new(Some(held)),
        });
        let mut matched = Vec::new();
        {
            let mut state = self.group.state.lock();
            if let Some(failure) = state.failure.clone() {
                drop(state);
                let held = batch.held.lock().take();
                return held.into_iter().for_each(|held| held.fail(failure.clone()));
            }
            let State { sends, receives, .. } = &mut *state;
            for (number, part) in self.parts.iter().enumerate() {
                let (mine, theirs, key, tensor) = match (&part.shape, &part.send, &part.recv) {
                    (Shape::Send { peer }, Some(t), _) => {
                        (&mut *sends, &mut *receives, (self.rank, *peer), t)
                    }
                    (Shape::Receive { peer }, _, Some(t)) => {
                        (&mut *receives, &mut *sends, (*peer, self.rank), t)
                    }
                    _ => continue,
                };
                let (tensor, batch) = (tensor.clone(), batch.clone());
                let posted = Posted { tensor, batch, part: number };
                match theirs.get_mut(&key).and_then(VecDeque::pop_front) {
                    Some(other) => {
                        let send_first = matches!(part.shape, Shape::Send { .. });
                        matched.push((
                            key,
                            if send_first { (posted, other) } else { (other, posted) },
                        ));
                    }
                    None => mine.entry(key).or_default().push_back(posted),
                }
            }
        }
        for ((from, to), (send, receive)) in matched {
            run_pair(system.clone(), self.group.clone(), (from, to), send, receive);
        }
    }
}

/// Carries out a batch that every rank has arrived at.
fn run_round(
    system: Arc<Shared>,
    group: Arc<Group>,
    number: u64,
    round: Round,
    devices: Vec<DeviceId>,
) {
    let ranks: Vec<&[Part]> = round.arrivals.iter().map(|(_, _, parts)| &**parts).collect();
    let fail = |rank: usize, cause| {
        let origin = round.arrivals[rank].1.failure(cause);
        group.fail(origin.clone());
        origin
    };
    let exchanged = match exchange::check(&ranks) {
        Err(text) => Err(fail(0, Cause::Mismatch(text))),
        Ok(()) if !system.mode.functional() => Ok(expected_bytes(&ranks)),
        Ok(()) => match movement::run(&ranks) {
            Ok(bytes) => Ok(bytes),
            // Come back when the other command is done.
            Err(Obstacle::Busy) => {
                let again = system.clone();
                return system
                    .pool
                    .run_once(move || run_round(again, group, number, round, devices));
            }
            Err(Obstacle::Data(rank, text)) => Err(fail(rank, Cause::Data(text))),
        },
    };
    match exchanged {
        Ok(bytes) => {
            let cost = total_cost(&system, ranks[0], &bytes, &devices);
            let (key, size) = ((group.id.0, number), devices.len() as u32);
            for (_, held, _) in round.arrivals {
                held.complete(Step::Meet { key, size, cost }, cost);
            }
        }
        Err(origin) => {
            for (_, held, _) in round.arrivals {
                held.fail(origin.clone());
            }
        }
    }
}

/// Bytes of the rank with the most to do, for each collective of the batch, where no values tell.
fn expected_bytes(ranks: &[&[Part]]) -> Vec<u64> {
    let most = |i: usize| ranks.iter().map(|parts| parts[i].bytes()).max().unwrap_or(0);
    (0..ranks[0].len()).map(most).collect()
}

fn total_cost(system: &Shared, batch: &[Part], bytes: &[u64], devices: &[DeviceId]) -> Cost {
    if !system.mode.timed() {
        return Cost::NOTHING;
    }
    let parts = batch.iter().zip(bytes).map(|(part, &bytes)| part.exchanged(bytes));
    system.cost.batch(parts, devices, &system.topology)
}

/// Carries out a send and its receive.
fn run_pair(
    system: Arc<Shared>,
    group: Arc<Group>,
    (from, to): (usize, usize),
    send: Posted,
    receive: Posted,
) {
    let (a, b) = (&send.tensor, &receive.tensor);
    if a.desc.dtype() != b.desc.dtype() || a.desc.elements() != b.desc.elements() {
        let text = format!("rank {from} sends {:?} and rank {to} expects {:?}", a.desc, b.desc);
        let held = [&send, &receive].map(|p| p.batch.held.lock().take());
        let origin = held.iter().flatten().next().map(|h| h.failure(Cause::Mismatch(text)));
        if let Some(origin) = origin {
            group.fail(origin.clone());
            held.into_iter().flatten().for_each(|h| h.fail(origin.clone()));
        }
        return;
    }
    if system.mode.functional() && copy(a, b).is_err() {
        let again = system.clone();
        return system.pool.run_once(move || run_pair(again, group, (from, to), send, receive));
    }
    let cost = match system.mode.timed() {
        true => system.cost.collective(
            &Exchanged { kind: CollectiveKind::Send, bytes: a.desc.bytes(), rows: 0 },
            &[a.memory.device, b.memory.device],
            &system.topology,
        ),
        false => Cost::NOTHING,
    };
    let number = system.next_pair.fetch_add(1, Ordering::Relaxed);
    let key = (group.id.0, from as u32, to as u32, number);
    send.batch.one_done(send.part, receive.batch.command, key, cost);
    receive.batch.one_done(receive.part, send.batch.command, key, cost);
}

fn copy(src: &SimTensor, dst: &SimTensor) -> Result<(), BorrowError> {
    let spans = arranged([
        Span::new(&src.memory, src.offset, src.desc.extent(), Access::Read),
        Span::new(&dst.memory, dst.offset, dst.desc.extent(), Access::Write),
    ]);
    let (mut guards, mut slots) = (Guards::default(), Slots::new());
    guards.lock(&spans)?;
    guards.carve(&spans, &mut slots)?;
    if let [Slot::Read(from), Slot::Write(to)] = slots.as_mut_slice() {
        to.copy_from_slice(from);
    }
    Ok(())
}

impl PeerBatch {
    fn one_done(&self, part: usize, counterpart: WaitedFor, key: PairKey, cost: Cost) {
        if part == 0
            && let Some(held) = &mut *self.held.lock()
        {
            held.waited_for = Some(counterpart);
        }
        let finished = {
            let mut progress = self.progress.lock();
            progress.left -= 1;
            progress.pairs.push((key, cost.picos));
            progress.bytes += cost.bytes;
            (progress.left == 0).then(|| (std::mem::take(&mut progress.pairs), progress.bytes))
        };
        if let Some((pairs, bytes)) = finished
            && let Some(held) = self.held.lock().take()
        {
            let bound = hal::trace::Bound::Link;
            held.complete(Step::Pairs { pairs }, Cost { bytes, bound, ..Cost::NOTHING });
        }
    }
}

/// One rank of a group.
#[derive(Debug)]
pub(crate) struct SimCommunicator {
    system: Arc<Shared>,
    group: Arc<Group>,
    device: DeviceId,
    rank: usize,
}

impl SimCommunicator {
    pub(crate) fn new(
        system: Arc<Shared>,
        group: Arc<Group>,
        device: DeviceId,
        rank: usize,
    ) -> Self {
        SimCommunicator { system, group, device, rank }
    }

    pub(crate) fn check_device(
        &self,
        stream: DeviceId,
        kind: CommandKind,
        label: &Label,
    ) -> Result<()> {
        if stream == self.device {
            return Ok(());
        }
        let problem =
            format!("rank {} of the communicator is {}, not {stream}", self.rank, self.device);
        Err(Error::misuse(stream, kind.name(), label, problem))
    }

    /// Queues this rank's batch on a stream and returns its sequence number there; `placed` is the
    /// same batch over the simulator's memory.
    #[expect(clippy::too_many_arguments, reason = "a batch, its memory, and how it is submitted")]
    pub(crate) fn submit(
        &self,
        stream: &Arc<StreamShared>,
        kind: CommandKind,
        label: &Label,
        batch: &[Collective],
        placed: &[Collective<SimTensor>],
        touches: &[Touch<'_>],
        launch: &Launch,
    ) -> Result<u64> {
        let misuse = |problem| Error::misuse(self.device, kind.name(), label, problem);
        let parts = self.parts(batch, placed).map_err(misuse)?;
        let peer_to_peer = parts.iter().any(Part::is_peer_to_peer);
        self.status()?;
        stream.takes_part_in(&self.group);
        let admitted = stream.admit(kind, label, touches, launch).inspect_err(|error| {
            // This rank will not take part: nobody shall wait for it.
            if !matches!(error, Error::Usage(_)) {
                self.group.fail(error.clone());
            }
        })?;
        let round = (!peer_to_peer).then(|| self.group.take_rounds(self.rank, 1) + 1);
        let group = self.group.clone();
        Ok(admitted.push(Work::Collective(Submission::new(group, self.rank, round, parts))))
    }

    /// This rank's parts of a batch; `placed` is the same over the simulator's memory.
    ///
    /// # Errors
    ///
    /// What is wrong with the batch.
    pub(crate) fn parts(
        &self,
        batch: &[Collective],
        placed: &[Collective<SimTensor>],
    ) -> Result<Arc<[Part]>, String> {
        hal::collective::check(batch, self.rank, self.group.size)?;
        Ok(placed.iter().map(|c| Part::new(c, self.rank)).collect())
    }

    /// The group, and which rank of it this is.
    pub(crate) fn member(&self) -> (&Arc<Group>, usize) {
        (&self.group, self.rank)
    }
}

impl Communicator for SimCommunicator {
    fn as_any(&self) -> &dyn Any {
        self
    }

    fn id(&self) -> CommunicatorId {
        self.group.id
    }

    fn rank(&self) -> usize {
        self.rank
    }

    fn size(&self) -> usize {
        self.group.size
    }

    fn device(&self) -> DeviceId {
        self.device
    }

    fn abort(&self, reason: &str) {
        let origin = hal::Failure {
            stream: hal::StreamId { device: self.device, index: 0 },
            stream_label: "host".into(),
            sequence: 0,
            op: "abort",
            label: Label::Static("communicator"),
            cause: Cause::Aborted(reason.into()),
        };
        self.group.fail(Error::Failed(Arc::new(origin)));
    }

    fn status(&self) -> Result<()> {
        self.group.status()
    }
}

impl Drop for SimCommunicator {
    fn drop(&mut self) {
        let mut groups = self.system.groups.lock();
        // The last rank's handle takes the group out of the registry.
        if let Some(group) = groups.get(&self.group.id)
            && Arc::ptr_eq(group, &self.group)
        {
            let empty = {
                let mut state = group.state.lock();
                state.members.remove(&self.rank);
                state.members.is_empty()
            };
            if empty {
                groups.remove(&self.group.id);
            }
        }
    }
}

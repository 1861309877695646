//! A command list, looked at once for all its launches.
//!
//! What does not change from launch to launch is worked out at the first: memory behind operands,
//! what shape rules and communicators say, the order of commands inside the list, and which of
//! their accesses meet those of commands outside. [`super::list`] launches the whole as one; the
//! queue then holds what is [left](Rest) of it on each stream.

use super::SimStream;
use super::queue::{Pending, StreamShared};
use super::recipe::Recipe;
use super::work::{Halt, Work};
use crate::collective::{Group, Part, SimCommunicator, Submission};
use crate::cost::Cost;
use crate::memory::{self, Extent, Memory, Standing};
use crate::system::Shared;
use hal::hazard::{AccessLog, StreamOrder};
use hal::op::{Access, AttentionWork};
use hal::trace::CommandKind;
use hal::{BufferId, CommandList, DeviceId, Entry, Label, ListAction, Op, StreamId, WaitFor};
use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::{Arc, Weak};

/// What a list comes to, on any streams of its die.
#[derive(Debug)]
pub(super) struct Prepared {
    system: Weak<Shared>,
    device: DeviceId,
    /// What each stream of the list has of it.
    pub(super) tracks: Vec<Track>,
    /// The waits, in the order of issue.
    pub(super) waits: Vec<Wait>,
    /// The memory that it touches, each once.
    pub(super) footprints: Vec<Footprint>,
    /// What is noted of its accesses to each.
    pub(super) standing: Arc<Standing>,
    pub(super) members: Vec<Member>,
    /// The entries whose amount of work each launch tells.
    attention: Vec<usize>,
}

/// One stream's commands of a list, in order, and all that they touch: read from end to end.
#[derive(Debug, Default)]
pub(super) struct Track {
    pub(super) commands: Vec<Command>,
    operands: Vec<Extent>,
    pub(super) script: Arc<Script>,
}

/// The recipes of a track, for those who tell of it later: without its memory, which may be freed by
/// then, and without its streams.
#[derive(Debug, Default)]
pub(crate) struct Script(Vec<Option<Arc<Recipe>>>);

impl Script {
    /// The recipe of a command, if it is an op.
    pub(crate) fn recipe(&self, at: u32) -> Option<&Recipe> {
        self.0.get(at as usize)?.as_deref()
    }
}

impl Track {
    fn finish(&mut self) {
        let recipe = |command: &Command| match command {
            Command::Op { recipe, .. } => Some(recipe.clone()),
            _ => None,
        };
        self.script = Arc::new(Script(self.commands.iter().map(recipe).collect()));
    }
}

/// A command of a list.
#[derive(Debug)]
pub(super) enum Command {
    Op {
        recipe: Arc<Recipe>,
        /// Its part of the operands.
        operands: Range<usize>,
        /// Which of the launch's amounts of attention work is its own.
        attention: Option<usize>,
    },
    Fill {
        memory: Arc<Memory>,
        offset: u64,
        len: u64,
        byte: u8,
    },
    Wait(Place),
    Collective {
        kind: CommandKind,
        label: Label,
        member: usize,
        /// Its number among the group collectives of the list; absent for sends and receives.
        round: Option<u64>,
        parts: Arc<[Part]>,
    },
}

impl Command {
    pub(super) fn kind(&self) -> CommandKind {
        match self {
            Command::Op { recipe, .. } => CommandKind::Op(recipe.kind()),
            Command::Fill { .. } => CommandKind::Fill,
            Command::Wait(_) => CommandKind::Wait,
            Command::Collective { kind, .. } => *kind,
        }
    }

    pub(super) fn label(&self) -> Label {
        match self {
            Command::Op { recipe, .. } => recipe.label.clone(),
            Command::Fill { .. } => Label::Static("fill"),
            Command::Wait(_) => Label::Static("wait"),
            Command::Collective { label, .. } => label.clone(),
        }
    }
}

/// A command of the list: its stream, and how many the list has there up to it. None stands for
/// what was there before the list.
#[derive(Clone, Copy, Debug)]
pub(super) struct Place {
    pub(super) stream: usize,
    pub(super) count: u64,
}

/// A wait, and its place on its own stream.
#[derive(Clone, Copy, Debug)]
pub(super) struct Wait {
    pub(super) place: Place,
    pub(super) target: Place,
}

/// What a list does to one buffer.
#[derive(Debug)]
pub(super) struct Footprint {
    pub(super) memory: Arc<Memory>,
    /// Of each stream that touches it, from the first byte to the last, and whether it writes any.
    pub(super) reach: Vec<(usize, Range<u64>, bool)>,
}

/// A communicator of the list.
#[derive(Debug)]
pub(super) struct Member {
    pub(super) group: Arc<Group>,
    pub(super) rank: usize,
    /// Group collectives in the list.
    pub(super) rounds: u64,
    /// The streams with collectives of it.
    streams: Vec<usize>,
}

impl Prepared {
    /// Looks at every command of a list as if it were submitted. `None` if one will be refused at
    /// each launch: which one first and with what words, a launch of its own must tell.
    pub(super) fn new(
        system: &Arc<Shared>,
        list: &CommandList,
        streams: &[&SimStream],
    ) -> Option<Arc<Prepared>> {
        let device = streams.first()?.shared.id.device;
        let mut maker = Maker {
            places: Vec::with_capacity(list.entries().len()),
            order: StreamOrder::default(),
            footprints: BTreeMap::new(),
            made: Prepared {
                system: Arc::downgrade(system),
                device,
                tracks: streams.iter().map(|_| Track::default()).collect(),
                waits: Vec::new(),
                footprints: Vec::new(),
                standing: Arc::new(Standing::new(Vec::new())),
                members: Vec::new(),
                attention: Vec::new(),
            },
        };
        for (at, entry) in list.entries().iter().enumerate() {
            maker.add(at, entry, streams[entry.stream])?;
        }
        let Maker { mut made, footprints, .. } = maker;
        let (footprints, logs) = footprints.into_values().unzip();
        (made.footprints, made.standing) = (footprints, Arc::new(Standing::new(logs)));
        made.tracks.iter_mut().for_each(Track::finish);
        Some(Arc::new(made))
    }

    /// Whether it was made for this die.
    pub(super) fn fits(&self, system: &Arc<Shared>, device: DeviceId) -> bool {
        std::ptr::eq(self.system.as_ptr(), Arc::as_ptr(system)) && self.device == device
    }

    /// The communicators that a stream has collectives of.
    pub(super) fn members_of(&self, stream: usize) -> impl Iterator<Item = &Member> {
        self.members.iter().filter(move |member| member.streams.contains(&stream))
    }

    /// The amounts of attention work that the list now tells.
    pub(super) fn attention_work(&self, list: &CommandList) -> Box<[AttentionWork]> {
        let of = |&entry: &usize| match &list.entries()[entry].action {
            ListAction::Op(command) => attention_work(&command.op).unwrap_or_default(),
            _ => AttentionWork::default(),
        };
        self.attention.iter().map(of).collect()
    }
}

fn attention_work<T>(op: &Op<T>) -> Option<AttentionWork> {
    match op {
        Op::MlaPrefill(op) => Some(op.work),
        Op::MlaDecode(op) => Some(op.work),
        _ => None,
    }
}

/// A list under examination.
struct Maker {
    /// Of each entry, where it is.
    places: Vec<Place>,
    /// The order that the list's own waits establish.
    order: StreamOrder,
    footprints: BTreeMap<BufferId, (Footprint, AccessLog)>,
    made: Prepared,
}

impl Maker {
    fn add(&mut self, at: usize, entry: &Entry, stream: &SimStream) -> Option<()> {
        let count = self.made.tracks[entry.stream].commands.len() as u64 + 1;
        let place = Place { stream: entry.stream, count };
        let command = match &entry.action {
            ListAction::Op(command) => {
                let op = stream.resolve_op(command).ok()?;
                let mut ordered = true;
                op.visit(|_, access, t| {
                    ordered &= self.touch(place, &t.memory, t.offset, t.desc.extent(), access);
                });
                if !ordered {
                    return None;
                }
                let attention = attention_work(&op).map(|_| {
                    self.made.attention.push(at);
                    self.made.attention.len() - 1
                });
                let all = &mut self.made.tracks[entry.stream].operands;
                let first = all.len();
                all.extend(memory::extents(&op));
                let operands = first..all.len();
                let recipe = stream.shared.system.recipes.get(&op, &command.label);
                Command::Op { recipe, operands, attention }
            }
            ListAction::Fill { region, byte } => {
                let memory = stream.region(region).ok()?.clone();
                let (offset, len, byte) = (region.offset, region.len, *byte);
                if !self.touch(place, &memory, offset, len, Access::Write) {
                    return None;
                }
                Command::Fill { memory, offset, len, byte }
            }
            ListAction::Wait(target) => {
                let target = match *target {
                    WaitFor::Start => Place { stream: 0, count: 0 },
                    WaitFor::Entry(entry) => self.places[entry],
                };
                self.made.waits.push(Wait { place, target });
                let [waiter, signaller] = [place, target].map(|p| self.stand_in(p.stream));
                self.order.wait(waiter, count, signaller, target.count);
                Command::Wait(target)
            }
            ListAction::Collectives { communicator, batch, label } => {
                let resolved = stream.resolve_collectives(communicator, batch, label).ok()?;
                let communicator = resolved.communicator;
                let parts = communicator.parts(batch, &resolved.placed).ok()?;
                let mut ordered = true;
                for collective in &resolved.placed {
                    collective.visit(communicator.member().1, |_, access, t| {
                        ordered &= self.touch(place, &t.memory, t.offset, t.desc.extent(), access);
                    });
                }
                if !ordered {
                    return None;
                }
                let member = self.member(communicator);
                let streams = &mut self.made.members[member].streams;
                if !streams.contains(&place.stream) {
                    streams.push(place.stream);
                }
                let round = (!parts.iter().any(Part::is_peer_to_peer)).then(|| {
                    let rounds = &mut self.made.members[member].rounds;
                    *rounds += 1;
                    *rounds
                });
                let (kind, label) = (resolved.kind, label.clone());
                Command::Collective { kind, label, member, round, parts }
            }
        };
        self.made.tracks[entry.stream].commands.push(command);
        self.places.push(place);
        Some(())
    }

    /// What stands for a stream of the list while there is none.
    fn stand_in(&self, stream: usize) -> StreamId {
        StreamId { device: self.made.device, index: stream as u32 }
    }

    /// Notes an access; `false` if the list itself does not order it after another.
    fn touch(
        &mut self,
        place: Place,
        memory: &Arc<Memory>,
        offset: u64,
        len: u64,
        access: Access,
    ) -> bool {
        let (stream, range, writes) =
            (self.stand_in(place.stream), offset..offset + len, access.writes());
        let (footprint, log) = self.footprints.entry(memory.id).or_insert_with(|| {
            let footprint = Footprint { memory: memory.clone(), reach: Vec::new() };
            (footprint, AccessLog::default())
        });
        if !range.is_empty() {
            match footprint.reach.iter_mut().find(|(stream, ..)| *stream == place.stream) {
                Some((_, reach, wrote)) => {
                    *reach = reach.start.min(range.start)..reach.end.max(range.end);
                    *wrote |= writes;
                }
                None => footprint.reach.push((place.stream, range.clone(), writes)),
            }
        }
        log.access(&self.order, stream, place.count, range, writes).is_ok()
    }

    fn member(&mut self, communicator: &SimCommunicator) -> usize {
        let (group, rank) = communicator.member();
        let known = |m: &Member| Arc::ptr_eq(&m.group, group) && m.rank == rank;
        self.made.members.iter().position(known).unwrap_or_else(|| {
            self.made.members.push(Member {
                group: group.clone(),
                rank,
                rounds: 0,
                streams: Vec::new(),
            });
            self.made.members.len() - 1
        })
    }
}

/// One launch of a list.
#[derive(Debug)]
pub(super) struct Launched {
    pub(super) prepared: Arc<Prepared>,
    /// The list's streams, if they wait for each other.
    pub(super) streams: Vec<Arc<StreamShared>>,
    /// The last command of each before the list.
    pub(super) before: Vec<u64>,
    /// The last group collective of each member before the list.
    pub(super) rounds: Vec<u64>,
    pub(super) attention: Box<[AttentionWork]>,
    /// When the host had issued it.
    pub(super) issued: u64,
}

impl Launched {
    /// Asks for what the commands after this one will look at. With many dies, every command is one
    /// that was last looked at long ago, and without asking it would wait for each of these in turn.
    fn fetch_ahead(&self, stream: usize, at: usize) {
        let Track { commands, operands: all, .. } = &self.prepared.tracks[stream];
        let operands = |at: usize| match commands.get(at) {
            Some(Command::Op { operands, .. }) => &all[operands.clone()],
            _ => &[],
        };
        operands(at + 2).iter().for_each(Extent::fetch);
        operands(at + 1).iter().for_each(Extent::fetch_bytes);
    }
}

/// What is left of a launch on one stream.
#[derive(Debug)]
pub(super) struct Rest {
    pub(super) launched: Arc<Launched>,
    pub(super) stream: usize,
    pub(super) done: usize,
}

impl Rest {
    /// All of it; `None` if it has nothing for this stream.
    pub(super) fn of(launched: &Arc<Launched>, stream: usize) -> Option<Rest> {
        let rest = Rest { launched: launched.clone(), stream, done: 0 };
        (!rest.is_empty()).then_some(rest)
    }

    pub(super) fn is_empty(&self) -> bool {
        self.done == self.track().commands.len()
    }

    pub(super) fn track(&self) -> &Track {
        &self.launched.prepared.tracks[self.stream]
    }

    /// The number of the next command.
    pub(super) fn sequence(&self) -> u64 {
        self.launched.before[self.stream] + self.done as u64 + 1
    }

    /// The next command.
    pub(super) fn command(&self) -> &Command {
        &self.track().commands[self.done]
    }

    /// Carries the next command out if it is an op. Says what it cost if that is not as usual.
    pub(super) fn run(&self, system: &Shared) -> Option<Result<Option<Cost>, Halt>> {
        let Command::Op { recipe, operands, attention } = self.command() else { return None };
        self.launched.fetch_ahead(self.stream, self.done);
        let attention = attention.map(|at| self.launched.attention[at]);
        Some(recipe.run(&self.track().operands[operands.clone()], attention, system))
    }

    /// Takes the next command out, which is not an op, as if it had been queued by itself.
    pub(super) fn take(&mut self) -> Pending {
        let (command, launched) = (self.command(), &self.launched);
        let work = match command {
            Command::Fill { memory, offset, len, byte } => {
                let (memory, offset, len, byte) = (memory.clone(), *offset, *len, *byte);
                Work::Fill { memory, offset, len, byte }
            }
            Command::Wait(Place { stream, count }) => Work::Wait {
                target: launched.streams[*stream].clone(),
                value: launched.before[*stream] + count,
            },
            Command::Collective { member, round, parts, .. } => {
                let Member { group, rank, .. } = &launched.prepared.members[*member];
                let round = round.map(|round| launched.rounds[*member] + round);
                Work::Collective(Submission::new(group.clone(), *rank, round, parts.clone()))
            }
            Command::Op { .. } => unreachable!("ops are run where they are"),
        };
        let sequence = self.sequence();
        let pending =
            Pending::new(sequence, command.kind(), command.label(), launched.issued, work);
        self.done += 1;
        pending
    }
}

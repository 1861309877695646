//! Who waited for whom.

use crate::log::Recorded;
use hal::trace::{CommandKind, Span, WaitedFor};
use hal::{CommunicatorId, StreamId};
use std::collections::HashMap;
use std::io;

/// A command by its stream and its number there.
type Command = (StreamId, u64);

/// From the end of one command to the beginning of another.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Arrow {
    pub(super) to: Command,
    pub(super) from: Command,
    pub(super) why: &'static str,
}

/// A stream waited for another's command.
const WAIT: &str = "wait";
/// A rank waited in a collective for what another rank was doing.
const RANK: &str = "waited for rank";
/// Ranks met in a collective at one time: the arrow only shows that they belong together.
const MEETS: &str = "meets rank";

/// All arrows, by where they end; their numbers follow that order.
#[derive(Debug)]
pub(super) struct Arrows {
    arrows: Vec<Arrow>,
    /// The numbers again, by where they begin.
    by_start: Vec<usize>,
    communicators: HashMap<CommunicatorId, usize>,
}

/// What identifies a collective: the round of a communicator, or the two sides of a transfer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Meeting {
    Round(CommunicatorId, u64),
    Pair(Command, Command),
}

/// A rank's part in a collective.
#[derive(Clone, Copy, Debug)]
struct Member {
    command: Command,
    ready: u64,
    start: u64,
    /// The command whose end made it ready.
    after: Option<Command>,
}

impl Arrows {
    /// Reads all spans once.
    pub(super) fn find(recorded: &Recorded) -> io::Result<Arrows> {
        let mut arrows = Vec::new();
        let mut meetings: HashMap<Meeting, Vec<Member>> = HashMap::new();
        let mut communicators = HashMap::new();
        for stream in recorded.streams() {
            let mut waits: Vec<(u64, Command)> = Vec::new();
            let mut after = None;
            for span in recorded.spans(stream) {
                let span = span?;
                let command = (stream, span.sequence);
                if let (CommandKind::Wait, Some(WaitedFor::Command { stream, sequence })) =
                    (span.kind, span.waited_for)
                {
                    if recorded.contains(stream, sequence) {
                        waits.push((span.sequence, (stream, sequence)));
                        if span.start > span.ready {
                            after = Some((stream, sequence));
                        }
                    }
                    continue;
                }
                let wait = |(_, from): (u64, Command)| Arrow { to: command, from, why: WAIT };
                arrows.extend(waits.drain(..).map(wait));
                if let Some(meeting) = meeting(&span) {
                    let Span { ready, start, .. } = span;
                    let member = Member { command, ready, start, after };
                    meetings.entry(meeting).or_default().push(member);
                }
                if let Some(WaitedFor::Ranks { communicator, .. }) = span.waited_for {
                    let next = communicators.len();
                    communicators.entry(communicator).or_insert(next);
                }
                after = Some(command);
            }
            // Nothing came after these.
            let wait = |(at, from)| Arrow { to: (stream, at), from, why: WAIT };
            arrows.extend(waits.into_iter().map(wait));
        }
        meetings.values().for_each(|members| arrows.extend(between(members)));
        arrows.sort_unstable();
        let mut by_start: Vec<usize> = (0..arrows.len()).collect();
        by_start.sort_by_key(|number| (arrows[*number].from, *number));
        Ok(Arrows { arrows, by_start, communicators })
    }

    /// Those that end at a command, with their numbers.
    pub(super) fn ending_at(
        &self,
        stream: StreamId,
        sequence: u64,
    ) -> impl Iterator<Item = (u64, &Arrow)> {
        let to = (stream, sequence);
        let first = self.arrows.partition_point(|arrow| arrow.to < to);
        let numbered = self.arrows.iter().enumerate().skip(first);
        numbered.take_while(move |(_, a)| a.to == to).map(|(number, arrow)| (number as u64, arrow))
    }

    /// Those that begin at a command, with their numbers.
    pub(super) fn beginning_at(
        &self,
        stream: StreamId,
        sequence: u64,
    ) -> impl Iterator<Item = (u64, &Arrow)> {
        let from = (stream, sequence);
        let first = self.by_start.partition_point(|number| self.arrows[*number].from < from);
        let numbered = self.by_start[first..].iter().map(|&n| (n as u64, &self.arrows[n]));
        numbered.take_while(move |(_, arrow)| arrow.from == from)
    }

    /// A communicator's number, by first appearance: ids differ from run to run.
    pub(super) fn communicator(&self, id: CommunicatorId) -> usize {
        self.communicators.get(&id).copied().unwrap_or_default()
    }
}

/// What others of a collective have in common with this command, if it is one.
fn meeting(span: &Span) -> Option<Meeting> {
    let this = (span.stream, span.sequence);
    match span.waited_for? {
        WaitedFor::Ranks { communicator, round } => Some(Meeting::Round(communicator, round)),
        WaitedFor::Command { stream, sequence } => {
            let other = (stream, sequence);
            Some(Meeting::Pair(this.min(other), this.max(other)))
        }
        _ => None,
    }
}

/// From what the last rank to be ready did before, to the collective on every other rank.
fn between(members: &[Member]) -> impl Iterator<Item = Arrow> {
    // Of several, the first by die and stream.
    let last = members.iter().min_by_key(|m| (std::cmp::Reverse(m.ready), m.command));
    let from = last.and_then(|last| Some((*last, last.after?)));
    from.into_iter().flat_map(move |(last, from)| {
        let others = members.iter().filter(move |m| m.command != last.command);
        // Clocks of different dies may disagree; an arrow never leads back in time.
        let others = others.filter(move |m| m.start >= last.ready);
        others.map(move |m| Arrow {
            to: m.command,
            from,
            why: if m.ready < last.ready { RANK } else { MEETS },
        })
    })
}

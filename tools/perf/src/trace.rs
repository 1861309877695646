//! The commands of a played step as a device's tracer would have told them.

use hal::trace::{Bound, CommandKind, Span, TraceSink, WaitedFor};
use hal::{CommunicatorId, DeviceId, DiePlacement, Label, StreamId};
use model::graph::{Node, Work};
use model::schedule::Lane;
use sim::cost::Cost;
use sim::timeline::{Done, PairKey, Step, StreamIndex};
use std::collections::HashMap;

/// A rank of a traced step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TracedRank {
    /// Its number, which is its die's.
    pub rank: usize,
    /// Where the die sits.
    pub placement: DiePlacement,
    /// Ranks that do the same at the same times, itself included.
    pub stands_for: usize,
}

/// Gathers spans while a step is played.
#[derive(Debug, Default)]
pub(crate) struct Watch {
    /// Parts of the step that are done: each has a timeline of its own.
    part: u64,
    /// When this part began.
    began: u64,
    /// The streams of this part's timeline.
    streams: Vec<Stream>,
    /// Commands of each stream in the parts before.
    before: HashMap<StreamId, u64>,
    /// Who takes part in each transfer: sender and receiver, in the order in which they were heard of.
    pairs: HashMap<PairKey, Vec<(StreamId, u64)>>,
    /// Spans of the parts before.
    gathered: Vec<Span>,
}

#[derive(Debug)]
struct Stream {
    id: StreamId,
    before: u64,
    spans: Vec<Span>,
    /// The first transfer of those that are such.
    transfers: Vec<(usize, PairKey)>,
}

impl Watch {
    /// The next stream of the timeline.
    pub(crate) fn stream(&mut self, rank: usize, lane: Lane) {
        let id = StreamId { device: DeviceId(rank as u32), index: lane as u32 };
        let before = self.before.get(&id).copied().unwrap_or(0);
        self.streams.push(Stream { id, before, spans: Vec::new(), transfers: Vec::new() });
    }

    /// The next command of a stream: a node, or what a step adds.
    pub(crate) fn command(
        &mut self,
        stream: StreamIndex,
        node: Option<&Node>,
        step: &Step,
        cost: Cost,
    ) {
        let waited_for = match step {
            Step::Wait { stream, value } => {
                let target = &self.streams[stream.0 as usize];
                Some(WaitedFor::Command { stream: target.id, sequence: target.before + value })
            }
            Step::Meet { key: ([_, group], round), .. } => {
                let communicator = CommunicatorId([self.part, *group]);
                Some(WaitedFor::Ranks { communicator, round: *round })
            }
            Step::Run(_) | Step::Pairs { .. } => None,
        };
        let kind = match (node.map(|node| &node.work), step) {
            (Some(Work::Op(op)), _) => CommandKind::Op(op.kind()),
            (Some(Work::Collectives { batch, .. }), _) => {
                batch.first().map_or(CommandKind::Transfer, |c| CommandKind::Collective(c.kind()))
            }
            (None, Step::Wait { .. }) => CommandKind::Wait,
            (None, _) => CommandKind::Write,
        };
        let own = &mut self.streams[stream.0 as usize];
        let sequence = own.before + own.spans.len() as u64 + 1;
        if let Step::Pairs { pairs } = step {
            for (key, _) in pairs {
                self.pairs.entry(*key).or_default().push((own.id, sequence));
            }
            own.transfers.extend(pairs.first().map(|(key, _)| (own.spans.len(), *key)));
        }
        let label = match node {
            Some(node) => Label::Shared(node.label.clone()),
            None => Label::Static(kind.name()),
        };
        let bound = if kind == CommandKind::Wait { Bound::Unknown } else { cost.bound };
        own.spans.push(Span { bound, waited_for, ..cost.span(own.id, sequence, kind, label) });
    }

    /// A command has ended.
    pub(crate) fn done(&mut self, done: &Done) {
        let own = &mut self.streams[done.stream.0 as usize];
        let Some(span) = own.spans.get_mut(done.value as usize - 1) else { return };
        let [ready, start, end] = [done.ready, done.start, done.end].map(|at| self.began + at);
        (span.ready, span.start, span.end) = (ready, start, end);
    }

    /// The next part begins, on a timeline of its own.
    pub(crate) fn next_part(&mut self, after: u64) {
        for Stream { id, before, mut spans, transfers } in std::mem::take(&mut self.streams) {
            for (at, key) in transfers {
                let this = (id, spans[at].sequence);
                let sides = self.pairs.get(&key).into_iter().flatten();
                let other = sides.copied().find(|side| *side != this);
                spans[at].waited_for =
                    other.map(|(stream, sequence)| WaitedFor::Command { stream, sequence });
            }
            self.before.insert(id, before + spans.len() as u64);
            self.gathered.extend(spans);
        }
        self.pairs.clear();
        (self.part, self.began) = (self.part + 1, self.began + after);
    }

    /// Gives all spans away, stream by stream.
    pub(crate) fn give(mut self, sink: &dyn TraceSink) {
        self.next_part(0);
        self.gathered.iter().for_each(|span| sink.record(span));
    }
}

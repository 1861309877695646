//! What spans say about waiting.

mod common;

use common::{SOON, die, floats, system};
use hal::trace::{CommandKind, Span, TraceSink, WaitedFor};
use hal::{Collective, CollectiveKind, Communicator, Device, Label, Reduction, Stream};
use sim::{Mode, System};
use std::sync::{Arc, Mutex};

#[derive(Debug, Default)]
struct Spans(Mutex<Vec<Span>>);

impl TraceSink for Spans {
    fn record(&self, span: &Span) {
        self.0.lock().unwrap().push(span.clone());
    }
}

struct Rank {
    device: Arc<dyn Device>,
    stream: Arc<dyn Stream>,
    communicator: Arc<dyn Communicator>,
}

/// Two ranks, of which the first has more to do before they meet.
fn ranks(system: &System) -> Vec<Rank> {
    let id = die(system, 0).communicator_id().unwrap();
    (0..2)
        .map(|rank| {
            let device = die(system, rank as u32);
            let stream = device.stream("comm").unwrap();
            let communicator = device.communicator(id, rank, 2).unwrap();
            let work = floats(&*stream, &[0.0; 1 << 16]);
            stream.synchronize(SOON).unwrap();
            for _ in rank..2 {
                stream.fill(&work.region(), 0).unwrap();
            }
            Rank { device, stream, communicator }
        })
        .collect()
}

/// The span of each rank's collective.
fn meet(make: impl Fn(&Rank) -> Collective) -> [Span; 2] {
    let system = system(Mode::Full, 2);
    let ranks = ranks(&system);
    let batches: Vec<_> = ranks.iter().map(|rank| [make(rank)]).collect();
    let spans = Arc::new(Spans::default());
    for (rank, batch) in ranks.iter().zip(&batches) {
        rank.device.set_trace(Some(spans.clone())).unwrap();
        let label = Label::Static("meet");
        rank.stream.submit_collectives(&rank.communicator, batch, &label).unwrap();
    }
    ranks.iter().for_each(|rank| rank.stream.synchronize(SOON).unwrap());
    ranks.iter().for_each(|rank| rank.device.set_trace(None).unwrap());
    let mut spans = spans.0.lock().unwrap().clone();
    spans.retain(|span| matches!(span.kind, CommandKind::Collective(_)));
    spans.sort_by_key(|span| span.stream);
    spans.try_into().unwrap()
}

#[test]
fn the_rank_that_is_first_waits_for_the_other() {
    let tensor = |rank: &Rank| floats(&*rank.stream, &[1.0; 64]);
    let reduce = |rank: &Rank| {
        let tensor = tensor(rank);
        Collective::AllReduce { send: tensor.clone(), recv: tensor, reduction: Reduction::Sum }
    };
    let [slow, fast] = meet(reduce);
    assert!(matches!(slow.waited_for, Some(WaitedFor::Ranks { round: 1, .. })), "{slow:?}");
    assert_eq!(slow.waited_for, fast.waited_for);
    let transfer = |rank: &Rank| match rank.communicator.rank() {
        0 => Collective::Send { tensor: tensor(rank), peer: 1 },
        _ => Collective::Recv { tensor: tensor(rank), peer: 0 },
    };
    let pair = meet(transfer);
    let command = |span: &Span| {
        let Span { stream, sequence, .. } = *span;
        Some(WaitedFor::Command { stream, sequence })
    };
    assert_eq!(pair[0].kind, CommandKind::Collective(CollectiveKind::Send));
    assert_eq!(pair[0].waited_for, command(&pair[1]));
    assert_eq!(pair[1].waited_for, command(&pair[0]));
    for [slow, fast] in [[slow, fast], pair] {
        assert!(fast.ready < fast.start, "it waited: {fast:?}");
        assert_eq!(slow.ready, slow.start, "nobody kept it waiting: {slow:?}");
        assert_eq!((slow.start, slow.end), (fast.start, fast.end));
    }
}

#[test]
fn a_wait_names_the_command_waited_for() {
    let system = system(Mode::Full, 2);
    let die = die(&system, 0);
    let spans = Arc::new(Spans::default());
    die.set_trace(Some(spans.clone())).unwrap();
    let (a, b) = (die.stream("a").unwrap(), die.stream("b").unwrap());
    let buffer = a.alloc(1 << 20).unwrap();
    a.fill(&buffer.whole(), 0).unwrap();
    let done = a.point();
    b.wait(&done).unwrap();
    b.fill(&buffer.whole(), 1).unwrap();
    b.synchronize(SOON).unwrap();
    die.set_trace(None).unwrap();
    let spans = spans.0.lock().unwrap();
    let wait = spans.iter().find(|span| span.kind == CommandKind::Wait).unwrap();
    let target = WaitedFor::Command { stream: a.id(), sequence: done.value() };
    assert_eq!(wait.waited_for, Some(target));
    assert!(wait.ready < wait.start && wait.start == wait.end);
    for span in spans.iter().filter(|span| span.kind != CommandKind::Wait) {
        assert_eq!(span.waited_for, None);
        assert_eq!(span.ready, span.start);
    }
}

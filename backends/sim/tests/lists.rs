//! Command lists: the values of eager issue, and its times less what the host no longer spends.

mod common;

use common::{die, floats, read, system};
use hal::fault::FaultPlan;
use hal::op::Add;
use hal::{
    Buffer, CommandList, DType, Device, Entry, ListAction, Op, Stream, Tensor, TensorDesc, WaitFor,
};
use proptest::prelude::*;
use sim::Mode;
use std::sync::Arc;

fn add(stream: usize, a: &Tensor, b: &Tensor, out: &Tensor) -> Entry {
    let op: Op = Add { a: a.clone(), b: b.clone(), out: out.clone() }.into();
    Entry { stream, action: ListAction::Op(Box::new(op.into())) }
}

/// A die with two streams, and a list that goes back and forth between them.
struct Program {
    device: Arc<dyn Device>,
    streams: Vec<Arc<dyn Stream>>,
    list: CommandList,
    sum: Tensor,
    _system: sim::System,
}

/// How many pairs of adds; each with two waits.
const ROUNDS: usize = 50;

fn program(mode: Mode) -> Program {
    let system = system(mode, 2);
    let device = die(&system, 0);
    let streams = vec![device.stream("a").unwrap(), device.stream("b").unwrap()];
    let (sum, other) = (floats(&*streams[0], &[1.0; 8]), floats(&*streams[0], &[0.5; 8]));
    let mut entries = Vec::new();
    for round in 0..ROUNDS {
        let target = entries.len().checked_sub(1).map_or(WaitFor::Start, |last| {
            // Of the other stream: the list is on stream 0 when a round ends.
            WaitFor::Entry(last)
        });
        entries.push(Entry { stream: 1, action: ListAction::Wait(target) });
        entries.push(add(1, &sum, &other, &sum));
        let last = entries.len() - 1;
        entries.push(Entry { stream: 0, action: ListAction::Wait(WaitFor::Entry(last)) });
        if round % 2 == 0 {
            entries.push(add(0, &sum, &other, &sum));
        } else {
            entries.push(add(0, &other, &sum, &sum));
        }
    }
    let list = CommandList::new(entries, 2).unwrap();
    Program { device, streams, list, sum, _system: system }
}

impl Program {
    /// Picoseconds from the end of what was there before to the end of the list.
    fn took(&self, run: impl FnOnce(&Self)) -> u64 {
        let end = |program: &Self| {
            let point = program.streams[0].point();
            point.synchronize(common::SOON).unwrap();
            point.completed_at().unwrap().picos
        };
        let before = end(self);
        run(self);
        end(self) - before
    }
}

#[test]
fn a_list_gives_the_values_of_eager_issue_and_costs_the_host_one_command() {
    let took = [true, false].map(|recorded| {
        let program = program(Mode::Full);
        let took = program.took(|p| match recorded {
            true => p.device.execute(&p.list, &p.streams).unwrap(),
            false => p.list.issue(p.device.properties().id, &p.streams).unwrap(),
        });
        let expected = 1.0 + 0.5 * 2.0 * ROUNDS as f32;
        assert_eq!(read(&*program.streams[0], &program.sum), vec![expected; 8], "{recorded}");
        took
    });
    let [recorded, eager] = took;
    let launch = sim::Machine::named("va16").unwrap().launch;
    let picos = |micros: f64| (micros * 1e6) as u64;
    let (issue, sync) = (picos(launch.host_us.value), picos(launch.sync_us.value));
    // The host knows that all is quiet, then issues. Eager, an add takes less than the host takes
    // for it and the wait before it, so the last one runs when all were issued. Recorded, the adds
    // follow one another.
    let (adds, entries) = (2 * ROUNDS as u64, 4 * ROUNDS as u64);
    let add = eager - sync - entries * issue;
    assert!(add < 2 * issue, "an add takes {add} ps");
    assert_eq!(recorded, sync + issue + adds * add);
    assert!(recorded < eager, "{recorded} ps recorded, {eager} ps eager");
}

#[test]
fn launches_repeat_to_the_picosecond() {
    let times = || {
        let program = program(Mode::Full);
        let launch = |p: &Program| p.device.execute(&p.list, &p.streams).unwrap();
        (0..3).map(|_| program.took(launch)).collect::<Vec<_>>()
    };
    let first = times();
    assert_eq!(first, times());
    assert_eq!(first[1], first[2], "later launches do not differ");
}

#[test]
fn fault_rules_count_a_lists_commands_as_submitted() {
    let program = program(Mode::Full);
    let rule = "op=add,nth=5,action=fail:bad parity".parse().unwrap();
    program.device.set_faults(Some(Arc::new(FaultPlan::new([rule])))).unwrap();
    // The failure may be known before the list's end is submitted, or after.
    let launched = program.device.execute(&program.list, &program.streams);
    let waited = program.streams[1].synchronize(common::SOON);
    for error in launched.err().into_iter().chain(waited.err()) {
        let origin = error.origin().unwrap();
        // The sixth add is the third of stream 1: each comes after a wait.
        assert_eq!((origin.op, origin.stream.index, origin.sequence), ("add", 0, 8));
    }
}

#[test]
fn a_launch_that_nothing_orders_after_the_one_before_is_refused() {
    let system = system(Mode::Full, 1);
    let device = die(&system, 0);
    let streams = [device.stream("a").unwrap(), device.stream("b").unwrap()];
    let buffer = streams[0].alloc(16).unwrap();
    let fill = |stream, byte| {
        let region = buffer.whole();
        Entry { stream, action: ListAction::Fill { region, byte } }
    };
    let wait = Entry { stream: 1, action: ListAction::Wait(WaitFor::Entry(0)) };
    let list = CommandList::new(vec![fill(0, 1), wait, fill(1, 2)], 2).unwrap();
    let launch = || device.execute(&list, &streams);
    launch().unwrap();
    for _ in 0..2 {
        // The first fill would race with the last one of the launch before.
        let text = launch().unwrap_err().to_string();
        assert!(text.contains("hazard"), "{text}");
        streams[0].wait(&streams[1].point()).unwrap();
        launch().unwrap();
    }
    streams[1].synchronize(common::SOON).unwrap();
    launch().unwrap();
    // A launch is two commands on this stream, and four were taken.
    assert_eq!(streams[1].point().value(), 2 * 4);
}

/// A command of a list, on one of two streams: parts of three buffers are set, copied or waited for.
#[derive(Clone, Copy, Debug)]
enum Listed {
    Fill(usize, usize),
    Copy([(usize, usize); 2]),
    /// For the latest entry of the other stream, or the start.
    Wait,
}

/// What a host does, on any of three streams.
#[derive(Clone, Copy, Debug)]
enum Step {
    Launch(usize, [usize; 2]),
    Fill(usize, usize, usize),
    Wait(usize, usize),
    Synchronize(usize),
}

/// First half, second half or all of one of three buffers.
fn part() -> impl Strategy<Value = (usize, usize)> {
    (0usize..3, 0usize..3)
}

fn listed() -> impl Strategy<Value = Vec<(usize, Listed)>> {
    let action = prop_oneof![
        part().prop_map(|(buffer, part)| Listed::Fill(buffer, part)),
        [part(), part()].prop_map(Listed::Copy),
        Just(Listed::Wait),
        Just(Listed::Wait),
    ];
    prop::collection::vec((0usize..2, action), 1..12)
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let stream = || 0usize..3;
    let launch = (0usize..2, prop_oneof![Just([0, 1]), Just([0, 1]), Just([1, 0]), Just([0, 2])]);
    let step = prop_oneof![
        launch.clone().prop_map(|(list, streams)| Step::Launch(list, streams)),
        launch.prop_map(|(list, streams)| Step::Launch(list, streams)),
        (stream(), part()).prop_map(|(stream, (buffer, part))| Step::Fill(stream, buffer, part)),
        (stream(), stream()).prop_map(|(stream, other)| Step::Wait(stream, other)),
        stream().prop_map(Step::Synchronize),
    ];
    prop::collection::vec(step, 1..16)
}

/// A die on which steps are taken, with lists launched as such or issued command by command.
struct Host {
    device: Arc<dyn Device>,
    streams: Vec<Arc<dyn Stream>>,
    buffers: Vec<Buffer>,
    lists: Vec<CommandList>,
    as_lists: bool,
    _system: sim::System,
}

impl Host {
    fn new(lists: &[Vec<(usize, Listed)>], as_lists: bool) -> Host {
        let system = system(Mode::Full, 1);
        let device = die(&system, 0);
        let streams: Vec<_> = ["a", "b", "c"].iter().map(|s| device.stream(s).unwrap()).collect();
        let buffers: Vec<_> = (0..3).map(|_| streams[0].alloc(16).unwrap()).collect();
        buffers.iter().for_each(|b| streams[0].fill(&b.whole(), 0).unwrap());
        streams[0].synchronize(common::SOON).unwrap();
        let lists = lists.iter().map(|list| build(list, &buffers)).collect();
        Host { device, streams, buffers, lists, as_lists, _system: system }
    }

    /// What comes of a step: its refusal, and how many commands each stream then has.
    fn take(&self, step: Step) -> (Option<String>, Vec<u64>) {
        let result = match step {
            Step::Launch(list, streams) => {
                let streams = streams.map(|stream| self.streams[stream].clone());
                match self.as_lists {
                    true => self.device.execute(&self.lists[list], &streams),
                    false => self.lists[list].issue(self.device.properties().id, &streams),
                }
            }
            Step::Fill(stream, buffer, part) => {
                self.streams[stream].fill(&tensor(&self.buffers, (buffer, part)).region(), 7)
            }
            Step::Wait(stream, other) => self.streams[stream].wait(&self.streams[other].point()),
            Step::Synchronize(stream) => self.streams[stream].synchronize(common::SOON),
        };
        let text = result.err().map(|error| {
            // Each host has buffers of its own, with numbers of their own.
            let text = error.to_string();
            let parts = text.split("buffer ").map(|part| part.trim_start_matches(char::is_numeric));
            parts.collect::<Vec<_>>().join("buffer ")
        });
        (text, self.streams.iter().map(|s| s.point().value()).collect())
    }

    fn bytes(&self) -> Vec<Vec<u8>> {
        let read = |buffer: &Buffer| {
            let mut bytes = vec![0; 16];
            self.streams.iter().for_each(|s| s.synchronize(common::SOON).unwrap());
            self.streams[0].read(&buffer.whole(), &mut bytes, common::SOON).unwrap();
            bytes
        };
        self.buffers.iter().map(read).collect()
    }
}

fn tensor(buffers: &[Buffer], (buffer, part): (usize, usize)) -> Tensor {
    let (offset, len) = [(0, 2), (8, 2), (0, 4)][part];
    Tensor::new(buffers[buffer].clone(), offset, TensorDesc::new(DType::F32, &[len]))
}

fn build(list: &[(usize, Listed)], buffers: &[Buffer]) -> CommandList {
    let mut entries: Vec<Entry> = Vec::new();
    for &(stream, action) in list {
        let action = match action {
            Listed::Fill(buffer, part) => ListAction::Fill {
                region: tensor(buffers, (buffer, part)).region(),
                byte: entries.len() as u8,
            },
            // Only what can run: sizes that differ are another test's.
            Listed::Copy([x, out]) if x.0 != out.0 && (x.1 < 2) == (out.1 < 2) => {
                let op: Op =
                    hal::op::Copy { x: tensor(buffers, x), out: tensor(buffers, out) }.into();
                ListAction::Op(Box::new(op.into()))
            }
            Listed::Wait => match entries.iter().rposition(|entry| entry.stream != stream) {
                Some(target) => ListAction::Wait(WaitFor::Entry(target)),
                None if stream != 0 => ListAction::Wait(WaitFor::Start),
                None => continue,
            },
            Listed::Copy(_) => continue,
        };
        entries.push(Entry { stream, action });
    }
    CommandList::new(entries, 2).unwrap()
}

proptest! {
    #[test]
    fn a_list_is_refused_and_leaves_traces_as_its_commands_do_one_by_one(
        lists in [listed(), listed()], steps in steps(),
    ) {
        let [whole, single] = [true, false].map(|as_lists| Host::new(&lists, as_lists));
        for step in steps {
            prop_assert_eq!(whole.take(step), single.take(step), "{:?}", step);
        }
        prop_assert_eq!(whole.bytes(), single.bytes());
    }
}

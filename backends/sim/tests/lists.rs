//! Command lists: the values of eager issue, and its times less what the host no longer spends.

mod common;

use common::{die, floats, read, system};
use hal::fault::FaultPlan;
use hal::op::Add;
use hal::{CommandList, Device, Entry, ListAction, Op, Stream, Tensor, WaitFor};
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

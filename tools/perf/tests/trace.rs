//! A traced step: every command, at the times that the estimate rests on.

use hal::StreamId;
use hal::trace::{CommandKind, Span, TraceSink, WaitedFor};
use model::config::Preset;
use model::engine::{EngineOptions, Overlap};
use model::plan::{ParallelOptions, ParallelPlan};
use perf::{Estimator, Folding, Phase, TracedRank, Workload};
use sim::Machine;
use sim::cost::{CostModel, TileModel};
use std::collections::{BTreeMap, HashMap};
use std::sync::Mutex;

#[derive(Debug, Default)]
struct Kept(Mutex<Vec<Span>>);

impl TraceSink for Kept {
    fn record(&self, span: &Span) {
        self.0.lock().unwrap().push(span.clone());
    }
}

struct Case {
    preset: Preset,
    machine: &'static str,
    plan: ParallelOptions,
    overlap: Overlap,
    mtp: bool,
}

/// The ranks, their spans, the step's picoseconds without the host's last wait, and its commands.
fn traced(case: &Case, all_ranks: bool) -> (Vec<TracedRank>, Vec<Span>, u64, usize) {
    let (config, machine) = (case.preset.config(), Machine::named(case.machine).unwrap());
    let plan = ParallelPlan::new(&config, case.plan).unwrap();
    let estimator = Estimator::new(&machine, plan.ranks()).unwrap();
    let options = EngineOptions {
        overlap: case.overlap,
        expert_capacity: Some(2.0),
        ..EngineOptions::default()
    };
    let phase = Phase::Decode { batch: 4, kv: 60 };
    let workload = Workload { mtp: case.mtp, ..Workload::new(phase) };
    let kept = Kept::default();
    let ranks = estimator.trace(&config, &plan, &options, &workload, all_ranks, &kept).unwrap();
    let folding = Folding { ranks: !all_ranks, layers: false };
    let told = estimator.step(&config, &plan, &options, &workload, folding).unwrap();
    let end = told.picos - TileModel::new(estimator.machine()).host_sync();
    (ranks, kept.0.into_inner().unwrap(), end, told.played.commands)
}

fn cases() -> [Case; 3] {
    let one = ParallelOptions::default();
    let case = |preset, machine, plan, overlap, mtp| Case { preset, machine, plan, overlap, mtp };
    let ep = ParallelOptions { data: 16, expert: true, ranks_per_node: Some(8), ..one };
    let staged = ParallelOptions { tensor: 2, pipeline: 2, ..one };
    [
        case(Preset::Tiny, "va16", ParallelOptions { tensor: 4, ..one }, Overlap::TwoBatch, false),
        case(Preset::Tiny, "va16", staged, Overlap::None, false),
        case(Preset::DeepSeekV3, "h800", ep, Overlap::TwoBatch, true),
    ]
}

#[test]
fn every_command_is_there_and_the_last_one_ends_with_the_step() {
    for (number, case) in cases().iter().enumerate() {
        let (ranks, spans, end, commands) = traced(case, false);
        assert_eq!(spans.iter().map(|s| s.end).max(), Some(end), "case {number}");
        // The schedule's commands, and a write of inputs for each rank and module.
        let writes = spans.iter().filter(|s| s.kind == CommandKind::Write).count();
        assert_eq!(spans.len(), commands + writes, "case {number}");
        let modules = 1 + usize::from(case.mtp);
        assert_eq!(writes, ranks.len() * modules, "case {number}");
        let stands_for: usize = ranks.iter().map(|rank| rank.stands_for).sum();
        let size = case.plan.tensor * case.plan.pipeline * case.plan.data;
        assert_eq!(stands_for, size, "case {number}");
        let mut last: HashMap<StreamId, &Span> = HashMap::new();
        for span in &spans {
            assert!(span.ready <= span.start && span.start <= span.end, "{span:?}");
            let before = last.insert(span.stream, span);
            assert_eq!(span.sequence, before.map_or(1, |b| b.sequence + 1), "{span:?}");
            assert!(before.is_none_or(|b| b.end <= span.ready), "{span:?}");
        }
        for layer in 0..case.preset.config().num_hidden_layers {
            let label = format!("layer {layer} ");
            assert!(spans.iter().any(|s| s.label.as_str().starts_with(&label)), "{label}");
        }
        let mtp = spans.iter().any(|s| s.label.as_str().starts_with("mtp"));
        assert_eq!(mtp, case.mtp, "case {number}");
    }
}

#[test]
fn what_was_waited_for_had_ended_and_ranks_meet_at_one_time() {
    for (number, case) in cases().iter().enumerate() {
        let (_, spans, ..) = traced(case, true);
        let by_name: HashMap<_, &Span> =
            spans.iter().map(|s| ((s.stream, s.sequence), s)).collect();
        let mut rounds: BTreeMap<_, Vec<&Span>> = BTreeMap::new();
        let mut waits = 0;
        for span in &spans {
            match (span.waited_for, span.kind) {
                (Some(WaitedFor::Command { stream, sequence }), CommandKind::Wait) => {
                    assert!(by_name[&(stream, sequence)].end <= span.start, "{span:?}");
                    waits += 1;
                }
                (Some(WaitedFor::Command { stream, sequence }), _) => {
                    let other = by_name[&(stream, sequence)];
                    assert_eq!((other.start, other.end), (span.start, span.end), "{span:?}");
                    let this = (span.stream, span.sequence);
                    let back = WaitedFor::Command { stream: this.0, sequence: this.1 };
                    assert_eq!(other.waited_for, Some(back));
                }
                (Some(WaitedFor::Ranks { communicator, round }), kind) => {
                    assert!(matches!(kind, CommandKind::Collective(_)), "{span:?}");
                    rounds.entry((communicator.0, round)).or_default().push(span);
                }
                (_, kind) => {
                    let alone = matches!(kind, CommandKind::Op(_) | CommandKind::Write);
                    assert!(alone, "case {number}: {span:?}");
                }
            }
        }
        assert_eq!(waits > 0, case.overlap == Overlap::TwoBatch, "case {number}");
        assert!(!rounds.is_empty(), "case {number}");
        for members in rounds.values() {
            assert!(members.len() > 1, "{:?} alone", members[0]);
            let last = members.iter().map(|s| s.ready).max().unwrap();
            assert!(members.iter().all(|s| s.kind == members[0].kind), "{members:?}");
            assert!(members.iter().all(|s| s.start == last), "{members:?}");
        }
    }
}

#[test]
fn a_rank_that_stands_for_others_runs_as_it_does_among_all() {
    for case in &cases() {
        let (folded, some, ..) = traced(case, false);
        let (_, all, ..) = traced(case, true);
        let times = |spans: &[Span], rank: usize| -> Vec<_> {
            let own = spans.iter().filter(|s| s.device().0 as usize == rank);
            own.map(|s| (s.stream, s.sequence, s.ready, s.start, s.end, s.bytes)).collect()
        };
        for rank in folded {
            assert_eq!(times(&some, rank.rank), times(&all, rank.rank), "{rank:?}");
        }
    }
}

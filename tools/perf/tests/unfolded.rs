//! What is played once for all that are alike takes the same picoseconds as playing everything, and
//! the same as simulated dies that are given the engine's own commands.

use hal::DeviceId;
use model::config::Preset;
use model::engine::{Engine, EngineOptions, Overlap, Sequence, Wanted};
use model::plan::{ParallelOptions, ParallelPlan};
use perf::{Estimator, Folding, Phase, Routing, Workload};
use sim::{Machine, Mode, Options, System};

const NONE: ParallelOptions = ParallelOptions::SINGLE;

struct Case {
    machine: &'static str,
    plan: ParallelOptions,
    overlap: Overlap,
    eager: bool,
    phase: Phase,
}

fn cases() -> Vec<Case> {
    let case = |machine, plan, overlap, phase| Case { machine, plan, overlap, eager: false, phase };
    let (plain, two) = (Overlap::None, Overlap::TwoBatch);
    let decode = |batch, kv| Phase::Decode { batch, kv };
    let prefill = |batch, input_len| Phase::Prefill { batch, input_len, past: 0 };
    let tp32 = ParallelOptions { tensor: 32, ..NONE };
    let ep = ParallelOptions { data: 16, expert: true, ..NONE };
    let hops = ParallelOptions { ranks_per_node: Some(8), ..ep };
    let mixed = ParallelOptions { tensor: 4, data: 4, expert: true, ..NONE };
    vec![
        case("va16", tp32, plain, decode(1, 200)),
        case("va16", tp32, two, decode(4, 130)),
        case("va16", tp32, two, prefill(1, 512)),
        case("h800", ep, two, decode(16, 64)),
        case("h800", hops, two, prefill(2, 300)),
        case("h800", hops, plain, prefill(1, 400)),
        case("h800", mixed, two, decode(6, 90)),
        Case { eager: true, ..case("va16", tp32, plain, decode(1, 100)) },
    ]
}

fn options(case: &Case) -> EngineOptions {
    EngineOptions {
        overlap: case.overlap,
        enforce_eager: case.eager,
        expert_capacity: Some(2.0),
        ..EngineOptions::default()
    }
}

fn plan(case: &Case) -> ParallelPlan {
    ParallelPlan::new(&Preset::DeepSeekV3.config(), case.plan).unwrap()
}

/// Picoseconds of a step by the estimator.
fn estimated(case: &Case, folding: Folding, routing: Routing) -> u64 {
    let (config, plan) = (Preset::DeepSeekV3.config(), plan(case));
    let machine = Machine::named(case.machine).unwrap();
    let estimator = Estimator::new(&machine, plan.ranks()).unwrap();
    let workload = Workload { routing, ..Workload::new(case.phase) };
    estimator.step(&config, &plan, &options(case), &workload, folding).unwrap().picos
}

/// Picoseconds from the end of one step to the end of the next, on simulated dies without storage.
fn simulated(case: &Case) -> u64 {
    let (config, plan) = (Preset::DeepSeekV3.config(), plan(case));
    let machine = Machine::named(case.machine).unwrap().enlarged(plan.ranks() as u32).unwrap();
    let system =
        System::new(machine, Options { mode: Mode::TimingOnly, threads: Some(2) }).unwrap();
    let devices = (0..plan.ranks() as u32).map(|d| system.open(DeviceId(d)).unwrap()).collect();
    let (batch, longest) = match case.phase {
        Phase::Decode { batch, kv } => (batch, kv),
        Phase::Prefill { batch, input_len, .. } => (batch, input_len),
    };
    let sequences = batch * case.plan.data;
    let options = EngineOptions {
        max_model_len: longest,
        max_sequences: sequences + case.plan.data,
        prefill_chunk: batch * longest,
        ..options(case)
    };
    let mut engine = Engine::timing_only(devices, plan, config, options).unwrap();
    let mut all: Vec<Sequence> = (0..sequences).map(|_| engine.start()).collect();
    match case.phase {
        Phase::Decode { kv, .. } => {
            // Two steps: the second one begins where the first one ended. It sees kv keys.
            let cached = vec![5; kv - 2];
            let mut before = 0;
            // Together: ranks that begin out of step may stay so.
            let mut first: Vec<_> = all.iter_mut().map(|s| (s, &cached[..])).collect();
            engine.prefill_batch(&mut first, Wanted::Greedy).unwrap();
            let mut last = 0;
            for _ in 0..2 {
                before = last;
                let mut step: Vec<(&mut Sequence, u32)> = all.iter_mut().map(|s| (s, 5)).collect();
                engine.decode(&mut step, Wanted::Greedy).unwrap();
                last = engine.now_picos().unwrap();
            }
            last - before
        }
        Phase::Prefill { input_len, .. } => {
            let tokens = vec![5; input_len];
            // A small step first, so that every die begins at the end of a step.
            let mut others: Vec<Sequence> = (0..case.plan.data).map(|_| engine.start()).collect();
            let mut first: Vec<_> = others.iter_mut().map(|s| (s, &tokens[..1])).collect();
            engine.prefill_batch(&mut first, Wanted::Greedy).unwrap();
            let before = engine.now_picos().unwrap();
            let mut step: Vec<(&mut Sequence, &[u32])> =
                all.iter_mut().map(|s| (s, &tokens[..])).collect();
            engine.prefill_batch(&mut step, Wanted::Greedy).unwrap();
            engine.now_picos().unwrap() - before
        }
    }
}

#[test]
fn folding_changes_no_picosecond() {
    for (number, case) in cases().iter().enumerate() {
        let folded = estimated(case, Folding::default(), Routing::Balanced);
        for folding in [
            Folding { ranks: true, layers: false },
            Folding { ranks: false, layers: true },
            Folding { ranks: false, layers: false },
        ] {
            let whole = estimated(case, folding, Routing::Balanced);
            assert_eq!(folded, whole, "case {number}, {folding:?}");
        }
    }
}

#[test]
fn folding_changes_nothing_under_skewed_routing_either() {
    let skewed = || Routing::Zipf { s: 0.7, seed: 5 };
    for number in [3, 4] {
        let case = &cases()[number];
        let folded = estimated(case, Folding::default(), skewed());
        let whole = estimated(case, Folding { ranks: false, layers: false }, skewed());
        assert_eq!(folded, whole, "case {number}");
    }
}

#[test]
fn simulated_dies_that_get_the_engines_commands_take_the_same_time() {
    for (number, case) in cases().iter().enumerate() {
        let (told, ran) = (estimated(case, Folding::default(), Routing::Balanced), simulated(case));
        assert_eq!(told, ran, "case {number}");
    }
}

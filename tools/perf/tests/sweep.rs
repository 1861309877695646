//! Sweeps: what files are understood, that points are single steps, and which ones are best.

use model::config::Preset;
use model::engine::{EngineOptions, Overlap};
use model::plan::{ParallelOptions, ParallelPlan};
use perf::{Estimator, Folding, Grid, Outcome, Phase, SweepError, Workload, on_threads, pareto};
use proptest::prelude::*;
use sim::Machine;
use std::collections::HashMap;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicUsize, Ordering};

const GOOD: &str = r#"
config = "tiny"

[[grid]]
machine = ["va16", "h800"]
phase = ["decode", "prefill"]
tensor-parallel-size = [1, 2, 3]
data-parallel-size = [1, 2]
expert-parallel = [false, true]
overlap = ["none", "two-batch"]
batch = [1, 3]
kv = [33]
input-len = [5, 40]

[[grid]]
machine = ["va16"]
phase = ["decode"]
pipeline-parallel-size = [1, 2, 5000]
batch = [2]
kv = [20, 2000000]
numerics = ["bf16"]
mtp = [true]
acceptance = [0.5]
routing = ["zipf:0.5"]
"#;

#[test]
fn a_file_gives_every_combination_and_the_last_list_changes_fastest() {
    let (config, points) = Grid::parse(GOOD).unwrap();
    assert_eq!(config.as_deref(), Some("tiny"));
    assert_eq!(points.len(), 2 * (2 + 4) * 3 * 2 * 2 * 2 + 3 * 2);
    let first = &points[0];
    assert_eq!((first.machine.as_str(), first.phase), ("va16", Phase::Decode { batch: 1, kv: 33 }));
    assert_eq!((first.numerics.as_str(), first.routing.as_str()), ("fp8", "balanced"));
    assert_eq!((first.mtp, first.acceptance), (false, 0.85));
    let (a, b) = (first.overlap.as_str(), points[1].overlap.as_str());
    assert_eq!((a, b, points[2].expert_parallel), ("none", "two-batch", true));
    let last = points.last().unwrap();
    assert_eq!(last.pipeline_parallel_size, 5000);
    assert_eq!(last.phase, Phase::Decode { batch: 2, kv: 2_000_000 });
    let set = (last.numerics.as_str(), last.mtp, last.acceptance, last.routing.as_str());
    assert_eq!(set, ("bf16", true, 0.5, "zipf:0.5"));
    let prefill = points.iter().find(|p| matches!(p.phase, Phase::Prefill { .. })).unwrap();
    assert_eq!(prefill.phase, Phase::Prefill { batch: 1, input_len: 5, past: 0 });
}

#[test]
fn mistakes_are_refused_with_the_field() {
    let base = "[[grid]]\nmachine = [\"va16\"]\nphase = [\"decode\"]\nbatch = [1]\nkv = [10]\n";
    assert_eq!(Grid::parse(base).unwrap().1.len(), 1);
    let with = |line: &str| format!("{base}{line}\n");
    let without = |name: &str| {
        let lines = base.lines().filter(|line| !line.starts_with(name));
        lines.map(|line| format!("{line}\n")).collect::<String>()
    };
    let instead = |name: &str, line: &str| without(name) + line;
    for (text, words) in [
        (String::new(), "grid"),
        ("grid = 1".into(), "expected a sequence"),
        ("[[grid]\n".into(), "line 1"),
        (without("machine"), "machine"),
        (without("phase"), "phase"),
        (without("batch"), "batch"),
        (without("kv"), "kv"),
        (instead("phase", "phase = [\"prefill\"]"), "input-len"),
        (instead("phase", "phase = [\"walk\"]"), "phase \"walk\"; expected decode or prefill"),
        (instead("phase", "phase = []"), "the list phase is empty"),
        (instead("machine", "machine = []"), "the list machine is empty"),
        (instead("machine", "machine = \"va16\""), "expected a sequence"),
        (instead("batch", "batch = []"), "the list batch is empty"),
        (instead("batch", "batch = [0]"), "batch has a 0"),
        (instead("batch", "batch = [-1]"), "batch = [-1]"),
        (instead("batch", "batch = [1.5]"), "batch = [1.5]"),
        (instead("kv", "kv = [5, 0]"), "kv has a 0"),
        (with("tensor-parallel-size = [0]"), "tensor-parallel-size has a 0"),
        (with("tensor-parallel-size = []"), "the list tensor-parallel-size is empty"),
        (with("tensor_parallel_size = [1]"), "unknown field `tensor_parallel_size`"),
        (with("expert-parallel = [1]"), "expected a boolean"),
        (with("overlap = [\"some\"]"), "overlap \"some\"; expected none or two-batch"),
        (with("numerics = [\"fp7\"]"), "numerics"),
        (with("routing = [\"zipf:9\"]"), "routing"),
        (with("mtp = []"), "the list mtp is empty"),
        (with("acceptance = [0.5, 1.5]"), "acceptance 1.5; expected 0 to 1"),
        (with("acceptance = [nan]"), "acceptance"),
        (format!("colour = 1\n{base}"), "unknown field `colour`"),
        (format!("{base}{}", with("mtp = [2]")), "expected a boolean"),
        (format!("{base}{}", with("overlap = [\"x\"]")), "grid 2"),
    ] {
        match Grid::parse(&text) {
            Err(SweepError::Parse(told)) => assert!(told.contains(words), "{text}\n{told}"),
            other => panic!("{text}\n{other:?}"),
        }
    }
}

#[test]
fn too_many_points_are_refused_before_they_are_made() {
    let numbers: Vec<String> = (1..=200).map(|n| n.to_string()).collect();
    let list = numbers.join(", ");
    let text = format!(
        "[[grid]]\nmachine = [\"va16\"]\nphase = [\"decode\"]\nbatch = [{list}]\nkv = [{list}]\n\
         tensor-parallel-size = [{list}]\ndata-parallel-size = [{list}]\n\
         pipeline-parallel-size = [{list}]\nrouting = [{}]",
        vec!["\"balanced\""; 200].join(", ")
    );
    match Grid::parse(&text) {
        Err(SweepError::TooMany { points, most }) => {
            assert_eq!((points, most), (200usize.pow(6), 1_000_000));
        }
        other => panic!("{:?}", other.map(|(_, points)| points.len())),
    }
}

fn swept(threads: usize) -> Vec<Outcome> {
    let (_, points) = Grid::parse(GOOD).unwrap();
    let named = |name: &str| (name.to_string(), Machine::named(name).unwrap());
    let machines: HashMap<String, Machine> = ["va16", "h800"].map(named).into();
    let config = Preset::Tiny.config();
    let most = AtomicUsize::new(0);
    let tell = |done: usize| {
        most.fetch_max(done, Ordering::Relaxed);
    };
    let outcomes = on_threads(threads, || perf::run(&config, &machines, &points, &tell)).unwrap();
    assert_eq!(most.into_inner(), points.len(), "told of every point");
    assert!(outcomes.iter().map(|o| &o.point).eq(&points), "in the order of the file");
    outcomes
}

#[test]
fn points_are_single_steps_whatever_the_threads() {
    let one = swept(1);
    assert_eq!(swept(2), one);
    assert_eq!(swept(3), one);
    let config = Preset::Tiny.config();
    let mut possible = 0;
    for Outcome { point, estimate, error, reason } in one {
        assert_eq!(estimate.is_none(), error.is_some() && reason.is_some(), "{point:?}");
        let machine = Machine::named(&point.machine).unwrap();
        let dies =
            point.tensor_parallel_size * point.pipeline_parallel_size * point.data_parallel_size;
        let per_host = machine.dies_per_host() as usize;
        let parallel = ParallelOptions {
            tensor: point.tensor_parallel_size,
            pipeline: point.pipeline_parallel_size,
            data: point.data_parallel_size,
            expert: point.expert_parallel,
            redundant_experts: None,
            ranks_per_node: (per_host < dies).then_some(per_host),
        };
        let alone = || {
            let estimator = Estimator::new(&machine, dies).map_err(|e| e.to_string())?;
            let plan = ParallelPlan::new(&config, parallel).map_err(|e| e.to_string())?;
            let options = EngineOptions {
                numerics: point.numerics.parse().unwrap(),
                overlap: match point.overlap.as_str() {
                    "none" => Overlap::None,
                    _ => Overlap::TwoBatch,
                },
                expert_capacity: Some(1.25),
                ..EngineOptions::default()
            };
            let workload = Workload {
                phase: point.phase,
                mtp: point.mtp,
                acceptance: point.acceptance,
                routing: point.routing.parse().unwrap(),
            };
            let folding = Folding::default();
            let told = estimator.step(&config, &plan, &options, &workload, folding);
            told.map_err(|e| e.to_string())
        };
        possible += usize::from(estimate.is_some());
        assert_eq!(alone(), estimate.ok_or_else(|| error.unwrap_or_default()), "{point:?}");
    }
    assert!((200..294).contains(&possible), "{possible}");
}

/// Outcomes with given tokens per second for each die and for each user; `None` where the point is
/// impossible or no decode step.
fn outcomes(rates: &[Option<(f64, Option<f64>)>]) -> Vec<Outcome> {
    static SOME: OnceLock<Outcome> = OnceLock::new();
    let some = SOME.get_or_init(|| {
        let machines = [("va16".to_string(), Machine::named("va16").unwrap())].into();
        let file = "[[grid]]\nmachine = [\"va16\"]\nphase = [\"decode\"]\nbatch = [1]\nkv = [10]\n";
        let points = Grid::parse(file).unwrap().1;
        perf::run(&Preset::Tiny.config(), &machines, &points, &|_| {}).remove(0)
    });
    let outcome = |rate: &Option<(f64, Option<f64>)>| {
        let mut outcome = some.clone();
        outcome.estimate = rate.and_then(|(die, user)| {
            let mut estimate = outcome.estimate.take()?;
            (estimate.tokens_per_s_per_die, estimate.tokens_per_s_per_user) = (die, user);
            Some(estimate)
        });
        outcome
    };
    rates.iter().map(outcome).collect()
}

#[test]
fn the_front_of_a_few_points() {
    let at = |die: f64, user: f64| Some((die, Some(user)));
    let front = |rates: &[Option<(f64, Option<f64>)>]| pareto(&outcomes(rates));
    assert!(front(&[]).is_empty());
    assert!(front(&[None, Some((9.0, None))]).is_empty(), "impossible, or prefill");
    assert_eq!(front(&[at(1.0, 1.0)]), [0]);
    assert_eq!(front(&[at(1.0, 9.0), at(5.0, 5.0), None, at(9.0, 1.0)]), [3, 1, 0]);
    assert_eq!(front(&[at(1.0, 9.0), at(5.0, 5.0), at(4.0, 4.0)]), [1, 0]);
    // As many for each die: the one with more for each user.
    assert_eq!(front(&[at(5.0, 5.0), at(5.0, 6.0), at(4.0, 6.0)]), [1]);
    assert_eq!(front(&[at(5.0, 5.0), at(5.0, 5.0)]).len(), 1, "the same twice");
}

proptest! {
    #[test]
    fn none_of_the_front_is_beaten_and_every_other_is(
        rates in prop::collection::vec(
            prop::option::weighted(0.9, (0..20u32, prop::option::weighted(0.9, 0..20u32))),
            0..40,
        )
    ) {
        let float = |(die, user): (u32, Option<u32>)| (f64::from(die), user.map(f64::from));
        let rates: Vec<_> = rates.into_iter().map(|rate| rate.map(float)).collect();
        let front = pareto(&outcomes(&rates));
        let known = |at: usize| rates[at].and_then(|(die, user)| Some((die, user?)));
        let as_good = |a: (f64, f64), b: (f64, f64)| a.0 >= b.0 && a.1 >= b.1;
        for (place, &at) in front.iter().enumerate() {
            let own = known(at).unwrap();
            let beaten = (0..rates.len())
                .filter_map(known)
                .any(|other| as_good(other, own) && other != own);
            prop_assert!(!beaten, "{own:?} of {rates:?}");
            if let Some(&next) = front.get(place + 1) {
                prop_assert!(known(next).unwrap().0 < own.0, "the most for each die first");
            }
        }
        for own in (0..rates.len()).filter(|at| !front.contains(at)).filter_map(known) {
            let beaten = front.iter().any(|&at| as_good(known(at).unwrap(), own));
            prop_assert!(beaten, "{own:?} of {rates:?}");
        }
    }
}

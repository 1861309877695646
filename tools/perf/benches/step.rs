//! How long it takes to say how long a step takes: 671B over 32 dies, over 16 to 2,048 ranks, over
//! layers, and a sweep of a thousand points.

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use model::config::{ModelConfig, Preset};
use model::engine::{EngineOptions, Overlap};
use model::plan::{ParallelOptions, ParallelPlan};
use perf::{Estimator, Folding, Grid, Phase, Workload, run};
use sim::Machine;
use std::collections::HashMap;
use std::hint::black_box;

/// A question and everything that is prepared once.
struct Asked {
    config: ModelConfig,
    plan: ParallelPlan,
    options: EngineOptions,
    estimator: Estimator,
    workload: Workload,
}

fn ask(machine: &str, parallel: ParallelOptions, overlap: Overlap, config: ModelConfig) -> Asked {
    let plan = ParallelPlan::new(&config, parallel).expect("a legal plan");
    let machine = Machine::named(machine).expect("a built-in machine");
    let estimator = Estimator::new(&machine, plan.ranks()).expect("joined hosts");
    let options =
        EngineOptions { overlap, expert_capacity: Some(1.25), ..EngineOptions::default() };
    let mut workload = Workload::new(Phase::Decode { batch: 4, kv: 4096 });
    (workload.mtp, workload.acceptance) = (true, 0.85);
    Asked { config, plan, options, estimator, workload }
}

impl Asked {
    fn picos(&self, folding: Folding) -> u64 {
        let Asked { config, plan, options, estimator, workload } = self;
        estimator.step(config, plan, options, workload, folding).expect("it fits").picos
    }
}

fn steps(c: &mut Criterion) {
    let v3 = || Preset::DeepSeekV3.config();
    let tp32 = ParallelOptions { tensor: 32, ..ParallelOptions::default() };
    let mut group = c.benchmark_group("a decode step of 671B with MTP on 32 dies");
    for (name, overlap) in [("plain", Overlap::None), ("two-batch", Overlap::TwoBatch)] {
        let asked = ask("va16", tp32, overlap, v3());
        group.bench_function(BenchmarkId::new("folded", name), |b| {
            b.iter(|| black_box(asked.picos(Folding::default())));
        });
        group.sample_size(10).bench_function(BenchmarkId::new("every rank and layer", name), |b| {
            b.iter(|| black_box(asked.picos(Folding { ranks: false, layers: false })));
        });
    }
    group.finish();

    let mut group = c.benchmark_group("ranks");
    for data in [16, 128, 512, 2048] {
        let parallel = ParallelOptions { data, expert: true, ..ParallelOptions::default() };
        let asked = ask("h800", parallel, Overlap::None, v3());
        group.throughput(Throughput::Elements(data as u64));
        group.bench_function(BenchmarkId::from_parameter(data), |b| {
            b.iter(|| black_box(asked.picos(Folding::default())));
        });
    }
    group.finish();

    let mut group = c.benchmark_group("layers, none folded");
    for layers in [16, 31, 61] {
        let config = ModelConfig { num_hidden_layers: layers, ..v3() };
        let asked = ask("va16", tp32, Overlap::None, config);
        group.throughput(Throughput::Elements(layers as u64));
        group.bench_function(BenchmarkId::from_parameter(layers), |b| {
            b.iter(|| black_box(asked.picos(Folding { ranks: true, layers: false })));
        });
    }
    group.finish();
}

/// A thousand points, all of which fit.
const SWEEP: &str = r#"
[[grid]]
machine = ["h800"]
phase = ["decode"]
data-parallel-size = [32, 64, 128, 256]
expert-parallel = [true]
overlap = ["none", "two-batch"]
batch = [1, 2, 4, 8, 12, 16, 20, 24]
kv = [1024, 2048, 3072, 4096, 5120, 6144, 7168, 8192]
mtp = [false, true]
"#;

fn sweeps(c: &mut Criterion) {
    let (_, points) = Grid::parse(SWEEP).expect("a sweep");
    let machines = HashMap::from([("h800".to_string(), Machine::named("h800").expect("built in"))]);
    let mut group = c.benchmark_group("sweep");
    group.sample_size(10).throughput(Throughput::Elements(points.len() as u64));
    group.bench_function(BenchmarkId::from_parameter(points.len()), |b| {
        b.iter(|| {
            let outcomes = run(&Preset::DeepSeekV3.config(), &machines, &points, &|_| {});
            assert!(outcomes.iter().all(|o| o.error.is_none()), "every point is possible");
            black_box(outcomes)
        });
    });
    group.finish();
}

criterion_group!(benches, steps, sweeps);
criterion_main!(benches);

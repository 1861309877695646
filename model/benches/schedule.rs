//! How long a rank's graph of a step and its schedule take: the graph alone, the schedule alone, and
//! all that an engine does for a new step shape. The same with more layers shows that time grows
//! with the number of nodes and no faster.

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use model::config::{ModelConfig, Preset};
use model::engine::{EngineOptions, Overlap, StepKind, preview};
use model::graph::{Form, ModelInputs, StepShape, main_model};
use model::plan::{ParallelOptions, ParallelPlan};
use model::schedule::Schedule;
use model::weights::{PlanOptions, plan as plan_weights};
use std::hint::black_box;

/// Sequences of a decode step.
const BATCH: usize = 128;

fn cases() -> [(&'static str, ParallelOptions, Overlap); 2] {
    let base = ParallelOptions::default();
    let two_hops = ParallelOptions { data: 32, expert: true, ranks_per_node: Some(8), ..base };
    [
        ("tp32", ParallelOptions { tensor: 32, ..base }, Overlap::None),
        ("ep32 two hops, two batches", two_hops, Overlap::TwoBatch),
    ]
}

fn with_layers(times: usize) -> ModelConfig {
    let config = Preset::DeepSeekV3.config();
    ModelConfig { num_hidden_layers: config.num_hidden_layers * times, ..config }
}

/// One micro-batch's graph, as it is written down, before fusion.
fn graph_alone(c: &mut Criterion) {
    for (name, parallel, _) in cases() {
        let mut group = c.benchmark_group(format!("graph/{name}"));
        for times in [1, 2, 4] {
            let config = with_layers(times);
            let plan = ParallelPlan::new(&config, parallel).expect("the plan keeps the rules");
            let rank = plan.rank(0);
            let options = EngineOptions::default();
            let numerics = options.numerics;
            let positions = options.max_model_len;
            let weights =
                plan_weights(&config, &rank, PlanOptions { numerics, mtp: false, positions });
            let inputs = ModelInputs { config: &config, numerics, rank: &rank, weights: &weights };
            let shape = StepShape {
                tokens: BATCH,
                sequences: BATCH,
                logit_rows: BATCH,
                form: Form::Absorbed,
                pages: positions / options.page_size,
                page_size: options.page_size,
                max_pages: positions / options.page_size,
                vocabulary: config.vocab_size,
                expert_tokens: BATCH * parallel.data,
                expert_capacity: None,
            };
            let nodes = main_model(inputs, shape, 0).nodes().len();
            group.throughput(Throughput::Elements(nodes as u64));
            group.bench_function(BenchmarkId::from_parameter(nodes), |b| {
                b.iter(|| main_model(black_box(inputs), black_box(shape), 0));
            });
        }
    }
}

fn schedule_alone_and_all(c: &mut Criterion) {
    for (name, parallel, overlap) in cases() {
        let options = EngineOptions { overlap, ..EngineOptions::default() };
        let step = StepKind::Decode { sequences: BATCH };
        for times in [1, 2, 4] {
            let config = with_layers(times);
            let plan = ParallelPlan::new(&config, parallel).expect("the plan keeps the rules");
            let all = || preview(&config, &plan, 0, options, step);
            let (graph, _) = all();
            let nodes = graph.nodes().len();
            let mut group = c.benchmark_group(format!("schedule/{name}"));
            group.throughput(Throughput::Elements(nodes as u64));
            group.bench_function(BenchmarkId::from_parameter(nodes), |b| {
                b.iter(|| Schedule::new(black_box(&graph)));
            });
            drop(group);
            let mut group = c.benchmark_group(format!("preview/{name}"));
            group.throughput(Throughput::Elements(nodes as u64));
            group.bench_function(BenchmarkId::from_parameter(nodes), |b| b.iter(&all));
        }
    }
}

criterion_group! {
    name = benches;
    // A dozen runs tell milliseconds from seconds.
    config = Criterion::default().sample_size(12);
    targets = graph_alone, schedule_alone_and_all
}
criterion_main!(benches);

//! DeepSeek-V3 over 32 dies in time alone: from nothing to the first decode step timed, which plans,
//! records and issues it, and the steps after it.

use criterion::{Criterion, criterion_group, criterion_main};
use hal::DeviceId;
use model::config::Preset;
use model::engine::{Engine, EngineOptions, Sequence, Wanted};
use model::plan::{ParallelOptions, ParallelPlan};
use sim::{Machine, Mode, Options, System};

fn engine() -> Engine {
    let config = Preset::DeepSeekV3.config();
    let parallel = ParallelOptions { tensor: 32, ..ParallelOptions::default() };
    let plan = ParallelPlan::new(&config, parallel).unwrap();
    let options = Options { mode: Mode::TimingOnly, threads: None };
    let system = System::new(Machine::named("va16").unwrap(), options).unwrap();
    let devices = (0..32).map(|die| system.open(DeviceId(die)).unwrap()).collect();
    let options = EngineOptions { max_model_len: 4096, ..EngineOptions::default() };
    Engine::timing_only(devices, plan, config, options).unwrap()
}

fn step(engine: &mut Engine, sequence: &mut Sequence) -> u64 {
    engine.decode(&mut [(sequence, 5)], Wanted::Greedy).unwrap();
    engine.now_picos().unwrap()
}

fn first_step(c: &mut Criterion) {
    let mut group = c.benchmark_group("671B on 32 dies, timing only");
    group.sample_size(10);
    group.bench_function("built, recorded and one step", |b| {
        b.iter(|| {
            let mut engine = engine();
            let mut sequence = engine.start();
            step(&mut engine, &mut sequence)
        });
    });
    let mut engine = engine();
    let mut sequence = engine.start();
    step(&mut engine, &mut sequence);
    group.bench_function("a further step", |b| b.iter(|| step(&mut engine, &mut sequence)));
}

criterion_group!(benches, first_step);
criterion_main!(benches);

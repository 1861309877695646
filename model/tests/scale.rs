//! The true 671B model on 32 dies, in time alone: buffers without storage, the same commands.

mod common;

use common::system;
use hal::DeviceId;
use model::config::Preset;
use model::engine::{Engine, EngineOptions, Overlap, Sequence, Wanted};
use model::plan::{ParallelOptions, ParallelPlan};
use sim::Mode;

fn engine(parallel: ParallelOptions, options: EngineOptions) -> Engine {
    let config = Preset::DeepSeekV3.config();
    let plan = ParallelPlan::new(&config, parallel).unwrap();
    let system = system(Mode::TimingOnly, 2);
    let devices = (0..plan.ranks() as u32).map(|d| system.open(DeviceId(d)).unwrap()).collect();
    Engine::timing_only(devices, plan, config, options).unwrap()
}

/// Simulated picoseconds of a decode step of `batch` sequences.
fn decode(engine: &mut Engine, batch: usize) -> u64 {
    let mut sequences: Vec<Sequence> = (0..batch).map(|_| engine.start()).collect();
    let mut step = |engine: &mut Engine| {
        let mut batch: Vec<(&mut Sequence, u32)> = sequences.iter_mut().map(|s| (s, 5)).collect();
        engine.decode(&mut batch, Wanted::Greedy).unwrap();
        engine.now_picos().unwrap()
    };
    let first = step(engine);
    let second = step(engine);
    sequences.into_iter().for_each(|s| engine.end(s));
    second - first
}

#[test]
fn tensor_ranks_decode_in_time_alone_and_the_same_in_every_run() {
    let parallel = ParallelOptions { tensor: 32, ..ParallelOptions::default() };
    let options = EngineOptions { max_model_len: 1024, ..EngineOptions::default() };
    let time = decode(&mut engine(parallel, options), 1);
    // 1.16 GB of weights a token and die at 136.5 GB/s: no step is faster (vacc-facts).
    assert!((8_500_000_000..1_000_000_000_000).contains(&time), "{time} ps");
    assert_eq!(decode(&mut engine(parallel, options), 1), time);
}

#[test]
fn two_micro_batches_hide_communication_where_there_is_some_to_hide() {
    // Compute-bound enough that halving the batch does not double the reading of weights: prefill.
    let parallel = ParallelOptions { tensor: 32, ..ParallelOptions::default() };
    let prefill = |overlap| {
        let options = EngineOptions {
            max_model_len: 4096,
            prefill_chunk: 4096,
            overlap,
            ..EngineOptions::default()
        };
        let mut engine = engine(parallel, options);
        let mut sequence = engine.start();
        engine.prefill(&mut sequence, &[5; 4096], Wanted::Greedy).unwrap();
        let time = engine.now_picos().unwrap();
        engine.end(sequence);
        time
    };
    let (plain, two) = (prefill(Overlap::None), prefill(Overlap::TwoBatch));
    assert!(two * 100 < plain * 95, "plain {plain} ps, two-batch {two} ps");
}

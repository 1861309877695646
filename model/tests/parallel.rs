//! Parallel plans against one rank: the same logits within rounding, the same greedy text.

mod common;

use common::{dies, max_difference, options, tiny_dir};
use hal::{Device, DeviceId, Validated};
use model::Numerics;
use model::checkpoint::Checkpoint;
use model::engine::{Engine, EngineOptions, GenerationOptions, Overlap, Sequence, Wanted};
use model::plan::{ParallelOptions, ParallelPlan};
use model::sampling::SamplingParams;
use std::path::Path;
use std::sync::Arc;

const PROMPT: [u32; 10] = [0, 1022, 267, 262, 269, 279, 272, 775, 33, 1023];
const OTHER: [u32; 13] = [0, 1022, 267, 262, 223, 19, 25, 285, 223, 20, 23, 33, 1023];

fn tp(tensor: usize) -> ParallelOptions {
    ParallelOptions { tensor, ..ParallelOptions::default() }
}

fn pp(tensor: usize, pipeline: usize) -> ParallelOptions {
    ParallelOptions { tensor, pipeline, ..ParallelOptions::default() }
}

fn load(dir: &Path, parallel: ParallelOptions, options: EngineOptions) -> Engine {
    let checkpoint = Checkpoint::open(dir).unwrap();
    let plan = ParallelPlan::new(checkpoint.config(), parallel).unwrap();
    let devices = dies(plan.ranks());
    Engine::load_on(devices, plan, &checkpoint, options, &mut |_| {}).unwrap()
}

fn greedy(max_tokens: usize) -> GenerationOptions {
    GenerationOptions {
        max_tokens,
        sampling: SamplingParams::greedy(),
        stop_ids: vec![1],
        ignore_eos: false,
        allowed: None,
    }
}

/// Everything that a plan may not change: logits of a prompt in pieces, MTP logits, greedy text, and
/// logits of a batch that decodes.
struct Outcome {
    logits: Vec<f32>,
    mtp: Option<Vec<f32>>,
    text: Vec<u32>,
    decoded: Vec<f32>,
}

fn outcome(engine: &mut Engine, prompts: [&[u32]; 2]) -> Outcome {
    let (logits, mtp) = engine.all_logits(prompts[1]).unwrap();
    let text = engine.generate(prompts[0], &greedy(12), &mut |_| {}).unwrap().token_ids;
    let mut sequences: Vec<Sequence> = (0..3).map(|_| engine.start()).collect();
    for (sequence, prompt) in sequences.iter_mut().zip([prompts[0], prompts[1], prompts[0]]) {
        engine.prefill(sequence, prompt, Wanted::Nothing).unwrap();
    }
    let mut decoded = Vec::new();
    for token in [5, 6] {
        let mut batch: Vec<(&mut Sequence, u32)> =
            sequences.iter_mut().enumerate().map(|(i, s)| (s, token + i as u32)).collect();
        decoded.extend(engine.decode(&mut batch, Wanted::LastLogits).unwrap().logits);
    }
    sequences.into_iter().for_each(|s| engine.end(s));
    Outcome { logits, mtp, text, decoded }
}

/// Plans that between them use every way to spread the model.
fn some_plans() -> Vec<ParallelOptions> {
    let nodes = ParallelOptions { ranks_per_node: Some(2), ..ep(2, 2) };
    vec![tp(2), tp(3), pp(1, 2), ep(1, 2), ep(2, 2), nodes]
}

fn check(dir: &Path, plans: &[ParallelOptions], base: EngineOptions, prompts: [&[u32]; 2]) {
    let base = EngineOptions { max_sequences: 3, prefill_chunk: 7, page_size: 16, ..base };
    let expected = outcome(&mut load(dir, ParallelOptions::default(), base), prompts);
    for &plan in plans {
        for overlap in [Overlap::None, Overlap::TwoBatch] {
            let mut engine = load(dir, plan, EngineOptions { overlap, ..base });
            let found = outcome(&mut engine, prompts);
            let name = format!("{} {plan:?} {overlap:?}", dir.display());
            for (what, a, b) in [
                ("logits", Some(&expected.logits), Some(&found.logits)),
                ("MTP logits", expected.mtp.as_ref(), found.mtp.as_ref()),
                ("decoded", Some(&expected.decoded), Some(&found.decoded)),
            ] {
                assert_eq!(a.is_some(), b.is_some(), "{name}: {what}");
                if let (Some(a), Some(b)) = (a, b) {
                    let difference = max_difference(a, b);
                    assert!(difference <= 1e-4, "{name}: {what} differ by {difference}");
                }
            }
            assert_eq!(found.text, expected.text, "{name}");
        }
    }
}

#[test]
fn tensor_and_pipeline_ranks_agree_with_one_in_f32() {
    let plans = [tp(2), tp(4), tp(8), tp(16), tp(32), tp(3), pp(1, 2), pp(1, 4), pp(4, 2)];
    check(&tiny_dir(), &plans, options(Numerics::F32), [&PROMPT, &OTHER]);
}

fn ep(tensor: usize, data: usize) -> ParallelOptions {
    ParallelOptions { tensor, data, expert: true, ..ParallelOptions::default() }
}

#[test]
fn expert_and_data_ranks_agree_with_one_in_f32() {
    let copies = ParallelOptions { redundant_experts: Some(8), ..ep(2, 2) };
    let nodes = ParallelOptions { ranks_per_node: Some(2), ..ep(1, 4) };
    let nodes_and_copies = ParallelOptions { ranks_per_node: Some(4), ..ep(4, 4) };
    let stages = ParallelOptions { pipeline: 2, ..ep(2, 2) };
    let replicas = ParallelOptions { data: 2, ..tp(2) };
    let plans = [
        ep(1, 2),
        ep(1, 4),
        ep(1, 8),
        ep(4, 2),
        ep(8, 1),
        copies,
        nodes,
        nodes_and_copies,
        stages,
        replicas,
    ];
    check(&tiny_dir(), &plans, options(Numerics::F32), [&PROMPT, &OTHER]);
}

#[test]
fn other_shapes_agree_with_one_rank_in_f32() {
    let fixtures = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/shapes");
    let mut checked = 0;
    for dir in std::fs::read_dir(fixtures).unwrap().map(|e| e.unwrap().path()) {
        let config = Checkpoint::open(&dir).unwrap().config().clone();
        let possible = |plan: &ParallelOptions| ParallelPlan::new(&config, *plan).is_ok();
        let plans: Vec<_> = some_plans().into_iter().filter(possible).collect();
        checked += plans.len();
        let prompts = [&[3, 1, 4, 1, 5][..], &[2, 7, 1, 8, 2, 8, 1, 8, 2][..]];
        let base = EngineOptions { max_model_len: 64, ..options(Numerics::F32) };
        check(&dir, &plans, base, prompts);
    }
    assert!(checked >= 50, "{checked} plans were possible");
}

#[test]
fn greedy_text_in_fp8_is_that_of_one_rank() {
    for parallel in [tp(4), tp(32), pp(2, 2), ep(1, 4), ep(4, 2)] {
        for overlap in [Overlap::None, Overlap::TwoBatch] {
            let base = EngineOptions { overlap, ..options(Numerics::Fp8) };
            let text = |plan| {
                let mut engine = load(&tiny_dir(), plan, base);
                engine.generate(&PROMPT, &greedy(12), &mut |_| {}).unwrap().token_ids
            };
            assert_eq!(
                text(parallel),
                text(ParallelOptions::default()),
                "{parallel:?} {overlap:?}"
            );
        }
    }
}

#[test]
fn validated_parallel_runs_are_clean_and_free_everything() {
    for (parallel, overlap) in [(tp(4), Overlap::TwoBatch), (ep(2, 2), Overlap::TwoBatch)] {
        let checkpoint = Checkpoint::open(&tiny_dir()).unwrap();
        let plan = ParallelPlan::new(checkpoint.config(), parallel).unwrap();
        let validated = Validated::wrap_all(dies(plan.ranks()));
        let devices = validated.iter().map(|d| d.clone() as Arc<dyn Device>).collect();
        let base = EngineOptions { overlap, prefill_chunk: 4, ..options(Numerics::Fp8) };
        let mut engine = Engine::load_on(devices, plan, &checkpoint, base, &mut |_| {}).unwrap();
        engine.all_logits(&OTHER).unwrap();
        engine.generate(&PROMPT, &greedy(5), &mut |_| {}).unwrap();
        drop(engine);
        for die in &validated {
            assert_eq!(die.leaks(), [], "{parallel:?}");
        }
    }
}

#[test]
fn simulated_time_of_many_ranks_depends_on_the_program_alone() {
    let run = |threads| {
        let system = common::system(sim::Mode::Full, threads);
        let devices = (0..4).map(|die| system.open(DeviceId(die)).unwrap()).collect();
        let checkpoint = Checkpoint::open(&tiny_dir()).unwrap();
        let plan = ParallelPlan::new(checkpoint.config(), ep(2, 2)).unwrap();
        let base = EngineOptions { overlap: Overlap::TwoBatch, ..options(Numerics::Fp8) };
        let mut engine = Engine::load_on(devices, plan, &checkpoint, base, &mut |_| {}).unwrap();
        engine.generate(&PROMPT, &greedy(5), &mut |_| {}).unwrap().timing.unwrap()
    };
    let timing = run(1);
    assert!(timing.prefill_ps > 0 && timing.decode_ps > 0);
    assert_eq!(run(3), timing);
    assert_eq!(run(2), timing);
}

#[test]
fn recorded_and_eager_issue_give_the_same_bits() {
    let bits = |values: &[f32]| values.iter().map(|v| v.to_bits()).collect::<Vec<_>>();
    for (plan, overlap) in [
        (ParallelOptions::default(), Overlap::None),
        (tp(4), Overlap::TwoBatch),
        (pp(2, 2), Overlap::None),
        (ep(2, 2), Overlap::TwoBatch),
    ] {
        let [recorded, eager] = [false, true].map(|enforce_eager| {
            let base = EngineOptions {
                max_sequences: 3,
                prefill_chunk: 7,
                page_size: 16,
                overlap,
                ..options(Numerics::Fp8)
            };
            let mut engine = load(&tiny_dir(), plan, EngineOptions { enforce_eager, ..base });
            outcome(&mut engine, [&PROMPT, &OTHER])
        });
        let name = format!("{plan:?} {overlap:?}");
        assert_eq!(bits(&recorded.logits), bits(&eager.logits), "{name}");
        assert_eq!(recorded.mtp.as_deref().map(bits), eager.mtp.as_deref().map(bits), "{name}");
        assert_eq!(bits(&recorded.decoded), bits(&eager.decoded), "{name}");
        assert_eq!(recorded.text, eager.text, "{name}");
    }
}

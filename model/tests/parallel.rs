//! Parallel plans against one rank: the same logits within rounding, the same greedy text.

mod common;

use common::{dies, max_difference, options, tiny_dir};
use model::Numerics;
use model::checkpoint::Checkpoint;
use model::engine::{Engine, EngineOptions, GenerationOptions, Overlap, Sequence, Wanted};
use model::plan::{ParallelOptions, ParallelPlan};
use model::sampling::SamplingParams;
use std::path::Path;

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

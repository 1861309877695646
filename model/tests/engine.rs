//! What the engine promises about numbers, limits and memory.

mod common;

use common::{device, engine, options, tiny_dir};
use hal::{Device, DeviceId, Validated};
use model::Numerics;
use model::checkpoint::Checkpoint;
use model::engine::{
    Engine, EngineError, EngineOptions, FinishReason, GenerationOptions, Sequence, Wanted,
};
use model::plan::ParallelPlan;
use model::sampling::SamplingParams;
use sim::{Machine, Mode, Options, System};

const PROMPT: [u32; 10] = [0, 1022, 267, 262, 269, 279, 272, 775, 33, 1023];
const OTHER: [u32; 13] = [0, 1022, 267, 262, 223, 19, 25, 285, 223, 20, 23, 33, 1023];

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|v| v.to_bits()).collect()
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

/// Logits of a few decode steps after a prompt.
fn decode(engine: &mut Engine, prompt: &[u32], tokens: &[u32]) -> Vec<f32> {
    let mut sequence = engine.start();
    let mut all = engine.prefill(&mut sequence, prompt, Wanted::LastLogits).unwrap().logits;
    for &token in tokens {
        let step = engine.decode(&mut [(&mut sequence, token)], Wanted::LastLogits).unwrap();
        all.extend(step.logits);
    }
    engine.end(sequence);
    all
}

#[test]
fn batches_give_the_bits_of_single_sequences() {
    for numerics in Numerics::ALL {
        let opts = EngineOptions { max_sequences: 3, ..options(numerics) };
        let mut engine = engine(&tiny_dir(), opts);
        let vocabulary = engine.config().vocab_size;
        let tokens = [[290u32, 279, 272], [19, 25, 285]];
        let alone: Vec<Vec<f32>> = [(&PROMPT[..], tokens[0]), (&OTHER[..], tokens[1])]
            .iter()
            .map(|(prompt, tokens)| decode(&mut engine, prompt, tokens))
            .collect();
        let mut sequences: Vec<Sequence> = vec![engine.start(), engine.start()];
        engine.prefill(&mut sequences[0], &PROMPT, Wanted::Nothing).unwrap();
        engine.prefill(&mut sequences[1], &OTHER, Wanted::Nothing).unwrap();
        let [a, b] = sequences.as_mut_slice() else { unreachable!("two were started") };
        for step in 0..3 {
            let mut batch = [(&mut *b, tokens[1][step]), (&mut *a, tokens[0][step])];
            let logits = engine.decode(&mut batch, Wanted::LastLogits).unwrap().logits;
            for (row, which) in [(0, 1), (1, 0)] {
                let together = &logits[row * vocabulary..(row + 1) * vocabulary];
                let alone = &alone[which][(step + 1) * vocabulary..(step + 2) * vocabulary];
                assert_eq!(bits(together), bits(alone), "{numerics}, step {step}");
            }
        }
    }
}

#[test]
fn threads_do_not_change_a_bit() {
    let checkpoint = Checkpoint::open(&tiny_dir()).unwrap();
    for numerics in Numerics::ALL {
        let run = |threads| {
            let mut engine =
                Engine::load(device(threads), &checkpoint, options(numerics), &mut |_| {}).unwrap();
            bits(&engine.all_logits(&[&PROMPT[..], &OTHER[1..]].concat()).unwrap().0)
        };
        assert_eq!(run(1), run(3), "{numerics}");
    }
}

#[test]
fn pieces_of_a_prompt_give_the_bits_of_the_whole() {
    // Keys and values come from the cache in the same dtype, and softmax runs over the same keys in
    // the same order, so even the rounding agrees.
    for numerics in Numerics::ALL {
        let prompt = [&PROMPT[..], &OTHER[1..], &PROMPT[1..]].concat();
        let run = |prefill_chunk| {
            let opts = EngineOptions { prefill_chunk, page_size: 16, ..options(numerics) };
            bits(&engine(&tiny_dir(), opts).all_logits(&prompt).unwrap().0)
        };
        let whole = run(512);
        assert_eq!(run(5), whole, "{numerics}");
        assert_eq!(run(1), whole, "{numerics}");
    }
}

#[test]
fn absorbed_and_expanded_attention_agree() {
    for (numerics, tolerance) in [(Numerics::F32, 1e-3), (Numerics::Bf16, 0.5)] {
        let mut engine = engine(&tiny_dir(), options(numerics));
        let answer = [290u32, 279, 272, 775, 262, 646, 261, 16];
        let absorbed = decode(&mut engine, &PROMPT, &answer);
        let whole = [&PROMPT[..], &answer].concat();
        let expanded = engine.all_logits(&whole).unwrap().0;
        let expanded = &expanded[(PROMPT.len() - 1) * engine.config().vocab_size..];
        let difference = common::max_difference(&absorbed, expanded);
        assert!(difference < tolerance, "{numerics}: {difference}");
    }
}

#[test]
fn a_validated_run_is_clean_and_frees_everything() {
    for numerics in Numerics::ALL {
        let validated = Validated::wrap(device(2));
        let checkpoint = Checkpoint::open(&tiny_dir()).unwrap();
        let mut opts = options(numerics);
        opts.prefill_chunk = 6;
        let mut engine = Engine::load(validated.clone(), &checkpoint, opts, &mut |_| {}).unwrap();
        let generation = engine.generate(&PROMPT, &greedy(20), &mut |_| {}).unwrap();
        assert_eq!(generation.finish_reason, FinishReason::Stop);
        engine.all_logits(&OTHER).unwrap();
        drop(engine);
        assert_eq!(validated.leaks(), [], "{numerics}");
        assert_eq!(validated.memory_info().unwrap().used, 0);
    }
}

#[test]
fn impossible_requests_are_refused_in_words() {
    let opts = EngineOptions { max_model_len: 12, ..options(Numerics::F32) };
    let mut engine = engine(&tiny_dir(), opts);
    let mut none = |_| {};
    for (prompt, words) in [
        (vec![], "the prompt is empty"),
        (vec![0, 1024], "token id 1024 at position 1 is out of range: the vocabulary has 1024 ids"),
        (vec![5; 13], "13 tokens does not fit the context of 12"),
    ] {
        let error = engine.generate(&prompt, &greedy(4), &mut none).unwrap_err().to_string();
        assert!(error.contains(words), "{error}");
    }
    // The context ends the text, and the engine goes on.
    let generation = engine.generate(&PROMPT, &greedy(100), &mut none).unwrap();
    assert_eq!(generation.finish_reason, FinishReason::Length);
    assert_eq!(generation.token_ids.len(), 3, "two more tokens fit, and a third is known");
    let again = engine.generate(&PROMPT, &greedy(100), &mut none).unwrap();
    assert_eq!(again.token_ids, generation.token_ids);
}

#[test]
fn what_does_not_fit_is_refused_before_loading() {
    let machine = Machine::named("va16").unwrap();
    let options = Options { mode: Mode::TimingOnly, threads: Some(1) };
    let device = System::new(machine, options).unwrap().open(DeviceId(0)).unwrap();
    let stream = device.stream("hog").unwrap();
    let checkpoint = Checkpoint::open(&tiny_dir()).unwrap();
    let opts = EngineOptions { max_model_len: 163_840, ..common::options(Numerics::Bf16) };
    let capacity = device.properties().memory_bytes;
    for (free, words) in [(64 << 20, "the longest context that fits is"), (8 << 20, "more memory")]
    {
        let _hog = stream.alloc(capacity - free).unwrap();
        let error = Engine::load(device.clone(), &checkpoint, opts, &mut |_| {}).unwrap_err();
        assert!(matches!(error, EngineError::DoesNotFit { .. }), "{error}");
        for words in ["weights", "KV cache", "workspace", words] {
            assert!(error.to_string().contains(words), "{error}");
        }
        // What is said to fit does, and a page more does not.
        let text = error.to_string();
        if let Some(rest) = text.split("fits is ").nth(1) {
            let tokens: usize = rest.split(' ').next().unwrap().parse().unwrap();
            let load = |max_model_len| {
                let opts = EngineOptions { max_model_len, ..opts };
                Engine::timing_only(
                    vec![device.clone()],
                    ParallelPlan::single(checkpoint.config()),
                    checkpoint.config().clone(),
                    opts,
                )
            };
            load(tokens).unwrap();
            load(tokens + opts.page_size).unwrap_err();
        }
    }
}

#[test]
fn sampling_is_seeded_and_stays_inside_the_vocabulary() {
    let mut engine =
        engine(&tiny_dir(), EngineOptions { vocabulary: Some(300), ..options(Numerics::F32) });
    let mut run = |seed| {
        let sampling = SamplingParams { temperature: 5.0, top_k: None, top_p: 1.0, seed };
        let options = GenerationOptions { sampling, ignore_eos: true, ..greedy(40) };
        engine.generate(&PROMPT, &options, &mut |_| {}).unwrap().token_ids
    };
    let first = run(1);
    assert_eq!(run(1), first);
    assert_ne!(run(2), first);
    assert!(first.iter().all(|&t| t < 300), "ids from 300 on are padding here: {first:?}");
    let options = GenerationOptions { ignore_eos: true, ..greedy(10) };
    let greedy = engine.generate(&PROMPT, &options, &mut |_| {}).unwrap().token_ids;
    assert!(greedy.iter().all(|&t| t < 300), "{greedy:?}");
}

#[test]
fn simulated_time_is_the_same_on_every_host() {
    let checkpoint = Checkpoint::open(&tiny_dir()).unwrap();
    let run = |threads, enforce_eager| {
        let options = EngineOptions { enforce_eager, ..options(Numerics::Fp8) };
        let mut engine = Engine::load(device(threads), &checkpoint, options, &mut |_| {}).unwrap();
        engine.generate(&PROMPT, &greedy(8), &mut |_| {}).unwrap().timing.unwrap()
    };
    let [recorded, eager] = [false, true].map(|enforce_eager| {
        let timing = run(1, enforce_eager);
        assert_eq!(run(3, enforce_eager), timing);
        timing
    });
    // On a model this small, issuing commands takes longer than running them.
    assert!(0 < recorded.prefill_ps && recorded.prefill_ps < eager.prefill_ps);
    assert!(0 < recorded.decode_ps && recorded.decode_ps < eager.decode_ps);
}

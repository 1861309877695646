//! The built-in model against transformers (see models/tiny-dsv3/README.md).

mod common;

use common::{engine, floats, ids, max_difference, options, tiny_dir};
use model::Numerics;
use model::engine::GenerationOptions;
use model::sampling::SamplingParams;
use safetensors::SafeTensors;
use serde::Deserialize;

#[derive(Deserialize)]
struct Reference {
    completions: Vec<Completion>,
}

#[derive(Deserialize)]
struct Completion {
    prompt: String,
    prompt_token_ids: Vec<u32>,
    completion_token_ids: Vec<u32>,
    min_top2_gap: f64,
}

fn reference() -> Reference {
    let text = std::fs::read(tiny_dir().join("reference.json")).unwrap();
    serde_json::from_slice(&text).unwrap()
}

#[test]
fn logits_and_mtp_logits_agree_in_f32() {
    let data = std::fs::read(tiny_dir().join("reference.safetensors")).unwrap();
    let file = SafeTensors::deserialize(&data).unwrap();
    let mut engine = engine(&tiny_dir(), options(Numerics::F32));
    let vocabulary = engine.config().vocab_size;
    for name in ["0", "1", "2", "3", "long"] {
        let tokens = ids(&file, &format!("token_ids.{name}"));
        let (logits, mtp) = engine.all_logits(&tokens).unwrap();
        let mtp = mtp.expect("the checkpoint has an MTP layer");
        assert_eq!(
            (logits.len(), mtp.len()),
            (tokens.len() * vocabulary, (tokens.len() - 1) * vocabulary)
        );
        for (kind, ours) in [("logits", logits), ("mtp_logits", mtp)] {
            let expected = floats(&file, &format!("{kind}.{name}"));
            // The long sequence keeps the last rows only.
            let ours = &ours[ours.len() - expected.len()..];
            let difference = max_difference(ours, &expected);
            assert!(difference <= 1e-3, "{kind}.{name} differ by {difference}");
        }
    }
}

#[test]
fn greedy_completions_agree() {
    for (numerics, least_gap) in
        [(Numerics::F32, 0.01), (Numerics::Bf16, 0.5), (Numerics::Fp8, 0.5)]
    {
        let mut engine = engine(&tiny_dir(), options(numerics));
        let mut compared = 0;
        for completion in reference().completions {
            if completion.min_top2_gap < least_gap {
                continue;
            }
            let options = GenerationOptions {
                max_tokens: 64,
                sampling: SamplingParams::greedy(),
                stop_ids: vec![1],
                ignore_eos: false,
                allowed: None,
            };
            let mut streamed = Vec::new();
            let generation = engine
                .generate(&completion.prompt_token_ids, &options, &mut |t| streamed.push(t))
                .unwrap();
            let expected = &completion.completion_token_ids;
            assert_eq!(&generation.token_ids, expected, "{numerics}: {}", completion.prompt);
            assert_eq!(&streamed, expected);
            compared += 1;
        }
        assert!(compared >= 7, "only the story has a near-tie");
    }
}

//! Randomly initialised models of other shapes against transformers (see oracle/README.md).

mod common;

use common::{device, floats, ids, max_difference};
use model::Numerics;
use model::checkpoint::Checkpoint;
use model::engine::{Engine, EngineOptions, GenerationOptions};
use model::sampling::SamplingParams;
use safetensors::SafeTensors;
use serde_json::Value;
use std::path::{Path, PathBuf};

fn fixtures() -> Vec<PathBuf> {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/shapes");
    let mut all: Vec<PathBuf> =
        std::fs::read_dir(dir).unwrap().map(|e| e.unwrap().path()).collect();
    all.sort();
    assert!(all.len() >= 15, "every shape of oracle/README.md is here");
    all
}

fn load(dir: &Path, numerics: Numerics, prefill_chunk: usize) -> Engine {
    let checkpoint = Checkpoint::open(dir).unwrap();
    let options = EngineOptions {
        numerics,
        max_model_len: 128,
        prefill_chunk,
        page_size: 16,
        mtp: true,
        ..EngineOptions::default()
    };
    Engine::load(device(2), &checkpoint, options, &mut |_| {}).unwrap()
}

#[test]
fn logits_agree_in_f32_whole_and_in_pieces() {
    let mut mtp_checked = 0;
    for dir in fixtures() {
        let name = dir.file_name().unwrap().display().to_string();
        let data = std::fs::read(dir.join("reference.safetensors")).unwrap();
        let file = SafeTensors::deserialize(&data).unwrap();
        for chunk in [64, 7] {
            let mut engine = load(&dir, Numerics::F32, chunk);
            for i in 0..2 {
                let tokens = ids(&file, &format!("token_ids.{i}"));
                let (logits, mtp) = engine.all_logits(&tokens).unwrap();
                let difference = max_difference(&logits, &floats(&file, &format!("logits.{i}")));
                assert!(
                    difference <= 1e-3,
                    "{name}, pieces of {chunk}: logits.{i} differ by {difference}"
                );
                let expected = format!("mtp_logits.{i}");
                let has_mtp = file.names().contains(&expected.as_str());
                assert_eq!(mtp.is_some(), has_mtp, "{name}");
                if let Some(mtp) = mtp {
                    let difference = max_difference(&mtp, &floats(&file, &expected));
                    assert!(
                        difference <= 1e-3,
                        "{name}, pieces of {chunk}: {expected} differ by {difference}"
                    );
                    mtp_checked += 1;
                }
            }
        }
    }
    assert!(mtp_checked > 0);
}

#[test]
fn greedy_completions_agree_in_f32() {
    for dir in fixtures() {
        let text = std::fs::read(dir.join("reference.json")).unwrap();
        let reference: Value = serde_json::from_slice(&text).unwrap();
        let list = |key: &str| -> Vec<u32> {
            let values = reference["completions"][0][key].as_array();
            let values = values.unwrap_or_else(|| panic!("{} has no {key}", dir.display()));
            values.iter().map(|v| v.as_u64().unwrap() as u32).collect()
        };
        let (prompt, expected) = (list("prompt_token_ids"), list("completion_token_ids"));
        let options = GenerationOptions {
            max_tokens: expected.len(),
            sampling: SamplingParams::greedy(),
            stop_ids: Vec::new(),
            ignore_eos: true,
            allowed: None,
        };
        let mut engine = load(&dir, Numerics::F32, 64);
        let generation = engine.generate(&prompt, &options, &mut |_| {}).unwrap();
        assert_eq!(generation.token_ids, expected, "{}", dir.display());
    }
}

#[test]
fn every_shape_runs_in_every_policy() {
    // Random weights let small errors flip experts, so nothing is compared but that logits exist.
    for dir in fixtures() {
        for numerics in [Numerics::Bf16, Numerics::Fp8] {
            let mut engine = load(&dir, numerics, 64);
            let (logits, _) = engine.all_logits(&[3, 1, 4, 1, 5]).unwrap();
            assert!(logits.iter().all(|l| l.is_finite() && l.abs() < 100.0), "{}", dir.display());
            assert!(logits.iter().any(|l| l.abs() > 0.1), "{}", dir.display());
        }
    }
}

//! Synthesised checkpoints: released layout, deterministic, plausible values, nothing left behind.

use std::{collections::BTreeMap, fs, path::Path};

use model::{
    checkpoint::{
        Checkpoint, Dtype, MtpState, SynthError, SynthOptions, inspect, inspect_config, layout,
        synthesize,
    },
    config::{ModelConfig, Preset},
};
use proptest::prelude::*;
use safetensors::SafeTensors;

/// Dimensions that are no multiples of a block, and few of everything.
fn small() -> ModelConfig {
    ModelConfig {
        vocab_size: 40,
        hidden_size: 136,
        num_hidden_layers: 2,
        first_k_dense_replace: 1,
        intermediate_size: 130,
        num_attention_heads: 2,
        q_lora_rank: Some(24),
        kv_lora_rank: 128,
        moe_intermediate_size: 48,
        n_routed_experts: 4,
        num_experts_per_tok: 2,
        n_group: 2,
        topk_group: 1,
        ..Preset::Tiny.config()
    }
}

fn make(config: &ModelConfig, folder: &Path, seed: u64, shard_bytes: u64) {
    synthesize(config, folder, SynthOptions { seed, shard_bytes }, &mut |_, _| {}).unwrap();
}

fn contents(folder: &Path) -> BTreeMap<String, Vec<u8>> {
    let checkpoint = Checkpoint::open(folder).unwrap();
    checkpoint.tensors().map(|view| (view.name.to_owned(), view.data.to_owned())).collect()
}

#[test]
fn files_are_named_as_released_and_readable_by_others() {
    let folder = tempfile::tempdir().unwrap();
    let (mut calls, mut last) = (0, (0, 0));
    let options = SynthOptions { seed: 1, shard_bytes: 100_000 };
    synthesize(&small(), folder.path(), options, &mut |done, total| {
        assert!(done > last.0 && done <= total, "progress must rise to the total");
        (calls, last) = (calls + 1, (done, total));
    })
    .unwrap();
    let size = inspect_config(&small());
    assert_eq!(last, ((size.main + size.mtp).bytes, (size.main + size.mtp).bytes));
    assert!(calls > 10);

    let mut names: Vec<String> = fs::read_dir(folder.path())
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    assert_eq!(names[..2], ["config.json", "generation_config.json"]);
    assert_eq!(names[2], "model-00001-of-000006.safetensors");
    assert_eq!(names[7], "model-00006-of-000006.safetensors");
    assert_eq!(names[8..], ["model.safetensors.index.json"]);

    // The reference library reads every shard, and finds the data aligned.
    let mut tensors = 0;
    for name in &names[2..8] {
        let bytes = fs::read(folder.path().join(name)).unwrap();
        let (header, _) = SafeTensors::read_metadata(&bytes).unwrap();
        for (_, view) in SafeTensors::deserialize(&bytes).unwrap().iter() {
            let offset = view.data().as_ptr() as usize - bytes.as_ptr() as usize;
            assert_eq!(offset % (view.dtype().bitsize() / 8), 0);
            tensors += 1;
        }
        assert_eq!(header % 8, 0);
    }
    assert_eq!(tensors, (size.main + size.mtp).tensors);
}

#[test]
fn tensors_depend_on_seed_and_name_alone() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    make(&small(), &at("a"), 7, 50_000);
    make(&small(), &at("b"), 7, 1 << 30);
    make(&small(), &at("c"), 8, 1 << 30);
    let (a, b, c) = (contents(&at("a")), contents(&at("b")), contents(&at("c")));
    assert_eq!(a, b);
    assert!(a.iter().all(|(name, data)| c[name] != *data), "another seed, other weights");
    assert_eq!(a["model.layers.2.embed_tokens.weight"], a["model.embed_tokens.weight"]);
    assert_eq!(a["model.layers.2.shared_head.head.weight"], a["lm_head.weight"]);
    assert_ne!(a["model.embed_tokens.weight"], a["lm_head.weight"]);
}

#[test]
fn weights_have_the_promised_spread() {
    let folder = tempfile::tempdir().unwrap();
    make(&Preset::Tiny.config(), folder.path(), 3, 1 << 30);
    let checkpoint = Checkpoint::open(folder.path()).unwrap();
    for spec in layout::tensors(checkpoint.config()) {
        let Ok(weight) = checkpoint.weight(&spec.name) else { continue };
        weight.check_values().unwrap();
        if let Some(scales) = &weight.scales {
            let columns = weight.shape[1];
            // E4M3 by the definition, not by the code under test.
            let value = |byte: u8| {
                let (e, m) = (i32::from(byte >> 3 & 15), f64::from(byte & 7) / 8.0);
                let size = if e == 0 { m * 2f64.powi(-6) } else { (1.0 + m) * 2f64.powi(e - 7) };
                if byte & 0x80 == 0 { size } else { -size }
            };
            let values =
                weight.data.iter().enumerate().map(|(at, &byte)| {
                    value(byte) * f64::from(scales.at(at / columns, at % columns))
                });
            let (sum, squares) =
                values.fold((0.0, 0.0), |(sum, squares), x| (sum + x, squares + x * x));
            let count = weight.data.len() as f64;
            let std = (squares / count).sqrt();
            assert!((0.017..0.023).contains(&std), "{}: {std}", weight.name);
            assert!((sum / count).abs() < 0.001, "{}", weight.name);
        }
    }
}

#[test]
fn occupied_folders_are_left_alone() {
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join("precious"), "x").unwrap();
    let result = synthesize(&small(), folder.path(), SynthOptions::default(), &mut |_, _| {});
    assert!(matches!(result, Err(SynthError::NotEmpty { .. })), "{result:?}");
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1);

    let file = folder.path().join("precious");
    let result = synthesize(&small(), &file, SynthOptions::default(), &mut |_, _| {});
    assert!(matches!(result, Err(SynthError::Io { .. })), "{result:?}");
    assert_eq!(fs::read(file).unwrap(), b"x");
}

/// A panic of the caller's progress function is the one way to fail half way that a test can bring
/// about without a full disk; the clean-up is the same.
#[test]
fn nothing_half_written_stays() {
    let folder = tempfile::tempdir().unwrap();
    let target = folder.path().join("new");
    let failing = std::panic::catch_unwind(|| {
        let options = SynthOptions { seed: 0, shard_bytes: 50_000 };
        synthesize(&small(), &target, options, &mut |done, total| {
            if done > total / 2 {
                std::panic::resume_unwind(Box::new(()));
            }
        })
    });
    assert!(failing.is_err());
    assert!(!target.exists());
}

#[test]
fn dequantised_layout_is_all_bf16() {
    let folder = tempfile::tempdir().unwrap();
    let config = ModelConfig { quantization: None, ..small() };
    make(&config, folder.path(), 0, 1 << 30);
    let inspection = inspect(&Checkpoint::open(folder.path()).unwrap());
    assert!(inspection.is_clean());
    let dtypes: Vec<&str> = inspection.dtypes.iter().map(|tally| tally.dtype.as_str()).collect();
    assert_eq!(dtypes, [Dtype::BF16.to_string(), Dtype::F32.to_string()]);
}

fn any_config() -> impl Strategy<Value = ModelConfig> {
    let attention = (1..4usize, 1..150usize, prop::option::of(1..140usize), 1..5usize, 1..20usize);
    let experts = (1..3usize, 2..4usize, 1..3usize, 1..140usize);
    (1..60usize, attention, 0..4usize, experts, any::<[bool; 2]>()).prop_map(
        |(vocab_size, attention, dense, experts, [quantised, mtp])| {
            let (num_hidden_layers, hidden_size, q_lora_rank, heads, head_dim) = attention;
            let (n_group, per_group, n_shared_experts, moe_intermediate_size) = experts;
            let base = Preset::Tiny.config();
            ModelConfig {
                vocab_size: vocab_size + 1,
                hidden_size,
                num_hidden_layers,
                first_k_dense_replace: dense.min(num_hidden_layers),
                num_attention_heads: heads,
                q_lora_rank,
                kv_lora_rank: head_dim * 9,
                qk_nope_head_dim: head_dim,
                v_head_dim: head_dim + 1,
                moe_intermediate_size,
                n_routed_experts: n_group * per_group,
                n_shared_experts,
                num_experts_per_tok: per_group,
                n_group,
                topk_group: 1,
                num_nextn_predict_layers: usize::from(mtp),
                quantization: base.quantization.filter(|_| quantised),
                ..base
            }
        },
    )
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    /// What is made for a configuration opens as that configuration and inspects clean.
    #[test]
    fn made_checkpoints_open_clean(config in any_config(), shard_bytes in 1_000..400_000u64) {
        config.validate().unwrap();
        let folder = tempfile::tempdir().unwrap();
        make(&config, folder.path(), 5, shard_bytes);
        let checkpoint = Checkpoint::open(folder.path()).unwrap();
        prop_assert_eq!(checkpoint.config(), &config);
        checkpoint.verify().unwrap();
        let (found, expected) = (inspect(&checkpoint), inspect_config(&config));
        prop_assert!(found.is_clean() && found.notes.is_empty(), "{:?}", found);
        prop_assert_eq!((found.main, found.mtp), (expected.main, expected.mtp));
        prop_assert_eq!(&found.dtypes, &expected.dtypes);
        let state = [MtpState::NotConfigured, MtpState::Complete][config.num_nextn_predict_layers];
        prop_assert_eq!(found.mtp_state, state);
    }
}

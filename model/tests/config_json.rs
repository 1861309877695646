//! `config.json` as it is found in the wild: what is accepted, what it means, what is refused.

use model::config::{ConfigError, ModelConfig, Preset, Quantization, RopeScaling, ScaleFormat};
use proptest::prelude::*;
use serde_json::{Value, json};

fn released() -> Value {
    serde_json::from_str(&Preset::DeepSeekV3.config_json()).unwrap()
}

fn read(value: &Value) -> Result<ModelConfig, ConfigError> {
    ModelConfig::from_json(value.to_string().as_bytes())
}

/// Applies `patch` to the released configuration: null removes a field.
fn patched(patch: &Value) -> Value {
    fn merge(target: &mut Value, patch: &Value) {
        let Value::Object(patch) = patch else { return };
        for (field, new) in patch {
            match (target.get_mut(field), new) {
                (_, Value::Null) => drop(target.as_object_mut().unwrap().remove(field)),
                (Some(old @ Value::Object(_)), Value::Object(_)) => merge(old, new),
                _ => target[field] = new.clone(),
            }
        }
    }
    let mut config = released();
    merge(&mut config, patch);
    config
}

fn v3() -> ModelConfig {
    Preset::DeepSeekV3.config()
}

#[test]
fn presets_survive_their_own_json() {
    for preset in Preset::ALL {
        let config = preset.config();
        config.validate().unwrap();
        assert_eq!(ModelConfig::from_json(preset.config_json().as_bytes()).unwrap(), config);
        assert_eq!(preset.name().parse(), Ok(preset));
    }
    let error = "1tb".parse::<Preset>().unwrap_err().to_string();
    assert_eq!(error, "there is no preset \"1tb\"; choose from tiny, 1gb, deepseek-v3");
}

#[test]
fn tiny_preset_is_the_tiny_checkpoint() {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../models/tiny-dsv3/config.json");
    let file = ModelConfig::from_json(&std::fs::read(path).unwrap()).unwrap();
    assert_eq!(file, Preset::Tiny.config());
}

/// The file as DeepSeek publishes it, with the fields that mean nothing for inference.
#[test]
fn released_file_is_the_preset() {
    let text = br#"{
      "architectures": ["DeepseekV3ForCausalLM"], "attention_bias": false,
      "attention_dropout": 0.0,
      "auto_map": {"AutoConfig": "configuration_deepseek.DeepseekV3Config"},
      "aux_loss_alpha": 0.001, "bos_token_id": 0, "eos_token_id": 1, "ep_size": 1,
      "first_k_dense_replace": 3, "hidden_act": "silu", "hidden_size": 7168,
      "initializer_range": 0.02, "intermediate_size": 18432, "kv_lora_rank": 512,
      "max_position_embeddings": 163840, "model_type": "deepseek_v3",
      "moe_intermediate_size": 2048, "moe_layer_freq": 1, "n_group": 8,
      "n_routed_experts": 256, "n_shared_experts": 1, "norm_topk_prob": true,
      "num_attention_heads": 128, "num_experts_per_tok": 8, "num_hidden_layers": 61,
      "num_key_value_heads": 128, "num_nextn_predict_layers": 1, "pretraining_tp": 1,
      "q_lora_rank": 1536, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64,
      "quantization_config": {"activation_scheme": "dynamic", "fmt": "e4m3",
        "quant_method": "fp8", "weight_block_size": [128, 128]},
      "rms_norm_eps": 1e-06,
      "rope_scaling": {"beta_fast": 32, "beta_slow": 1, "factor": 40, "mscale": 1.0,
        "mscale_all_dim": 1.0, "original_max_position_embeddings": 4096, "type": "yarn"},
      "rope_theta": 10000, "routed_scaling_factor": 2.5, "scoring_func": "sigmoid",
      "seq_aux": true, "tie_word_embeddings": false, "topk_group": 4,
      "topk_method": "noaux_tc", "torch_dtype": "bfloat16", "transformers_version": "4.33.1",
      "use_cache": true, "v_head_dim": 128, "vocab_size": 129280 }"#;
    assert_eq!(ModelConfig::from_json(text).unwrap(), v3());
}

/// transformers 5 nests the rope fields, omits three fields, renames one and derives two.
#[test]
fn transformers_5_file_means_the_same() {
    let config = patched(&json!({
        "scoring_func": null, "topk_method": null, "moe_layer_freq": null,
        "torch_dtype": null, "dtype": "bfloat16",
        "head_dim": 64, "qk_head_dim": 192, "rope_interleave": true,
        "rope_theta": null, "rope_scaling": null,
        "rope_parameters": {
            "rope_theta": 10000.0, "rope_type": "yarn", "type": "yarn", "factor": 40,
            "beta_fast": 32, "beta_slow": 1, "mscale": 1, "mscale_all_dim": 1,
            "original_max_position_embeddings": 4096,
        },
    }));
    assert_eq!(read(&config).unwrap(), v3());
}

#[test]
fn variants_are_read_as_meant() {
    let dense = json!({
        "first_k_dense_replace": 61, "num_nextn_predict_layers": 0, "n_routed_experts": null,
        "n_shared_experts": null, "num_experts_per_tok": null, "n_group": null,
        "topk_group": null, "moe_intermediate_size": null, "routed_scaling_factor": null,
    });
    let all_dense = ModelConfig {
        first_k_dense_replace: 61,
        num_nextn_predict_layers: 0,
        n_routed_experts: 0,
        n_shared_experts: 0,
        num_experts_per_tok: 0,
        n_group: 0,
        topk_group: 0,
        moe_intermediate_size: 0,
        routed_scaling_factor: 1.0,
        ..v3()
    };
    let ue8m0 = Quantization { block: [128, 128], scale_fmt: ScaleFormat::Ue8m0 };
    for (patch, expected) in [
        (json!({"q_lora_rank": null}), ModelConfig { q_lora_rank: None, ..v3() }),
        (json!({"q_lora_rank": 0}), ModelConfig { q_lora_rank: None, ..v3() }),
        (json!({"quantization_config": null}), ModelConfig { quantization: None, ..v3() }),
        (
            json!({"quantization_config": {"scale_fmt": "ue8m0"}}),
            ModelConfig { quantization: Some(ue8m0), ..v3() },
        ),
        (json!({"quantization_config": {"fmt": null, "modules_to_not_convert": ["x"]}}), v3()),
        (json!({"eos_token_id": [1, 7]}), ModelConfig { eos_token_ids: vec![1, 7], ..v3() }),
        (json!({"eos_token_id": null}), ModelConfig { eos_token_ids: vec![], ..v3() }),
        (json!({"bos_token_id": null}), ModelConfig { bos_token_id: None, ..v3() }),
        (
            json!({"num_nextn_predict_layers": null}),
            ModelConfig { num_nextn_predict_layers: 0, ..v3() },
        ),
        (json!({"num_nextn_predict_layers": null, "num_mtp_layers": 1}), v3()),
        (json!({"n_routed_experts": null, "num_local_experts": 256}), v3()),
        (json!({"num_key_value_heads": null, "norm_topk_prob": null, "rms_norm_eps": null}), v3()),
        (
            json!({"max_position_embeddings": null, "rope_scaling": null, "rope_theta": null}),
            ModelConfig { max_position_embeddings: 4096, rope_scaling: RopeScaling::None, ..v3() },
        ),
        (
            json!({"rope_scaling": {"type": "default"}}),
            ModelConfig { rope_scaling: RopeScaling::None, ..v3() },
        ),
        (json!({"rope_scaling": {"type": "linear", "rope_type": "yarn"}}), v3()),
        (json!({"rope_scaling": {"beta_fast": null, "beta_slow": null, "factor": 40}}), v3()),
        (json!({"head_dim": 999_999, "something_new": {"a": [1]}}), v3()),
        (dense, all_dense),
    ] {
        assert_eq!(read(&patched(&patch)).unwrap(), expected, "{patch}");
        assert_eq!(ModelConfig::from_json(expected.to_json().as_bytes()).unwrap(), expected);
    }
}

/// Each refusal names field, value and rule.
#[test]
fn refusals_name_field_value_and_rule() {
    for (patch, expected) in [
        // Not this family, or not these mathematics.
        (
            json!({"model_type": "deepseek_v2"}),
            "model_type = \"deepseek_v2\" is not supported; accepted: \"deepseek_v3\"",
        ),
        (json!({"model_type": null}), "model_type is missing"),
        (
            json!({"scoring_func": "softmax"}),
            "scoring_func = \"softmax\" is not supported; accepted: \"sigmoid\"",
        ),
        (json!({"topk_method": "group_limited_greedy"}), "accepted: \"noaux_tc\""),
        (json!({"moe_layer_freq": 2}), "moe_layer_freq = 2 is not supported; accepted: 1"),
        (
            json!({"hidden_act": "gelu"}),
            "hidden_act = \"gelu\" is not supported; accepted: \"silu\"",
        ),
        (json!({"attention_bias": true}), "attention_bias = true is not supported"),
        (json!({"tie_word_embeddings": true}), "tie_word_embeddings = true is not supported"),
        (json!({"rope_interleave": false}), "rope_interleave = false is not supported"),
        (
            json!({"num_nextn_predict_layers": 2}),
            "num_nextn_predict_layers = 2 is not supported; accepted: 0 or 1",
        ),
        (
            json!({"rope_scaling": {"type": "linear"}}),
            "rope_scaling.type = \"linear\" is not supported; accepted: \"yarn\"",
        ),
        (json!({"rope_scaling": {"rope_type": 3}}), "rope_scaling.rope_type = 3 is not supported"),
        (
            json!({"quantization_config": {"quant_method": "awq"}}),
            "quantization_config.quant_method = \"awq\" is not supported; accepted: \"fp8\"",
        ),
        (json!({"quantization_config": {"fmt": "e5m2"}}), "quantization_config.fmt = \"e5m2\""),
        (json!({"quantization_config": {"activation_scheme": "static"}}), "accepted: \"dynamic\""),
        (
            json!({"quantization_config": {"weight_block_size": [64, 128]}}),
            "weight_block_size = [64,128] is not supported; accepted: [128, 128]",
        ),
        (
            json!({"quantization_config": {"weight_block_size": null}}),
            "quantization_config.weight_block_size is missing",
        ),
        (
            json!({"quantization_config": {"scale_fmt": "int8"}}),
            "quantization_config.scale_fmt = \"int8\"",
        ),
        // Absent.
        (json!({"hidden_size": null}), "hidden_size is missing"),
        (
            json!({"n_group": null}),
            "n_group is missing; it is required where there are layers with experts",
        ),
        (json!({"intermediate_size": null}), "intermediate_size is missing"),
        (json!({"routed_scaling_factor": null}), "writers disagree on its default"),
        (json!({"rope_scaling": {"factor": null}}), "rope_scaling.factor is missing"),
        (
            json!({"rope_scaling": {"original_max_position_embeddings": null}}),
            "rope_scaling.original_max_position_embeddings is missing",
        ),
        // Of the wrong type.
        (json!({"hidden_size": "7168"}), "hidden_size is \"7168\", but must be a whole number"),
        (json!({"hidden_size": -1}), "hidden_size is -1, but must be a whole number"),
        (json!({"hidden_size": 7168.5}), "hidden_size is 7168.5"),
        (json!({"norm_topk_prob": 1}), "norm_topk_prob is 1, but must be true or false"),
        (json!({"rms_norm_eps": "1e-6"}), "rms_norm_eps is \"1e-6\", but must be a number"),
        (json!({"rope_scaling": [1]}), "rope_scaling is [1], but must be an object"),
        (json!({"eos_token_id": [1, -2]}), "eos_token_id is -2, but must be a token id"),
        (
            json!({"quantization_config": "fp8"}),
            "quantization_config is \"fp8\", but must be an object",
        ),
        // Impossible.
        (json!({"hidden_size": 0}), "hidden_size = 0 is impossible: it must be at least 1"),
        (json!({"vocab_size": 0}), "vocab_size = 0"),
        (json!({"num_hidden_layers": 0, "first_k_dense_replace": 0}), "num_hidden_layers = 0"),
        (json!({"num_attention_heads": 0, "num_key_value_heads": 0}), "num_attention_heads = 0"),
        (json!({"kv_lora_rank": 0}), "kv_lora_rank = 0"),
        (json!({"intermediate_size": 0}), "intermediate_size = 0"),
        (json!({"n_shared_experts": 0}), "n_shared_experts = 0"),
        (json!({"num_key_value_heads": 8}), "num_key_value_heads = 8 is impossible"),
        (
            json!({"qk_rope_head_dim": 63}),
            "qk_rope_head_dim = 63 is impossible: rotary dimensions come in pairs",
        ),
        (
            json!({"first_k_dense_replace": 62}),
            "first_k_dense_replace = 62 is impossible: there are only 61 layers",
        ),
        (json!({"n_group": 7}), "n_group = 7 is impossible: it must divide n_routed_experts = 256"),
        (json!({"n_group": 256}), "groups of one"),
        (
            json!({"topk_group": 9}),
            "topk_group = 9 is impossible: there are only n_group = 8 groups",
        ),
        (
            json!({"topk_group": 1, "num_experts_per_tok": 33}),
            "num_experts_per_tok = 33 is impossible: topk_group = 1 groups of 32 experts leave 32",
        ),
        (json!({"routed_scaling_factor": 0}), "routed_scaling_factor = 0"),
        (json!({"rms_norm_eps": 0.0}), "rms_norm_eps = 0"),
        (json!({"rms_norm_eps": 2}), "rms_norm_eps = 2 is impossible: it must be below 1"),
        (json!({"rope_scaling": {"mscale_all_dim": 1e200}}), "it must be at most 1000000000000"),
        (json!({"rms_norm_eps": -1e-6}), "rms_norm_eps = -0.000001"),
        (
            json!({"rope_theta": 1}),
            "rope_theta = 1 is impossible: it must be a finite number above 1",
        ),
        (
            json!({"rope_scaling": {"factor": 0.5}}),
            "rope_scaling.factor = 0.5 is impossible: it must be a finite number at least 1",
        ),
        (json!({"rope_scaling": {"beta_fast": 0.5}}), "rope_scaling.beta_fast = 0.5"),
        (json!({"max_position_embeddings": 0}), "max_position_embeddings = 0"),
        (
            json!({"eos_token_id": 129_280}),
            "eos_token_id = 129280 is impossible: the vocabulary ends at 129279",
        ),
        // Absurd.
        (
            json!({"hidden_size": u64::MAX}),
            "hidden_size = 18446744073709551615 is impossible: it must be at most",
        ),
        (json!({"num_hidden_layers": 1_000_000}), "num_hidden_layers = 1000000 is impossible"),
        (json!({"first_k_dense_replace": u64::MAX}), "there are only 61 layers"),
        (json!({"num_nextn_predict_layers": u64::MAX}), "num_nextn_predict_layers ="),
        (
            json!({"n_shared_experts": 4096, "moe_intermediate_size": 1_000_000}),
            "n_shared_experts * moe_intermediate_size",
        ),
        (
            json!({
                "hidden_size": 1 << 20, "moe_intermediate_size": 1 << 20, "num_hidden_layers": 512,
                "n_routed_experts": 4096, "num_attention_heads": 4096,
                "num_key_value_heads": 4096, "v_head_dim": 1 << 20,
            }),
            "together exceed 1 PiB",
        ),
    ] {
        let message = read(&patched(&patch)).unwrap_err().to_string();
        assert!(message.contains(expected), "{patch}: {message:?} lacks {expected:?}");
    }
}

#[test]
fn broken_json_is_located() {
    let error = |text: &str| ModelConfig::from_json(text.as_bytes()).unwrap_err().to_string();
    assert_eq!(
        error("{\n\"vocab_size\": 3,\n\"hidden_size\" 4}"),
        "not valid JSON at line 3, column 15: expected `:`"
    );
    assert!(error("").starts_with("not valid JSON at line 1, column 0"));
    assert!(error("{\"rms_norm_eps\": NaN}").contains("line 1"));
    assert!(error("{\"rms_norm_eps\": 1e999}").contains("number out of range"));
    assert!(error(&"[".repeat(100_000)).contains("recursion limit"));
    assert_eq!(error("[1]"), "the top level must be a JSON object, found [1]");
    let long = format!("[\"{}\"]", "é".repeat(500));
    assert!(error(&long).len() < 250);
}

/// Values that JSON cannot express can still be set in code.
#[test]
fn nan_and_infinity_are_refused() {
    for bad in [f64::NAN, f64::INFINITY] {
        let configs = [
            ModelConfig { rms_norm_eps: bad, ..v3() },
            ModelConfig { rope_theta: bad, ..v3() },
            ModelConfig { routed_scaling_factor: bad, ..v3() },
        ];
        for config in configs {
            assert!(matches!(config.validate(), Err(ConfigError::Invalid { .. })), "{config:?}");
        }
    }
}

#[test]
fn derived_sizes() {
    let config = v3();
    assert_eq!((config.qk_head_dim(), config.kv_latent_width()), (192, 576));
    assert_eq!((config.experts_per_group(), config.shared_intermediate_size()), (32, 2048));
    assert_eq!(config.mtp_layer(), Some(61));
    let moe: Vec<usize> = (0..62).filter(|&layer| config.is_moe_layer(layer)).collect();
    assert_eq!(moe, (3..62).collect::<Vec<_>>());
    assert_eq!(ModelConfig { num_nextn_predict_layers: 0, ..config }.mtp_layer(), None);
}

/// Any JSON value, small.
fn any_value() -> impl Strategy<Value = Value> {
    prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<i32>().prop_map(Value::from),
        // Few, and short: serde_json may be off by a last bit when it reads long fractions.
        prop::sample::select(vec![0.5, 1e-6, -2.5, 1e300, 5e-324]).prop_map(Value::from),
        prop::sample::select(vec![u64::MAX, 1 << 40, 1 << 20]).prop_map(Value::from),
        (0..70u64).prop_map(Value::from),
        ".{0,4}".prop_map(Value::from),
        Just(json!([1, 2])),
        Just(json!({"type": "yarn"})),
    ]
}

proptest! {
    #[test]
    fn arbitrary_bytes_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
        let _ = ModelConfig::from_json(&bytes);
    }

    #[test]
    fn damaged_text_never_panics(at: prop::sample::Index, value: u8) {
        let mut text = Preset::DeepSeekV3.config_json().into_bytes();
        let at = at.index(text.len());
        text[at] = value;
        let _ = ModelConfig::from_json(&text);
    }

    /// Whatever is accepted can be used: nothing derived panics, and it survives a round trip.
    #[test]
    fn what_is_accepted_is_usable(
        edits in prop::collection::vec((any::<prop::sample::Index>(), any_value()), 1..4),
    ) {
        let mut value = released();
        for (field, new) in edits {
            let map = value.as_object_mut().unwrap();
            let field = map.keys().nth(field.index(map.len())).unwrap().clone();
            map[&field] = new;
        }
        if let Ok(config) = read(&value) {
            prop_assert!(config.softmax_scale().is_finite());
            prop_assert!(config.rope_attention_factor().is_finite());
            prop_assert!(config.rope_inv_freq().iter().all(|frequency| frequency.is_finite()));
            let main = model::checkpoint::Footprint::main(&config);
            let active = model::checkpoint::Footprint::active(&config);
            prop_assert!(active.bytes <= main.bytes);
            prop_assert_eq!(ModelConfig::from_json(config.to_json().as_bytes()), Ok(config));
        }
    }
}

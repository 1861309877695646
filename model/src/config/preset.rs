//! Configurations to start from when there is no checkpoint at hand.

use std::{fmt, str::FromStr};

use super::{FP8_BLOCK, ModelConfig, Quantization, RopeScaling, ScaleFormat};

/// A named configuration.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Preset {
    /// The small trained checkpoint in `models/tiny-dsv3`: 6.9 M parameters, 8.7 MB.
    Tiny,
    /// DeepSeek-V3's proportions at 1 GB, made to be read: 983,061,888 bytes with the MTP layer,
    /// of which a decoded token reads 484,442,048 (49%).
    ///
    /// The released model reads 5.5% per token. A benchmark of decoding bandwidth wants the
    /// opposite, a large share of a checkpoint that still loads in a second: hence half of 16
    /// experts per token and three dense layers among eight, with the head sizes, latent widths,
    /// vocabulary-to-width ratio and YaRN of the real thing.
    OneGb,
    /// DeepSeek-V3, V3-Base and V3-0324: 671 B parameters, 688.6 GB with the MTP layer.
    DeepSeekV3,
}

/// A name that is no preset.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("there is no preset {name:?}; choose from {}", Preset::ALL.map(Preset::name).join(", "))]
pub struct UnknownPreset {
    /// What was asked for.
    pub name: String,
}

impl Preset {
    /// Every preset, smallest first.
    pub const ALL: [Preset; 3] = [Preset::Tiny, Preset::OneGb, Preset::DeepSeekV3];

    /// The name on the command line.
    pub const fn name(self) -> &'static str {
        match self {
            Preset::Tiny => "tiny",
            Preset::OneGb => "1gb",
            Preset::DeepSeekV3 => "deepseek-v3",
        }
    }

    /// The configuration, as text in the form of a released `config.json`.
    pub fn config_json(self) -> String {
        self.config().to_json()
    }

    /// The configuration.
    pub fn config(self) -> ModelConfig {
        let v3 = deepseek_v3();
        match self {
            Preset::DeepSeekV3 => v3,
            Preset::OneGb => ModelConfig {
                vocab_size: 16_384,
                hidden_size: 2048,
                num_hidden_layers: 8,
                first_k_dense_replace: 3,
                intermediate_size: 6144,
                num_attention_heads: 16,
                q_lora_rank: Some(768),
                moe_intermediate_size: 768,
                n_routed_experts: 16,
                n_group: 4,
                topk_group: 3,
                ..v3
            },
            Preset::Tiny => ModelConfig {
                vocab_size: 1024,
                hidden_size: 256,
                num_hidden_layers: 4,
                first_k_dense_replace: 1,
                intermediate_size: 512,
                num_attention_heads: 32,
                q_lora_rank: Some(128),
                kv_lora_rank: 128,
                qk_nope_head_dim: 16,
                qk_rope_head_dim: 16,
                v_head_dim: 16,
                moe_intermediate_size: 128,
                n_routed_experts: 8,
                num_experts_per_tok: 2,
                n_group: 4,
                topk_group: 2,
                ..v3
            },
        }
    }
}

impl fmt::Display for Preset {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Preset {
    type Err = UnknownPreset;

    fn from_str(name: &str) -> Result<Preset, UnknownPreset> {
        let known = Preset::ALL.into_iter().find(|preset| preset.name() == name);
        known.ok_or_else(|| UnknownPreset { name: name.to_owned() })
    }
}

/// The `config.json` of deepseek-ai/DeepSeek-V3.
fn deepseek_v3() -> ModelConfig {
    ModelConfig {
        vocab_size: 129_280,
        hidden_size: 7168,
        num_hidden_layers: 61,
        first_k_dense_replace: 3,
        intermediate_size: 18_432,
        num_attention_heads: 128,
        q_lora_rank: Some(1536),
        kv_lora_rank: 512,
        qk_nope_head_dim: 128,
        qk_rope_head_dim: 64,
        v_head_dim: 128,
        moe_intermediate_size: 2048,
        n_routed_experts: 256,
        n_shared_experts: 1,
        num_experts_per_tok: 8,
        n_group: 8,
        topk_group: 4,
        norm_topk_prob: true,
        routed_scaling_factor: 2.5,
        num_nextn_predict_layers: 1,
        rms_norm_eps: 1e-6,
        rope_theta: 10_000.0,
        rope_scaling: RopeScaling::Yarn {
            factor: 40.0,
            beta_fast: 32.0,
            beta_slow: 1.0,
            mscale: Some(1.0),
            mscale_all_dim: Some(1.0),
            original_max_position_embeddings: 4096,
            attention_factor: None,
            truncate: true,
        },
        max_position_embeddings: 163_840,
        bos_token_id: Some(0),
        eos_token_ids: vec![1],
        quantization: Some(Quantization {
            block: [FP8_BLOCK, FP8_BLOCK],
            scale_fmt: ScaleFormat::Float,
        }),
        dtype: Some("bfloat16".to_owned()),
    }
}

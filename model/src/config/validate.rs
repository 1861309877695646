//! Which configurations can exist at all.
//!
//! The ceilings are far above any released model and low enough that no product of two fields, and
//! no sum over the layers, overflows 64 bits; code behind this check need not think about it.

use std::fmt::Display;

use super::{ConfigError, FP8_BLOCK, ModelConfig, RopeScaling};
use crate::checkpoint::Footprint;

/// Ceiling on widths and ranks.
const MAX_WIDTH: usize = 1 << 20;
/// Ceiling on heads, experts and groups.
const MAX_COUNT: usize = 1 << 12;
/// Ceiling on layers.
const MAX_LAYERS: usize = 1 << 9;
/// Ceiling on the vocabulary.
const MAX_VOCAB: usize = 1 << 24;
/// Ceiling on positions, so that one fits an i32.
const MAX_POSITIONS: usize = i32::MAX as usize;
/// Ceiling on fractional fields, so that what is computed from them stays finite.
const MAX_NUMBER: f64 = 1e12;
/// Ceiling on the weights' bytes: a thousand times the released model.
const MAX_BYTES: u128 = 1 << 50;

fn invalid(field: &str, value: impl Display, reason: impl Into<String>) -> ConfigError {
    let (field, value) = (field.to_owned(), value.to_string());
    ConfigError::Invalid { field, value, reason: reason.into() }
}

fn range(field: &str, value: usize, low: usize, high: usize) -> Result<(), ConfigError> {
    if value < low {
        return Err(invalid(field, value, format!("it must be at least {low}")));
    }
    if value > high {
        return Err(invalid(field, value, format!("it must be at most {high}")));
    }
    Ok(())
}

/// `value` must be finite, not absurd, and above `low` (or equal, if `inclusive`).
fn above(field: &str, value: f64, low: f64, inclusive: bool) -> Result<(), ConfigError> {
    let large_enough = if inclusive { value >= low } else { value > low };
    if !(value.is_finite() && large_enough) {
        let relation = if inclusive { "at least" } else { "above" };
        return Err(invalid(field, value, format!("it must be a finite number {relation} {low}")));
    }
    if value > MAX_NUMBER {
        return Err(invalid(field, value, format!("it must be at most {MAX_NUMBER}")));
    }
    Ok(())
}

pub(super) fn validate(config: &ModelConfig) -> Result<(), ConfigError> {
    range("vocab_size", config.vocab_size, 1, MAX_VOCAB)?;
    range("num_hidden_layers", config.num_hidden_layers, 1, MAX_LAYERS)?;
    range("num_attention_heads", config.num_attention_heads, 1, MAX_COUNT)?;
    for (field, value) in [
        ("hidden_size", config.hidden_size),
        ("kv_lora_rank", config.kv_lora_rank),
        ("qk_nope_head_dim", config.qk_nope_head_dim),
        ("qk_rope_head_dim", config.qk_rope_head_dim),
        ("v_head_dim", config.v_head_dim),
        ("q_lora_rank", config.q_lora_rank.unwrap_or(1)),
    ] {
        range(field, value, 1, MAX_WIDTH)?;
    }
    if !config.qk_rope_head_dim.is_multiple_of(2) {
        let reason = "rotary dimensions come in pairs, so it must be even";
        return Err(invalid("qk_rope_head_dim", config.qk_rope_head_dim, reason));
    }

    if config.first_k_dense_replace > config.num_hidden_layers {
        let reason = format!("there are only {} layers", config.num_hidden_layers);
        return Err(invalid("first_k_dense_replace", config.first_k_dense_replace, reason));
    }
    let dense_needed = usize::from(config.first_k_dense_replace > 0);
    range("intermediate_size", config.intermediate_size, dense_needed, MAX_WIDTH)?;
    if config.num_nextn_predict_layers > 1 {
        return Err(ConfigError::Unsupported {
            field: "num_nextn_predict_layers".to_owned(),
            value: config.num_nextn_predict_layers.to_string(),
            accepted: "0 or 1",
        });
    }
    validate_experts(config)?;
    validate_numbers(config)?;
    validate_tokens(config)?;
    if let Some(quantization) = config.quantization
        && quantization.block != [FP8_BLOCK, FP8_BLOCK]
    {
        return Err(ConfigError::Unsupported {
            field: "quantization_config.weight_block_size".to_owned(),
            value: format!("{:?}", quantization.block),
            accepted: "[128, 128]",
        });
    }

    // Only now are all fields small enough for the sum itself to be computed.
    let bytes = Footprint::total_bytes(config);
    if bytes > MAX_BYTES {
        let reason = "the sizes together exceed 1 PiB";
        return Err(invalid("weights", format!("{bytes} bytes"), reason));
    }
    Ok(())
}

fn validate_experts(config: &ModelConfig) -> Result<(), ConfigError> {
    let least = usize::from(config.has_moe_layers());
    for (field, value, high) in [
        ("moe_intermediate_size", config.moe_intermediate_size, MAX_WIDTH),
        ("n_routed_experts", config.n_routed_experts, MAX_COUNT),
        ("n_shared_experts", config.n_shared_experts, MAX_COUNT),
        ("num_experts_per_tok", config.num_experts_per_tok, MAX_COUNT),
        ("n_group", config.n_group, MAX_COUNT),
        ("topk_group", config.topk_group, MAX_COUNT),
    ] {
        range(field, value, least, high)?;
    }
    range(
        "n_shared_experts * moe_intermediate_size",
        config.shared_intermediate_size(),
        least,
        MAX_WIDTH,
    )?;
    if !config.has_moe_layers() {
        return Ok(());
    }
    let (experts, groups) = (config.n_routed_experts, config.n_group);
    if !experts.is_multiple_of(groups) {
        let reason = format!("it must divide n_routed_experts = {experts}");
        return Err(invalid("n_group", groups, reason));
    }
    if experts / groups < 2 {
        // transformers' top-2 over a group of one fails at run time; vLLM's kernel asserts.
        let reason = format!(
            "a group is scored by its two best experts, and {experts} experts make groups of one"
        );
        return Err(invalid("n_group", groups, reason));
    }
    if config.topk_group > groups {
        let reason = format!("there are only n_group = {groups} groups");
        return Err(invalid("topk_group", config.topk_group, reason));
    }
    let reachable = config.topk_group * (experts / groups);
    if config.num_experts_per_tok > reachable {
        let reason = format!(
            "topk_group = {} groups of {} experts leave {reachable} to choose from",
            config.topk_group,
            experts / groups
        );
        return Err(invalid("num_experts_per_tok", config.num_experts_per_tok, reason));
    }
    above("routed_scaling_factor", config.routed_scaling_factor, 0.0, false)
}

fn validate_numbers(config: &ModelConfig) -> Result<(), ConfigError> {
    above("rms_norm_eps", config.rms_norm_eps, 0.0, false)?;
    if config.rms_norm_eps >= 1.0 {
        return Err(invalid("rms_norm_eps", config.rms_norm_eps, "it must be below 1"));
    }
    above("rope_theta", config.rope_theta, 1.0, false)?;
    range("max_position_embeddings", config.max_position_embeddings, 1, MAX_POSITIONS)?;
    let RopeScaling::Yarn {
        factor,
        beta_fast,
        beta_slow,
        mscale,
        mscale_all_dim,
        original_max_position_embeddings,
        attention_factor,
        truncate: _,
    } = config.rope_scaling
    else {
        return Ok(());
    };
    above("rope_scaling.factor", factor, 1.0, true)?;
    above("rope_scaling.beta_slow", beta_slow, 0.0, false)?;
    above("rope_scaling.beta_fast", beta_fast, beta_slow, true)?;
    above("rope_scaling.mscale", mscale.unwrap_or(0.0), 0.0, true)?;
    above("rope_scaling.mscale_all_dim", mscale_all_dim.unwrap_or(0.0), 0.0, true)?;
    above("rope_scaling.attention_factor", attention_factor.unwrap_or(1.0), 0.0, false)?;
    let original = original_max_position_embeddings;
    range("rope_scaling.original_max_position_embeddings", original, 1, MAX_POSITIONS)
}

fn validate_tokens(config: &ModelConfig) -> Result<(), ConfigError> {
    let eos = config.eos_token_ids.iter().map(|&id| ("eos_token_id", id));
    let bos = config.bos_token_id.map(|id| ("bos_token_id", id));
    for (field, id) in bos.into_iter().chain(eos) {
        if usize::try_from(id).map_or(true, |id| id >= config.vocab_size) {
            let reason = format!("the vocabulary ends at {}", config.vocab_size - 1);
            return Err(invalid(field, id, reason));
        }
    }
    Ok(())
}

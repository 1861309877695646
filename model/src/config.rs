//! The model configuration: Hugging Face `config.json` of the `deepseek_v3` family, and what
//! follows from it.
//!
//! Reading is forgiving where writers are known to differ and strict everywhere else: a field that
//! changes the mathematics and has a value this crate does not implement is refused by name, never
//! ignored. Sources: DeepSeek's `inference/` and `README_WEIGHTS.md`, and `DeepseekV3Config` of
//! transformers 4.50 to 5.23.
//!
//! | part | file |
//! |---|---|
//! | the fields and their derived sizes | this one |
//! | JSON in, JSON out | `parse.rs` |
//! | which values are possible | `validate.rs` |
//! | YaRN frequencies and attention scale | `rope.rs` |
//! | ready-made configurations | `preset.rs` |

mod error;
mod parse;
mod preset;
mod rope;
mod validate;

pub use error::ConfigError;
pub(crate) use error::json_message;
pub use preset::{Preset, UnknownPreset};
pub use rope::RopeScaling;

/// Side of the square blocks in which released weights share one scale.
pub const FP8_BLOCK: usize = 128;

/// A validated DeepSeek-V3 configuration. Field names are those of `config.json`.
///
/// Every value obtained from this crate has passed [`ModelConfig::validate`]; code that edits the
/// public fields should call it again.
#[derive(Clone, Debug, PartialEq)]
pub struct ModelConfig {
    /// Rows of the embedding and of the head. May exceed the tokenizer's last id: the rest is
    /// padding and must never be sampled.
    pub vocab_size: usize,
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// Decoder layers of the main model, without the MTP layer.
    pub num_hidden_layers: usize,
    /// The first layers that have a dense FFN; the rest are mixtures of experts.
    pub first_k_dense_replace: usize,
    /// Inner width of a dense FFN. 0 if there is no dense layer and the file leaves it out.
    pub intermediate_size: usize,
    /// Query heads. MLA has as many key-value heads.
    pub num_attention_heads: usize,
    /// Width of the query latent; `None` means one full-rank `q_proj` (as in V2-Lite).
    pub q_lora_rank: Option<usize>,
    /// Width of the key-value latent that is cached.
    pub kv_lora_rank: usize,
    /// Dimensions of a query or key head that carry no position.
    pub qk_nope_head_dim: usize,
    /// Dimensions of a query or key head that are rotated; the key part is shared by all heads.
    pub qk_rope_head_dim: usize,
    /// Dimensions of a value head.
    pub v_head_dim: usize,
    /// Inner width of one expert. The six fields from here to `topk_group` are 0 in a model
    /// without mixture layers.
    pub moe_intermediate_size: usize,
    /// Routed experts of a mixture layer.
    pub n_routed_experts: usize,
    /// Shared experts, which every token passes: one FFN of width
    /// `n_shared_experts * moe_intermediate_size`.
    pub n_shared_experts: usize,
    /// Routed experts that a token passes.
    pub num_experts_per_tok: usize,
    /// Groups of contiguous experts that routing first chooses among.
    pub n_group: usize,
    /// Groups that stay in the race for a token.
    pub topk_group: usize,
    /// Whether the chosen experts' weights are divided by their sum.
    pub norm_topk_prob: bool,
    /// Factor on the routed experts' weights, after normalisation.
    pub routed_scaling_factor: f64,
    /// Multi-token-prediction layers: 0 or 1. The checkpoint may lack the tensors all the same;
    /// see [`Checkpoint::has_mtp`](crate::checkpoint::Checkpoint::has_mtp).
    pub num_nextn_predict_layers: usize,
    /// Epsilon of every RMS norm, those of the latents included.
    pub rms_norm_eps: f64,
    /// Base of the rotary frequencies.
    pub rope_theta: f64,
    /// Context extension of the rotary embedding.
    pub rope_scaling: RopeScaling,
    /// Longest sequence the model is meant for, in tokens.
    pub max_position_embeddings: usize,
    /// Token that opens a sequence.
    pub bos_token_id: Option<u32>,
    /// Tokens that end generation; empty if the file names none.
    pub eos_token_ids: Vec<u32>,
    /// Block quantisation of the linear weights; `None` for a dequantised dump.
    pub quantization: Option<Quantization>,
    /// `torch_dtype` or `dtype`, as written. Informative: each tensor states its own type.
    pub dtype: Option<String>,
}

/// How the linear weights are quantised: FP8 E4M3 with one F32 scale per block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Quantization {
    /// Rows and columns that share a scale: `[128, 128]`.
    pub block: [usize; 2],
    /// What scales activations are given at run time.
    pub scale_fmt: ScaleFormat,
}

/// Form of the scales of activations quantised at run time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ScaleFormat {
    /// Any float: V3 and V3-0324, which leave the field out.
    Float,
    /// Powers of two, rounded up (`scale_fmt: "ue8m0"`): V3.1.
    Ue8m0,
}

impl ModelConfig {
    /// Reads a `config.json`.
    ///
    /// # Errors
    /// [`ConfigError`] naming the field, its value and what would be accepted.
    pub fn from_json(text: &[u8]) -> Result<ModelConfig, ConfigError> {
        let config = parse::parse(text)?;
        config.validate()?;
        Ok(config)
    }

    /// Writes a `config.json` in the form of the released checkpoints (transformers 4 names).
    /// Reading it back gives an equal configuration.
    pub fn to_json(&self) -> String {
        parse::write(self)
    }

    /// Refuses values that no model can have: zeros, groups that do not divide the experts, more
    /// experts per token than the chosen groups hold, sizes whose sum overflows, NaN.
    ///
    /// # Errors
    /// [`ConfigError::Invalid`] or [`ConfigError::Unsupported`] for the first offending field.
    pub fn validate(&self) -> Result<(), ConfigError> {
        validate::validate(self)
    }

    /// Width of a query or key head: `qk_nope_head_dim + qk_rope_head_dim` (192 in V3).
    ///
    /// `head_dim` of transformers-5 files is *not* this (it is `qk_rope_head_dim`) and is ignored.
    pub fn qk_head_dim(&self) -> usize {
        self.qk_nope_head_dim + self.qk_rope_head_dim
    }

    /// Values cached per token and layer: `kv_lora_rank + qk_rope_head_dim` (576 in V3).
    pub fn kv_latent_width(&self) -> usize {
        self.kv_lora_rank + self.qk_rope_head_dim
    }

    /// Factor on attention scores: `qk_head_dim^-0.5 * m^2`, with `m` from YaRN's
    /// `mscale_all_dim` (see [`RopeScaling::softmax_mscale`]). 0.1352337789 in V3.
    ///
    /// The same in the absorbed form of MLA, although its dot products run over
    /// [`kv_latent_width`](Self::kv_latent_width) values.
    pub fn softmax_scale(&self) -> f64 {
        let m = self.rope_scaling.softmax_mscale();
        (self.qk_head_dim() as f64).powf(-0.5) * m * m
    }

    /// Rotary frequencies in radians per position, `qk_rope_head_dim / 2` of them, pair by pair
    /// (see [`RopeScaling::inv_freq`]). Computed in f64 and rounded once.
    pub fn rope_inv_freq(&self) -> Vec<f32> {
        self.rope_scaling
            .inv_freq(self.rope_theta, self.qk_rope_head_dim)
            .into_iter()
            .map(|frequency| frequency as f32)
            .collect()
    }

    /// Factor on the rotary cosines and sines (see [`RopeScaling::attention_factor`]): 1.0 in V3.
    pub fn rope_attention_factor(&self) -> f64 {
        self.rope_scaling.attention_factor()
    }

    /// Whether layer `index` has experts. True for the MTP layer too.
    pub fn is_moe_layer(&self, index: usize) -> bool {
        index >= self.first_k_dense_replace
    }

    /// Whether any layer, MTP included, has experts; if not, the expert fields may be 0.
    pub fn has_moe_layers(&self) -> bool {
        self.first_k_dense_replace < self.num_hidden_layers + self.num_nextn_predict_layers
    }

    /// Index of the MTP layer in tensor names, `num_hidden_layers` (61 in V3), if there is one.
    pub fn mtp_layer(&self) -> Option<usize> {
        (self.num_nextn_predict_layers > 0).then_some(self.num_hidden_layers)
    }

    /// Experts in one routing group; 0 without mixture layers.
    pub fn experts_per_group(&self) -> usize {
        self.n_routed_experts.checked_div(self.n_group).unwrap_or(0)
    }

    /// Inner width of the fused shared experts.
    pub fn shared_intermediate_size(&self) -> usize {
        self.n_shared_experts * self.moe_intermediate_size
    }
}

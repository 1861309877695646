//! The table behind the layout: every kind of tensor, with its place, name, shape and storage.

use safetensors::Dtype;

use crate::config::ModelConfig;

/// What a tensor is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[non_exhaustive]
pub enum Role {
    /// Token embedding `[vocab, hidden]`.
    Embedding,
    /// RMS norm after the last layer.
    FinalNorm,
    /// Output head `[vocab, hidden]`.
    Head,
    /// RMS norm before attention.
    AttentionNorm,
    /// RMS norm before the FFN.
    FfnNorm,
    /// Query down-projection `[q_lora, hidden]`.
    QueryDown,
    /// RMS norm of the query latent.
    QueryNorm,
    /// Query up-projection `[heads * (nope + rope), q_lora]`.
    QueryUp,
    /// The one query projection of a model without query latent `[heads * (nope + rope), hidden]`.
    Query,
    /// Key-value down-projection and the shared rotary key `[kv_lora + rope, hidden]`.
    KeyValueDown,
    /// RMS norm of the key-value latent, without the rotary key.
    KeyValueNorm,
    /// Key-value up-projection `[heads * (nope + v), kv_lora]`, K and V rows head by head.
    KeyValueUp,
    /// Attention output `[hidden, heads * v]`.
    AttentionOut,
    /// Dense SwiGLU gate `[intermediate, hidden]`.
    DenseGate,
    /// Dense SwiGLU up-projection `[intermediate, hidden]`.
    DenseUp,
    /// Dense SwiGLU down-projection `[hidden, intermediate]`.
    DenseDown,
    /// Routing logits `[experts, hidden]`; never FP8.
    Router,
    /// Routing bias `[experts]`: chooses experts, does not weigh them.
    RouterBias,
    /// Shared experts' gate `[shared * moe_intermediate, hidden]`.
    SharedGate,
    /// Shared experts' up-projection.
    SharedUp,
    /// Shared experts' down-projection `[hidden, shared * moe_intermediate]`.
    SharedDown,
    /// One routed expert's gate `[moe_intermediate, hidden]`.
    ExpertGate,
    /// One routed expert's up-projection.
    ExpertUp,
    /// One routed expert's down-projection `[hidden, moe_intermediate]`.
    ExpertDown,
    /// MTP: copy of the embedding.
    MtpEmbedding,
    /// MTP: norm of the next token's embedding.
    MtpEmbeddingNorm,
    /// MTP: norm of the main model's hidden state.
    MtpHiddenNorm,
    /// MTP: projection of `[embedding | hidden]`, in this order, `[hidden, 2 * hidden]`; never FP8.
    MtpProjection,
    /// MTP: norm before the shared head.
    MtpFinalNorm,
    /// MTP: copy of the head.
    MtpHead,
}

/// Where a role occurs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Scope {
    Model,
    Layer,
    DenseLayer,
    MoeLayer,
    Expert,
    MtpLayer,
}

/// How a tensor is stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Storage {
    /// FP8 E4M3 with a tensor of block scales beside it.
    Fp8WithScale,
    /// BF16. F32 is accepted too, as found in dumps made by other tools.
    Bf16,
    /// F32. BF16 is accepted too: widening is exact.
    F32,
    /// F32 block scales of an FP8 weight; nothing else is accepted.
    BlockScale,
}

impl Storage {
    /// The type that the released checkpoints use.
    pub fn dtype(self) -> Dtype {
        match self {
            Storage::Fp8WithScale => Dtype::F8_E4M3,
            Storage::Bf16 => Dtype::BF16,
            Storage::F32 | Storage::BlockScale => Dtype::F32,
        }
    }

    /// Bytes of one element in the released form.
    pub fn bytes_per_element(self) -> usize {
        self.dtype().bitsize() / 8
    }

    /// Whether a file may store this tensor as `dtype`.
    pub fn accepts(self, dtype: Dtype) -> bool {
        match self {
            Storage::Fp8WithScale | Storage::BlockScale => dtype == self.dtype(),
            Storage::Bf16 | Storage::F32 => matches!(dtype, Dtype::BF16 | Dtype::F32),
        }
    }

    /// The accepted types, for messages.
    pub fn accepted(self) -> &'static str {
        match self {
            Storage::Fp8WithScale => "F8_E4M3",
            Storage::Bf16 => "BF16 or F32",
            Storage::F32 => "F32 or BF16",
            Storage::BlockScale => "F32",
        }
    }
}

impl Role {
    /// Every role, in the order in which [`tensors`](super::layout::tensors) lists a layer.
    pub const ALL: [Role; 30] = [
        Role::Embedding,
        Role::FinalNorm,
        Role::Head,
        Role::AttentionNorm,
        Role::FfnNorm,
        Role::QueryDown,
        Role::QueryNorm,
        Role::QueryUp,
        Role::Query,
        Role::KeyValueDown,
        Role::KeyValueNorm,
        Role::KeyValueUp,
        Role::AttentionOut,
        Role::DenseGate,
        Role::DenseUp,
        Role::DenseDown,
        Role::Router,
        Role::RouterBias,
        Role::SharedGate,
        Role::SharedUp,
        Role::SharedDown,
        Role::ExpertGate,
        Role::ExpertUp,
        Role::ExpertDown,
        Role::MtpEmbedding,
        Role::MtpEmbeddingNorm,
        Role::MtpHiddenNorm,
        Role::MtpProjection,
        Role::MtpFinalNorm,
        Role::MtpHead,
    ];

    /// Where the role occurs, and its name below that place.
    pub(super) const fn place(self) -> (Scope, &'static str) {
        match self {
            Role::Embedding => (Scope::Model, "model.embed_tokens.weight"),
            Role::FinalNorm => (Scope::Model, "model.norm.weight"),
            Role::Head => (Scope::Model, "lm_head.weight"),
            Role::AttentionNorm => (Scope::Layer, "input_layernorm.weight"),
            Role::FfnNorm => (Scope::Layer, "post_attention_layernorm.weight"),
            Role::QueryDown => (Scope::Layer, "self_attn.q_a_proj.weight"),
            Role::QueryNorm => (Scope::Layer, "self_attn.q_a_layernorm.weight"),
            Role::QueryUp => (Scope::Layer, "self_attn.q_b_proj.weight"),
            Role::Query => (Scope::Layer, "self_attn.q_proj.weight"),
            Role::KeyValueDown => (Scope::Layer, "self_attn.kv_a_proj_with_mqa.weight"),
            Role::KeyValueNorm => (Scope::Layer, "self_attn.kv_a_layernorm.weight"),
            Role::KeyValueUp => (Scope::Layer, "self_attn.kv_b_proj.weight"),
            Role::AttentionOut => (Scope::Layer, "self_attn.o_proj.weight"),
            Role::DenseGate => (Scope::DenseLayer, "mlp.gate_proj.weight"),
            Role::DenseUp => (Scope::DenseLayer, "mlp.up_proj.weight"),
            Role::DenseDown => (Scope::DenseLayer, "mlp.down_proj.weight"),
            Role::Router => (Scope::MoeLayer, "mlp.gate.weight"),
            Role::RouterBias => (Scope::MoeLayer, "mlp.gate.e_score_correction_bias"),
            Role::SharedGate => (Scope::MoeLayer, "mlp.shared_experts.gate_proj.weight"),
            Role::SharedUp => (Scope::MoeLayer, "mlp.shared_experts.up_proj.weight"),
            Role::SharedDown => (Scope::MoeLayer, "mlp.shared_experts.down_proj.weight"),
            Role::ExpertGate => (Scope::Expert, "gate_proj.weight"),
            Role::ExpertUp => (Scope::Expert, "up_proj.weight"),
            Role::ExpertDown => (Scope::Expert, "down_proj.weight"),
            Role::MtpEmbedding => (Scope::MtpLayer, "embed_tokens.weight"),
            Role::MtpEmbeddingNorm => (Scope::MtpLayer, "enorm.weight"),
            Role::MtpHiddenNorm => (Scope::MtpLayer, "hnorm.weight"),
            Role::MtpProjection => (Scope::MtpLayer, "eh_proj.weight"),
            Role::MtpFinalNorm => (Scope::MtpLayer, "shared_head.norm.weight"),
            Role::MtpHead => (Scope::MtpLayer, "shared_head.head.weight"),
        }
    }

    pub(super) const fn scope(self) -> Scope {
        self.place().0
    }

    /// Whether a model of this configuration has the role at all.
    pub(super) fn exists(self, config: &ModelConfig) -> bool {
        match self {
            Role::QueryDown | Role::QueryNorm | Role::QueryUp => config.q_lora_rank.is_some(),
            Role::Query => config.q_lora_rank.is_none(),
            _ => true,
        }
    }

    /// Rows and columns, or one dimension for norms and the routing bias.
    pub fn shape(self, config: &ModelConfig) -> Vec<usize> {
        let (hidden, heads) = (config.hidden_size, config.num_attention_heads);
        let q_lora = config.q_lora_rank.unwrap_or(0);
        let (shared, expert) = (config.shared_intermediate_size(), config.moe_intermediate_size);
        match self {
            Role::Embedding | Role::Head | Role::MtpEmbedding | Role::MtpHead => {
                vec![config.vocab_size, hidden]
            }
            Role::FinalNorm
            | Role::AttentionNorm
            | Role::FfnNorm
            | Role::MtpEmbeddingNorm
            | Role::MtpHiddenNorm
            | Role::MtpFinalNorm => vec![hidden],
            Role::QueryDown => vec![q_lora, hidden],
            Role::QueryNorm => vec![q_lora],
            Role::QueryUp => vec![heads * config.qk_head_dim(), q_lora],
            Role::Query => vec![heads * config.qk_head_dim(), hidden],
            Role::KeyValueDown => vec![config.kv_latent_width(), hidden],
            Role::KeyValueNorm => vec![config.kv_lora_rank],
            Role::KeyValueUp => {
                vec![heads * (config.qk_nope_head_dim + config.v_head_dim), config.kv_lora_rank]
            }
            Role::AttentionOut => vec![hidden, heads * config.v_head_dim],
            Role::DenseGate | Role::DenseUp => vec![config.intermediate_size, hidden],
            Role::DenseDown => vec![hidden, config.intermediate_size],
            Role::Router => vec![config.n_routed_experts, hidden],
            Role::RouterBias => vec![config.n_routed_experts],
            Role::SharedGate | Role::SharedUp => vec![shared, hidden],
            Role::SharedDown => vec![hidden, shared],
            Role::ExpertGate | Role::ExpertUp => vec![expert, hidden],
            Role::ExpertDown => vec![hidden, expert],
            Role::MtpProjection => vec![hidden, 2 * hidden],
        }
    }

    /// How the role is stored under this configuration.
    pub fn storage(self, config: &ModelConfig) -> Storage {
        match self {
            Role::RouterBias => Storage::F32,
            Role::Embedding
            | Role::Head
            | Role::MtpEmbedding
            | Role::MtpHead
            | Role::MtpProjection
            | Role::Router => Storage::Bf16,
            norm if norm.shape(config).len() == 1 => Storage::Bf16,
            _ if config.quantization.is_some() => Storage::Fp8WithScale,
            _ => Storage::Bf16,
        }
    }

    /// The main model's role that this MTP tensor repeats bit for bit, if it does.
    ///
    /// Loaders hold such a pair once, and a checkpoint may leave the copy out.
    pub fn copy_of(self) -> Option<Role> {
        match self {
            Role::MtpEmbedding => Some(Role::Embedding),
            Role::MtpHead => Some(Role::Head),
            _ => None,
        }
    }
}

"""The table of small checkpoints: how each differs from the base, and what it is there for."""

from dataclasses import dataclass, field

YARN = {
    "beta_fast": 32,
    "beta_slow": 1,
    "factor": 40,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "original_max_position_embeddings": 4096,
    "type": "yarn",
}
FP8 = {
    "activation_scheme": "dynamic",
    "fmt": "e4m3",
    "quant_method": "fp8",
    "weight_block_size": [128, 128],
}
BASE = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "ep_size": 1,
    "first_k_dense_replace": 1,
    "hidden_act": "silu",
    "hidden_size": 64,
    "initializer_range": 0.02,
    "intermediate_size": 64,
    "kv_lora_rank": 48,
    "max_position_embeddings": 163840,
    "model_type": "deepseek_v3",
    "moe_intermediate_size": 16,
    "moe_layer_freq": 1,
    "n_group": 3,
    "n_routed_experts": 6,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_attention_heads": 4,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 2,
    "num_key_value_heads": 4,
    "num_nextn_predict_layers": 0,
    "q_lora_rank": 32,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 16,
    "quantization_config": FP8,
    "rms_norm_eps": 1e-6,
    "rope_scaling": YARN,
    "rope_theta": 10000,
    "routed_scaling_factor": 2.5,
    "scoring_func": "sigmoid",
    "tie_word_embeddings": False,
    "topk_group": 2,
    "topk_method": "noaux_tc",
    "torch_dtype": "bfloat16",
    "transformers_version": "4.33.1",
    "use_cache": True,
    "v_head_dim": 8,
    "vocab_size": 160,
}
ONE_MOE_LAYER = {"first_k_dense_replace": 0, "num_hidden_layers": 1}


@dataclass
class Shape:
    """One checkpoint. A field of `change` that is None in Python becomes null in the file."""

    name: str
    covers: str
    change: dict = field(default_factory=dict)
    drop: tuple = ()
    # A configuration that a careless reader would use instead: the logits must differ from it.
    contrast: dict = field(default_factory=dict)
    shards: int = 2
    mtp_tensors: bool = True
    mtp_copies: bool = True
    # Whether config.json is written by transformers 5 rather than in the released style.
    transformers_config: bool = False


SHAPES = [
    Shape(
        "q_lora_null",
        "no query latent: one `q_proj`; MTP without the copies of embedding and head",
        {"q_lora_rank": None, "num_nextn_predict_layers": 1},
        mtp_copies=False,
    ),
    Shape(
        "no_dense",
        "no dense layer; MTP",
        ONE_MOE_LAYER | {"num_nextn_predict_layers": 1},
    ),
    Shape(
        "all_dense",
        "dense layers only, the expert fields left out",
        {"first_k_dense_replace": 2},
        drop=(
            "moe_intermediate_size",
            "n_routed_experts",
            "n_shared_experts",
            "num_experts_per_tok",
            "n_group",
            "topk_group",
            "norm_topk_prob",
            "routed_scaling_factor",
            "scoring_func",
            "topk_method",
            "moe_layer_freq",
        ),
    ),
    Shape(
        "one_group",
        "one group of experts, 3 of 6 chosen",
        ONE_MOE_LAYER | {"n_group": 1, "topk_group": 1, "num_experts_per_tok": 3},
        contrast={"n_group": 3, "topk_group": 2},
    ),
    Shape(
        "ragged_blocks",
        "no dimension a multiple of 128, latents and experts that end inside a block; "
        "value heads narrower than keys; 3 heads",
        {
            "hidden_size": 136,
            "intermediate_size": 144,
            "moe_intermediate_size": 24,
            "q_lora_rank": 40,
            "kv_lora_rank": 136,
            "num_attention_heads": 3,
            "num_key_value_heads": 3,
            "qk_nope_head_dim": 32,
            "v_head_dim": 16,
        },
    ),
    Shape(
        "v_head_wide",
        "value heads wider than keys without rotation (24 against 8)",
        ONE_MOE_LAYER | {"v_head_dim": 24},
    ),
    Shape(
        "bf16",
        "BF16 dump: no `quantization_config`, no scales",
        ONE_MOE_LAYER,
        drop=("quantization_config",),
    ),
    Shape(
        "single_file",
        "`model.safetensors` without index; the config declares an MTP layer that is missing",
        {"num_nextn_predict_layers": 1},
        shards=1,
        mtp_tensors=False,
    ),
    Shape(
        "int_rope",
        "`rope_type` instead of `type`, integers where floats are meant; `eos_token_id` a list",
        ONE_MOE_LAYER
        | {
            "rope_scaling": {
                "rope_type": "yarn",
                "factor": 40,
                "beta_fast": 32,
                "beta_slow": 1,
                "mscale": 1,
                "mscale_all_dim": 1,
                "original_max_position_embeddings": 4096,
            },
            "eos_token_id": [1, 2],
        },
        contrast={"rope_scaling": None},
    ),
    Shape(
        "rope_parameters",
        "config as transformers 5 writes it: `rope_parameters` with `rope_theta`, `dtype`, "
        "derived `head_dim`, no `scoring_func`",
        {"rope_theta": 5000.0},
        drop=("ep_size", "moe_layer_freq", "scoring_func", "topk_method", "transformers_version"),
        contrast={"rope_parameters": YARN | {"rope_theta": 10000}},
        transformers_config=True,
    ),
    Shape(
        "plain_rope",
        "`rope_scaling` null, `rope_theta` 500",
        ONE_MOE_LAYER | {"rope_scaling": None, "rope_theta": 500},
        contrast={"rope_theta": 10000},
    ),
    Shape(
        "no_norm_topk",
        "`norm_topk_prob` false: weights are the bare sigmoids",
        ONE_MOE_LAYER | {"norm_topk_prob": False},
        contrast={"norm_topk_prob": True},
    ),
    Shape(
        "mscale",
        "`mscale` 1.0 with `mscale_all_dim` 0.707: cos and sin are scaled too",
        ONE_MOE_LAYER | {"rope_scaling": YARN | {"mscale_all_dim": 0.707}},
        contrast={"rope_scaling": YARN},
    ),
    Shape(
        "shared_experts",
        "3 shared experts, fused into one FFN; scaling factor 1.0",
        ONE_MOE_LAYER | {"n_shared_experts": 3, "routed_scaling_factor": 1.0},
        contrast={"routed_scaling_factor": 2.5},
    ),
    Shape(
        "yarn_long",
        "sequences beyond `original_max_position_embeddings` (32), factor 4",
        ONE_MOE_LAYER
        | {
            "rope_scaling": YARN | {"factor": 4, "original_max_position_embeddings": 32},
            "max_position_embeddings": 128,
        },
        contrast={"rope_scaling": None},
    ),
]

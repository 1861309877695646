//! The tensors a checkpoint of a given configuration consists of: names, shapes, storage.
//!
//! One table, [`Role`], is the source of everything: the list of all tensors ([`tensors`]), what a
//! name found in a file should be ([`TensorSpec::lookup`]) and the sums
//! ([`Footprint`](super::Footprint)). Names and shapes are those of the released checkpoints
//! (`README_WEIGHTS.md`, `DeepseekV3ForCausalLM`). Linear weights are `[out, in]`, row-major,
//! without biases.

use super::role::Scope;
pub use super::role::{Role, Storage};
use crate::config::{FP8_BLOCK, ModelConfig};

/// Suffix that turns the name of an FP8 weight into that of its block scales.
///
/// "inv" is DeepSeek's view from the quantiser: weights are *multiplied* by it.
pub const SCALE_SUFFIX: &str = "_scale_inv";

/// One tensor of the layout.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorSpec {
    /// Full name in the checkpoint.
    pub name: String,
    /// What it is for; a scale has the role of its weight.
    pub role: Role,
    /// Layer, `num_hidden_layers` being the MTP layer; `None` at the top level.
    pub layer: Option<usize>,
    /// Routed expert, if it belongs to one.
    pub expert: Option<usize>,
    /// Dimensions, outermost first.
    pub shape: Vec<usize>,
    /// How it is stored.
    pub storage: Storage,
}

impl TensorSpec {
    /// The tensor in role `role` at a place, or `None` if the configuration has no such tensor.
    pub fn at(
        config: &ModelConfig,
        role: Role,
        layer: Option<usize>,
        expert: Option<usize>,
    ) -> Option<TensorSpec> {
        let (scope, suffix) = role.place();
        let layers = config.num_hidden_layers + config.num_nextn_predict_layers;
        let fits = role.exists(config)
            && layer.is_some() == (scope != Scope::Model)
            && expert.is_some() == (scope == Scope::Expert)
            && expert.is_none_or(|expert| expert < config.n_routed_experts)
            && layer.is_none_or(|layer| {
                layer < layers
                    && match scope {
                        Scope::Model | Scope::Layer => true,
                        Scope::DenseLayer => !config.is_moe_layer(layer),
                        Scope::MoeLayer | Scope::Expert => config.is_moe_layer(layer),
                        Scope::MtpLayer => config.mtp_layer() == Some(layer),
                    }
            });
        if !fits {
            return None;
        }
        let name = match (layer, expert) {
            (Some(layer), Some(expert)) => {
                format!("model.layers.{layer}.mlp.experts.{expert}.{suffix}")
            }
            (Some(layer), None) => format!("model.layers.{layer}.{suffix}"),
            (None, _) => suffix.to_owned(),
        };
        let (shape, storage) = (role.shape(config), role.storage(config));
        Some(TensorSpec { name, role, layer, expert, shape, storage })
    }

    /// What the tensor called `name` should be, or `None` if this configuration has no such tensor.
    pub fn lookup(config: &ModelConfig, name: &str) -> Option<TensorSpec> {
        if let Some(weight) = name.strip_suffix(SCALE_SUFFIX) {
            return TensorSpec::lookup(config, weight)?.scale();
        }
        let (layer, expert, rest) = match name.strip_prefix("model.layers.") {
            None => (None, None, name),
            Some(below) => {
                let (layer, below) = split_index(below)?;
                match below.strip_prefix("mlp.experts.") {
                    None => (Some(layer), None, below),
                    Some(below) => {
                        let (expert, below) = split_index(below)?;
                        (Some(layer), Some(expert), below)
                    }
                }
            }
        };
        let role = Role::ALL.into_iter().find(|role| {
            let (scope, suffix) = role.place();
            suffix == rest
                && (scope == Scope::Model) == layer.is_none()
                && (scope == Scope::Expert) == expert.is_some()
        })?;
        TensorSpec::at(config, role, layer, expert)
    }

    /// The block scales that belong to this weight, one per 128 x 128 block, edges included.
    pub fn scale(&self) -> Option<TensorSpec> {
        (self.storage == Storage::Fp8WithScale).then(|| TensorSpec {
            name: format!("{}{SCALE_SUFFIX}", self.name),
            shape: self.shape.iter().map(|size| size.div_ceil(FP8_BLOCK)).collect(),
            storage: Storage::BlockScale,
            ..self.clone()
        })
    }

    /// This weight, then its scales if it has any.
    pub(super) fn with_scale(self) -> impl Iterator<Item = TensorSpec> {
        let scale = self.scale();
        std::iter::once(self).chain(scale)
    }

    /// The tensor of the main model that this one repeats, if it does (see [`Role::copy_of`]).
    pub fn copy_of(&self, config: &ModelConfig) -> Option<TensorSpec> {
        TensorSpec::at(config, self.role.copy_of()?, None, None)
    }

    /// Whether it belongs to the MTP layer.
    pub fn is_mtp(&self, config: &ModelConfig) -> bool {
        self.layer.is_some() && self.layer == config.mtp_layer()
    }

    /// Number of elements.
    pub fn elements(&self) -> u64 {
        // Validation keeps every product below 2^50.
        self.shape.iter().map(|&size| size as u64).product()
    }

    /// Bytes in the released form.
    pub fn bytes(&self) -> u64 {
        self.elements() * self.storage.bytes_per_element() as u64
    }
}

/// Splits `"12.rest"`. Only the canonical spelling of a number counts: `"012"` names nothing.
fn split_index(text: &str) -> Option<(usize, &str)> {
    let (digits, rest) = text.split_once('.')?;
    let canonical = digits.bytes().all(|byte| byte.is_ascii_digit())
        && (digits == "0" || !digits.starts_with('0'));
    Some((canonical.then(|| digits.parse().ok())??, rest))
}

/// Every tensor of the configuration, scales after their weights, the MTP layer last.
pub fn tensors(config: &ModelConfig) -> impl Iterator<Item = TensorSpec> + '_ {
    let layers = config.num_hidden_layers + config.num_nextn_predict_layers;
    let top = Role::ALL.into_iter().filter_map(|role| TensorSpec::at(config, role, None, None));
    let below = (0..layers).flat_map(move |layer| layer_tensors(config, layer));
    top.chain(below).flat_map(TensorSpec::with_scale)
}

/// The weights of one layer, without scales, experts one after the other.
pub(super) fn layer_tensors(
    config: &ModelConfig,
    layer: usize,
) -> impl Iterator<Item = TensorSpec> + '_ {
    let experts = if config.is_moe_layer(layer) { config.n_routed_experts } else { 0 };
    let own = Role::ALL
        .into_iter()
        .filter_map(move |role| TensorSpec::at(config, role, Some(layer), None));
    let of_experts = (0..experts).flat_map(move |expert| {
        [Role::ExpertGate, Role::ExpertUp, Role::ExpertDown]
            .into_iter()
            .filter_map(move |role| TensorSpec::at(config, role, Some(layer), Some(expert)))
    });
    own.chain(of_experts)
}

#[cfg(test)]
mod tests {
    use safetensors::Dtype;

    use super::*;
    use crate::config::Preset;

    /// Names, shapes and types as the released checkpoint has them.
    #[test]
    fn released_tensors() {
        let config = Preset::DeepSeekV3.config();
        let cases: [(&str, &[usize], Dtype, &[usize]); 20] = [
            ("model.embed_tokens.weight", &[129_280, 7168], Dtype::BF16, &[]),
            ("model.norm.weight", &[7168], Dtype::BF16, &[]),
            ("lm_head.weight", &[129_280, 7168], Dtype::BF16, &[]),
            ("model.layers.0.input_layernorm.weight", &[7168], Dtype::BF16, &[]),
            ("model.layers.0.self_attn.q_a_proj.weight", &[1536, 7168], Dtype::F8_E4M3, &[12, 56]),
            ("model.layers.0.self_attn.q_a_layernorm.weight", &[1536], Dtype::BF16, &[]),
            (
                "model.layers.9.self_attn.q_b_proj.weight",
                &[24_576, 1536],
                Dtype::F8_E4M3,
                &[192, 12],
            ),
            (
                "model.layers.60.self_attn.kv_a_proj_with_mqa.weight",
                &[576, 7168],
                Dtype::F8_E4M3,
                &[5, 56],
            ),
            ("model.layers.60.self_attn.kv_a_layernorm.weight", &[512], Dtype::BF16, &[]),
            (
                "model.layers.61.self_attn.kv_b_proj.weight",
                &[32_768, 512],
                Dtype::F8_E4M3,
                &[256, 4],
            ),
            (
                "model.layers.61.self_attn.o_proj.weight",
                &[7168, 16_384],
                Dtype::F8_E4M3,
                &[56, 128],
            ),
            ("model.layers.2.mlp.gate_proj.weight", &[18_432, 7168], Dtype::F8_E4M3, &[144, 56]),
            ("model.layers.2.mlp.down_proj.weight", &[7168, 18_432], Dtype::F8_E4M3, &[56, 144]),
            ("model.layers.3.mlp.gate.weight", &[256, 7168], Dtype::BF16, &[]),
            ("model.layers.3.mlp.gate.e_score_correction_bias", &[256], Dtype::F32, &[]),
            (
                "model.layers.3.mlp.experts.255.up_proj.weight",
                &[2048, 7168],
                Dtype::F8_E4M3,
                &[16, 56],
            ),
            (
                "model.layers.3.mlp.shared_experts.down_proj.weight",
                &[7168, 2048],
                Dtype::F8_E4M3,
                &[56, 16],
            ),
            ("model.layers.61.eh_proj.weight", &[7168, 14_336], Dtype::BF16, &[]),
            ("model.layers.61.shared_head.norm.weight", &[7168], Dtype::BF16, &[]),
            ("model.layers.61.shared_head.head.weight", &[129_280, 7168], Dtype::BF16, &[]),
        ];
        for (name, shape, dtype, scale) in cases {
            let spec = TensorSpec::lookup(&config, name).unwrap();
            assert_eq!((&*spec.shape, spec.storage.dtype()), (shape, dtype), "{name}");
            assert_eq!(spec.scale().map_or(vec![], |scale| scale.shape), scale, "{name}");
            let scale = TensorSpec::lookup(&config, &format!("{name}{SCALE_SUFFIX}"));
            assert_eq!(scale, spec.scale(), "{name}");
        }
    }

    #[test]
    fn names_that_name_nothing() {
        let config = Preset::DeepSeekV3.config();
        for name in [
            "",
            "model",
            "model.norm.weight_scale_inv",
            "input_layernorm.weight",
            "model.layers.",
            "model.layers.62.input_layernorm.weight",
            "model.layers.03.input_layernorm.weight",
            "model.layers.+3.input_layernorm.weight",
            "model.layers.99999999999999999999.input_layernorm.weight",
            "model.layers.3.mlp.gate_proj.weight",
            "model.layers.2.mlp.gate.weight",
            "model.layers.2.mlp.experts.0.up_proj.weight",
            "model.layers.3.mlp.experts.256.up_proj.weight",
            "model.layers.3.mlp.experts.0.input_layernorm.weight",
            "model.layers.3.mlp.experts.0.up_proj.weight_scale_inv_scale_inv",
            "model.layers.60.hnorm.weight",
            "model.layers.61.mlp.gate_proj.weight",
            "model.layers.3.self_attn.q_proj.weight",
            "model.layers.3.lm_head.weight",
        ] {
            assert_eq!(TensorSpec::lookup(&config, name), None, "{name}");
        }
    }

    /// Listing and looking up are each other's inverse, and no name comes twice.
    #[test]
    fn every_listed_tensor_is_found_by_name() {
        for config in [
            Preset::DeepSeekV3.config(),
            ModelConfig { q_lora_rank: None, quantization: None, ..Preset::Tiny.config() },
        ] {
            let mut names = std::collections::HashSet::new();
            for spec in tensors(&config) {
                assert_eq!(TensorSpec::lookup(&config, &spec.name).as_ref(), Some(&spec));
                assert!(names.insert(spec.name));
            }
        }
    }
}

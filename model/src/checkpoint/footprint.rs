//! How large a configuration's checkpoint is, summed from the layout's table without listing the
//! 92 thousand tensors.

use super::role::{Role, Scope, Storage};
use crate::config::{FP8_BLOCK, ModelConfig};

/// Sizes of a part of a checkpoint in the released form.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize)]
pub struct Footprint {
    /// Tensors, block scales included.
    pub tensors: u64,
    /// Elements, block scales excluded.
    pub parameters: u64,
    /// Bytes of all tensors.
    pub bytes: u64,
}

/// The parts that are summed.
#[derive(Clone, Copy)]
enum Part {
    Main,
    Mtp,
    /// What one decoded token reads of the main model.
    Active,
}

impl Part {
    /// How many tensors of a scope belong to the part.
    fn copies(self, config: &ModelConfig, scope: Scope) -> usize {
        let dense = config.first_k_dense_replace;
        let moe = config.num_hidden_layers - dense;
        match (self, scope) {
            (Part::Main | Part::Active, Scope::Model) => 1,
            (Part::Main | Part::Active, Scope::Layer) => dense + moe,
            (Part::Main | Part::Active, Scope::DenseLayer) => dense,
            (Part::Main | Part::Active, Scope::MoeLayer) => moe,
            (Part::Main, Scope::Expert) => moe * config.n_routed_experts,
            (Part::Active, Scope::Expert) => moe * config.num_experts_per_tok,
            (Part::Main | Part::Active, Scope::MtpLayer) => 0,
            (Part::Mtp, Scope::Model | Scope::DenseLayer) => 0,
            (Part::Mtp, Scope::Expert) => config.num_nextn_predict_layers * config.n_routed_experts,
            (Part::Mtp, Scope::Layer | Scope::MoeLayer | Scope::MtpLayer) => {
                config.num_nextn_predict_layers
            }
        }
    }

    /// `(tensors, parameters, bytes)`, wide enough for any configuration within the field limits.
    fn sum(self, config: &ModelConfig) -> (u128, u128, u128) {
        let (mut tensors, mut parameters, mut bytes) = (0, 0, 0);
        for role in Role::ALL.into_iter().filter(|role| role.exists(config)) {
            let copies = self.copies(config, role.scope()) as u128;
            let mut shape = role.shape(config);
            if matches!((self, role), (Part::Active, Role::Embedding)) {
                // A token looks up one row.
                shape[0] = 1;
            }
            let product = |sizes: &mut dyn Iterator<Item = usize>| -> u128 {
                sizes.map(|size| size as u128).product()
            };
            let storage = role.storage(config);
            let elements = product(&mut shape.iter().copied());
            let scales = match storage {
                Storage::Fp8WithScale => {
                    product(&mut shape.iter().map(|size| size.div_ceil(FP8_BLOCK)))
                }
                _ => 0,
            };
            tensors += copies * (1 + u128::from(scales > 0));
            parameters += copies * elements;
            bytes += copies * (elements * storage.bytes_per_element() as u128 + scales * 4);
        }
        (tensors, parameters, bytes)
    }

    fn footprint(self, config: &ModelConfig) -> Footprint {
        // Validation refuses configurations that come near; one that skipped it saturates.
        let narrow = |wide: u128| u64::try_from(wide).unwrap_or(u64::MAX);
        let (tensors, parameters, bytes) = self.sum(config);
        Footprint { tensors: narrow(tensors), parameters: narrow(parameters), bytes: narrow(bytes) }
    }
}

impl Footprint {
    /// The main model, without the MTP layer.
    pub fn main(config: &ModelConfig) -> Footprint {
        Part::Main.footprint(config)
    }

    /// The MTP layer, its copies of embedding and head included; zeros if there is none.
    pub fn mtp(config: &ModelConfig) -> Footprint {
        Part::Mtp.footprint(config)
    }

    /// What one decoded token reads of the main model: everything but the experts that it is not
    /// routed to and the embedding rows that are not its own.
    pub fn active(config: &ModelConfig) -> Footprint {
        Part::Active.footprint(config)
    }

    /// Bytes of main model and MTP layer, before they are known to be sane.
    pub(crate) fn total_bytes(config: &ModelConfig) -> u128 {
        Part::Main.sum(config).2 + Part::Mtp.sum(config).2
    }
}

impl std::ops::Add for Footprint {
    type Output = Footprint;

    fn add(self, other: Footprint) -> Footprint {
        Footprint {
            tensors: self.tensors + other.tensors,
            parameters: self.parameters + other.parameters,
            bytes: self.bytes + other.bytes,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::checkpoint::layout::{self, TensorSpec};
    use crate::config::Preset;

    fn listed(config: &ModelConfig, mtp: bool) -> Footprint {
        let mut sum = Footprint::default();
        for spec in layout::tensors(config).filter(|spec| spec.is_mtp(config) == mtp) {
            let is_scale = spec.storage == Storage::BlockScale;
            sum.tensors += 1;
            sum.parameters += if is_scale { 0 } else { spec.elements() };
            sum.bytes += spec.bytes();
        }
        sum
    }

    /// The totals of the released checkpoint's index and of its published listings.
    #[test]
    fn released_model_has_its_published_size() {
        let config = Preset::DeepSeekV3.config();
        let main =
            Footprint { tensors: 90_427, parameters: 671_026_419_200, bytes: 673_150_611_808 };
        let all =
            Footprint { tensors: 91_991, parameters: 684_489_845_504, bytes: 688_574_839_360 };
        assert_eq!(Footprint::main(&config), main);
        assert_eq!(Footprint::main(&config) + Footprint::mtp(&config), all);
        assert_eq!(listed(&config, false), main);
        assert_eq!(listed(&config, false) + listed(&config, true), all);
        // "37B activated" counts neither the embedding table nor, in some tables, the head.
        let active = Footprint::active(&config).parameters;
        assert!((36_500_000_000..37_500_000_000).contains(&active), "{active}");
    }

    #[test]
    fn sums_equal_listings_for_every_shape_of_model() {
        let tiny = Preset::Tiny.config();
        let variants = [
            tiny.clone(),
            Preset::OneGb.config(),
            ModelConfig { q_lora_rank: None, ..tiny.clone() },
            ModelConfig { quantization: None, ..tiny.clone() },
            ModelConfig { num_nextn_predict_layers: 0, ..tiny.clone() },
            ModelConfig { first_k_dense_replace: 0, ..tiny.clone() },
            ModelConfig {
                first_k_dense_replace: 4,
                num_nextn_predict_layers: 0,
                n_routed_experts: 0,
                ..tiny
            },
        ];
        for config in variants {
            assert_eq!(Footprint::main(&config), listed(&config, false), "{config:?}");
            assert_eq!(Footprint::mtp(&config), listed(&config, true), "{config:?}");
        }
    }

    #[test]
    fn one_gb_preset_is_what_its_documentation_says() {
        let config = Preset::OneGb.config();
        let total = Footprint::main(&config) + Footprint::mtp(&config);
        let active = Footprint::active(&config);
        assert_eq!((total.bytes, active.bytes), (983_061_888, 484_442_048));
        assert!(active.bytes as f64 >= 0.45 * total.bytes as f64);
    }

    /// The specs' own sizes are what the sums are made of.
    #[test]
    fn ragged_latent_has_ceil_shaped_scales() {
        let config = Preset::DeepSeekV3.config();
        let spec = TensorSpec::at(&config, Role::KeyValueDown, Some(0), None).unwrap();
        assert_eq!(spec.shape, [576, 7168]);
        assert_eq!(spec.scale().unwrap().shape, [5, 56]);
    }
}

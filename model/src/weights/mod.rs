//! The weights as the device holds them: which there are, in which dtype and layout, and which
//! tensors of the checkpoint they come from.
//!
//! [`plan`] lists them from the configuration alone, so that a model that does not fit is refused
//! before anything is read; [`load()`] brings them to a die.

mod load;

pub use load::{LoadError, LoadProgress, Weights, load};

use crate::config::ModelConfig;
use crate::numerics::Numerics;
use hal::op::BlockGrid;
use hal::{DType, TensorDesc};

/// Which part of a layer a weight is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[expect(missing_docs, reason = "the names are those of the checkpoint's tensors")]
pub enum Role {
    Embedding,
    FinalNorm,
    Head,
    InputNorm,
    QA,
    QANorm,
    QB,
    Q,
    KvA,
    KvANorm,
    KvB,
    /// `kv_b` dequantised: the absorbed form uses W_UK along its output axis, where the 128x128
    /// scales do not apply.
    KvBAbsorbed,
    O,
    PostAttentionNorm,
    /// Gate and up projection, one above the other.
    GateUp,
    Down,
    Router,
    RouterBias,
    ExpertsGateUp,
    ExpertsDown,
    SharedGateUp,
    SharedDown,
    MtpEmbeddingNorm,
    MtpHiddenNorm,
    MtpProjection,
    MtpHeadNorm,
    /// Cosines and sines per position; computed, not read.
    RopeTable,
}

/// A weight of the model. Layer 0 stands for weights that belong to no layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct WeightKey {
    /// The layer; the MTP layer comes after the last one.
    pub layer: usize,
    /// What it is there.
    pub role: Role,
}

/// A tensor of the checkpoint and the part of a weight that it fills.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Piece {
    /// Its name in the checkpoint.
    pub name: String,
    /// The expert's slice of a stacked weight.
    pub expert: usize,
    /// First row within that slice.
    pub row: usize,
}

/// A weight as a die holds it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WeightSpec {
    /// Which one.
    pub key: WeightKey,
    /// Shape and dtype: `[rows]`, `[rows, columns]` or `[experts, rows, columns]`.
    pub desc: TensorDesc,
    /// Scales of an FP8 weight, as [`BlockGrid`] lays them out.
    pub scales: Option<TensorDesc>,
    /// How rows and columns meet the scales.
    pub grid: BlockGrid,
    /// Where it comes from; empty for what is computed.
    pub pieces: Vec<Piece>,
}

impl WeightSpec {
    /// Bytes on the device.
    pub fn bytes(&self) -> u64 {
        self.desc.bytes() + self.scales.map_or(0, |s| s.bytes())
    }
}

/// What a plan depends on besides the configuration.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PlanOptions {
    /// The numerics policy.
    pub numerics: Numerics,
    /// Whether the MTP layer is wanted and the checkpoint has it.
    pub mtp: bool,
    /// Positions that the rotary table covers.
    pub positions: usize,
}

/// Lists every weight of the model.
pub fn plan(config: &ModelConfig, options: PlanOptions) -> Vec<WeightSpec> {
    let mut planner = Planner { config, options, specs: Vec::new() };
    planner.model();
    planner.specs
}

struct Planner<'c> {
    config: &'c ModelConfig,
    options: PlanOptions,
    specs: Vec<WeightSpec>,
}

impl Planner<'_> {
    fn model(&mut self) {
        let c = self.config;
        let top = |role| WeightKey { layer: 0, role };
        self.dense(
            top(Role::Embedding),
            &[c.vocab_size, c.hidden_size],
            "model.embed_tokens.weight",
        );
        self.dense(top(Role::FinalNorm), &[c.hidden_size], "model.norm.weight");
        self.dense(top(Role::Head), &[c.vocab_size, c.hidden_size], "lm_head.weight");
        self.specs.push(WeightSpec {
            key: top(Role::RopeTable),
            desc: TensorDesc::new(DType::F32, &[self.options.positions, c.qk_rope_head_dim]),
            scales: None,
            grid: BlockGrid::default(),
            pieces: Vec::new(),
        });
        for layer in 0..c.num_hidden_layers {
            self.layer(layer);
        }
        if let (true, Some(layer)) = (self.options.mtp, c.mtp_layer()) {
            let h = c.hidden_size;
            let at = |role| WeightKey { layer, role };
            let name = |part: &str| format!("model.layers.{layer}.{part}.weight");
            self.dense(at(Role::MtpEmbeddingNorm), &[h], &name("enorm"));
            self.dense(at(Role::MtpHiddenNorm), &[h], &name("hnorm"));
            self.dense(at(Role::MtpProjection), &[h, 2 * h], &name("eh_proj"));
            self.dense(at(Role::MtpHeadNorm), &[h], &name("shared_head.norm"));
            // Embedding and head are copies of the main model's, which serve for both.
            self.layer(layer);
        }
    }

    fn layer(&mut self, layer: usize) {
        let c = self.config;
        let (h, heads) = (c.hidden_size, c.num_attention_heads);
        let at = |role| WeightKey { layer, role };
        let name = |part: &str| format!("model.layers.{layer}.{part}.weight");
        self.dense(at(Role::InputNorm), &[h], &name("input_layernorm"));
        self.dense(at(Role::PostAttentionNorm), &[h], &name("post_attention_layernorm"));
        let q_rows = heads * c.qk_head_dim();
        match c.q_lora_rank {
            Some(rank) => {
                self.linear(at(Role::QA), rank, h, &name("self_attn.q_a_proj"));
                self.dense(at(Role::QANorm), &[rank], &name("self_attn.q_a_layernorm"));
                self.linear(at(Role::QB), q_rows, rank, &name("self_attn.q_b_proj"));
            }
            None => self.linear(at(Role::Q), q_rows, h, &name("self_attn.q_proj")),
        }
        self.linear(at(Role::KvA), c.kv_latent_width(), h, &name("self_attn.kv_a_proj_with_mqa"));
        self.dense(at(Role::KvANorm), &[c.kv_lora_rank], &name("self_attn.kv_a_layernorm"));
        let kv_rows = heads * (c.qk_nope_head_dim + c.v_head_dim);
        self.linear(at(Role::KvB), kv_rows, c.kv_lora_rank, &name("self_attn.kv_b_proj"));
        if self.quantized() {
            let shape = [kv_rows, c.kv_lora_rank];
            self.dense(at(Role::KvBAbsorbed), &shape, &name("self_attn.kv_b_proj"));
        }
        self.linear(at(Role::O), h, heads * c.v_head_dim, &name("self_attn.o_proj"));
        if !c.is_moe_layer(layer) {
            self.mlp(at(Role::GateUp), at(Role::Down), c.intermediate_size, "mlp");
            return;
        }
        let experts = c.n_routed_experts;
        self.dense(at(Role::Router), &[experts, h], &name("mlp.gate"));
        self.push(
            at(Role::RouterBias),
            TensorDesc::new(DType::F32, &[experts]),
            None,
            vec![Piece {
                name: format!("model.layers.{layer}.mlp.gate.e_score_correction_bias"),
                expert: 0,
                row: 0,
            }],
        );
        let inner = c.moe_intermediate_size;
        let piece = |e: usize, part: &str, row| Piece {
            name: name(&format!("mlp.experts.{e}.{part}_proj")),
            expert: e,
            row,
        };
        let gate_up =
            (0..experts).flat_map(|e| [piece(e, "gate", 0), piece(e, "up", inner)]).collect();
        let down = (0..experts).map(|e| piece(e, "down", 0)).collect();
        self.stacked(at(Role::ExpertsGateUp), [experts, 2 * inner, h], 2, gate_up);
        self.stacked(at(Role::ExpertsDown), [experts, h, inner], 1, down);
        if c.n_shared_experts > 0 {
            let inner = c.shared_intermediate_size();
            self.mlp(at(Role::SharedGateUp), at(Role::SharedDown), inner, "mlp.shared_experts");
        }
    }

    fn mlp(&mut self, gate_up: WeightKey, down: WeightKey, inner: usize, prefix: &str) {
        let h = self.config.hidden_size;
        let piece = |part: &str, row| Piece {
            name: format!("model.layers.{}.{prefix}.{part}_proj.weight", gate_up.layer),
            expert: 0,
            row,
        };
        self.matrix(gate_up, 2 * inner, h, 2, vec![piece("gate", 0), piece("up", inner)]);
        self.matrix(down, h, inner, 1, vec![piece("down", 0)]);
    }

    fn quantized(&self) -> bool {
        self.options.numerics == Numerics::Fp8 && self.config.quantization.is_some()
    }

    /// A weight that FP8 checkpoints keep in BF16: embedding, head, norms, router, `eh_proj`.
    fn dense(&mut self, key: WeightKey, shape: &[usize], name: &str) {
        let desc = TensorDesc::new(self.options.numerics.activations(), shape);
        self.push(key, desc, None, vec![Piece { name: name.to_string(), expert: 0, row: 0 }]);
    }

    fn linear(&mut self, key: WeightKey, rows: usize, columns: usize, name: &str) {
        self.matrix(
            key,
            rows,
            columns,
            1,
            vec![Piece { name: name.to_string(), expert: 0, row: 0 }],
        );
    }

    fn matrix(
        &mut self,
        key: WeightKey,
        rows: usize,
        columns: usize,
        segments: u32,
        pieces: Vec<Piece>,
    ) {
        let grid = BlockGrid { segments, ..BlockGrid::default() };
        let (dtype, scales) = match self.quantized() {
            true => {
                let shape = [grid.scale_rows(rows), grid.scale_columns(columns)];
                (DType::F8E4M3, Some(TensorDesc::new(DType::F32, &shape)))
            }
            false => (self.options.numerics.activations(), None),
        };
        self.push(key, TensorDesc::new(dtype, &[rows, columns]), scales, pieces);
        self.set_grid(grid);
    }

    fn stacked(&mut self, key: WeightKey, shape: [usize; 3], segments: u32, pieces: Vec<Piece>) {
        let grid = BlockGrid { segments, ..BlockGrid::default() };
        let (dtype, scales) = match self.quantized() {
            true => {
                let shape = [shape[0], grid.scale_rows(shape[1]), grid.scale_columns(shape[2])];
                (DType::F8E4M3, Some(TensorDesc::new(DType::F32, &shape)))
            }
            false => (self.options.numerics.activations(), None),
        };
        self.push(key, TensorDesc::new(dtype, &shape), scales, pieces);
        self.set_grid(grid);
    }

    fn set_grid(&mut self, grid: BlockGrid) {
        if let Some(spec) = self.specs.last_mut() {
            spec.grid = grid;
        }
    }

    fn push(
        &mut self,
        key: WeightKey,
        desc: TensorDesc,
        scales: Option<TensorDesc>,
        pieces: Vec<Piece>,
    ) {
        self.specs.push(WeightSpec { key, desc, scales, grid: BlockGrid::default(), pieces });
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Preset;

    #[test]
    fn v3_in_fp8_has_the_published_size() {
        let config = Preset::DeepSeekV3.config();
        let options = PlanOptions { numerics: Numerics::Fp8, mtp: false, positions: 1 };
        let specs = plan(&config, options);
        let bytes: u64 = specs.iter().map(WeightSpec::bytes).sum();
        let copies: u64 = specs
            .iter()
            .filter(|s| matches!(s.key.role, Role::KvBAbsorbed | Role::RopeTable))
            .map(WeightSpec::bytes)
            .sum();
        // The checkpoint's own count (main model), plus what the device holds besides.
        assert_eq!(bytes - copies, 673_150_611_808);
        let mut keys: Vec<_> = specs.iter().map(|s| s.key).collect();
        keys.sort_unstable();
        keys.dedup();
        assert_eq!(keys.len(), specs.len(), "each weight once");
    }
}

//! Where a weight comes from: tensors of the checkpoint, and the rows and columns of them that a
//! rank holds.

use super::{PlanOptions, Role, WeightKey, WeightSpec};
use crate::config::{FP8_BLOCK, ModelConfig};
use crate::numerics::Numerics;
use crate::plan::{Member, RankPlan};
use hal::op::BlockGrid;
use hal::{DType, TensorDesc};
use std::ops::Range;

/// A part of a tensor of the checkpoint, and the part of a weight that it fills.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Piece {
    /// The tensor's name in the checkpoint.
    pub name: String,
    /// Its rows (elements, where it has one dimension) that are taken.
    pub rows: Range<usize>,
    /// Its columns that are taken; absent where it has one dimension.
    pub columns: Option<Range<usize>>,
    /// The expert's slice of a stacked weight that it goes to.
    pub expert: usize,
    /// First row within that slice.
    pub row: usize,
}

/// How a weight is held.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Storage {
    /// In the activations' dtype: what FP8 checkpoints keep in BF16, and `kv_b` for the absorbed
    /// form.
    Plain,
    /// In FP8 with block scales where the policy and the checkpoint have them.
    Matrix,
    /// In FP32.
    F32,
    /// In I32.
    I32,
}

/// One weight: the tensors that stand one above the other in it, and the part that a rank holds.
#[derive(Clone, Debug)]
pub(super) struct Description {
    /// Names below the layer's prefix, `{}` for the expert's number.
    names: &'static [&'static str],
    rows: Range<usize>,
    columns: Option<Range<usize>>,
    /// Logical experts, where the weight is a stack of them.
    experts: Option<Vec<u32>>,
    storage: Storage,
}

/// What a rank holds of a weight.
pub(super) fn describe(
    c: &ModelConfig,
    rank: &RankPlan,
    options: PlanOptions,
    key: WeightKey,
) -> Description {
    let h = c.hidden_size;
    let heads = rank.tensor.part(c.num_attention_heads);
    let of_heads = |each: usize| heads.start * each..heads.end * each;
    let mlp = rank.mlp_member();
    let vector = |name: &'static [&'static str], n: usize| Description {
        names: name,
        rows: 0..n,
        columns: None,
        experts: None,
        storage: Storage::Plain,
    };
    let plain = |names: &'static [&'static str], rows: Range<usize>, columns: usize| Description {
        names,
        rows,
        columns: Some(0..columns),
        experts: None,
        storage: Storage::Plain,
    };
    let matrix = |names: &'static [&'static str], rows: Range<usize>, columns: Range<usize>| {
        Description { names, rows, columns: Some(columns), experts: None, storage: Storage::Matrix }
    };
    let held = || match &rank.experts {
        Some(placement) => placement.of_rank(rank.expert.rank).to_vec(),
        None => (0..c.n_routed_experts as u32).collect(),
    };
    let kv_rows = || of_heads(c.qk_nope_head_dim + c.v_head_dim);
    let inner = |member: Member, whole: usize| member.part(whole);
    match key.role {
        Role::Embedding => plain(&["model.embed_tokens.weight"], rank.tensor.part(c.vocab_size), h),
        Role::Head => plain(&["lm_head.weight"], rank.tensor.part(c.vocab_size), h),
        Role::FinalNorm => vector(&["model.norm.weight"], h),
        Role::InputNorm => vector(&["input_layernorm.weight"], h),
        Role::PostAttentionNorm => vector(&["post_attention_layernorm.weight"], h),
        Role::QANorm => vector(&["self_attn.q_a_layernorm.weight"], c.q_lora_rank.unwrap_or(0)),
        Role::KvANorm => vector(&["self_attn.kv_a_layernorm.weight"], c.kv_lora_rank),
        Role::MtpEmbeddingNorm => vector(&["enorm.weight"], h),
        Role::MtpHiddenNorm => vector(&["hnorm.weight"], h),
        Role::MtpHeadNorm => vector(&["shared_head.norm.weight"], h),
        Role::MtpProjection => plain(&["eh_proj.weight"], 0..h, 2 * h),
        Role::Router => plain(&["mlp.gate.weight"], 0..c.n_routed_experts, h),
        Role::RouterBias => Description {
            storage: Storage::F32,
            ..vector(&["mlp.gate.e_score_correction_bias"], c.n_routed_experts)
        },
        Role::QA => matrix(&["self_attn.q_a_proj.weight"], 0..c.q_lora_rank.unwrap_or(0), 0..h),
        Role::QB => matrix(
            &["self_attn.q_b_proj.weight"],
            of_heads(c.qk_head_dim()),
            0..c.q_lora_rank.unwrap_or(0),
        ),
        Role::Q => matrix(&["self_attn.q_proj.weight"], of_heads(c.qk_head_dim()), 0..h),
        Role::KvA => matrix(&["self_attn.kv_a_proj_with_mqa.weight"], 0..c.kv_latent_width(), 0..h),
        Role::KvB => matrix(&["self_attn.kv_b_proj.weight"], kv_rows(), 0..c.kv_lora_rank),
        Role::KvBAbsorbed => plain(&["self_attn.kv_b_proj.weight"], kv_rows(), c.kv_lora_rank),
        Role::O => matrix(&["self_attn.o_proj.weight"], 0..h, of_heads(c.v_head_dim)),
        Role::GateUp => matrix(
            &["mlp.gate_proj.weight", "mlp.up_proj.weight"],
            inner(mlp, c.intermediate_size),
            0..h,
        ),
        Role::Down => matrix(&["mlp.down_proj.weight"], 0..h, inner(mlp, c.intermediate_size)),
        Role::SharedGateUp => matrix(
            &["mlp.shared_experts.gate_proj.weight", "mlp.shared_experts.up_proj.weight"],
            inner(mlp, c.shared_intermediate_size()),
            0..h,
        ),
        Role::SharedDown => matrix(
            &["mlp.shared_experts.down_proj.weight"],
            0..h,
            inner(mlp, c.shared_intermediate_size()),
        ),
        Role::ExpertsGateUp => Description {
            experts: Some(held()),
            ..matrix(
                &["mlp.experts.{}.gate_proj.weight", "mlp.experts.{}.up_proj.weight"],
                inner(mlp, c.moe_intermediate_size),
                0..h,
            )
        },
        Role::ExpertsDown => Description {
            experts: Some(held()),
            ..matrix(
                &["mlp.experts.{}.down_proj.weight"],
                0..h,
                inner(mlp, c.moe_intermediate_size),
            )
        },
        Role::RopeTable => Description {
            storage: Storage::F32,
            ..plain(&[], 0..options.positions, c.qk_rope_head_dim)
        },
        Role::Replicas => Description {
            storage: Storage::I32,
            ..plain(
                &[],
                0..c.n_routed_experts,
                rank.experts.as_ref().map_or(1, |e| e.most_replicas()),
            )
        },
    }
}

impl Description {
    /// Shape, dtype, and how it meets its scales.
    pub(super) fn spec(
        &self,
        config: &ModelConfig,
        options: PlanOptions,
        key: WeightKey,
    ) -> WeightSpec {
        let stacks = self.names.len().max(1);
        let rows = stacks * self.rows.len();
        let quantized = self.storage == Storage::Matrix
            && options.numerics == Numerics::Fp8
            && config.quantization.is_some();
        let dtype = match self.storage {
            Storage::Matrix if quantized => DType::F8E4M3,
            Storage::Plain | Storage::Matrix => options.numerics.activations(),
            Storage::F32 => DType::F32,
            Storage::I32 => DType::I32,
        };
        let Some(columns) = &self.columns else {
            let desc = TensorDesc::new(dtype, &[rows]);
            return WeightSpec { key, desc, scales: None, grid: BlockGrid::default() };
        };
        let grid = match self.storage {
            Storage::Matrix => BlockGrid {
                row_offset: (self.rows.start % FP8_BLOCK) as u32,
                column_offset: (columns.start % FP8_BLOCK) as u32,
                segments: stacks as u32,
            },
            _ => BlockGrid::default(),
        };
        let shaped = |dtype, rows: usize, columns: usize| match &self.experts {
            Some(experts) => TensorDesc::new(dtype, &[experts.len(), rows, columns]),
            None => TensorDesc::new(dtype, &[rows, columns]),
        };
        let desc = shaped(dtype, rows, columns.len());
        let scales = quantized
            .then(|| shaped(DType::F32, grid.scale_rows(rows), grid.scale_columns(columns.len())));
        WeightSpec { key, desc, scales, grid }
    }

    /// The parts of tensors that fill it.
    pub(super) fn pieces(&self, key: WeightKey) -> Vec<Piece> {
        let piece = |slot: usize, expert: Option<u32>, stack: usize, name: &str| {
            let name = match expert {
                Some(expert) => name.replacen("{}", &expert.to_string(), 1),
                None => name.to_string(),
            };
            // Names that begin so are the model's, all others the layer's.
            let top = name.starts_with("model.") || name.starts_with("lm_head.");
            Piece {
                name: if top { name } else { format!("model.layers.{}.{name}", key.layer) },
                rows: self.rows.clone(),
                columns: self.columns.clone(),
                expert: slot,
                row: stack * self.rows.len(),
            }
        };
        let of = |slot: usize, expert: Option<u32>| {
            self.names.iter().enumerate().map(move |(stack, name)| (slot, expert, stack, *name))
        };
        let all: Vec<_> = match &self.experts {
            Some(experts) => {
                experts.iter().enumerate().flat_map(|(slot, &e)| of(slot, Some(e))).collect()
            }
            None => of(0, None).collect(),
        };
        all.into_iter()
            .map(|(slot, expert, stack, name)| piece(slot, expert, stack, name))
            .collect()
    }
}

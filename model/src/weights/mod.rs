//! The weights as a rank's die holds them: which there are, in which dtype and layout, and which
//! parts of which tensors of the checkpoint they come from.
//!
//! [`plan`] lists them from the configuration and the rank's place alone, so that a model that does
//! not fit is refused before anything is read; [`load()`] brings them to the dies.

mod load;
mod source;

pub use load::{LoadError, LoadProgress, Weights, allocate, load};
pub use source::Piece;

use crate::config::ModelConfig;
use crate::numerics::Numerics;
use crate::plan::RankPlan;
use hal::TensorDesc;
use hal::op::BlockGrid;
use std::collections::HashMap;

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
    /// `[experts, most replicas]` I32: the physical experts of each logical one, −1 behind them;
    /// computed, not read.
    Replicas,
}

impl Role {
    /// Whether all ranks of a tensor group hold all of it, and it is large.
    pub fn is_whole(self) -> bool {
        use Role::{KvA, MtpProjection, QA, RopeTable, Router};
        matches!(self, QA | KvA | Router | MtpProjection | RopeTable)
    }
}

/// A weight of the model. Layer 0 stands for weights that belong to no layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct WeightKey {
    /// The layer; the MTP layer comes after the last one.
    pub layer: usize,
    /// What it is there.
    pub role: Role,
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
}

impl WeightSpec {
    /// Bytes on the device.
    pub fn bytes(&self) -> u64 {
        self.desc.bytes() + self.scales.map_or(0, |s| s.bytes())
    }
}

/// What a plan depends on besides the configuration and the rank.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PlanOptions {
    /// The numerics policy.
    pub numerics: Numerics,
    /// Whether the MTP layer is wanted and the checkpoint has it.
    pub mtp: bool,
    /// Positions that the rotary table covers.
    pub positions: usize,
}

/// The weights of one rank, by key, and what they were planned from.
#[derive(Clone, Debug)]
pub struct WeightPlan {
    /// In the order in which they are loaded.
    pub specs: Vec<WeightSpec>,
    index: HashMap<WeightKey, usize>,
}

impl WeightPlan {
    /// A weight that the rank holds.
    pub fn get(&self, key: WeightKey) -> Option<&WeightSpec> {
        self.index.get(&key).map(|&at| &self.specs[at])
    }

    /// Bytes on the device.
    pub fn bytes(&self) -> u64 {
        self.specs.iter().map(WeightSpec::bytes).sum()
    }

    /// Whether any weight is block-quantised.
    pub fn is_quantized(&self) -> bool {
        self.specs.iter().any(|s| s.scales.is_some())
    }
}

/// Lists every weight that a rank holds.
pub fn plan(config: &ModelConfig, rank: &RankPlan, options: PlanOptions) -> WeightPlan {
    let specs: Vec<_> = keys(config, rank, options)
        .into_iter()
        .map(|key| source::describe(config, rank, options, key).spec(config, options, key))
        .collect();
    let index = specs.iter().enumerate().map(|(at, spec)| (spec.key, at)).collect();
    WeightPlan { specs, index }
}

/// The parts of the checkpoint's tensors that fill a weight; empty for what is computed.
pub fn pieces(
    config: &ModelConfig,
    rank: &RankPlan,
    options: PlanOptions,
    key: WeightKey,
) -> Vec<Piece> {
    source::describe(config, rank, options, key).pieces(key)
}

/// Which weights a rank holds.
fn keys(config: &ModelConfig, rank: &RankPlan, options: PlanOptions) -> Vec<WeightKey> {
    let c = config;
    let mtp = c.mtp_layer().filter(|_| options.mtp && rank.is_last_stage());
    let mut keys = Vec::new();
    let mut top = |role| keys.push(WeightKey { layer: 0, role });
    if rank.is_first_stage() || mtp.is_some() {
        top(Role::Embedding);
    }
    if rank.is_last_stage() {
        top(Role::FinalNorm);
        top(Role::Head);
    }
    top(Role::RopeTable);
    if rank.experts.as_ref().is_some_and(|e| !e.is_identity()) {
        top(Role::Replicas);
    }
    let quantized = options.numerics == Numerics::Fp8 && c.quantization.is_some();
    for layer in rank.layers.clone().chain(mtp) {
        let mut add = |role| keys.push(WeightKey { layer, role });
        if mtp == Some(layer) {
            // Embedding and head are copies of the main model's, which serve for both.
            add(Role::MtpEmbeddingNorm);
            add(Role::MtpHiddenNorm);
            add(Role::MtpProjection);
            add(Role::MtpHeadNorm);
        }
        add(Role::InputNorm);
        add(Role::PostAttentionNorm);
        match c.q_lora_rank {
            Some(_) => [Role::QA, Role::QANorm, Role::QB].into_iter().for_each(&mut add),
            None => add(Role::Q),
        }
        [Role::KvA, Role::KvANorm, Role::KvB].into_iter().for_each(&mut add);
        if quantized {
            add(Role::KvBAbsorbed);
        }
        add(Role::O);
        if !c.is_moe_layer(layer) {
            [Role::GateUp, Role::Down].into_iter().for_each(&mut add);
            continue;
        }
        [Role::Router, Role::RouterBias, Role::ExpertsGateUp, Role::ExpertsDown]
            .into_iter()
            .for_each(&mut add);
        if c.n_shared_experts > 0 {
            [Role::SharedGateUp, Role::SharedDown].into_iter().for_each(&mut add);
        }
    }
    keys
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Preset;
    use crate::plan::{ParallelOptions, ParallelPlan};

    const OPTIONS: PlanOptions = PlanOptions { numerics: Numerics::Fp8, mtp: false, positions: 1 };

    #[test]
    fn v3_in_fp8_has_the_published_size() {
        let config = Preset::DeepSeekV3.config();
        let plan = plan(&config, &RankPlan::single(&config), OPTIONS);
        let copies: u64 = plan
            .specs
            .iter()
            .filter(|s| matches!(s.key.role, Role::KvBAbsorbed | Role::RopeTable))
            .map(WeightSpec::bytes)
            .sum();
        // The checkpoint's own count (main model), plus what the device holds besides.
        assert_eq!(plan.bytes() - copies, 673_150_611_808);
        assert_eq!(plan.index.len(), plan.specs.len(), "each weight once");
    }

    /// The elements of each tensor that the ranks hold add up to the tensor, or to it on each rank.
    #[test]
    fn ranks_cover_every_tensor_without_gaps() {
        let config = Preset::DeepSeekV3.config();
        let base = ParallelOptions::default();
        for options in [
            ParallelOptions { tensor: 32, ..base },
            ParallelOptions { tensor: 3, pipeline: 2, ..base },
            ParallelOptions { data: 8, expert: true, ..base },
            ParallelOptions {
                tensor: 4,
                data: 2,
                expert: true,
                redundant_experts: Some(8),
                ..base
            },
        ] {
            let plan = ParallelPlan::new(&config, options).unwrap();
            let mut held: HashMap<String, u64> = HashMap::new();
            for rank in 0..plan.ranks() {
                let rank = plan.rank(rank);
                let data_copies = rank.data.rank > 0 && rank.experts.is_none();
                for key in keys(&config, &rank, OPTIONS) {
                    // One layer of each kind is enough, and the layers are alike.
                    if (key.layer > 0 && key.layer != 40) || data_copies {
                        continue;
                    }
                    for piece in pieces(&config, &rank, OPTIONS, key) {
                        let columns = piece.columns.as_ref().map_or(1, |c| c.len());
                        *held.entry(piece.name).or_default() += (piece.rows.len() * columns) as u64;
                    }
                }
            }
            let moe = "model.layers.40.mlp";
            let expert = |e: usize| format!("{moe}.experts.{e}.down_proj.weight");
            let sum = |name: String| held[&name];
            let q_b = sum("model.layers.40.self_attn.q_b_proj.weight".into());
            assert_eq!(q_b % (24576 * 1536), 0, "{options:?}");
            let copies = plan.experts().map_or(1, |p| p.replicas()[0].len());
            assert_eq!(sum(expert(0)), copies as u64 * 7168 * 2048, "{options:?}");
            assert_eq!(sum(expert(255)), 7168 * 2048, "{options:?}");
        }
    }

    #[test]
    fn what_is_whole_is_what_large_weights_all_ranks_read_alike() {
        let config = Preset::DeepSeekV3.config();
        let all = PlanOptions { positions: 4096, ..OPTIONS };
        let options = ParallelOptions { tensor: 2, ..ParallelOptions::default() };
        let parallel = ParallelPlan::new(&config, options).unwrap();
        let ranks = [0, 1].map(|rank| parallel.rank(rank));
        for spec in plan(&config, &ranks[0], all).specs {
            let [first, second] = ranks.each_ref().map(|r| pieces(&config, r, all, spec.key));
            let alike = first == second && spec.bytes() >= 16 << 10;
            // A norm of 14 KB is not worth a buffer of its own.
            assert_eq!(spec.key.role.is_whole(), alike, "{:?}", spec.key);
        }
    }

    #[test]
    fn tp32_splits_blocks_in_half_and_keeps_both_scales() {
        let config = Preset::DeepSeekV3.config();
        let options = ParallelOptions { tensor: 32, ..ParallelOptions::default() };
        let parallel = ParallelPlan::new(&config, options).unwrap();
        let plan = plan(&config, &parallel.rank(1), OPTIONS);
        let spec = |layer, role| plan.get(WeightKey { layer, role }).unwrap();
        let up = spec(3, Role::ExpertsGateUp);
        assert_eq!(up.desc.shape(), [256, 128, 7168]);
        assert_eq!(up.grid, BlockGrid { row_offset: 64, column_offset: 0, segments: 2 });
        assert_eq!(up.scales.unwrap().shape(), [256, 2, 56]);
        let down = spec(0, Role::Down);
        assert_eq!(down.desc.shape(), [7168, 576]);
        assert_eq!((down.grid.column_offset, down.scales.unwrap().shape()), (64, &[56, 5][..]));
        assert_eq!(spec(0, Role::Embedding).desc.shape(), [4040, 7168]);
        // About 20.1 GB a die (vacc-facts: 20.1 GB of weights at TP32), and kv_b in BF16 besides.
        let bytes = plan.bytes() as f64;
        assert!((21e9..23e9).contains(&bytes), "{bytes}");
    }
}

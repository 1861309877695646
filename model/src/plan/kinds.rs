//! Ranks that hold parts of the same sizes.

use super::{Member, ParallelPlan, RankPlan};
use crate::config::{FP8_BLOCK, ModelConfig};
use std::collections::BTreeMap;

/// The ranks of a plan by what they hold: those of one kind take the same memory and run ops of the
/// same shapes.
#[derive(Clone, Debug)]
pub struct RankKinds {
    /// One rank of each kind.
    pub ranks: Vec<RankPlan>,
    /// The kind of each rank.
    pub of_rank: Vec<usize>,
}

impl RankKinds {
    /// The kinds of a plan.
    pub fn of(config: &ModelConfig, plan: &ParallelPlan) -> Self {
        let c = config;
        let (mut ranks, mut of_rank) = (Vec::new(), Vec::with_capacity(plan.ranks()));
        let mut known: BTreeMap<(usize, Vec<(usize, usize)>), usize> = BTreeMap::new();
        for number in 0..plan.ranks() {
            let rank = plan.rank(number);
            // Parts of the same length that meet the FP8 blocks alike.
            let like = |member: Member, whole: usize, each: usize| {
                let part = member.part(whole);
                (part.len(), part.start * each % FP8_BLOCK)
            };
            let heads = |each| like(rank.tensor, c.num_attention_heads, each);
            let mlp = |whole| like(rank.mlp_member(), whole, 1);
            let parts = vec![
                heads(c.qk_head_dim()),
                heads(c.v_head_dim),
                heads(c.qk_nope_head_dim + c.v_head_dim),
                (like(rank.tensor, c.vocab_size, 1).0, 0),
                mlp(c.intermediate_size),
                mlp(c.moe_intermediate_size),
                mlp(c.shared_intermediate_size()),
            ];
            let next = ranks.len();
            let kind = *known.entry((rank.stage.rank, parts)).or_insert(next);
            if kind == next {
                ranks.push(rank);
            }
            of_rank.push(kind);
        }
        RankKinds { ranks, of_rank }
    }
}

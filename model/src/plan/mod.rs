//! Parallel plans: which rank holds and computes what.
//!
//! A plan is a function of the configuration and of the degrees alone, so that it can be explained
//! or refused in milliseconds, before anything is read. Ranks are numbered stage by stage, within a
//! stage by data rank, within that by tensor rank: neighbours in a tensor group are neighbours on
//! a card.
//!
//! | degree | splits | as in |
//! |---|---|---|
//! | tensor (TP) | heads, columns of the MLPs, vocabulary | Megatron-LM, arXiv 1909.08053 |
//! | pipeline (PP) | layers | GPipe, arXiv 1811.06965 |
//! | data (DP) | sequences; without experts over ranks, each data rank is an instance of its own | |
//! | expert (EP) | routed experts over all ranks of a stage, each token being with one rank | DeepSeek-V3 report, section 3.4 |

mod error;
mod experts;
mod kinds;
mod stages;

pub use error::{PlanError, Rule};
pub use experts::{ExpertPlacement, balance};
pub use kinds::RankKinds;

use crate::config::ModelConfig;
use serde::Serialize;
use std::ops::Range;

/// The degrees of a plan, as asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct ParallelOptions {
    /// Ranks that share heads, MLP columns and the vocabulary.
    pub tensor: usize,
    /// Stages that share the layers.
    pub pipeline: usize,
    /// Ranks, or tensor groups, that share the sequences.
    pub data: usize,
    /// Whether routed experts are spread over all ranks of a stage.
    pub expert: bool,
    /// Copies of experts beyond one each; `None` for the fewest that divide evenly.
    pub redundant_experts: Option<usize>,
    /// Ranks of a stage that share a node, where dispatch goes over nodes first; `None` for one hop.
    pub ranks_per_node: Option<usize>,
}

impl ParallelOptions {
    /// One rank.
    pub const SINGLE: ParallelOptions = ParallelOptions {
        tensor: 1,
        pipeline: 1,
        data: 1,
        expert: false,
        redundant_experts: None,
        ranks_per_node: None,
    };
}

impl Default for ParallelOptions {
    fn default() -> Self {
        Self::SINGLE
    }
}

/// A place in a group.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize)]
pub struct Member {
    /// Which one, from 0.
    pub rank: usize,
    /// Of how many.
    pub size: usize,
}

impl Member {
    /// A group of one.
    pub const ALONE: Member = Member { rank: 0, size: 1 };

    /// This member's part of `total` things, as even as possible, in order.
    pub const fn part(self, total: usize) -> Range<usize> {
        self.rank * total / self.size..(self.rank + 1) * total / self.size
    }

    /// Whether there is anybody else.
    pub const fn is_alone(self) -> bool {
        self.size == 1
    }
}

/// A group of ranks that communicate.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Group {
    /// The ranks that share heads and columns.
    Tensor,
    /// The ranks that hold the same part of each stage, in the order of the stages.
    Pipeline,
    /// The ranks that share the experts of a stage.
    Expert,
    /// Of those, the ones with this rank's place in their node, one per node.
    ExpertNodes,
    /// Of those, the ones in this rank's node.
    ExpertNode,
}

impl Group {
    /// The name used in dumps and reports.
    pub const fn name(self) -> &'static str {
        match self {
            Group::Tensor => "tensor",
            Group::Pipeline => "pipeline",
            Group::Expert => "expert",
            Group::ExpertNodes => "expert nodes",
            Group::ExpertNode => "expert node",
        }
    }
}

/// A plan that keeps every rule.
#[derive(Clone, Debug, PartialEq)]
pub struct ParallelPlan {
    options: ParallelOptions,
    stages: Vec<Range<usize>>,
    experts: Option<ExpertPlacement>,
}

/// One rank's place in a plan.
#[derive(Clone, Debug, PartialEq)]
pub struct RankPlan {
    /// The rank, which is also the number of its die within the instance.
    pub rank: usize,
    /// Its place among the ranks that share heads and columns.
    pub tensor: Member,
    /// Its place among the tensor groups that share the sequences.
    pub data: Member,
    /// Its place among the stages.
    pub stage: Member,
    /// Its place among the ranks that share experts; alone where experts are not spread.
    pub expert: Member,
    /// Ranks of the expert group in one node; the whole group where dispatch takes one hop.
    pub node_size: usize,
    /// Decoder layers of its stage. The MTP layer, where wanted, comes with the last stage.
    pub layers: Range<usize>,
    /// Where experts are, if they are spread.
    pub experts: Option<ExpertPlacement>,
}

impl ParallelPlan {
    /// Checks the degrees against the configuration.
    ///
    /// # Errors
    ///
    /// The rule that is broken, and the nearest degrees that keep it.
    pub fn new(config: &ModelConfig, options: ParallelOptions) -> Result<Self, PlanError> {
        error::check(config, options)?;
        let stage_ranks = options.tensor * options.data;
        let experts = (options.expert && stage_ranks > 1).then(|| {
            let redundant = options
                .redundant_experts
                .unwrap_or_else(|| experts::fewest_redundant(config.n_routed_experts, stage_ranks));
            ExpertPlacement::even(config.n_routed_experts, redundant, stage_ranks)
        });
        let stages = stages::split(config, options.pipeline);
        Ok(ParallelPlan { options, stages, experts })
    }

    /// One rank.
    pub fn single(config: &ModelConfig) -> Self {
        let stages = stages::split(config, 1);
        ParallelPlan { options: ParallelOptions::default(), stages, experts: None }
    }

    /// The degrees.
    pub fn options(&self) -> ParallelOptions {
        self.options
    }

    /// Ranks in all: tensor × data × pipeline.
    pub fn ranks(&self) -> usize {
        self.options.tensor * self.options.data * self.options.pipeline
    }

    /// Ranks of one stage.
    pub fn stage_ranks(&self) -> usize {
        self.options.tensor * self.options.data
    }

    /// Layers of each stage.
    pub fn stages(&self) -> &[Range<usize>] {
        &self.stages
    }

    /// Where the routed experts are, if they are spread over ranks.
    pub fn experts(&self) -> Option<&ExpertPlacement> {
        self.experts.as_ref()
    }

    /// Puts experts elsewhere: the outcome of [`balance`].
    #[must_use]
    pub fn with_placement(mut self, placement: ExpertPlacement) -> Self {
        if self.experts.is_some() {
            self.experts = Some(placement);
        }
        self
    }

    /// The rank at a place.
    pub fn rank_at(&self, stage: usize, data: usize, tensor: usize) -> usize {
        (stage * self.options.data + data) * self.options.tensor + tensor
    }

    /// A rank's place.
    pub fn rank(&self, rank: usize) -> RankPlan {
        let ParallelOptions { tensor, pipeline, data, ranks_per_node, .. } = self.options;
        let stage = rank / (tensor * data);
        let expert = match self.experts {
            Some(_) => Member { rank: rank % (tensor * data), size: tensor * data },
            None => Member::ALONE,
        };
        RankPlan {
            rank,
            tensor: Member { rank: rank % tensor, size: tensor },
            data: Member { rank: rank / tensor % data, size: data },
            stage: Member { rank: stage, size: pipeline },
            expert,
            node_size: match ranks_per_node {
                Some(n) if n < expert.size && expert.size.is_multiple_of(n) => n,
                _ => expert.size,
            },
            layers: self.stages[stage].clone(),
            experts: self.experts.clone(),
        }
    }
}

impl RankPlan {
    /// One rank that holds everything.
    pub fn single(config: &ModelConfig) -> Self {
        ParallelPlan::single(config).rank(0)
    }

    /// Whether tokens, not columns, are split between the ranks of the tensor group outside
    /// attention (sequence parallelism, arXiv 2205.05198): where each token's experts may be
    /// anywhere, each token is with one rank.
    pub fn splits_tokens(&self) -> bool {
        self.experts.is_some() && !self.tensor.is_alone()
    }

    /// This rank's part of the columns of MLPs that are not spread expert by expert.
    pub fn mlp_member(&self) -> Member {
        if self.experts.is_some() { Member::ALONE } else { self.tensor }
    }

    /// Whether it has the first stage.
    pub fn is_first_stage(&self) -> bool {
        self.stage.rank == 0
    }

    /// Whether it has the last stage.
    pub fn is_last_stage(&self) -> bool {
        self.stage.rank + 1 == self.stage.size
    }

    /// The ranks of a group that this rank is in, in the group's order, and its place there;
    /// `None` where it would be alone.
    pub fn group(&self, group: Group) -> Option<(Vec<usize>, usize)> {
        let stage_ranks = self.tensor.size * self.data.size;
        let stage_first = self.stage.rank * stage_ranks;
        let (ranks, at): (Vec<usize>, usize) = match group {
            Group::Tensor => {
                let first = self.rank - self.tensor.rank;
                ((first..first + self.tensor.size).collect(), self.tensor.rank)
            }
            Group::Pipeline => {
                let within = self.rank - stage_first;
                let ranks = (0..self.stage.size).map(|s| s * stage_ranks + within).collect();
                (ranks, self.stage.rank)
            }
            Group::Expert => {
                ((stage_first..stage_first + self.expert.size).collect(), self.expert.rank)
            }
            Group::ExpertNodes if self.node_size < self.expert.size => {
                let within = self.expert.rank % self.node_size;
                let nodes = self.expert.size / self.node_size;
                let ranks = (0..nodes).map(|n| stage_first + n * self.node_size + within).collect();
                (ranks, self.expert.rank / self.node_size)
            }
            Group::ExpertNode if self.node_size < self.expert.size => {
                let node = self.expert.rank / self.node_size * self.node_size;
                let ranks = (0..self.node_size).map(|r| stage_first + node + r).collect();
                (ranks, self.expert.rank % self.node_size)
            }
            Group::ExpertNodes | Group::ExpertNode => return None,
        };
        (ranks.len() > 1).then_some((ranks, at))
    }

    /// Every kind of group, in the order in which communicators are made.
    pub const GROUPS: [Group; 5] =
        [Group::Tensor, Group::Pipeline, Group::Expert, Group::ExpertNodes, Group::ExpertNode];
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Preset;
    use std::collections::HashMap;

    #[test]
    fn groups_partition_the_ranks_and_agree_with_each_other() {
        let config = Preset::DeepSeekV3.config();
        for (tensor, pipeline, data, expert, node) in [
            (32, 1, 1, false, None),
            (4, 2, 1, false, None),
            (1, 1, 32, true, None),
            (4, 1, 8, true, Some(8)),
            (2, 3, 2, true, Some(2)),
        ] {
            let options = ParallelOptions {
                tensor,
                pipeline,
                data,
                expert,
                ranks_per_node: node,
                ..ParallelOptions::default()
            };
            let plan = ParallelPlan::new(&config, options).unwrap();
            for group in RankPlan::GROUPS {
                let mut seen: HashMap<usize, Vec<usize>> = HashMap::new();
                for rank in 0..plan.ranks() {
                    let Some((ranks, at)) = plan.rank(rank).group(group) else { continue };
                    assert_eq!(ranks[at], rank, "{group:?} of {options:?}");
                    for &other in &ranks {
                        let known = seen.entry(other).or_insert_with(|| ranks.clone());
                        assert_eq!(*known, ranks, "{group:?} of {options:?}");
                    }
                }
                assert!(seen.is_empty() || seen.len() == plan.ranks(), "{group:?} {options:?}");
            }
            let layers: usize = plan.stages().iter().map(ExactSizeIterator::len).sum();
            assert_eq!(layers, config.num_hidden_layers);
        }
    }

    #[test]
    fn parts_are_even_and_complete() {
        for (total, size) in [(128, 32), (10, 3), (7, 7), (4040, 32)] {
            let parts: Vec<_> = (0..size).map(|rank| Member { rank, size }.part(total)).collect();
            assert_eq!(parts.iter().map(ExactSizeIterator::len).sum::<usize>(), total);
            assert!(parts.windows(2).all(|w| w[0].end == w[1].start));
            let (least, most) =
                (parts.iter().map(|p| p.len()).min(), parts.iter().map(|p| p.len()).max());
            assert!(most.unwrap() - least.unwrap() <= 1);
        }
    }
}

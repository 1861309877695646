//! The rules of plans, and what is told to who breaks one.

use super::ParallelOptions;
use crate::config::ModelConfig;
use std::fmt;

/// A rule that every plan keeps.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Rule {
    /// Each degree is at least 1.
    Positive,
    /// Each tensor rank has at least one head.
    HeadPerTensorRank,
    /// Each tensor rank has at least one column of every MLP, and one row of the vocabulary.
    ColumnPerTensorRank,
    /// Each stage has at least one layer.
    LayerPerStage,
    /// Experts can only be spread where the model has some.
    HasExperts,
    /// Experts with their copies divide evenly over the ranks of a stage.
    ExpertsDivide,
    /// Copies are for experts that are spread over ranks.
    RedundancyNeedsExpertParallel,
    /// The machine has a die per rank.
    EnoughDies,
}

impl fmt::Display for Rule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Rule::Positive => "every degree is at least 1",
            Rule::HeadPerTensorRank => "every tensor rank has at least one attention head",
            Rule::ColumnPerTensorRank => {
                "every tensor rank has at least one column of each MLP and one row of the vocabulary"
            }
            Rule::LayerPerStage => "every pipeline stage has at least one layer",
            Rule::HasExperts => "expert parallelism needs routed experts",
            Rule::ExpertsDivide => {
                "routed experts and their copies divide evenly over the ranks of a stage"
            }
            Rule::RedundancyNeedsExpertParallel => {
                "redundant experts are for experts that are spread over ranks"
            }
            Rule::EnoughDies => "the machine has one die per rank",
        })
    }
}

/// A plan that is not possible.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the plan breaks the rule that {rule}: {problem}; {nearest}")]
pub struct PlanError {
    /// The rule.
    pub rule: Rule,
    /// The values that break it.
    pub problem: String,
    /// The nearest settings that keep it, in words.
    pub nearest: String,
}

impl PlanError {
    /// More ranks than the machine has dies.
    pub fn too_many_ranks(options: ParallelOptions, dies: usize) -> Self {
        let ParallelOptions { tensor, pipeline, data, .. } = options;
        let others = (data * pipeline).max(1);
        let problem = format!(
            "tensor {tensor} × data {data} × pipeline {pipeline} = {} ranks, and there are {dies} dies",
            tensor * data * pipeline
        );
        let nearest = match dies / others {
            0 => format!("the most that fits is {dies} ranks in all"),
            most => {
                format!(
                    "with data {data} and pipeline {pipeline}, tensor {most} is the most that fits"
                )
            }
        };
        PlanError { rule: Rule::EnoughDies, problem, nearest }
    }
}

/// Checks the rules that the configuration alone decides.
pub(super) fn check(config: &ModelConfig, options: ParallelOptions) -> Result<(), PlanError> {
    let ParallelOptions { tensor, pipeline, data, expert, redundant_experts, .. } = options;
    let broken = |rule, problem: String, nearest: String| Err(PlanError { rule, problem, nearest });
    for (name, degree) in [("tensor", tensor), ("pipeline", pipeline), ("data", data)] {
        if degree == 0 {
            return broken(Rule::Positive, format!("{name} is 0"), "1 is the least".into());
        }
    }
    let heads = config.num_attention_heads;
    if tensor > heads {
        let problem = format!("tensor {tensor} and {heads} heads");
        return broken(Rule::HeadPerTensorRank, problem, format!("tensor {heads} is the most"));
    }
    let spread = expert && tensor * data > 1;
    let mut widths = vec![("the vocabulary", config.vocab_size)];
    if !spread {
        if config.first_k_dense_replace > 0 && config.num_hidden_layers > 0 {
            widths.push(("a dense MLP's intermediate size", config.intermediate_size));
        }
        if config.has_moe_layers() {
            widths.push(("an expert's intermediate size", config.moe_intermediate_size));
        }
    }
    for (name, width) in widths {
        if tensor > width {
            let problem = format!("tensor {tensor} and {name} of {width}");
            return broken(
                Rule::ColumnPerTensorRank,
                problem,
                format!("tensor {width} is the most"),
            );
        }
    }
    let layers = config.num_hidden_layers;
    if pipeline > layers {
        let problem = format!("pipeline {pipeline} and {layers} layers");
        return broken(Rule::LayerPerStage, problem, format!("pipeline {layers} is the most"));
    }
    if redundant_experts.is_some_and(|n| n > 0) && !spread {
        let problem = format!(
            "{} redundant experts, and every rank holds a part of every expert",
            redundant_experts.unwrap_or(0)
        );
        let nearest = "ask for expert parallelism over more than one rank, or for no copies".into();
        return broken(Rule::RedundancyNeedsExpertParallel, problem, nearest);
    }
    if !expert {
        return Ok(());
    }
    if !config.has_moe_layers() || config.n_routed_experts == 0 {
        let problem = "the model has none".to_string();
        return broken(Rule::HasExperts, problem, "leave expert parallelism out".into());
    }
    let (experts, ranks) = (config.n_routed_experts, tensor * data);
    if let Some(redundant) = redundant_experts
        && !(experts + redundant).is_multiple_of(ranks)
    {
        let all = experts + redundant;
        let more = all.next_multiple_of(ranks) - experts;
        let problem = format!("{experts} experts + {redundant} copies = {all} over {ranks} ranks");
        let nearest = match (all / ranks * ranks).checked_sub(experts) {
            Some(fewer) => format!("{fewer} or {more} copies divide evenly"),
            None => format!("{more} copies divide evenly"),
        };
        return broken(Rule::ExpertsDivide, problem, nearest);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Preset;
    use crate::plan::ParallelPlan;

    #[test]
    fn each_rule_is_named_with_the_nearest_legal_setting() {
        let config = Preset::DeepSeekV3.config();
        let base = ParallelOptions::default();
        for (options, rule, words) in [
            (ParallelOptions { tensor: 0, ..base }, Rule::Positive, "tensor is 0"),
            (
                ParallelOptions { tensor: 129, ..base },
                Rule::HeadPerTensorRank,
                "tensor 128 is the most",
            ),
            (
                ParallelOptions { pipeline: 62, ..base },
                Rule::LayerPerStage,
                "pipeline 61 is the most",
            ),
            (
                ParallelOptions { redundant_experts: Some(8), ..base },
                Rule::RedundancyNeedsExpertParallel,
                "8 redundant experts",
            ),
            (
                ParallelOptions { data: 32, expert: true, redundant_experts: Some(33), ..base },
                Rule::ExpertsDivide,
                "32 or 64 copies",
            ),
            (
                ParallelOptions { data: 320, expert: true, redundant_experts: Some(0), ..base },
                Rule::ExpertsDivide,
                "64 copies divide",
            ),
        ] {
            let error = ParallelPlan::new(&config, options).unwrap_err();
            assert_eq!(error.rule, rule, "{error}");
            assert!(error.to_string().contains(words), "{error}");
        }
        let error = PlanError::too_many_ranks(ParallelOptions { tensor: 32, data: 2, ..base }, 32);
        assert!(error.to_string().contains("tensor 16 is the most"), "{error}");
        for tensor in [1, 2, 3, 31, 32, 100, 128] {
            ParallelPlan::new(&config, ParallelOptions { tensor, ..base }).unwrap();
        }
    }
}

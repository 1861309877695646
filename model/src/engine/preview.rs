//! Steps without an engine: the graph and the schedule that a rank would run.

use super::EngineOptions;
use super::memory::{padding_pages, pages, plan_options};
use super::program::{Module, ProgramKey, micro_batches, plan as plan_program};
use crate::config::ModelConfig;
use crate::graph::{Form, Graph, ModelInputs, StepShape};
use crate::plan::ParallelPlan;
use crate::schedule::Schedule;
use crate::weights;

/// What goes through the model in a step, on each data rank.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StepKind {
    /// One token each of so many sequences.
    Decode {
        /// Sequences.
        sequences: usize,
    },
    /// New tokens of one sequence that has no past.
    Prefill {
        /// Tokens.
        tokens: usize,
    },
}

/// A rank's graph of a step and its schedule, from the configuration alone, on a device that has
/// every fused op.
pub fn preview(
    config: &ModelConfig,
    plan: &ParallelPlan,
    rank: usize,
    options: EngineOptions,
    step: StepKind,
) -> (Graph, Schedule) {
    let rank = plan.rank(rank);
    let weights = weights::plan(config, &rank, plan_options(options, false));
    let tokens = match step {
        StepKind::Decode { sequences } => sequences,
        StepKind::Prefill { tokens } => tokens,
    };
    let parts = micro_batches(options.overlap, tokens);
    let multiple = if rank.splits_tokens() { rank.tensor.size } else { 1 };
    let shape = |part: usize| {
        // The first half is the larger one.
        let real = (tokens + parts - 1 - part) / parts;
        let padded = real.max(1).next_multiple_of(multiple);
        let sequences = match step {
            StepKind::Decode { .. } => real,
            StepKind::Prefill { .. } => 1,
        };
        StepShape {
            tokens: padded,
            sequences: sequences + usize::from(padded > real),
            logit_rows: match step {
                StepKind::Decode { .. } => real,
                StepKind::Prefill { .. } => usize::from(part + 1 == parts),
            },
            form: match step {
                StepKind::Decode { .. } => Form::Absorbed,
                StepKind::Prefill { .. } if part == 0 => Form::Expanded { keys: padded },
                StepKind::Prefill { .. } => Form::Expanded { keys: tokens.max(padded) },
            },
            pages: pages(options, plan) + padding_pages(options, plan),
            page_size: options.page_size,
            max_pages: options.max_model_len.div_ceil(options.page_size),
            vocabulary: options.vocabulary.unwrap_or(config.vocab_size).min(config.vocab_size),
            expert_tokens: padded * plan.options().data,
            expert_capacity: options.expert_rows(config, plan, padded),
        }
    };
    let key = ProgramKey { module: Module::Main, shapes: (0..parts).map(shape).collect() };
    let inputs = ModelInputs { config, numerics: options.numerics, rank: &rank, weights: &weights };
    plan_program(inputs, &key, &|_| options.fuse).unwrap_or_default()
}

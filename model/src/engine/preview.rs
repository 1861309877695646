//! Steps without an engine: the graph and the schedule that a rank would run.

use super::EngineOptions;
use super::memory::plan_options;
use super::program::{Module, ProgramKey, plan as plan_program};
use super::shape::{Part, Sizes, micro_batches, tokens_of};
use crate::config::ModelConfig;
use crate::graph::{Form, Graph, ModelInputs};
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
    let sizes = Sizes::of(config, plan, options);
    let parts = micro_batches(options.overlap, tokens);
    let shape = |part: usize| {
        let real = tokens_of(part, parts, tokens);
        let padded = sizes.filled_up(real);
        let last = part + 1 == parts;
        let (sequences, logit_rows, form) = match step {
            StepKind::Decode { .. } => (real, real, Form::Absorbed),
            StepKind::Prefill { .. } => {
                let keys = if part == 0 { padded } else { tokens.max(padded) };
                (1, usize::from(last), Form::Expanded { keys })
            }
        };
        sizes.shape(Part {
            tokens: padded,
            sequences: sequences + usize::from(padded > real),
            logit_rows,
            form,
            expert_tokens: padded * plan.options().data,
        })
    };
    let key = ProgramKey { module: Module::Main, shapes: (0..parts).map(shape).collect() };
    let inputs = ModelInputs { config, numerics: options.numerics, rank: &rank, weights: &weights };
    plan_program(inputs, &key, &|_| options.fuse).unwrap_or_default()
}

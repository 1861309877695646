//! The sizes of a step: one rule for steps that run, for those that are only previewed, and for the
//! largest one, which memory is set aside for.

use super::memory::{padding_pages, pages};
use super::{EngineOptions, Overlap};
use crate::config::ModelConfig;
use crate::graph::{Form, StepShape};
use crate::plan::ParallelPlan;

/// What all steps of a model, a plan and its options have in common.
#[derive(Clone, Copy, Debug)]
pub struct Sizes {
    pages: usize,
    page_size: usize,
    vocabulary: usize,
    max_pages: usize,
    multiple: usize,
    /// Rows of experts' buffers for each token of a tensor group.
    expert_rows: Option<f64>,
}

/// What a micro-batch has of its own, on one data rank.
#[derive(Clone, Copy, Debug)]
pub struct Part {
    /// New tokens, filled up.
    pub tokens: usize,
    /// Sequences, that of the padding included.
    pub sequences: usize,
    /// Tokens whose logits are wanted.
    pub logit_rows: usize,
    /// Attention's form.
    pub form: Form,
    /// New tokens of all data ranks.
    pub expert_tokens: usize,
}

impl Sizes {
    /// The sizes under these options.
    pub fn of(config: &ModelConfig, plan: &ParallelPlan, options: EngineOptions) -> Self {
        let split = plan.experts().is_some();
        Sizes {
            pages: pages(options, plan) + padding_pages(options, plan),
            page_size: options.page_size,
            vocabulary: vocabulary(config, options),
            max_pages: options.max_model_len.div_ceil(options.page_size),
            multiple: if split { plan.options().tensor } else { 1 },
            expert_rows: options.expert_rows(config, plan),
        }
    }

    /// Width of the block table: pages of the longest sequence.
    pub fn max_pages(&self) -> usize {
        self.max_pages
    }

    /// To how many tokens a micro-batch is filled up: where the ranks of a tensor group split tokens
    /// each has as many, and where ranks wait for each other's experts each has some.
    pub fn filled_up(&self, tokens: usize) -> usize {
        tokens.max(1).next_multiple_of(self.multiple)
    }

    /// Whether there are numbers of tokens that are filled up.
    pub fn fills_up(&self) -> bool {
        self.multiple > 1
    }

    /// What a micro-batch's graph is built for.
    pub fn shape(&self, part: Part) -> StepShape {
        let Sizes { pages, page_size, vocabulary, max_pages, expert_rows, .. } = *self;
        let Part { tokens, sequences, logit_rows, form, expert_tokens } = part;
        StepShape {
            tokens,
            sequences,
            logit_rows,
            form,
            pages,
            page_size,
            max_pages,
            vocabulary,
            expert_tokens,
            expert_capacity: expert_rows
                .map(|each| ((tokens as f64 * each).ceil() as usize).max(1)),
        }
    }
}

/// Ids that have a token.
pub(super) fn vocabulary(config: &ModelConfig, options: EngineOptions) -> usize {
    options.vocabulary.unwrap_or(config.vocab_size).min(config.vocab_size)
}

/// How many micro-batches a step of so many tokens is split into.
pub fn micro_batches(overlap: Overlap, tokens: usize) -> usize {
    match overlap {
        Overlap::TwoBatch if tokens >= 2 => 2,
        _ => 1,
    }
}

/// Tokens of one of `parts` micro-batches: as even as can be, the first ones larger.
pub(super) fn tokens_of(part: usize, parts: usize, tokens: usize) -> usize {
    (tokens + parts - 1 - part) / parts
}

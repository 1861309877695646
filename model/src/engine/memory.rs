//! What a plan takes of each die's memory, before anything is loaded.

use super::program::{Module, ProgramKey, plan as plan_program};
use super::shape::{Part, Sizes, micro_batches, tokens_of};
use super::{EngineError, EngineOptions, rank::cached_layers};
use crate::config::ModelConfig;
use crate::graph::{Form, Graph, ModelInputs, Source, Work};
use crate::plan::{ParallelPlan, RankKinds, RankPlan};
use crate::weights::{self, PlanOptions, WeightPlan};
use serde::Serialize;
use std::collections::HashMap;

/// What an engine takes of a die's memory, in bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct MemoryPlan {
    /// Weights.
    pub weights: u64,
    /// KV cache.
    pub cache: u64,
    /// Scratch, inputs and outputs of the largest step, without what `communication` counts.
    pub workspace: u64,
    /// The part of the scratch that collectives send from and receive into, at its most.
    pub communication: u64,
}

impl MemoryPlan {
    /// The sum.
    pub const fn total(&self) -> u64 {
        self.weights + self.cache + self.workspace + self.communication
    }
}

/// Pages for as many full sequences as one data rank has of those that the options ask for.
pub(super) fn pages(options: EngineOptions, plan: &ParallelPlan) -> usize {
    let sequences = options.max_sequences.div_ceil(plan.options().data);
    sequences * options.max_model_len.div_ceil(options.page_size)
}

/// Pages of tokens that only fill up batches.
pub(super) fn padding_pages(options: EngineOptions, plan: &ParallelPlan) -> usize {
    match plan.experts() {
        Some(_) => plan.options().tensor.div_ceil(options.page_size),
        None => 0,
    }
}

/// What each rank takes. Ranks of one stage differ by little: by uneven parts, if at all.
pub fn memory_plan(
    config: &ModelConfig,
    plan: &ParallelPlan,
    options: EngineOptions,
    mtp: bool,
) -> Vec<MemoryPlan> {
    let kinds = RankKinds::of(config, plan);
    let planned: Vec<MemoryPlan> =
        kinds.ranks.iter().map(|rank| of_rank(config, plan, rank, options, mtp)).collect();
    kinds.of_rank.iter().map(|&kind| planned[kind]).collect()
}

pub(super) fn plan_options(options: EngineOptions, mtp: bool) -> PlanOptions {
    PlanOptions { numerics: options.numerics, mtp, positions: options.max_model_len }
}

fn of_rank(
    config: &ModelConfig,
    plan: &ParallelPlan,
    rank: &RankPlan,
    options: EngineOptions,
    mtp: bool,
) -> MemoryPlan {
    let weights = weights::plan(config, rank, plan_options(options, mtp));
    let layers = cached_layers(rank, config.mtp_layer().filter(|_| mtp)).count();
    let tokens = (pages(options, plan) + padding_pages(options, plan)) * options.page_size;
    let width = config.kv_latent_width() * options.numerics.activations().size();
    let few = few_layers(config, rank);
    let (workspace, communication) = largest_workspace(config, plan, &few, &weights, options);
    MemoryPlan {
        weights: weights.bytes(),
        cache: (tokens * layers * width) as u64,
        workspace,
        communication,
    }
}

/// The rank with a few of its layers, dense and sparse ones: layers of a kind are alike, so that the
/// workspace of a few is that of all.
fn few_layers(config: &ModelConfig, rank: &RankPlan) -> RankPlan {
    let std::ops::Range { start, end } = rank.layers.clone();
    let dense = config.first_k_dense_replace.clamp(start, end);
    let first = dense.saturating_sub(2).max(start);
    RankPlan { layers: first..(dense + 3).min(end), ..rank.clone() }
}

/// Bytes of the largest prefill step, a full chunk at the end of the longest context: scratch,
/// inputs and outputs, and of the scratch what collectives use.
fn largest_workspace(
    config: &ModelConfig,
    plan: &ParallelPlan,
    rank: &RankPlan,
    weights: &WeightPlan,
    options: EngineOptions,
) -> (u64, u64) {
    let tokens = options.prefill_chunk.min(options.max_model_len);
    let sizes = Sizes::of(config, plan, options);
    let split = micro_batches(options.overlap, tokens);
    let tokens = sizes.filled_up(tokens_of(0, split, tokens));
    let shape = sizes.shape(Part {
        tokens,
        sequences: 1 + usize::from(sizes.fills_up()),
        logit_rows: 1,
        form: Form::Expanded { keys: options.max_model_len.max(tokens) },
        expert_tokens: tokens * plan.options().data,
    });
    let key = ProgramKey { module: Module::Main, shapes: vec![shape; split] };
    let inputs = ModelInputs { config, numerics: options.numerics, rank, weights };
    // Without fused ops, whatever the device has: they only take values away.
    let Some((graph, schedule)) = plan_program(inputs, &key, &|_| false) else { return (0, 0) };
    let host = graph
        .values()
        .iter()
        .filter(|v| matches!(v.source, Source::Output(..) | Source::Input(..)));
    let communication = communication(&graph).min(schedule.arena.size);
    let scratch = schedule.arena.size - communication;
    (scratch + host.map(|v| v.desc.bytes()).sum::<u64>(), communication)
}

/// The most bytes of scratch that collectives send from or receive into and that live at once.
fn communication(graph: &Graph) -> u64 {
    let mut lives: HashMap<_, (usize, usize, bool)> = HashMap::new();
    graph.visit(|node, _, slot| {
        if graph.value(slot.value).source == Source::Scratch {
            let sent = matches!(graph.nodes()[node].work, Work::Collectives { .. });
            let life = lives.entry(slot.value).or_insert((node, node, false));
            (life.1, life.2) = (node, life.2 || sent);
        }
    });
    let mut changes: Vec<(usize, i64)> = Vec::new();
    for (value, (first, last, sent)) in lives {
        if sent {
            let bytes = graph.value(value).desc.bytes() as i64;
            changes.extend([(2 * first, bytes), (2 * last + 1, -bytes)]);
        }
    }
    changes.sort_unstable();
    let mut live = 0;
    let peak = changes.iter().map(|(_, change)| {
        live += change;
        live
    });
    peak.max().unwrap_or(0) as u64
}

/// The largest context and the most sequences that fit where `options` may not.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Fitting {
    /// The longest sequence, with as many sequences as asked for; 0 if none fits.
    pub max_model_len: usize,
    /// The most sequences, each as long as asked for; 0 if none fits.
    pub max_sequences: usize,
}

/// Searches for the largest settings that fit `capacity` bytes on every die.
pub fn fitting(
    config: &ModelConfig,
    plan: &ParallelPlan,
    options: EngineOptions,
    mtp: bool,
    capacity: u64,
) -> Fitting {
    let kinds = RankKinds::of(config, plan);
    let fits = |options: EngineOptions| {
        let of = |rank| of_rank(config, plan, rank, options, mtp).total() <= capacity;
        kinds.ranks.iter().all(of)
    };
    let page = options.page_size;
    let with_length = |pages: usize| fits(EngineOptions { max_model_len: pages * page, ..options });
    let with_sequences =
        |n: usize| fits(EngineOptions { max_sequences: n * plan.options().data, ..options });
    Fitting {
        max_model_len: largest(config.max_position_embeddings / page, with_length) * page,
        max_sequences: largest(1 << 16, with_sequences) * plan.options().data,
    }
}

/// The largest number up to `most` for which `fits` holds, 0 if none; `fits` holds below it.
fn largest(most: usize, fits: impl Fn(usize) -> bool) -> usize {
    let (mut low, mut high) = (0, most + 1);
    while high - low > 1 {
        let middle = low + (high - low) / 2;
        if fits(middle) { low = middle } else { high = middle }
    }
    low
}

/// Refuses what does not fit, with the sizes and the largest settings that would.
pub(super) fn refuse_if_too_large(
    config: &ModelConfig,
    plan: &ParallelPlan,
    options: EngineOptions,
    mtp: bool,
    memory: &[MemoryPlan],
    free: &[(hal::DeviceId, u64)],
) -> Result<(), EngineError> {
    let short = memory.iter().zip(free).find(|(m, (_, free))| m.total() > *free);
    let Some((needed, &(device, capacity))) = short else { return Ok(()) };
    let least = free.iter().map(|(_, free)| *free).min().unwrap_or(capacity);
    let fitting = fitting(config, plan, options, mtp, least);
    let advice = match (fitting.max_model_len, fitting.max_sequences) {
        (0, _) => "the weights alone need more memory or more dies".to_string(),
        (tokens, 0) => format!("the longest context that fits is {tokens} tokens"),
        (tokens, sequences) => format!(
            "the longest context that fits is {tokens} tokens, or {sequences} sequences of {} tokens",
            options.max_model_len
        ),
    };
    Err(EngineError::DoesNotFit {
        device,
        weights: needed.weights,
        cache: needed.cache,
        workspace: needed.workspace + needed.communication,
        total: needed.total(),
        capacity,
        max_model_len: options.max_model_len,
        advice,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Preset;
    use crate::engine::Overlap;
    use crate::plan::ParallelOptions;

    #[test]
    fn the_workspace_of_a_few_layers_is_that_of_all_and_every_rank_is_like_its_kind() {
        let config = Preset::DeepSeekV3.config();
        let base = ParallelOptions::default();
        for (parallel, overlap) in [
            (ParallelOptions { tensor: 32, ..base }, Overlap::None),
            (ParallelOptions { tensor: 3, pipeline: 2, ..base }, Overlap::TwoBatch),
            (ParallelOptions { tensor: 4, data: 8, expert: true, ..base }, Overlap::TwoBatch),
        ] {
            let plan = ParallelPlan::new(&config, parallel).unwrap();
            let options = EngineOptions { overlap, ..EngineOptions::default() };
            let kinds = RankKinds::of(&config, &plan);
            for number in [0, plan.ranks() / 2, plan.ranks() - 1] {
                let rank = plan.rank(number);
                let weights = weights::plan(&config, &rank, plan_options(options, false));
                let few = few_layers(&config, &rank);
                assert!(few.layers.len() < rank.layers.len());
                let of = |rank| largest_workspace(&config, &plan, rank, &weights, options);
                assert_eq!(of(&few), of(&rank), "{parallel:?}, rank {number}");
                let like = &kinds.ranks[kinds.of_rank[number]];
                let theirs = weights::plan(&config, like, plan_options(options, false));
                assert_eq!(weights.bytes(), theirs.bytes(), "{parallel:?}, rank {number}");
            }
        }
    }
}

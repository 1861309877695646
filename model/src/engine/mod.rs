//! Running the model on the ranks of a plan: steps over batches of sequences, and generation.
//!
//! | part | file |
//! |---|---|
//! | setting up, and what can go wrong | this one |
//! | what a plan takes of each die's memory | `memory.rs` |
//! | what a step would be, without an engine | `preview.rs` |
//! | a rank: die, streams, weights, cache | `rank.rs` |
//! | a schedule bound to a rank's memory | `program.rs` |
//! | which tokens go together, and what the host sends | `batch.rs` |
//! | the sizes of a step | `shape.rs` |
//! | one step on all ranks | `step.rs` |
//! | failures: one origin, and everybody released | `failure.rs` |
//! | pages of the KV cache | `cache.rs` |
//! | prompt in, tokens out | `generate.rs` |

mod batch;
mod cache;
mod failure;
mod generate;
mod memory;
mod preview;
mod program;
mod rank;
mod shape;
mod step;

pub use cache::{CacheFull, PagePool, Sequence};
pub use generate::{FinishReason, Generation, GenerationOptions, Timing};
pub use memory::{Fitting, MemoryPlan, fitting, memory_plan};
pub use preview::{StepKind, preview};
pub use shape::{Part as StepPart, Sizes as StepSizes, micro_batches};
pub use step::{StepOutput, Wanted};

use crate::checkpoint::{Checkpoint, CheckpointError};
use crate::config::ModelConfig;
use crate::numerics::Numerics;
use crate::plan::{ParallelPlan, PlanError};
use crate::sampling::SamplingError;
use crate::weights::{self, LoadError, LoadProgress, Weights};
use hal::{Device, Stream};
use rank::Rank;
use std::sync::Arc;
use std::time::Duration;

/// What may hide behind what.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Overlap {
    /// Collectives hide behind what the graph leaves independent of them, and no more.
    #[default]
    None,
    /// A step's tokens go through the model in two halves; the collectives of one hide behind the
    /// computation of the other.
    TwoBatch,
}

/// How an engine is set up.
#[derive(Clone, Copy, Debug)]
pub struct EngineOptions {
    /// The numerics policy.
    pub numerics: Numerics,
    /// The longest sequence, prompt and output together.
    pub max_model_len: usize,
    /// The most sequences at a time.
    pub max_sequences: usize,
    /// The most tokens that one prefill step takes; longer prompts go in pieces.
    pub prefill_chunk: usize,
    /// Tokens in a page of the KV cache; 64 as in FlashMLA.
    pub page_size: usize,
    /// Ids that have a token; those of a padded vocabulary beyond are never chosen. `None` for all.
    pub vocabulary: Option<usize>,
    /// Whether the MTP module is wanted, if the checkpoint has one.
    pub mtp: bool,
    /// What may hide behind what.
    pub overlap: Overlap,
    /// Whether norms and SwiGLUs run in one op with the quantisation of what they give, where the
    /// device has such ops. Results are the same to the bit.
    pub fuse: bool,
    /// Issue every command of a step by itself, rather than each rank's commands as one
    /// [`hal::CommandList`]. Values are the same; the host takes longer.
    pub enforce_eager: bool,
    /// Room for tokens that come to a rank's experts, against what balanced routing brings (the
    /// capacity factor of GShard, arXiv 2006.16668); `None` for the worst routing. A step that
    /// brings more fails: nothing is dropped.
    pub expert_capacity: Option<f64>,
    /// How long a step may take on the host before it counts as hanging.
    pub timeout: Duration,
}

impl EngineOptions {
    /// Rows of experts' buffers for each token of a tensor group; `None` for the worst routing. Each
    /// token has `num_experts_per_tok` experts somewhere, and each of the group's ranks gets its part.
    pub fn expert_rows(&self, config: &ModelConfig, plan: &ParallelPlan) -> Option<f64> {
        let own = config.num_experts_per_tok as f64 / plan.options().tensor as f64;
        self.expert_capacity.map(|factor| own * factor)
    }
}

impl Default for EngineOptions {
    fn default() -> Self {
        EngineOptions {
            numerics: Numerics::Fp8,
            max_model_len: 4096,
            max_sequences: 1,
            prefill_chunk: 512,
            page_size: 64,
            vocabulary: None,
            mtp: false,
            overlap: Overlap::None,
            fuse: true,
            enforce_eager: false,
            expert_capacity: None,
            timeout: Duration::from_secs(600),
        }
    }
}

/// Why the engine cannot do what it is asked.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum EngineError {
    /// The checkpoint.
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    /// Loading the weights.
    #[error(transparent)]
    Load(#[from] LoadError),
    /// The device.
    #[error(transparent)]
    Device(#[from] hal::Error),
    /// The plan, for the machine at hand.
    #[error(transparent)]
    Plan(#[from] PlanError),
    /// A rank did not finish a step in time.
    #[error("the step did not end within {after:?}: {device} is behind: {pending}")]
    Hangs {
        /// The die whose commands hold up the others.
        device: hal::DeviceId,
        /// How long the engine was ready to wait.
        after: Duration,
        /// Its oldest unfinished command, and what it waits for.
        pending: String,
    },
    /// Sampling.
    #[error(transparent)]
    Sampling(#[from] SamplingError),
    /// An empty prompt.
    #[error("the prompt is empty; it needs at least one token")]
    EmptyPrompt,
    /// A token that the model does not have.
    #[error(
        "token id {id} at position {position} is out of range: the vocabulary has {vocabulary} ids"
    )]
    TokenOutOfRange {
        /// The id.
        id: u32,
        /// Where it stands in the prompt.
        position: usize,
        /// Size of the model's vocabulary.
        vocabulary: usize,
    },
    /// More tokens than the context has room for.
    #[error(
        "a sequence of {tokens} tokens does not fit the context of {limit} tokens; shorten the prompt{hint}"
    )]
    ContextFull {
        /// Tokens needed.
        tokens: usize,
        /// Tokens that fit.
        limit: usize,
        /// What else would help.
        hint: &'static str,
    },
    /// The context asked for is longer than the model's.
    #[error("a context of {asked} tokens exceeds the model's {limit} (max_position_embeddings)")]
    ContextTooLong {
        /// Tokens asked for.
        asked: usize,
        /// The model's limit.
        limit: usize,
    },
    /// The model and its cache do not fit the device.
    #[error(
        "the model does not fit on {device}: weights {weights} bytes + KV cache {cache} bytes ({max_model_len} tokens) + workspace {workspace} bytes = {total} of {capacity} bytes; {advice}"
    )]
    DoesNotFit {
        /// The die.
        device: hal::DeviceId,
        /// Bytes of weights.
        weights: u64,
        /// Bytes of KV cache.
        cache: u64,
        /// Bytes of workspace.
        workspace: u64,
        /// Their sum.
        total: u64,
        /// Bytes the device has free.
        capacity: u64,
        /// Tokens that the cache was to hold.
        max_model_len: usize,
        /// The largest setting that fits, in words.
        advice: String,
    },
    /// The KV cache has no free page.
    #[error(transparent)]
    CacheFull(#[from] CacheFull),
    /// The device computes no values.
    #[error("the device computes no values (timing only), so there are no tokens to choose from")]
    NoValues,
    /// MTP was asked of a model that has none.
    #[error("the checkpoint has no MTP layer")]
    NoMtp,
}

/// The model on its dies.
#[derive(Debug)]
pub struct Engine {
    config: ModelConfig,
    options: EngineOptions,
    plan: ParallelPlan,
    ranks: Vec<Rank>,
    /// Of each data rank.
    pools: Vec<PagePool>,
    cache_pages: usize,
    memory: Vec<MemoryPlan>,
    read_bytes: u64,
    has_mtp: bool,
}

impl Engine {
    /// Loads the model on one die.
    ///
    /// # Errors
    ///
    /// As [`Engine::load_on`].
    pub fn load(
        device: Arc<dyn Device>,
        checkpoint: &Checkpoint,
        options: EngineOptions,
        progress: &mut dyn FnMut(LoadProgress),
    ) -> Result<Engine, EngineError> {
        let plan = ParallelPlan::single(checkpoint.config());
        Engine::load_on(vec![device], plan, checkpoint, options, progress)
    }

    /// Checks that everything is there and fits, then loads the weights. Rank `r` of the plan is on
    /// `devices[r]`; further devices are left alone.
    ///
    /// # Errors
    ///
    /// [`EngineError`]; nothing stays allocated.
    pub fn load_on(
        devices: Vec<Arc<dyn Device>>,
        plan: ParallelPlan,
        checkpoint: &Checkpoint,
        options: EngineOptions,
        progress: &mut dyn FnMut(LoadProgress),
    ) -> Result<Engine, EngineError> {
        let config = checkpoint.config().clone();
        let has_mtp = options.mtp && checkpoint.has_mtp()?;
        checkpoint.verify()?;
        let mut engine = Engine::unloaded(&devices, plan, config, options, has_mtp)?;
        let planned = |number: usize, device: Arc<dyn Device>| {
            let rank = engine.plan.rank(number);
            let weights =
                weights::plan(&engine.config, &rank, memory::plan_options(options, has_mtp));
            (device, rank, weights)
        };
        let devices = devices.into_iter().take(engine.plan.ranks()).enumerate();
        let ranks: Vec<_> = devices.map(|(number, device)| planned(number, device)).collect();
        let loaded =
            weights::load(&ranks, checkpoint, memory::plan_options(options, has_mtp), progress)?;
        engine.read_bytes = loaded.iter().map(|w| w.read_bytes).sum();
        engine.populate(ranks.into_iter().zip(loaded).map(|((d, r, p), w)| (d, r, p, w)))?;
        Ok(engine)
    }

    /// An engine whose weights are allocated and not loaded: for devices that compute no values, where
    /// steps have times and nothing else.
    ///
    /// # Errors
    ///
    /// As [`Engine::load_on`].
    pub fn timing_only(
        devices: Vec<Arc<dyn Device>>,
        plan: ParallelPlan,
        config: ModelConfig,
        options: EngineOptions,
    ) -> Result<Engine, EngineError> {
        let has_mtp = options.mtp && config.mtp_layer().is_some();
        let mut engine = Engine::unloaded(&devices, plan, config, options, has_mtp)?;
        let mut ranks = Vec::with_capacity(engine.plan.ranks());
        for (number, device) in devices.into_iter().take(engine.plan.ranks()).enumerate() {
            let rank = engine.plan.rank(number);
            let plan = weights::plan(&engine.config, &rank, memory::plan_options(options, has_mtp));
            let weights = weights::allocate(&device, &plan)?;
            ranks.push((device, rank, plan, weights));
        }
        engine.populate(ranks.into_iter())?;
        Ok(engine)
    }

    /// Checks the plan against the devices, the context and the memory.
    fn unloaded(
        devices: &[Arc<dyn Device>],
        plan: ParallelPlan,
        config: ModelConfig,
        options: EngineOptions,
        has_mtp: bool,
    ) -> Result<Engine, EngineError> {
        if options.max_model_len > config.max_position_embeddings {
            return Err(EngineError::ContextTooLong {
                asked: options.max_model_len,
                limit: config.max_position_embeddings,
            });
        }
        if plan.ranks() > devices.len() {
            return Err(PlanError::too_many_ranks(plan.options(), devices.len()).into());
        }
        let memory = memory_plan(&config, &plan, options, has_mtp);
        let mut free = Vec::with_capacity(plan.ranks());
        for device in &devices[..plan.ranks()] {
            free.push((device.properties().id, device.memory_info()?.free()));
        }
        memory::refuse_if_too_large(&config, &plan, options, has_mtp, &memory, &free)?;
        let pages = memory::pages(options, &plan);
        let padding = memory::padding_pages(options, &plan);
        let pool = || PagePool::new(pages, padding, options.page_size);
        let pools = (0..plan.options().data).map(|_| pool()).collect();
        let cache_pages = pages + padding;
        Ok(Engine {
            config,
            options,
            plan,
            ranks: Vec::new(),
            pools,
            cache_pages,
            memory,
            read_bytes: 0,
            has_mtp,
        })
    }

    /// Sets up the ranks around their weights and connects them.
    fn populate(
        &mut self,
        ranks: impl Iterator<
            Item = (Arc<dyn Device>, crate::plan::RankPlan, weights::WeightPlan, Weights),
        >,
    ) -> Result<(), EngineError> {
        let mtp = self.config.mtp_layer().filter(|_| self.has_mtp);
        for (device, rank, weight_plan, weights) in ranks {
            let mut rank = Rank::new(device, rank, weight_plan, weights)?;
            rank.allocate_cache(&self.config, self.options, self.cache_pages, mtp)?;
            self.ranks.push(rank);
        }
        rank::connect(&mut self.ranks, &self.plan)?;
        Ok(())
    }

    /// The configuration.
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// The set-up.
    pub fn options(&self) -> &EngineOptions {
        &self.options
    }

    /// Who holds what.
    pub fn plan(&self) -> &ParallelPlan {
        &self.plan
    }

    /// The dies, by rank.
    pub fn devices(&self) -> impl Iterator<Item = &Arc<dyn Device>> {
        self.ranks.iter().map(|rank| &rank.device)
    }

    /// The streams that the ranks have opened so far, by rank.
    pub fn streams(&self) -> impl Iterator<Item = &Arc<dyn Stream>> {
        self.ranks.iter().flat_map(|rank| &rank.lanes)
    }

    /// What each rank takes of its die's memory.
    pub fn memory(&self) -> &[MemoryPlan] {
        &self.memory
    }

    /// Whether the MTP module is loaded.
    pub fn has_mtp(&self) -> bool {
        self.has_mtp
    }

    /// Bytes of the checkpoint that were read, all ranks together.
    pub fn read_bytes(&self) -> u64 {
        self.read_bytes
    }

    /// Whether the devices compute values.
    fn is_functional(&self) -> bool {
        self.ranks.iter().all(|rank| rank.device.properties().functional)
    }

    /// Ids that have a token.
    fn vocabulary(&self) -> usize {
        shape::vocabulary(&self.config, self.options)
    }
}

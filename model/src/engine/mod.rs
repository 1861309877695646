//! Running the model on a die: steps over batches of sequences, and generation.

mod cache;
mod generate;
mod program;
mod step;

pub use cache::{CacheFull, PagedCache, Sequence};
pub use generate::{FinishReason, Generation, GenerationOptions, Timing};
pub use step::{StepOutput, Wanted};

use crate::checkpoint::{Checkpoint, CheckpointError};
use crate::config::ModelConfig;
use crate::numerics::Numerics;
use crate::sampling::SamplingError;
use crate::weights::{self, LoadError, LoadProgress, PlanOptions, WeightKey, WeightSpec, Weights};
use hal::{Buffer, Device, Stream};
use program::{Program, ProgramKey};
use serde::Serialize;
use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

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
    /// How long a step may take on the host before it counts as hanging.
    pub timeout: Duration,
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

/// What an engine takes of the device's memory, in bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct MemoryPlan {
    /// Weights.
    pub weights: u64,
    /// KV cache.
    pub cache: u64,
    /// Scratch of the largest step.
    pub workspace: u64,
}

impl MemoryPlan {
    /// The sum.
    pub const fn total(&self) -> u64 {
        self.weights + self.cache + self.workspace
    }
}

/// The model on a die.
#[derive(Debug)]
pub struct Engine {
    device: Arc<dyn Device>,
    stream: Arc<dyn Stream>,
    config: ModelConfig,
    options: EngineOptions,
    specs: HashMap<WeightKey, WeightSpec>,
    weights: Weights,
    cache: PagedCache,
    workspace: Option<Buffer>,
    programs: HashMap<ProgramKey, Program>,
    memory: MemoryPlan,
    has_mtp: bool,
}

impl Engine {
    /// Checks that everything is there and fits, then loads the weights.
    ///
    /// # Errors
    ///
    /// [`EngineError`]; nothing stays allocated.
    pub fn load(
        device: Arc<dyn Device>,
        checkpoint: &Checkpoint,
        options: EngineOptions,
        progress: &mut dyn FnMut(LoadProgress),
    ) -> Result<Engine, EngineError> {
        let config = checkpoint.config().clone();
        if options.max_model_len > config.max_position_embeddings {
            return Err(EngineError::ContextTooLong {
                asked: options.max_model_len,
                limit: config.max_position_embeddings,
            });
        }
        let has_mtp = options.mtp && checkpoint.has_mtp()?;
        checkpoint.verify()?;
        let plan_options = PlanOptions {
            numerics: options.numerics,
            mtp: has_mtp,
            positions: options.max_model_len,
        };
        let plan = weights::plan(&config, plan_options);
        let by_key: HashMap<_, _> = plan.iter().map(|s| (s.key, s.clone())).collect();
        let memory = memory_plan(&config, &by_key, options, has_mtp);
        refuse_if_too_large(&*device, memory, options)?;
        let weights = weights::load(&device, checkpoint, &plan, progress)?;
        let stream = device.stream("compute")?;
        let layers = config.num_hidden_layers + usize::from(has_mtp);
        let cache = PagedCache::new(&*stream, &config, options, layers)?;
        Ok(Engine {
            device,
            stream,
            config,
            options,
            specs: by_key,
            weights,
            cache,
            workspace: None,
            programs: HashMap::new(),
            memory,
            has_mtp,
        })
    }

    /// The configuration.
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// The set-up.
    pub fn options(&self) -> &EngineOptions {
        &self.options
    }

    /// The die.
    pub fn device(&self) -> &Arc<dyn Device> {
        &self.device
    }

    /// What it takes of the die's memory.
    pub fn memory(&self) -> MemoryPlan {
        self.memory
    }

    /// Whether the MTP module is loaded.
    pub fn has_mtp(&self) -> bool {
        self.has_mtp
    }

    /// Bytes of the checkpoint that were read.
    pub fn read_bytes(&self) -> u64 {
        self.weights.read_bytes
    }
}

/// Bytes of a token in the KV cache, all layers together.
fn cache_bytes_per_token(config: &ModelConfig, numerics: Numerics, mtp: bool) -> u64 {
    let layers = config.num_hidden_layers + usize::from(mtp);
    (layers * config.kv_latent_width() * numerics.activations().size()) as u64
}

/// Adds up weights, cache, and the workspace of the largest prefill step.
fn memory_plan(
    config: &ModelConfig,
    specs: &HashMap<WeightKey, WeightSpec>,
    options: EngineOptions,
    mtp: bool,
) -> MemoryPlan {
    let pages = cache::pages(options) as u64;
    MemoryPlan {
        weights: specs.values().map(WeightSpec::bytes).sum(),
        cache: pages
            * options.page_size as u64
            * cache_bytes_per_token(config, options.numerics, mtp),
        workspace: program::largest_workspace(config, specs, options),
    }
}

fn refuse_if_too_large(
    device: &dyn Device,
    plan: MemoryPlan,
    options: EngineOptions,
) -> Result<(), EngineError> {
    let capacity = device.memory_info()?.free();
    if plan.total() <= capacity {
        return Ok(());
    }
    let fixed = plan.weights + plan.workspace;
    let per_token = plan.cache / (options.max_model_len * options.max_sequences).max(1) as u64;
    let fitting = capacity.saturating_sub(fixed) / per_token.max(1) / options.max_sequences as u64;
    let advice = match fitting / options.page_size as u64 * options.page_size as u64 {
        0 => "the weights alone need more memory or more dies".to_string(),
        tokens => format!("the longest context that fits is {tokens} tokens"),
    };
    Err(EngineError::DoesNotFit {
        device: device.properties().id,
        weights: plan.weights,
        cache: plan.cache,
        workspace: plan.workspace,
        total: plan.total(),
        capacity,
        max_model_len: options.max_model_len,
        advice,
    })
}

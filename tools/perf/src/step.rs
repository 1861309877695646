//! The estimate of a step.

use crate::batch::{Module, micro_batches};
use crate::breakdown::{Breakdown, Sums};
use crate::floor::Floor;
use crate::fold::{Folded, sharers};
use crate::play::{Costs, Played, Program, play};
use crate::repeat::{self, Repeated, Shortened};
use crate::routing::{Loads, RoutingError};
use crate::trace::{TracedRank, Watch};
use crate::workload::{Phase, Workload};
use hal::trace::TraceSink;
use hal::{DeviceId, Topology};
use model::config::ModelConfig;
use model::engine::EngineOptions;
use model::plan::{ParallelOptions, ParallelPlan};
use model::weights::{self, PlanOptions};
use serde::Serialize;
use sim::Machine;
use sim::cost::{CostModel, TileModel};

/// A machine that is asked about steps. What one question has worked out, the next one reuses.
#[derive(Debug)]
pub struct Estimator {
    machine: Machine,
    topology: Topology,
    model: TileModel,
}

/// What is played once for all that are alike. Times are the same to the picosecond either way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Folding {
    /// One rank of each kind.
    pub ranks: bool,
    /// One layer of each kind, once they repeat.
    pub layers: bool,
}

impl Default for Folding {
    fn default() -> Self {
        Folding { ranks: true, layers: true }
    }
}

/// Why a step has no time.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum PerfError {
    /// The machine cannot be that large.
    #[error("{0}")]
    Machine(String),
    /// Nothing to do, or less.
    #[error("{what} is {value}; expected {expected}")]
    Size {
        /// Which setting.
        what: &'static str,
        /// Its value.
        value: String,
        /// What would do.
        expected: String,
    },
    /// MTP was asked of a model that has none.
    #[error("the model has no MTP layer (num_nextn_predict_layers is 0)")]
    NoMtp,
    /// Routing.
    #[error(transparent)]
    Routing(#[from] RoutingError),
    /// More than a die's memory.
    #[error(
        "rank {rank} needs {needed_gib:.1} GiB (weights {weights_gib:.1}, KV cache {cache_gib:.1}, \
         workspace {workspace_gib:.1}), and a die of {machine} has {capacity_gib:.1} GiB; {advice}"
    )]
    DoesNotFit {
        /// The rank with the most.
        rank: usize,
        /// The machine.
        machine: String,
        /// All of it.
        needed_gib: f64,
        /// Weights.
        weights_gib: f64,
        /// KV cache.
        cache_gib: f64,
        /// Scratch, inputs and outputs of the step.
        workspace_gib: f64,
        /// What there is.
        capacity_gib: f64,
        /// What would fit.
        advice: String,
    },
}

impl PerfError {
    /// Where the text has a step's own sizes: what is the same for all steps that fail alike.
    pub(crate) fn short(&self) -> Option<String> {
        let PerfError::DoesNotFit { machine, capacity_gib, weights_gib, .. } = self else {
            return None;
        };
        let what = match weights_gib > capacity_gib {
            true => "the weights alone do",
            false => "weights, KV cache and workspace together do",
        };
        Some(format!("{what} not fit in the {capacity_gib:.1} GiB of a die of {machine}"))
    }
}

/// What a step takes of a die.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Memory {
    /// Bytes of weights.
    pub weights: u64,
    /// Bytes of KV cache.
    pub cache: u64,
    /// Bytes of scratch, inputs and outputs.
    pub workspace: u64,
}

impl Memory {
    /// The sum.
    pub const fn total(&self) -> u64 {
        self.weights + self.cache + self.workspace
    }
}

/// How long a step takes.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Estimate {
    /// Milliseconds of the step, what the host does between two steps included.
    pub step_ms: f64,
    /// Of a decode step: milliseconds for each token that a sequence gets.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tpot_ms: Option<f64>,
    /// Of a prefill step: milliseconds until the first token.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ttft_ms: Option<f64>,
    /// Tokens per second of all data ranks: prompt tokens taken in, or tokens generated.
    pub tokens_per_s: f64,
    /// The same for each die.
    pub tokens_per_s_per_die: f64,
    /// Of a decode step: what one sequence gets.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tokens_per_s_per_user: Option<f64>,
    /// Dies of the plan.
    pub dies: usize,
    /// Bytes that the fullest die holds.
    pub memory_bytes_per_die: u64,
    /// The same in parts.
    pub memory: Memory,
    /// Where the time goes.
    pub breakdown: Breakdown,
    /// The part of communication that hides behind computation.
    pub communication_hidden_share: f64,
    /// What no schedule beats.
    pub floor: Floor,
    /// The larger of the floors.
    pub floor_ms: f64,
    /// The most loaded rank's routed tokens against the mean.
    pub expert_imbalance: f64,
    /// Picoseconds from the end of one step of the engine to the end of the next.
    pub picos: u64,
    /// Ranks and commands that were played.
    pub played: PlayedSize,
}

/// How much was played.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct PlayedSize {
    /// Ranks.
    pub ranks: usize,
    /// Commands of all of them.
    pub commands: usize,
}

/// A module's part of a step.
struct Part {
    programs: Vec<Program>,
    played: Played,
    /// Of each program, what stands for more than itself.
    repeated: Vec<Vec<Repeated>>,
    /// When the last command ended, all layers counted.
    end: u64,
}

/// A step that is to be played, and how.
struct OneStep<'a> {
    plan: &'a ParallelPlan,
    options: &'a EngineOptions,
    workload: &'a Workload,
    costs: &'a Costs<'a>,
    folding: Folding,
}

/// A step that was played.
struct Stepped {
    loads: Loads,
    folded: Folded,
    parts: Vec<Part>,
    memory: Memory,
}

impl OneStep<'_> {
    fn part(
        &self,
        module: Module,
        folded: &Folded,
        watch: Option<&mut Watch>,
    ) -> Result<Part, PerfError> {
        let OneStep { plan, options, workload, costs, folding } = *self;
        let config = costs.config;
        let batches: Vec<_> = micro_batches(config, plan, options, workload, module)
            .into_iter()
            .map(|m| (m.shape, m.work))
            .collect();
        let programs = |ranks: &mut dyn Iterator<Item = model::plan::RankPlan>| {
            ranks
                .map(|rank| Program::new(config, options, rank, module, &batches))
                .collect::<Option<Vec<_>>>()
                .ok_or(PerfError::NoMtp)
        };
        if folding.layers && module == Module::Main {
            let short: Vec<Shortened> =
                folded.ranks.iter().map(|rank| repeat::shorten(config, rank)).collect();
            if short.iter().any(|s| s.left_out != [0, 0]) {
                let programs = programs(&mut short.iter().map(|s| s.rank.clone()))?;
                let left_out: Vec<_> = short.iter().map(|s| s.left_out).collect();
                // What is traced has all layers.
                let played = play(&programs, folded, costs, None);
                if let Some(repeated) = repeat::find(config, &programs, &left_out, &played) {
                    // Stages come one after the other: each adds its layers' time once.
                    let stages = plan.stages().len();
                    let of_stage = |stage| {
                        let member = programs.iter().position(|p| p.rank.stage.rank == stage);
                        member.map_or(0, |m| repeated[m].iter().map(Repeated::picos).sum::<u64>())
                    };
                    let end = played.end + (0..stages).map(of_stage).sum::<u64>();
                    return Ok(Part { programs, played, repeated, end });
                }
            }
        }
        let programs = programs(&mut folded.ranks.iter().cloned())?;
        let played = play(&programs, folded, costs, watch);
        let (repeated, end) = (vec![Vec::new(); programs.len()], played.end);
        Ok(Part { programs, played, repeated, end })
    }
}

impl Estimator {
    /// An estimator of steps over so many dies of a machine, which gets as many hosts as that takes.
    ///
    /// # Errors
    ///
    /// [`PerfError::Machine`] where hosts are not joined.
    pub fn new(machine: &Machine, dies: usize) -> Result<Self, PerfError> {
        let count = u32::try_from(dies).unwrap_or(u32::MAX);
        let machine = machine.enlarged(count).map_err(PerfError::Machine)?;
        Ok(Estimator { topology: machine.topology(), model: TileModel::new(&machine), machine })
    }

    /// The machine.
    pub fn machine(&self) -> &Machine {
        &self.machine
    }

    /// Its dies and links.
    pub fn topology(&self) -> &Topology {
        &self.topology
    }

    /// How long a step takes.
    ///
    /// Of `options`, the numerics, the overlap, fusion, eager issue and the page size count; the
    /// context and the number of sequences are the workload's.
    ///
    /// # Errors
    ///
    /// [`PerfError`]: sizes that make no step, a plan that does not fit.
    pub fn step(
        &self,
        config: &ModelConfig,
        plan: &ParallelPlan,
        options: &EngineOptions,
        workload: &Workload,
        folding: Folding,
    ) -> Result<Estimate, PerfError> {
        let stepped = self.stepped(config, plan, options, workload, folding, None)?;
        Ok(self.estimate(config, plan, options, workload, &stepped))
    }

    /// Gives `sink` every command of the step, as a device would that was traced: each layer, and one
    /// rank of each kind or, with `all_ranks`, all. Returns the ranks. Times begin at 0, and are those
    /// of [`Estimator::step`]; of collectives of which only one rank is played, one span is given.
    ///
    /// # Errors
    ///
    /// As [`Estimator::step`]; then `sink` is given nothing.
    pub fn trace(
        &self,
        config: &ModelConfig,
        plan: &ParallelPlan,
        options: &EngineOptions,
        workload: &Workload,
        all_ranks: bool,
        sink: &dyn TraceSink,
    ) -> Result<Vec<TracedRank>, PerfError> {
        let folding = Folding { ranks: !all_ranks, layers: false };
        let mut watch = Watch::default();
        let Stepped { folded, .. } =
            self.stepped(config, plan, options, workload, folding, Some(&mut watch))?;
        watch.give(sink);
        let told = folded.ranks.iter().map(|rank| TracedRank {
            rank: rank.rank,
            placement: self.topology.placement(DeviceId(rank.rank as u32)).unwrap_or_default(),
            stands_for: folded.weight(folded.of_rank[rank.rank]),
        });
        Ok(told.collect())
    }

    fn costs<'a>(
        &'a self,
        config: &'a ModelConfig,
        options: &EngineOptions,
        loads: &'a Loads,
    ) -> Costs<'a> {
        let eager = options.enforce_eager;
        Costs { config, model: &self.model, topology: &self.topology, loads, eager }
    }

    fn stepped(
        &self,
        config: &ModelConfig,
        plan: &ParallelPlan,
        options: &EngineOptions,
        workload: &Workload,
        folding: Folding,
        mut watch: Option<&mut Watch>,
    ) -> Result<Stepped, PerfError> {
        self.check(config, plan, workload)?;
        let options = EngineOptions {
            max_model_len: workload.longest(),
            max_sequences: workload.sequences() * plan.options().data,
            ..*options
        };
        let loads = workload.routing.loads(config, plan)?;
        let folded = match folding.ranks {
            true => Folded::new(config, plan, &self.topology, sharers(&self.machine), &loads),
            false => Folded::none(plan),
        };
        let costs = self.costs(config, &options, &loads);
        let step = OneStep { plan, options: &options, workload, costs: &costs, folding };
        let mut parts = vec![step.part(Module::Main, &folded, watch.as_deref_mut())?];
        if workload.drafts() {
            if let Some(watch) = &mut watch {
                watch.next_part(parts[0].end + self.model.host_sync());
            }
            let last = plan.stages().len() - 1;
            let ends = Folded {
                ranks: folded.ranks.iter().filter(|r| r.stage.rank == last).cloned().collect(),
                of_rank: folded.of_rank.clone(),
            };
            parts.push(step.part(Module::Mtp, &ends, watch)?);
        }
        let memory = self.memory(config, &options, workload, &folded, &parts)?;
        Ok(Stepped { loads, folded, parts, memory })
    }

    fn check(
        &self,
        config: &ModelConfig,
        plan: &ParallelPlan,
        workload: &Workload,
    ) -> Result<(), PerfError> {
        let positive = |what, value: usize| match value {
            0 => Err(PerfError::Size { what, value: "0".into(), expected: "at least 1".into() }),
            _ => Ok(()),
        };
        match workload.phase {
            Phase::Prefill { batch, input_len, .. } => {
                positive("batch", batch)?;
                positive("input-len", input_len)?;
            }
            Phase::Decode { batch, kv } => {
                positive("batch", batch)?;
                positive("kv", kv)?;
            }
        }
        // Sizes of tensors are 32 bits; far below that, a batch is a slip of the keyboard.
        let most = 1 << 24;
        let tokens = workload.tokens();
        if tokens * plan.options().data as f64 > f64::from(most) {
            let expected = format!("at most {most} over all data ranks");
            return Err(PerfError::Size {
                what: "the number of a step's tokens",
                value: tokens.to_string(),
                expected,
            });
        }
        let (longest, limit) = (workload.longest(), config.max_position_embeddings);
        if longest > limit {
            let expected = format!("at most {limit} tokens, the model's context");
            return Err(PerfError::Size {
                what: "the length of a sequence",
                value: longest.to_string(),
                expected,
            });
        }
        if !(0.0..=1.0).contains(&workload.acceptance) {
            let (value, expected) = (workload.acceptance.to_string(), "0 to 1".into());
            return Err(PerfError::Size { what: "acceptance", value, expected });
        }
        if workload.mtp && config.mtp_layer().is_none() {
            return Err(PerfError::NoMtp);
        }
        Ok(())
    }

    /// What the fullest die holds, or why it cannot.
    fn memory(
        &self,
        config: &ModelConfig,
        options: &EngineOptions,
        workload: &Workload,
        folded: &Folded,
        parts: &[Part],
    ) -> Result<Memory, PerfError> {
        let pages = options.max_model_len.div_ceil(options.page_size) * workload.sequences();
        let width = config.kv_latent_width() * options.numerics.activations().size();
        let of = |kind: usize| {
            let rank = &folded.ranks[kind];
            let (numerics, mtp) = (options.numerics, workload.mtp);
            let planned = PlanOptions { numerics, mtp, positions: options.max_model_len };
            let layers = rank.layers.len() + usize::from(mtp && rank.is_last_stage());
            let steps = parts.iter().flat_map(|part| &part.programs);
            let own = steps.filter(|program| program.rank.rank == rank.rank);
            Memory {
                weights: weights::plan(config, rank, planned).bytes(),
                cache: (pages * options.page_size * layers * width) as u64,
                workspace: own.map(Program::workspace).max().unwrap_or(0),
            }
        };
        let kinds = (0..folded.ranks.len()).map(|kind| (kind, of(kind)));
        let (kind, most) = kinds.max_by_key(|(_, m)| m.total()).unwrap_or_default();
        let capacity = self.machine.memory_bytes();
        if most.total() <= capacity {
            return Ok(most);
        }
        let gib = |bytes: u64| bytes as f64 / f64::from(1 << 30);
        let fixed = most.weights + most.workspace;
        let each = most.cache / workload.sequences() as u64;
        let advice = match capacity.checked_sub(fixed).map(|left| left / each.max(1)) {
            None if most.weights > capacity => {
                // No plan needs fewer: it holds each weight at least once.
                let one = ParallelPlan::new(config, ParallelOptions::default());
                let planned = PlanOptions {
                    numerics: options.numerics,
                    mtp: workload.mtp,
                    positions: options.max_model_len,
                };
                let whole = one.map_or(0, |p| weights::plan(config, &p.rank(0), planned).bytes());
                let least = whole.div_ceil(capacity).max(folded.of_rank.len() as u64 + 1);
                format!("the weights alone do not fit: spread them over at least {least} dies")
            }
            None => "the workspace does not fit beside the weights: fewer tokens a step".into(),
            Some(0) => {
                "not even one sequence of this length fits: a shorter one, or more dies".into()
            }
            Some(fit) => format!("about {fit} sequences of this length fit on each data rank"),
        };
        Err(PerfError::DoesNotFit {
            rank: folded.ranks[kind].rank,
            machine: self.machine.name.clone(),
            needed_gib: gib(most.total()),
            weights_gib: gib(most.weights),
            cache_gib: gib(most.cache),
            workspace_gib: gib(most.workspace),
            capacity_gib: gib(capacity),
            advice,
        })
    }

    fn estimate(
        &self,
        config: &ModelConfig,
        plan: &ParallelPlan,
        options: &EngineOptions,
        workload: &Workload,
        stepped: &Stepped,
    ) -> Estimate {
        let Stepped { loads, folded, parts, memory } = stepped;
        let costs = &self.costs(config, options, loads);
        let (issue, sync) = (self.model.host_issue(), self.model.host_sync());
        let between = (self.machine.launch.step_us.value * 1e6) as u64;
        let mut sums = Sums::default();
        let mut floor = Floor::default();
        for part in parts {
            let mut most = Floor::default();
            for (at, program) in part.programs.iter().enumerate() {
                let weight = folded.weight(folded.of_rank[program.rank.rank]) as f64;
                let repeated = &part.repeated[at];
                sums.add(config, program, &part.played.runs[at], repeated, weight);
                most = most.max(Floor::of(&self.machine, program, repeated, costs));
            }
            floor = floor.plus(most);
        }
        let device: u64 = parts.iter().map(|part| part.end - 2 * issue).sum();
        let launches = parts.len() as u64 * (2 * issue + sync);
        let picos = device + launches;
        let seconds = (picos + between) as f64 * 1e-12;
        let breakdown = sums.breakdown(plan.ranks(), device, launches + between);
        let data = plan.options().data as f64;
        let tokens_per_s = workload.tokens() * data / seconds;
        let each = workload.tokens() / workload.sequences() as f64;
        let decode = matches!(workload.phase, Phase::Decode { .. });
        let dies = plan.ranks();
        Estimate {
            step_ms: seconds * 1e3,
            tpot_ms: decode.then_some(seconds * 1e3 / each),
            ttft_ms: (!decode).then_some(seconds * 1e3),
            tokens_per_s,
            tokens_per_s_per_die: tokens_per_s / dies as f64,
            tokens_per_s_per_user: decode.then_some(each / seconds),
            dies,
            memory_bytes_per_die: memory.total(),
            memory: *memory,
            communication_hidden_share: breakdown.hidden_share(),
            breakdown,
            floor,
            floor_ms: floor.ms(),
            expert_imbalance: costs.loads.most(),
            picos,
            played: PlayedSize {
                ranks: folded.ranks.len(),
                commands: parts.iter().flat_map(|p| &p.programs).map(Program::commands).sum(),
            },
        }
    }
}

//! Explaining a parallel plan: who holds what, what it takes, and what goes over the links.

use crate::cli::PlanArgs;
use crate::output::{bold, bytes, dim};
use crate::source;
use anyhow::Context;
use hal::Operand;
use model::config::ModelConfig;
use model::engine::{EngineOptions, Fitting, MemoryPlan, StepKind, fitting, memory_plan, preview};
use model::graph::{Graph, Work};
use model::plan::{Group, ParallelPlan, PlanError};
use serde::Serialize;
use serde_json::json;
use sim::Machine;
use std::collections::BTreeMap;
use std::io::Write;

/// Collectives of one kind in one step of one rank.
#[derive(Clone, Debug, Default, Serialize)]
struct Traffic {
    /// Batches.
    calls: usize,
    /// Bytes that the rank sends from, all calls together.
    bytes: u64,
}

/// What a rank does in a step, as far as links are concerned.
type Collectives = BTreeMap<(&'static str, &'static str), Traffic>;

fn collectives(graph: &Graph) -> Collectives {
    let mut all = Collectives::new();
    for node in graph.nodes() {
        let Work::Collectives { group, rank, batch } = &node.work else { continue };
        let traffic = all.entry((node.work.name(), Group::name(*group))).or_default();
        traffic.calls += 1;
        for collective in batch {
            let (send, recv) = collective.tensors(*rank);
            traffic.bytes += send.or(recv).map_or(0, |t| t.desc().bytes());
        }
    }
    all
}

pub(crate) fn run(args: &PlanArgs) -> anyhow::Result<()> {
    let config = source::config(args.config.as_deref())?;
    let machine = Machine::load(args.machine.as_deref().unwrap_or("va16"))?;
    let plan = args.parallel.plan(&config, &machine.topology())?;
    let limit = config.max_position_embeddings;
    let options = EngineOptions {
        numerics: args.numerics,
        max_model_len: args
            .max_model_len
            .unwrap_or(EngineOptions::default().max_model_len.min(limit)),
        max_sequences: args.max_num_seqs,
        prefill_chunk: args.prefill_chunk.max(1),
        overlap: args.parallel.overlap.into(),
        fuse: !args.parallel.no_fusion,
        ..EngineOptions::default()
    };
    if options.max_model_len > limit {
        return Err(model::engine::EngineError::ContextTooLong {
            asked: options.max_model_len,
            limit,
        })
        .context("--max-model-len");
    }
    let mtp = config.mtp_layer().is_some() && args.mtp;
    let step = match args.prefill {
        Some(tokens) => StepKind::Prefill { tokens },
        None => StepKind::Decode { sequences: args.batch },
    };
    if args.schedule {
        let (graph, schedule) =
            preview(&config, &plan, args.rank.min(plan.ranks() - 1), options, step);
        return Ok(write!(std::io::stdout(), "{}", schedule.dump(&graph))?);
    }
    let memory = memory_plan(&config, &plan, options, mtp);
    let capacity = machine.memory_bytes();
    let report = Report {
        config: &config,
        fitting: fitting(&config, &plan, options, mtp, capacity),
        machine: &machine,
        plan: &plan,
        options,
        step,
        memory,
        capacity,
    };
    let mut out = std::io::stdout();
    match args.json {
        true => writeln!(out, "{:#}", report.json())?,
        false => write!(out, "{}", report.text())?,
    }
    if plan.ranks() > machine.dies() as usize {
        return Err(PlanError::too_many_ranks(plan.options(), machine.dies() as usize).into());
    }
    if let Some((rank, needed)) = report.short() {
        let Fitting { max_model_len, max_sequences } = report.fitting;
        let advice = match (max_model_len, max_sequences) {
            (0, 0) => "no context fits beside the weights: spread them over more dies".to_string(),
            (length, 0) => format!("the largest --max-model-len that fits is {length}"),
            (length, sequences) => format!(
                "the largest --max-model-len that fits is {length}, or --max-num-seqs {sequences} at \
                 {} tokens",
                options.max_model_len
            ),
        };
        anyhow::bail!(
            "rank {rank} needs {}, and a die of {} has {}; {advice}",
            bytes(needed.total()),
            machine.name,
            bytes(capacity),
        );
    }
    Ok(())
}

struct Report<'a> {
    config: &'a ModelConfig,
    machine: &'a Machine,
    plan: &'a ParallelPlan,
    options: EngineOptions,
    step: StepKind,
    memory: Vec<MemoryPlan>,
    fitting: Fitting,
    capacity: u64,
}

impl Report<'_> {
    /// The first rank that does not fit.
    fn short(&self) -> Option<(usize, MemoryPlan)> {
        let needed = self.memory.iter().copied().enumerate();
        needed.into_iter().find(|(_, m)| m.total() > self.capacity)
    }

    /// One rank of each stage: those of a stage do the same.
    fn step_collectives(&self, stage: usize) -> Collectives {
        let rank = self.plan.rank_at(stage, 0, 0);
        collectives(&preview(self.config, self.plan, rank, self.options, self.step).0)
    }

    fn step_text(&self) -> String {
        match self.step {
            StepKind::Decode { sequences } => format!("a decode step of {sequences} sequences"),
            StepKind::Prefill { tokens } => format!("a prefill step of {tokens} tokens"),
        }
    }

    fn json(&self) -> serde_json::Value {
        let stages: Vec<_> = (0..self.plan.stages().len())
            .map(|stage| {
                let collectives: Vec<_> = self
                    .step_collectives(stage)
                    .into_iter()
                    .map(|((kind, group), t)| {
                        json!({"kind": kind, "group": group, "calls": t.calls, "bytes": t.bytes})
                    })
                    .collect();
                let layers = &self.plan.stages()[stage];
                json!({"layers": [layers.start, layers.end], "collectives_per_step": collectives})
            })
            .collect();
        let ranks: Vec<_> = self
            .memory
            .iter()
            .enumerate()
            .map(|(number, memory)| {
                let rank = self.plan.rank(number);
                json!({
                    "rank": number,
                    "stage": rank.stage.rank,
                    "data": rank.data.rank,
                    "tensor": rank.tensor.rank,
                    "heads": self.heads(&rank),
                    "experts": rank.experts.as_ref().map(|e| e.of_rank(rank.expert.rank).to_vec()),
                    "bytes": memory,
                    "total_bytes": memory.total(),
                })
            })
            .collect();
        json!({
            "machine": self.machine.name,
            "dies": self.machine.dies(),
            "plan": self.plan.options(),
            "ranks": ranks,
            "stages": stages,
            "max_model_len": self.options.max_model_len,
            "max_num_seqs": self.options.max_sequences,
            "bytes_per_die": self.capacity,
            "fits": self.short().is_none() && self.plan.ranks() <= self.machine.dies() as usize,
            "largest_max_model_len": self.fitting.max_model_len,
            "largest_max_num_seqs": self.fitting.max_sequences,
        })
    }

    fn heads(&self, rank: &model::plan::RankPlan) -> [usize; 2] {
        let heads = rank.tensor.part(self.config.num_attention_heads);
        [heads.start, heads.end]
    }

    fn text(&self) -> String {
        let (c, plan) = (self.config, self.plan);
        let o = plan.options();
        let mut out = String::new();
        let mut line = |text: String| {
            out += &text;
            out.push('\n');
        };
        line(format!(
            "{} {} ranks = tensor {} × data {} × pipeline {}, on {} dies of {}",
            bold("plan:"),
            plan.ranks(),
            o.tensor,
            o.data,
            o.pipeline,
            self.machine.dies(),
            self.machine.name
        ));
        let rank = plan.rank(0);
        let heads = rank.tensor.part(c.num_attention_heads).len();
        line(format!(
            "  attention   {heads} of {} heads a rank; latent projections on every rank{}",
            c.num_attention_heads,
            if rank.splits_tokens() {
                "; outside attention each rank has its own tokens"
            } else {
                ""
            }
        ));
        let width = |what: &str, whole: usize| {
            let part = rank.mlp_member().part(whole).len();
            let blocks = part as f64 / model::config::FP8_BLOCK as f64;
            match part == whole {
                true => format!("{what} whole ({whole} columns)"),
                false => format!("{what} {part} of {whole} columns = {blocks} FP8 blocks"),
            }
        };
        if c.first_k_dense_replace > 0 {
            line(format!("  dense MLP   {}", width("", c.intermediate_size).trim_start()));
        }
        if c.has_moe_layers() {
            match plan.experts() {
                Some(e) => line(format!(
                    "  experts     {} of {} a rank, {} of them copies in all; shared expert on every rank",
                    e.per_rank(),
                    e.physical(),
                    e.physical() - e.experts()
                )),
                None => line(format!(
                    "  experts     all {}, {}",
                    c.n_routed_experts,
                    width("of each", c.moe_intermediate_size)
                )),
            }
        }
        let vocabulary = rank.tensor.part(c.vocab_size).len();
        line(format!("  vocabulary  {vocabulary} of {} rows a rank", c.vocab_size));
        for (stage, layers) in plan.stages().iter().enumerate() {
            if plan.stages().len() > 1 {
                line(format!("  stage {stage}     layers {} to {}", layers.start, layers.end - 1));
            }
        }
        line(String::new());
        line(format!(
            "{} {} sequences of {} tokens, prefill in pieces of {}, {}",
            bold("memory:"),
            self.options.max_sequences,
            self.options.max_model_len,
            self.options.prefill_chunk,
            self.options.numerics
        ));
        line(format!(
            "  {:<12} {:>10} {:>10} {:>10} {:>13} {:>10}",
            "rank", "weights", "KV cache", "workspace", "communication", "total"
        ));
        for (ranks, m) in grouped(&self.memory) {
            line(format!(
                "  {ranks:<12} {:>10} {:>10} {:>10} {:>13} {:>10}",
                bytes(m.weights),
                bytes(m.cache),
                bytes(m.workspace),
                bytes(m.communication),
                bytes(m.total())
            ));
        }
        let verdict = match self.short() {
            None => "fits",
            Some(_) => "does not fit",
        };
        line(format!(
            "  {verdict}: a die has {}; the longest context that fits is {}, the most sequences {}",
            bytes(self.capacity),
            self.fitting.max_model_len,
            self.fitting.max_sequences
        ));
        line(String::new());
        line(format!("{} in {}, per rank:", bold("collectives"), self.step_text()));
        for stage in 0..plan.stages().len() {
            let all = self.step_collectives(stage);
            if all.is_empty() {
                line("  none".to_string());
            }
            for ((kind, group), t) in all {
                let stage = match plan.stages().len() {
                    1 => String::new(),
                    _ => format!("stage {stage} "),
                };
                line(format!(
                    "  {stage}{:<28} {:>5} × {:>10} = {}",
                    format!("{kind} [{group}]"),
                    t.calls,
                    bytes(t.bytes / t.calls.max(1) as u64),
                    bytes(t.bytes)
                ));
            }
        }
        line(dim(
            "sizes are exact, from the configuration alone; buffers of all-to-alls are as large as \
             the worst routing needs",
        ));
        out
    }
}

/// Runs of ranks that take the same.
fn grouped(memory: &[MemoryPlan]) -> Vec<(String, MemoryPlan)> {
    let mut runs: Vec<(usize, usize, MemoryPlan)> = Vec::new();
    for (rank, m) in memory.iter().enumerate() {
        match runs.last_mut() {
            Some((_, last, same)) if same == m => *last = rank,
            _ => runs.push((rank, rank, *m)),
        }
    }
    // Uneven parts alternate: then the smallest and the largest say enough.
    if runs.len() > 8 {
        let by_total = |(_, _, m): &&(usize, usize, MemoryPlan)| m.total();
        let ends = [runs.iter().min_by_key(by_total), runs.iter().max_by_key(by_total)];
        runs = ends.into_iter().flatten().copied().collect();
    }
    let name = |first: usize, last: usize| match first == last {
        true => format!("{first}"),
        false => format!("{first} to {last}"),
    };
    runs.into_iter().map(|(first, last, m)| (name(first, last), m)).collect()
}

//! `perf step`: one step of the model on a whole machine.

use super::plan_name;
use crate::cli::{Overlap, ParallelArgs};
use crate::output::{bold, bytes, count, dim, plural, seconds};
use crate::source;
use crate::trace::{self, Tracing};
use anyhow::{Context, ensure};
use clap::{Args, ValueEnum};
use hal::{DeviceId, StreamId, Topology};
use model::config::ModelConfig;
use model::engine::EngineOptions;
use model::numerics::Numerics;
use model::plan::ParallelPlan;
use model::schedule::{COMMUNICATION, COMPUTE, NODE_COMMUNICATION, lane_label};
use perf::{
    Estimate, Estimator, Folding, Part, Phase, Routing, RoutingError, TracedRank, Workload,
};
use report::trace::Names;
use serde_json::json;
use sim::Machine;
use sim::cost::question::Moved;
use std::io::Write;
use std::path::PathBuf;
use std::time::Instant;

pub(crate) const EXAMPLES: &str = "\
Examples:
  dsv3-run perf step --tensor-parallel-size 32             a decode step of V3 on 32 dies of va16
  dsv3-run perf step --tensor-parallel-size 32 --phase prefill --input-len 4096
  dsv3-run perf step --machine h800 --data-parallel-size 128 --expert-parallel \\
      --overlap two-batch --batch 128 --kv 4096            much as DeepSeek decodes
  dsv3-run perf step --machine h800 --data-parallel-size 32 --expert-parallel --batch 64 \\
      --mtp --routing zipf:0.5                             drafting, and unevenly loaded experts
  dsv3-run perf step --tensor-parallel-size 32 --trace t.json      to look at in ui.perfetto.dev

The same graph, plan and schedule that a card would be given, played on the simulator's timeline.
Exit status: 0 success, 2 the step is impossible or does not fit.";

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum PhaseName {
    Prefill,
    Decode,
}

#[derive(Args, Clone, Debug)]
pub(crate) struct StepArgs {
    /// deepseek-v3, tiny, 1gb, a config.json, or a folder with one.
    #[arg(long, value_name = "PRESET|FILE|DIR", default_value = "deepseek-v3")]
    config: String,
    /// va16, h800, h100, h200, b200, cloudmatrix384, or the path of a machine file; it gets as many
    /// hosts as the plan needs.
    #[arg(long, value_name = "NAME|FILE", default_value = "va16")]
    machine: String,
    /// Taking in prompts, or generating.
    #[arg(long, value_enum, default_value = "decode")]
    phase: PhaseName,
    /// Sequences of each data rank.
    #[arg(long, value_name = "N", default_value_t = 1, allow_negative_numbers = true)]
    batch: usize,
    /// Of decode: tokens that each sequence has, the new one included; 1024 by default.
    #[arg(long, value_name = "TOKENS", allow_negative_numbers = true)]
    kv: Option<usize>,
    /// Of prefill: new tokens of each prompt; 1024 by default.
    #[arg(long, value_name = "TOKENS", allow_negative_numbers = true)]
    input_len: Option<usize>,
    /// Of prefill: tokens of each prompt that are cached already; none by default.
    #[arg(long, value_name = "TOKENS", allow_negative_numbers = true)]
    past: Option<usize>,
    /// fp8, bf16 or f32.
    #[arg(long, default_value = "fp8", value_name = "fp8|bf16|f32")]
    numerics: Numerics,
    /// Each decode step verifies a token that the MTP module drafted, and drafts the next.
    #[arg(long)]
    mtp: bool,
    /// How often a drafted token is accepted, 0 to 1.
    #[arg(long, value_name = "SHARE", default_value_t = 0.85, allow_negative_numbers = true)]
    acceptance: f64,
    /// Where tokens' experts are: balanced; zipf:S or zipf:S:SEED; or a JSON file: a count for each
    /// expert, or a list of each token's experts as recorded. Redundant experts are placed for it.
    #[arg(long, value_name = "balanced|zipf:S|FILE", default_value = "balanced")]
    routing: String,
    /// Room for routed tokens on each die, against what balanced routing brings; "worst" for any
    /// routing.
    #[arg(long, value_name = "FACTOR|worst", default_value = "1.25")]
    expert_capacity: String,
    #[command(flatten)]
    parallel: ParallelArgs,
    /// Do not halve and double every assumed constant to see which ones decide.
    #[arg(long)]
    no_sensitivity: bool,
    /// Play every rank and every layer instead of one of each kind: slower, the same picoseconds.
    #[arg(long)]
    no_folding: bool,
    /// Write what would run when, command by command and layer by layer, to a file for
    /// ui.perfetto.dev or chrome://tracing: a process per rank that was played, whose name says for
    /// how many it stands (every rank with --no-folding), and a thread per stream. Some 300 bytes a
    /// command.
    #[arg(long, value_name = "FILE")]
    trace: Option<PathBuf>,
    /// Print one JSON object and nothing else.
    #[arg(long)]
    json: bool,
}

/// Everything that a step is asked with.
pub(crate) struct Asked {
    pub(crate) config: ModelConfig,
    pub(crate) machine: Machine,
    pub(crate) plan: ParallelPlan,
    pub(crate) options: EngineOptions,
    pub(crate) workload: Workload,
}

impl StepArgs {
    fn asked(&self) -> anyhow::Result<Asked> {
        let config = source::named_config(&self.config)?;
        let machine = Machine::load(&self.machine)?;
        let plan = plan(&self.parallel, &config, &machine)?;
        let phase = match self.phase {
            PhaseName::Decode => {
                ensure!(
                    self.input_len.is_none() && self.past.is_none(),
                    "--input-len and --past are for --phase prefill; a decode step has --kv"
                );
                Phase::Decode { batch: self.batch, kv: self.kv.unwrap_or(1024) }
            }
            PhaseName::Prefill => {
                ensure!(
                    self.kv.is_none(),
                    "--kv is for --phase decode; a prefill step has --input-len and --past"
                );
                let (input_len, past) = (self.input_len.unwrap_or(1024), self.past.unwrap_or(0));
                Phase::Prefill { batch: self.batch, input_len, past }
            }
        };
        let options = EngineOptions {
            numerics: self.numerics,
            overlap: self.parallel.overlap.into(),
            fuse: !self.parallel.no_fusion,
            enforce_eager: self.parallel.enforce_eager,
            expert_capacity: capacity(&self.expert_capacity)?,
            ..EngineOptions::default()
        };
        let routing = routing(&self.routing, config.n_routed_experts)?;
        let workload = Workload { phase, mtp: self.mtp, acceptance: self.acceptance, routing };
        Ok(Asked { config, machine, plan, options, workload })
    }
}

/// The plan on a machine with enough hosts for it.
fn plan(
    parallel: &ParallelArgs,
    config: &ModelConfig,
    machine: &Machine,
) -> anyhow::Result<ParallelPlan> {
    let degrees = [
        parallel.tensor_parallel_size,
        parallel.pipeline_parallel_size,
        parallel.data_parallel_size,
    ];
    let ranks = degrees.into_iter().fold(1usize, usize::saturating_mul);
    // Rules first: an illegal plan says more than a machine that is too small for it.
    parallel.plan(config, &Topology::new(Vec::new(), Vec::new()))?;
    let dies = u32::try_from(ranks).unwrap_or(u32::MAX);
    let enlarged = machine.enlarged(dies).map_err(anyhow::Error::msg)?;
    Ok(parallel.plan(config, &enlarged.topology())?)
}

fn capacity(text: &str) -> anyhow::Result<Option<f64>> {
    match text.parse::<f64>() {
        _ if text == "worst" => Ok(None),
        Ok(factor) if factor.is_finite() && factor >= 1.0 => Ok(Some(factor)),
        _ => anyhow::bail!("--expert-capacity {text:?}; expected a factor of at least 1, or worst"),
    }
}

/// Routing by name, or from a file.
pub(crate) fn routing(text: &str, experts: usize) -> anyhow::Result<Routing> {
    let unknown = match text.parse() {
        Ok(routing) => return Ok(routing),
        Err(error @ RoutingError::Unknown(_)) => error,
        Err(error) => return Err(error.into()),
    };
    let Ok(file) = std::fs::read_to_string(text) else { return Err(unknown.into()) };
    if let Ok(counts) = serde_json::from_str::<Vec<u64>>(&file) {
        return Ok(Routing::Histogram(counts));
    }
    let tokens: Vec<Vec<usize>> = serde_json::from_str(&file).with_context(|| {
        format!("{text}: neither a list of counts nor a list of tokens' experts")
    })?;
    let mut counts = vec![0u64; experts];
    for (number, &expert) in tokens.iter().flatten().enumerate() {
        let count = counts.get_mut(expert).with_context(|| {
            format!("{text}: choice {number} is expert {expert}, and the model has {experts}")
        })?;
        *count += 1;
    }
    Ok(Routing::Histogram(counts))
}

pub(crate) fn run(args: &StepArgs) -> anyhow::Result<()> {
    let began = Instant::now();
    let asked = args.asked()?;
    let trace = args.trace.as_deref().map(Tracing::create).transpose()?;
    let Asked { config, machine, plan, options, workload } = &asked;
    let estimator = Estimator::new(machine, plan.ranks())?;
    let folding = match args.no_folding {
        true => Folding { ranks: false, layers: false },
        false => Folding::default(),
    };
    let told = estimator.step(config, plan, options, workload, folding)?;
    let took = began.elapsed().as_secs_f64();
    if let Some(trace) = trace {
        let sink = trace.sink();
        let ranks = estimator.trace(config, plan, options, workload, args.no_folding, sink)?;
        trace.finish(&names(&asked, &ranks))?;
    }
    let moved = match args.no_sensitivity {
        true => Vec::new(),
        false => perf::sensitivity(machine, config, plan, options, workload, told.step_ms),
    };
    let mut out = std::io::stdout().lock();
    if args.json {
        let mut report = serde_json::to_value(&told).context("writing the estimate as JSON")?;
        report["workload"] = json!({
            "step": workload.phase,
            "mtp": workload.mtp,
            "acceptance": if workload.drafts() { Some(workload.acceptance) } else { None },
            "routing": args.routing,
        });
        report["plan"] = json!(plan.options());
        report["provenance"] = json!({
            "clock": "simulated",
            "machine": machine.name,
            "kernels": machine.kernels.generation,
            "constants": machine.constants().len(),
            "assumed": machine.assumed(),
            "sensitive_to": moved.iter().map(|m| json!({
                "constant": m.constant,
                "value": m.value,
                "halved_ms": m.halved,
                "doubled_ms": m.doubled,
            })).collect::<Vec<_>>(),
        });
        return Ok(writeln!(out, "{report:#}")?);
    }
    let text = Text { args, asked: &asked, told: &told, moved: &moved };
    text.write(took, &mut out)
}

/// What the trace of a step calls its ranks.
fn names(asked: &Asked, ranks: &[TracedRank]) -> Names {
    let machine = asked.machine.name.clone();
    let about = [("machine", machine), ("backend", "sim".into()), ("clock", "simulated".into())];
    let mut names = Names { about: trace::about(about), ..Names::default() };
    for &TracedRank { rank, placement, stands_for } in ranks {
        let device = DeviceId(rank as u32);
        names.dies.insert(device, placement);
        let note = match stands_for {
            1 => "stands for itself".to_string(),
            many => format!("stands for {many} ranks"),
        };
        names.notes.insert(device, note);
        for lane in [COMPUTE, COMMUNICATION, NODE_COMMUNICATION] {
            let index = lane as u32;
            names.streams.insert(StreamId { device, index }, lane_label(lane).to_string());
        }
    }
    names
}

struct Text<'a> {
    args: &'a StepArgs,
    asked: &'a Asked,
    told: &'a Estimate,
    moved: &'a [Moved],
}

fn ms(ms: f64) -> String {
    seconds(ms * 1e-3)
}

impl Text<'_> {
    fn write(&self, took: f64, out: &mut impl Write) -> anyhow::Result<()> {
        let Asked { machine, workload, .. } = self.asked;
        let t = self.told;
        let phase = match workload.phase {
            Phase::Decode { .. } => "decode",
            Phase::Prefill { .. } => "prefill",
        };
        let headline = format!(
            "{} for a {phase} step, simulated on {} of {}",
            ms(t.step_ms),
            plural(t.dies, "die"),
            machine.name
        );
        writeln!(out, "{}", bold(&headline))?;
        writeln!(out, "  {}", self.what())?;
        if let (Some(tpot), Some(user)) = (t.tpot_ms, t.tokens_per_s_per_user) {
            writeln!(out, "  TPOT {}: {} tokens/s for each user", ms(tpot), count(user))?;
        }
        if workload.drafts() {
            let accepted = workload.acceptance;
            writeln!(
                out,
                "  MTP: {:.0}% of the drafted tokens are taken to be accepted, so a step gives {:.2} \
                 tokens a sequence",
                100.0 * accepted,
                1.0 + accepted
            )?;
        }
        if let Some(ttft) = t.ttft_ms {
            writeln!(out, "  TTFT {}", ms(ttft))?;
        }
        writeln!(
            out,
            "  {} tokens/s in all, {} for each die",
            count(t.tokens_per_s),
            count(t.tokens_per_s_per_die)
        )?;
        writeln!(
            out,
            "  floor {}, {:.0}% of the step: {} for the bytes of the busiest die, {} for its operations",
            ms(t.floor_ms),
            100.0 * t.floor_ms / t.step_ms,
            ms(t.floor.bytes_ms),
            ms(t.floor.operations_ms)
        )?;
        writeln!(
            out,
            "  memory {} of {} on the fullest die: weights {}, KV cache {}, workspace {}",
            bytes(t.memory_bytes_per_die),
            bytes(machine.memory_bytes()),
            bytes(t.memory.weights),
            bytes(t.memory.cache),
            bytes(t.memory.workspace)
        )?;
        if t.expert_imbalance > 1.0 {
            let most = t.expert_imbalance;
            writeln!(
                out,
                "  routing {}: the most loaded die gets {most:.2} times the mean of routed tokens",
                self.args.routing
            )?;
        }
        let b = &t.breakdown;
        writeln!(out, "\n{}", bold("where the time of the average die goes"))?;
        writeln!(
            out,
            "  computing {}, communicating {} of which {} exposed ({:.0}% hidden), idle {}, host {}",
            ms(b.compute_ms),
            ms(b.communication_ms),
            ms(b.communication_exposed_ms),
            100.0 * t.communication_hidden_share,
            ms(b.idle_ms),
            ms(b.host_ms)
        )?;
        writeln!(
            out,
            "  {}",
            dim(
                "shares are of the step; what runs at the same time counts each, so sums may pass 100%"
            )
        )?;
        table(out, "by op", &b.by_op, t.step_ms)?;
        table(out, "by kind of layer", &b.by_layer, t.step_ms)?;
        table(out, "by what bounds it", &b.by_bound, t.step_ms)?;
        self.provenance(out)?;
        let (played, dies) = (t.played.ranks, plural(t.dies, "rank"));
        let stand = if played == 1 { "stands" } else { "stand" };
        let played = match played == t.dies {
            true => format!("all {dies} and {} commands were played", t.played.commands),
            false => format!(
                "{} with {} commands {stand} for all {dies}",
                plural(played, "rank"),
                t.played.commands
            ),
        };
        writeln!(out, "{}", dim(&format!("{played}; worked out in {}", seconds(took))))?;
        Ok(())
    }

    /// The step and the plan.
    fn what(&self) -> String {
        let Asked { plan, options, workload, .. } = self.asked;
        let (batch, what, tokens, past) = match workload.phase {
            Phase::Decode { batch, kv } => (batch, "sequence", kv, 0),
            Phase::Prefill { batch, input_len, past } => (batch, "prompt", input_len, past),
        };
        let mut text = format!("{} of {}", plural(batch, what), plural(tokens, "token"));
        if past > 0 {
            text += &format!(" after {past} cached");
        }
        let o = plan.options();
        if o.data > 1 {
            text += &format!(" on each of {} data ranks", o.data);
        }
        let degrees = [o.tensor, o.pipeline, o.data];
        let overlap = self.args.parallel.overlap == Overlap::TwoBatch;
        let name = plan_name(degrees, o.expert, overlap, workload.drafts());
        format!("{text}; {name}, {}", options.numerics)
    }

    fn provenance(&self, out: &mut impl Write) -> anyhow::Result<()> {
        let machine = &self.asked.machine;
        let (assumed, all) = (machine.assumed().len(), machine.constants().len());
        writeln!(out, "\n{}", bold("what it rests on"))?;
        writeln!(out, "  kernels: {}", machine.kernels.generation)?;
        if self.args.no_sensitivity {
            return Ok(writeln!(out, "  {assumed} of {all} constants are assumed")?);
        }
        let decide = match self.moved.len() {
            0 => "none of them moves".to_string(),
            1 => "one of them moves".to_string(),
            many => format!("{many} of them move"),
        };
        let end = if self.moved.is_empty() { "" } else { ":" };
        writeln!(
            out,
            "  {assumed} of {all} constants are assumed; {decide} the step by more than 2% when halved or \
             doubled{end}"
        )?;
        // No negative zero.
        let change = |now: f64| (100.0 * (now / self.told.step_ms - 1.0)).round() + 0.0;
        for m in self.moved {
            let name = format!("{} = {}", m.constant, m.value);
            let (half, twice) = (ms(m.halved), ms(m.doubled));
            let moves = format!(
                "half: {half} ({:+.0}%), twice: {twice} ({:+.0}%)",
                change(m.halved),
                change(m.doubled)
            );
            writeln!(out, "    {name:<36} {}", dim(&moves))?;
        }
        Ok(())
    }
}

fn table(out: &mut impl Write, title: &str, parts: &[Part], whole: f64) -> anyhow::Result<()> {
    writeln!(out, "  {title}")?;
    let (shown, rest) = parts.split_at(parts.len().min(10));
    for part in shown {
        let share = 100.0 * part.ms / whole;
        let (time, name) = (ms(part.ms), &part.name);
        writeln!(
            out,
            "    {name:<22} {time:>10} {share:>6.1}%  in {}",
            plural(part.commands as usize, "command")
        )?;
    }
    if !rest.is_empty() {
        let sum: f64 = rest.iter().map(|part| part.ms).sum();
        writeln!(out, "    {:<22} {:>10} {:>6.1}%", "others", ms(sum), 100.0 * sum / whole)?;
    }
    Ok(())
}

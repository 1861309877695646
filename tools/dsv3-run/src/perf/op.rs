//! `perf op`: one operation.

use crate::output::{bold, dim, seconds};
use anyhow::Context;
use clap::{Args, Subcommand, ValueEnum};
use hal::CollectiveKind;
use serde_json::json;
use sim::Machine;
use sim::cost::question::{Answer, Precision, Question, Sensitivity, answer, sensitivity};
use std::io::Write;

#[derive(Args, Clone, Debug)]
pub(crate) struct OpArgs {
    /// va16, h800, h100, h200, b200, cloudmatrix384, or the path of a machine file
    /// (docs/machine-files.md).
    // A name of its own: global flags of nested commands meet the outer ones by name.
    #[arg(long = "machine", value_name = "NAME|FILE", default_value = "va16", global = true)]
    op_machine: String,
    /// Print one JSON object and nothing else.
    #[arg(long = "json", global = true)]
    op_json: bool,
    #[command(subcommand)]
    op: OpCommand,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum Dtype {
    Fp8,
    Bf16,
    F32,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
#[value(rename_all = "kebab-case")]
enum Kind {
    AllReduce,
    AllGather,
    ReduceScatter,
    AllToAll,
    Broadcast,
    /// From one die to its neighbour.
    SendRecv,
}

#[derive(Clone, Debug, Subcommand)]
#[command(rename_all = "kebab-case")]
enum OpCommand {
    /// A matrix product [m, k] x [n, k]^T: FP8 with block scales, or BF16.
    Gemm {
        #[arg(long, value_enum, default_value = "fp8")]
        dtype: Dtype,
        /// Rows: tokens.
        #[arg(long)]
        m: u64,
        /// Columns of the result.
        #[arg(long)]
        n: u64,
        /// Length of the sums.
        #[arg(long)]
        k: u64,
    },
    /// One product per group (expert), of m rows each.
    GroupedGemm {
        #[arg(long, value_enum, default_value = "fp8")]
        dtype: Dtype,
        /// Groups with rows.
        #[arg(long)]
        groups: u64,
        /// Rows of each group.
        #[arg(long)]
        m: u64,
        /// Columns of the result.
        #[arg(long)]
        n: u64,
        /// Length of the sums.
        #[arg(long)]
        k: u64,
        /// Groups in places of their own with counts, as in decode; else one after the other.
        #[arg(long)]
        masked: bool,
    },
    /// MLA attention in absorbed form over the latent cache.
    MlaDecode {
        /// Sequences.
        #[arg(long)]
        batch: u64,
        /// Keys of each sequence.
        #[arg(long)]
        kv: u64,
        /// Heads on this die.
        #[arg(long, default_value_t = 128)]
        heads: u64,
        /// Of the cache.
        #[arg(long, value_enum, default_value = "bf16")]
        dtype: Dtype,
        /// New tokens of each sequence: 2 to verify one speculative token.
        #[arg(long, default_value_t = 1)]
        queries: u64,
    },
    /// MLA attention in expanded form, causal, in BF16.
    MlaPrefill {
        /// Tokens of each sequence.
        #[arg(long)]
        tokens: u64,
        /// Heads on this die.
        #[arg(long, default_value_t = 128)]
        heads: u64,
        /// Sequences.
        #[arg(long, default_value_t = 1)]
        batch: u64,
    },
    /// A collective over dies 0 to ranks - 1.
    Collective {
        #[arg(long, value_enum)]
        kind: Kind,
        /// Dies; more hosts are added where hosts are joined.
        #[arg(long)]
        ranks: u64,
        /// Of the reduced or broadcast tensor, of the gathered or scattered whole, or of all that a
        /// rank sends.
        #[arg(long)]
        bytes: u64,
    },
    /// Tokens to the ranks of their experts, routing balanced. FP8 unless --dtype says otherwise.
    MoeDispatch(MoeArgs),
    /// Experts' results back to the tokens' ranks. BF16 unless --dtype says otherwise.
    MoeCombine(MoeArgs),
}

#[derive(Args, Clone, Debug)]
struct MoeArgs {
    /// Expert-parallel ranks.
    #[arg(long)]
    ep: u64,
    /// Tokens of each rank.
    #[arg(long)]
    tokens: u64,
    /// Experts of each token.
    #[arg(long, default_value_t = 8)]
    top_k: u64,
    /// Elements of a token.
    #[arg(long, default_value_t = 7168)]
    hidden: u64,
    /// Every copy straight to its die, as in decode; else two hops with de-duplication.
    #[arg(long)]
    low_latency: bool,
    /// What travels.
    #[arg(long, value_enum)]
    dtype: Option<Dtype>,
    /// Experts in all, redundant ones included; without it the least multiple of --ep from 256 on.
    #[arg(long)]
    experts: Option<u64>,
    /// Most hosts that a token goes to, without --low-latency.
    #[arg(long, default_value_t = 4)]
    max_hosts: u64,
    /// Dies of a host use the network too.
    #[arg(long)]
    network_only: bool,
}

impl From<Dtype> for Precision {
    fn from(dtype: Dtype) -> Self {
        match dtype {
            Dtype::Fp8 => Precision::Fp8,
            Dtype::Bf16 => Precision::Bf16,
            Dtype::F32 => Precision::F32,
        }
    }
}

impl MoeArgs {
    fn question(&self, combine: bool) -> Question {
        let usual = if combine { Precision::Bf16 } else { Precision::Fp8 };
        Question::Moe {
            combine,
            ep: self.ep,
            tokens: self.tokens,
            top_k: self.top_k,
            hidden: self.hidden,
            dtype: self.dtype.map_or(usual, Precision::from),
            low_latency: self.low_latency,
            experts: self.experts,
            host_limit: self.max_hosts,
            network_only: self.network_only,
        }
    }
}

impl OpCommand {
    fn question(&self) -> Question {
        match *self {
            OpCommand::Gemm { dtype, m, n, k } => Question::Gemm { dtype: dtype.into(), m, n, k },
            OpCommand::GroupedGemm { dtype, groups, m, n, k, masked } => {
                Question::GroupedGemm { dtype: dtype.into(), groups, m, n, k, masked }
            }
            OpCommand::MlaDecode { batch, kv, heads, dtype, queries } => {
                Question::MlaDecode { dtype: dtype.into(), batch, kv, heads, queries }
            }
            OpCommand::MlaPrefill { tokens, heads, batch } => {
                Question::MlaPrefill { tokens, heads, batch }
            }
            OpCommand::Collective { kind, ranks, bytes } => {
                let collective = match kind {
                    Kind::AllReduce => CollectiveKind::AllReduce,
                    Kind::AllGather => CollectiveKind::AllGather,
                    Kind::ReduceScatter => CollectiveKind::ReduceScatter,
                    Kind::AllToAll => CollectiveKind::AllToAll,
                    Kind::Broadcast => CollectiveKind::Broadcast,
                    Kind::SendRecv => CollectiveKind::Send,
                };
                Question::Collective { collective, ranks, bytes }
            }
            OpCommand::MoeDispatch(ref moe) => moe.question(false),
            OpCommand::MoeCombine(ref moe) => moe.question(true),
        }
    }
}

pub(crate) fn run(args: &OpArgs) -> anyhow::Result<()> {
    let machine = Machine::load(&args.op_machine)?;
    let question = args.op.question();
    let told = answer(&machine, &question).map_err(anyhow::Error::msg)?;
    let moved = sensitivity(&machine, &question).map_err(anyhow::Error::msg)?;
    let mut out = std::io::stdout().lock();
    if args.op_json {
        let mut report = serde_json::to_value(&told).context("writing the answer as JSON")?;
        report["question"] = json!(question);
        report["provenance"] = json!({
            "clock": "simulated",
            "machine": machine.name,
            "kernels": machine.kernels.generation,
            "constants": machine.constants().len(),
            "assumed": machine.assumed(),
            "sensitive_to": moved,
        });
        return Ok(writeln!(out, "{report:#}")?);
    }
    report(&machine, &told, &moved, &mut out)
}

fn report(
    machine: &Machine,
    told: &Answer,
    moved: &[Sensitivity],
    out: &mut impl Write,
) -> anyhow::Result<()> {
    let us = |us: f64| seconds(us * 1e-6);
    let headline = format!("{} simulated on {}", us(told.time_us), machine.name);
    writeln!(out, "{}, bound by {}", bold(&headline), bound(told.bound))?;
    if told.tflops > 0.0 {
        writeln!(out, "  {:.1} TFLOPS, {:.0} GB/s", told.tflops, told.gb_per_s)?;
    } else {
        writeln!(out, "  {:.1} GB/s", told.gb_per_s)?;
    }
    let reached = 100.0 * told.floor_us / told.time_us;
    writeln!(
        out,
        "  floor {}: the time of the scarcest resource alone; {reached:.0}% of it is reached",
        us(told.floor_us)
    )?;
    writeln!(out, "  mapping: {}", told.mapping)?;
    writeln!(out, "  kernels: {}", machine.kernels.generation)?;
    writeln!(out, "  in a stream, {} more between it and the command before", us(told.gap_us))?;
    let assumed = machine.assumed().len();
    let all = machine.constants().len();
    if moved.is_empty() {
        return Ok(writeln!(
            out,
            "  {assumed} of {all} constants of {} are assumed; none of them moves this time by more \
             than 2% when it is halved or doubled",
            machine.name
        )?);
    }
    writeln!(
        out,
        "  {assumed} of {all} constants of {} are assumed; those that decide here:",
        machine.name
    )?;
    for s in moved {
        let name = format!("{} = {}", s.constant, s.value);
        let (half, twice) = (us(s.halved_us), us(s.doubled_us));
        writeln!(out, "    {name:<36} {}", dim(&format!("half: {half}, twice: {twice}")))?;
    }
    Ok(())
}

fn bound(name: &str) -> &str {
    match name {
        "memory" => "memory: bytes, not operations, decide",
        "matrix" => "the matrix units",
        "vector" => "the vector units",
        "link" => "links between dies",
        "launch" => "latency: starting and waiting take longer than the work",
        other => other,
    }
}

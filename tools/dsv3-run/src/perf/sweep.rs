//! `perf sweep`: many steps at once.

use crate::output::{Progress, bold, count, dim, seconds};
use crate::source;
use anyhow::Context;
use clap::Args;
use perf::{Grid, Outcome, Phase, pareto};
use serde_json::json;
use sim::Machine;
use std::collections::HashMap;
use std::fmt::Write as _;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::time::Instant;

pub(crate) const EXAMPLES: &str = "\
A sweep file names a model and grids; each grid stands for every combination of its lists:

  config = \"deepseek-v3\"
  [[grid]]
  machine = [\"h800\", \"va16\"]
  phase = [\"decode\"]
  tensor-parallel-size = [8, 16, 32]      # pipeline-parallel-size, data-parallel-size alike
  expert-parallel = [false, true]
  overlap = [\"none\", \"two-batch\"]
  batch = [1, 2, 4, 8]
  kv = [1024, 4096]                       # prefill: input-len
  mtp = [false, true]                     # also: acceptance, routing, numerics

  dsv3-run perf sweep sweep.toml
  dsv3-run perf sweep sweep.toml --csv points.csv --json - | jq '.pareto'

Plans that break a rule or do not fit are points too, with the reason.
Exit status: 0 success, 2 an unusable file, or no point that fits.";

#[derive(Args, Clone, Debug)]
pub(crate) struct SweepArgs {
    /// The sweep.
    #[arg(value_name = "FILE.toml")]
    file: PathBuf,
    /// Write all points as comma-separated values.
    #[arg(long, value_name = "FILE")]
    csv: Option<PathBuf>,
    /// Write all points and the Pareto front as one JSON object to a file, or with "-" to standard
    /// output and nothing else there.
    #[arg(long, value_name = "FILE|-", num_args = 0..=1, default_missing_value = "-")]
    json: Option<String>,
    /// Host threads; one per processor by default. Never changes a result.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=1024))]
    threads: Option<u16>,
}

pub(crate) fn run(args: &SweepArgs) -> anyhow::Result<()> {
    let began = Instant::now();
    let name = args.file.display().to_string();
    let text = std::fs::read_to_string(&args.file).with_context(|| name.clone())?;
    let (config, points) = Grid::parse(&text).with_context(|| name.clone())?;
    let config = source::named_config(config.as_deref().unwrap_or("deepseek-v3"))?;
    let mut machines = HashMap::new();
    for point in &points {
        if !machines.contains_key(&point.machine) {
            machines.insert(point.machine.clone(), Machine::load(&point.machine)?);
        }
    }
    let progress = Mutex::new(Progress::counting("sweeping"));
    let total = points.len() as u64;
    let tell = |done: usize| {
        // Whoever holds it shows a later number anyway.
        if let Ok(mut progress) = progress.try_lock() {
            progress.update(done as u64, total);
        }
    };
    let sweep = || perf::run(&config, &machines, &points, &tell);
    let outcomes = match args.threads {
        None => sweep(),
        Some(threads) => perf::on_threads(threads.into(), sweep).context("starting threads")?,
    };
    if let Ok(mut progress) = progress.lock() {
        progress.finish();
    }
    let front = pareto(&outcomes);
    if let Some(path) = &args.csv {
        write_whole(path, &csv(&outcomes))?;
    }
    let fitting = outcomes.iter().filter(|o| o.estimate.is_some()).count();
    match args.json.as_deref() {
        Some(target) => {
            let assumed: HashMap<&String, Vec<String>> =
                machines.iter().map(|(name, machine)| (name, machine.assumed())).collect();
            let report = json!({
                "points": outcomes,
                "pareto": front,
                "provenance": { "clock": "simulated", "assumed": assumed },
            });
            match target {
                "-" => writeln!(std::io::stdout().lock(), "{report:#}")?,
                path => write_whole(Path::new(path), &format!("{report:#}\n"))?,
            }
        }
        None => print(&outcomes, &front, began.elapsed().as_secs_f64())?,
    }
    if fitting == 0 {
        let why = outcomes.iter().find_map(|o| o.error.clone()).unwrap_or_default();
        anyhow::bail!("none of {} points is possible; the first one: {why}", outcomes.len());
    }
    Ok(())
}

/// Writes a file whole or not at all.
fn write_whole(path: &Path, text: &str) -> anyhow::Result<()> {
    let aside = path.with_extension("partial");
    let written = std::fs::write(&aside, text).and_then(|()| std::fs::rename(&aside, path));
    if written.is_err() {
        // What is left is nobody's; the error that counts is the first one.
        let _ = std::fs::remove_file(&aside);
    }
    written.with_context(|| format!("writing {}", path.display()))
}

const COLUMNS: &[&str] = &[
    "machine",
    "phase",
    "batch",
    "length",
    "tensor_parallel_size",
    "pipeline_parallel_size",
    "data_parallel_size",
    "expert_parallel",
    "overlap",
    "numerics",
    "mtp",
    "acceptance",
    "routing",
    "dies",
    "step_ms",
    "tpot_ms",
    "ttft_ms",
    "tokens_per_s",
    "tokens_per_s_per_die",
    "tokens_per_s_per_user",
    "memory_bytes_per_die",
    "floor_ms",
    "communication_hidden_share",
    "error",
];

fn csv(outcomes: &[Outcome]) -> String {
    let mut out = COLUMNS.join(",");
    out.push('\n');
    let quoted = |text: &str| match text.contains([',', '"', '\n']) {
        true => format!("\"{}\"", text.replace('"', "\"\"")),
        false => text.to_string(),
    };
    let number = |value: Option<f64>| value.map_or(String::new(), |v| format!("{v}"));
    for Outcome { point: p, estimate, error } in outcomes {
        let (phase, batch, length) = match p.phase {
            Phase::Decode { batch, kv } => ("decode", batch, kv),
            Phase::Prefill { batch, input_len, .. } => ("prefill", batch, input_len),
        };
        let e = estimate.as_ref();
        let fields = [
            quoted(&p.machine),
            phase.to_string(),
            batch.to_string(),
            length.to_string(),
            p.tensor_parallel_size.to_string(),
            p.pipeline_parallel_size.to_string(),
            p.data_parallel_size.to_string(),
            p.expert_parallel.to_string(),
            p.overlap.clone(),
            p.numerics.clone(),
            p.mtp.to_string(),
            p.acceptance.to_string(),
            quoted(&p.routing),
            e.map_or(String::new(), |e| e.dies.to_string()),
            number(e.map(|e| e.step_ms)),
            number(e.and_then(|e| e.tpot_ms)),
            number(e.and_then(|e| e.ttft_ms)),
            number(e.map(|e| e.tokens_per_s)),
            number(e.map(|e| e.tokens_per_s_per_die)),
            number(e.and_then(|e| e.tokens_per_s_per_user)),
            e.map_or(String::new(), |e| e.memory_bytes_per_die.to_string()),
            number(e.map(|e| e.floor_ms)),
            number(e.map(|e| e.communication_hidden_share)),
            quoted(error.as_deref().unwrap_or_default()),
        ];
        debug_assert_eq!(fields.len(), COLUMNS.len());
        // Writing to a string cannot fail.
        let _ = writeln!(out, "{}", fields.join(","));
    }
    out
}

fn print(outcomes: &[Outcome], front: &[usize], took: f64) -> anyhow::Result<()> {
    let mut out = std::io::stdout().lock();
    let fitting = outcomes.iter().filter(|o| o.estimate.is_some()).count();
    writeln!(
        out,
        "{} points, {fitting} possible, in {}",
        bold(&outcomes.len().to_string()),
        seconds(took)
    )?;
    let mut reasons: HashMap<&str, usize> = HashMap::new();
    for error in outcomes.iter().filter_map(|o| o.error.as_deref()) {
        *reasons.entry(error.split(';').next().unwrap_or(error)).or_default() += 1;
    }
    let mut reasons: Vec<_> = reasons.into_iter().collect();
    reasons.sort_by_key(|&(reason, n)| (std::cmp::Reverse(n), reason));
    for (reason, n) in reasons.iter().take(5) {
        writeln!(out, "  {}", dim(&format!("{n} impossible: {reason}")))?;
    }
    if front.is_empty() {
        return Ok(writeln!(out, "no decode points, so no front; --csv or --json has all points")?);
    }
    writeln!(
        out,
        "\n{}",
        bold("Pareto front: tokens/s for each die against tokens/s for each user")
    )?;
    writeln!(
        out,
        "  {:>10} {:>10} {:>10}  {:<12} {:<26} {:>6} {:>7}",
        "per die", "per user", "TPOT", "machine", "plan", "batch", "kv"
    )?;
    for &at in front {
        let Outcome { point: p, estimate: Some(e), .. } = &outcomes[at] else { continue };
        let Phase::Decode { batch, kv } = p.phase else { continue };
        let mut plan = format!("TP{}", p.tensor_parallel_size);
        for (name, degree) in [("PP", p.pipeline_parallel_size), ("DP", p.data_parallel_size)] {
            if degree > 1 {
                plan += &format!(" {name}{degree}");
            }
        }
        for (name, on) in [("EP", p.expert_parallel), ("2mb", p.overlap != "none"), ("MTP", p.mtp)]
        {
            if on {
                plan += &format!(" {name}");
            }
        }
        writeln!(
            out,
            "  {:>10} {:>10} {:>10}  {:<12} {plan:<26} {batch:>6} {kv:>7}",
            count(e.tokens_per_s_per_die),
            count(e.tokens_per_s_per_user.unwrap_or(0.0)),
            seconds(e.tpot_ms.unwrap_or(0.0) * 1e-3),
            p.machine
        )?;
    }
    Ok(())
}

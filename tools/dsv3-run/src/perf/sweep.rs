//! `perf sweep`: many steps at once.

use super::plan_name;
use crate::output::{Progress, bold, count, dim, plural, seconds};
use crate::source;
use anyhow::Context;
use clap::Args;
use perf::{Grid, Outcome, Phase, pareto};
use report::PartialFile;
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

  config = \"deepseek-v3\"                  # a preset or a config.json; this one if absent
  [[grid]]
  machine = [\"h800\", \"va16\"]              # names or machine files
  phase = [\"decode\", \"prefill\"]
  batch = [1, 2, 4, 8]                    # sequences of each data rank
  kv = [1024, 4096]                       # of decode
  input-len = [1024]                      # of prefill
  tensor-parallel-size = [8, 16, 32]
  expert-parallel = [false, true]
  overlap = [\"none\", \"two-batch\"]

All flags of perf step that may be lists: pipeline-parallel-size, data-parallel-size, numerics, mtp,
acceptance and routing too. What is absent has perf step's default. More [[grid]]s may follow.

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
    let csv_file = args.csv.as_deref().map(|path| begin("--csv", path)).transpose()?;
    let json_file = match args.json.as_deref() {
        None | Some("-") => None,
        Some(path) => Some(begin("--json", Path::new(path))?),
    };
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
    if let Some(file) = csv_file {
        keep("--csv", file, &csv(&outcomes))?;
    }
    let fitting = outcomes.iter().filter(|o| o.estimate.is_some()).count();
    match args.json {
        Some(_) => {
            let assumed: HashMap<&String, Vec<String>> =
                machines.iter().map(|(name, machine)| (name, machine.assumed())).collect();
            let report = json!({
                "points": outcomes,
                "pareto": front,
                "provenance": { "clock": "simulated", "assumed": assumed },
            });
            match json_file {
                None => writeln!(std::io::stdout().lock(), "{report:#}")?,
                Some(file) => keep("--json", file, &format!("{report:#}\n"))?,
            }
        }
        None => print(&outcomes, &front, began.elapsed().as_secs_f64())?,
    }
    if fitting == 0 {
        let why = outcomes.iter().find_map(|o| o.error.clone()).unwrap_or_default();
        anyhow::bail!(
            "none of {} is possible; the first one: {why}",
            plural(outcomes.len(), "point")
        );
    }
    Ok(())
}

/// A file that is to be written whole or not at all, begun before the work.
fn begin(flag: &str, path: &Path) -> anyhow::Result<PartialFile> {
    PartialFile::create(path).with_context(|| format!("{flag} {}", path.display()))
}

fn keep(flag: &str, mut file: PartialFile, text: &str) -> anyhow::Result<()> {
    let path = file.path().to_path_buf();
    let written = file.file().write_all(text.as_bytes()).and_then(|()| file.keep());
    written.with_context(|| format!("{flag} {}", path.display()))
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
    for Outcome { point: p, estimate, error, .. } in outcomes {
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
        "{}, {fitting} possible, in {}",
        bold(&plural(outcomes.len(), "point")),
        seconds(took)
    )?;
    let mut reasons: HashMap<&str, usize> = HashMap::new();
    for reason in outcomes.iter().filter_map(|o| o.reason.as_deref()) {
        *reasons.entry(reason).or_default() += 1;
    }
    let mut reasons: Vec<_> = reasons.into_iter().collect();
    reasons.sort_by_key(|&(reason, n)| (std::cmp::Reverse(n), reason));
    let (shown, rest) = reasons.split_at(reasons.len().min(8));
    for (reason, n) in shown {
        writeln!(out, "  {}", dim(&format!("{n} impossible: {reason}")))?;
    }
    if !rest.is_empty() {
        let more: usize = rest.iter().map(|(_, n)| n).sum();
        writeln!(out, "  {}", dim(&format!("{more} impossible for {} more reasons", rest.len())))?;
    }
    if !front.is_empty() {
        let title = "decode, Pareto front: tokens/s for each die against tokens/s for each user";
        writeln!(out, "\n{}", bold(title))?;
        rows(&mut out, outcomes, front)?;
    }
    let mut prefill: Vec<usize> = (0..outcomes.len())
        .filter(|&at| outcomes[at].estimate.as_ref().is_some_and(|e| e.ttft_ms.is_some()))
        .collect();
    let rate = |&at: &usize| outcomes[at].estimate.as_ref().map_or(0.0, |e| e.tokens_per_s_per_die);
    prefill.sort_by(|a, b| rate(b).total_cmp(&rate(a)));
    if !prefill.is_empty() {
        prefill.truncate(10);
        writeln!(out, "\n{}", bold("prefill, most tokens/s for each die first"))?;
        rows(&mut out, outcomes, &prefill)?;
    }
    if fitting > 0 {
        writeln!(out, "\n{}", dim("times are simulated; --csv and --json have all points"))?;
    }
    Ok(())
}

/// A table of points of one phase.
fn rows(out: &mut impl Write, outcomes: &[Outcome], which: &[usize]) -> anyhow::Result<()> {
    let decode = |at: &usize| matches!(outcomes[*at].point.phase, Phase::Decode { .. });
    let (time, length) = match which.iter().all(decode) {
        true => ("TPOT", "kv"),
        false => ("TTFT", "input"),
    };
    writeln!(
        out,
        "  {:>10} {:>10} {time:>10}  {:<14} {:<22} {:>6} {length:>7}  also",
        "per die", "per user", "machine", "plan", "batch"
    )?;
    for &at in which {
        let Outcome { point: p, estimate: Some(e), .. } = &outcomes[at] else { continue };
        let (batch, length) = match p.phase {
            Phase::Decode { batch, kv } => (batch, kv),
            Phase::Prefill { batch, input_len, .. } => (batch, input_len),
        };
        let degrees = [p.tensor_parallel_size, p.pipeline_parallel_size, p.data_parallel_size];
        let plan = plan_name(degrees, p.expert_parallel, p.overlap != "none", p.mtp);
        let user = e.tokens_per_s_per_user.map_or("-".to_string(), count);
        let time = e.tpot_ms.or(e.ttft_ms).unwrap_or(0.0);
        let mut also = Vec::new();
        also.extend((p.numerics != "fp8").then(|| p.numerics.clone()));
        also.extend((p.routing != "balanced").then(|| p.routing.clone()));
        also.extend(p.mtp.then(|| format!("accepts {}", p.acceptance)));
        let line = format!(
            "  {:>10} {user:>10} {:>10}  {:<14} {plan:<22} {batch:>6} {length:>7}  {}",
            count(e.tokens_per_s_per_die),
            seconds(time * 1e-3),
            p.machine,
            also.join(", ")
        );
        writeln!(out, "{}", line.trim_end())?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_file_of_the_help_is_a_sweep() {
        let lines = EXAMPLES.lines().skip_while(|line| !line.starts_with("  config"));
        let file: Vec<&str> = lines.take_while(|line| !line.is_empty()).collect();
        let (config, points) = Grid::parse(&file.join("\n")).unwrap();
        assert_eq!(config.as_deref(), Some("deepseek-v3"));
        assert_eq!(points.len(), 2 * 4 * (2 + 1) * 3 * 2 * 2);
    }
}

//! Running a recording again.

use crate::cli::ReplayArgs;
use crate::output::{bold, bytes, dim, seconds};
use crate::system::Platform;
use ::replay::file::Reader;
use ::replay::record::Die;
use ::replay::{Options, Outcome, Problem, Report};
use anyhow::{Context, ensure};
use hal::fault::FaultPlan;
use hal::{Device, DeviceId, Validated};
use std::fs::File;
use std::io::Write;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// The replay gave something else than the recorded run.
#[derive(Debug)]
pub(crate) struct Differs;

impl std::fmt::Display for Differs {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("the replay differs from the recorded run")
    }
}

impl std::error::Error for Differs {}

pub(crate) fn run(args: &ReplayArgs) -> anyhow::Result<()> {
    let name = args.file.display();
    let file = File::open(&args.file).with_context(|| format!("opening {name}"))?;
    let mut reader = Reader::new(file).with_context(|| format!("{name}"))?;
    if args.dump {
        let mut out = std::io::BufWriter::new(std::io::stdout().lock());
        ::replay::dump(&mut reader, args.unfinished, &mut out)
            .map_err(|error| hint(error.into()))
            .with_context(|| format!("{name}"))?;
        return Ok(out.flush()?);
    }
    let platform = Platform::start(&args.system)?;
    let dies = Dies::new(platform, args)?;
    let options = Options {
        tolerance: args.tolerance,
        timeout: Duration::from_secs(args.timeout),
        allow_unfinished: args.unfinished,
        ..Options::default()
    };
    let began = Instant::now();
    let report = ::replay::replay(&mut reader, &mut |die| dies.open(die), &options)
        .map_err(|error| hint(error.into()))
        .with_context(|| format!("{name}"))?;
    let mut out = std::io::stdout();
    if args.json {
        let mut json = serde_json::to_value(&report).context("encoding the report")?;
        json["equal"] = report.is_equal().into();
        json["recorded_by"] = reader.header().program.clone().into();
        json["recorded_command"] = reader.header().command.clone().into();
        writeln!(out, "{json:#}")?;
    } else {
        let command = reader.header().command.join(" ");
        writeln!(out, "{}", dim(&format!("recorded by {}: {command}", reader.header().program)))?;
        write!(out, "{}", text(&report, began.elapsed()))?;
    }
    ensure!(report.is_equal(), Differs);
    Ok(())
}

/// Says what to do about a recording without an end.
fn hint(error: anyhow::Error) -> anyhow::Error {
    let mut causes = error.chain().filter_map(|cause| cause.downcast_ref::<Problem>());
    match causes.next() {
        Some(Problem::Unfinished | Problem::Truncated) => {
            let text = format!("{error}; --unfinished takes it as far as it goes");
            error.context(text)
        }
        _ => error,
    }
}

/// Dies by the numbers that the recording knows them by.
struct Dies {
    platform: Platform,
    faults: Option<Arc<FaultPlan>>,
    /// With `--validate`, all of them: order between dies is checked too.
    validated: Vec<Arc<Validated>>,
}

impl Dies {
    fn new(platform: Platform, args: &ReplayArgs) -> anyhow::Result<Dies> {
        let rules = &args.system.fault;
        let faults = (!rules.is_empty()).then(|| Arc::new(FaultPlan::new(rules.clone())));
        let mut dies = Dies { platform, faults, validated: Vec::new() };
        if args.system.validate {
            let all: Vec<_> = (0..dies.platform.dies())
                .map(|die| dies.open(DeviceId(die)))
                .collect::<Result<_, _>>()?;
            dies.validated = Validated::wrap_all(all);
        }
        Ok(dies)
    }

    fn open(&self, die: DeviceId) -> hal::Result<Arc<dyn Device>> {
        if let Some(validated) = self.validated.get(die.0 as usize) {
            return Ok(validated.clone());
        }
        let device = self.platform.open(die)?;
        if let Some(faults) = &self.faults {
            device.set_faults(Some(faults.clone()))?;
        }
        Ok(device)
    }
}

fn text(report: &Report, took: Duration) -> String {
    let mut out = format!(
        "recorded on {}, replayed on {}\n{} of {} commands issued again in {}: {} reads ({})",
        dies(&report.recorded_dies),
        dies(&report.replayed_dies),
        report.commands,
        report.recorded_commands,
        seconds(took.as_secs_f64()),
        report.reads,
        bytes(report.compared_bytes),
    );
    if report.hashes > 0 {
        out += &format!(" and {} outputs", report.hashes);
    }
    out += " compared\n";
    let mut note = |say: bool, words: String| {
        if say {
            out += &words;
            out.push('\n');
        }
    };
    let complete = report.recording_complete;
    note(!complete, "the recording has no end: its process was killed, or it was cut off".into());
    note(complete && !report.run_finished, "the recorded run stopped early".into());
    note(
        report.not_compared > 0,
        format!(
            "{} reads or outputs could not be compared: timing without values, or hashes with a \
             tolerance",
            report.not_compared
        ),
    );
    note(
        report.skipped > 0,
        format!(
            "{} commands were left out: they were refused then, or cannot be made now",
            report.skipped
        ),
    );
    for failure in &report.failures {
        let words = failure.to_string();
        let words = if failure.outcome == Outcome::Same { words } else { bold(&words) };
        note(true, words);
    }
    let shown = report.differences.len() as u64;
    let more = report.different - shown;
    let compared = report.reads + report.hashes;
    note(compared == 0, "no values were compared".into());
    note(compared > 0 && report.different == 0, "all values are equal".into());
    note(
        report.different > 0,
        bold(&format!("{} of {compared} comparisons differ", report.different)),
    );
    for difference in &report.differences {
        note(true, format!("  {difference}"));
    }
    note(more > 0, format!("  and {more} more"));
    out
}

/// `va16 (sim)`, or `32 dies of va16 (sim)`.
fn dies(dies: &[Die]) -> String {
    match dies {
        [] => "nothing".to_string(),
        [one] => format!("{} ({})", one.name, one.backend),
        [first, ..] => format!("{} dies of {} ({})", dies.len(), first.name, first.backend),
    }
}

//! The conformance suite on a backend: progress, a table per family, every failure with its reason.

use crate::cli::ConformanceArgs;
use crate::output::{bold, seconds};
use crate::system::Platform;
use anyhow::ensure;
use conformance::{Backend, CaseResult, Feature, Options, Outcome, Report, Summary};
use hal::{Device, DeviceId, Error};
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::fmt;
use std::io::{IsTerminal, Write};
use std::sync::Arc;

/// The backend does not do what it must; the report says where.
#[derive(Debug)]
pub(crate) struct SuiteFailed {
    failed: usize,
    cases: usize,
}

impl fmt::Display for SuiteFailed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} of {} conformance cases failed", self.failed, self.cases)
    }
}

impl std::error::Error for SuiteFailed {}

pub(crate) fn run(args: &ConformanceArgs) -> anyhow::Result<()> {
    ensure!(
        args.system.fault.is_empty() && !args.system.validate,
        "--fault and --validate are not for the conformance suite: it injects faults and wraps \
         devices itself"
    );
    let options = Options { filter: args.filter.clone(), ..Options::default() };
    let names: Vec<String> = conformance::cases().into_iter().map(|case| case.name).collect();
    let names: Vec<&String> = names.iter().filter(|name| options.lets_through(name)).collect();
    ensure!(
        !names.is_empty(),
        "no case matches --filter {:?}; `dsv3-run conformance --list` names them all",
        args.filter.as_deref().unwrap_or_default()
    );
    if args.list {
        return list(&names, args.json);
    }
    let backend = FreshSystems::new(args)?;
    let bar = progress(names.len());
    let report = conformance::run(&backend, &options, &mut |result: &CaseResult| {
        bar.set_message(result.name.clone());
        bar.inc(1);
    });
    bar.finish_and_clear();
    match args.json {
        true => writeln!(std::io::stdout(), "{:#}", json(&report, &backend))?,
        false => table(&report)?,
    }
    match report.bad().count() {
        0 => Ok(()),
        failed => Err(SuiteFailed { failed, cases: report.results.len() }.into()),
    }
}

fn list(names: &[&String], as_json: bool) -> anyhow::Result<()> {
    let mut out = std::io::stdout().lock();
    if as_json {
        return Ok(writeln!(out, "{:#}", json!({ "cases": names }))?);
    }
    names.iter().try_for_each(|name| Ok(writeln!(out, "{name}")?))
}

/// On a terminal only; elsewhere it draws nothing.
fn progress(cases: usize) -> ProgressBar {
    let target = match std::io::stderr().is_terminal() {
        true => ProgressDrawTarget::stderr(),
        false => ProgressDrawTarget::hidden(),
    };
    let style = ProgressStyle::with_template("[{bar:40}] {pos}/{len} {wide_msg}");
    let style = style.unwrap_or(ProgressStyle::default_bar());
    ProgressBar::with_draw_target(Some(cases as u64), target).with_style(style)
}

/// The backend of the command line, which starts a system whenever a case wants one of its own.
struct FreshSystems<'a> {
    args: &'a ConformanceArgs,
    name: String,
    dies: u32,
    features: Vec<Feature>,
}

impl<'a> FreshSystems<'a> {
    /// Starts one system to ask what there is, so that flags that cannot be used fail here and not
    /// in every case.
    fn new(args: &'a ConformanceArgs) -> anyhow::Result<Self> {
        let platform = Platform::start(&args.system)?;
        ensure!(platform.dies() > 0, "the backend has no dies");
        let die = platform.open(DeviceId(0))?;
        let name = die.properties().backend.to_string();
        Ok(FreshSystems { args, name, dies: platform.dies(), features: Feature::probe(&*die)? })
    }
}

impl Backend for FreshSystems<'_> {
    fn name(&self) -> String {
        self.name.clone()
    }

    fn dies(&self) -> usize {
        self.dies as usize
    }

    fn open(&self) -> hal::Result<Vec<Arc<dyn Device>>> {
        let platform = Platform::start(&self.args.system).map_err(start_error)?;
        (0..self.dies).map(|die| platform.open(DeviceId(die))).collect()
    }

    fn features(&self) -> Vec<Feature> {
        self.features.clone()
    }
}

/// The device's own error where it is one.
fn start_error(error: anyhow::Error) -> Error {
    error.downcast::<Error>().unwrap_or_else(|other| Error::Runtime {
        device: DeviceId(0),
        call: "starting a system",
        code: 0,
        text: format!("{other:#}"),
    })
}

fn json(report: &Report, backend: &FreshSystems<'_>) -> Value {
    let features: Vec<String> = backend.features.iter().map(Feature::to_string).collect();
    json!({
        "backend": report.backend,
        "dies": backend.dies,
        "features": features,
        "cases": report.results.len(),
        "failed": report.bad().count(),
        "families": report.families(),
        "results": report.results,
    })
}

fn table(report: &Report) -> anyhow::Result<()> {
    let mut out = std::io::stdout().lock();
    let heading = format!(
        "{:<12} {:>7} {:>7} {:>8} {:>18} {:>18} {:>9}",
        report.backend,
        "passed",
        "failed",
        "skipped",
        "expected failures",
        "unexpected passes",
        "time"
    );
    writeln!(out, "{}", bold(&heading))?;
    let families = report.families();
    let mut all = Summary { family: "all".to_string(), ..Summary::default() };
    report.results.iter().for_each(|result| all.add(result));
    for s in families.iter().chain([&all]) {
        writeln!(
            out,
            "{:<12} {:>7} {:>7} {:>8} {:>18} {:>18} {:>9}",
            s.family,
            s.passed,
            s.failed,
            s.skipped,
            s.expected_failures,
            s.unexpected_passes,
            seconds(s.seconds)
        )?;
    }
    let mut skipped: BTreeMap<&str, usize> = BTreeMap::new();
    for result in report.results.iter().filter(|r| r.outcome == Outcome::Skipped) {
        *skipped.entry(&result.reason).or_default() += 1;
    }
    for (reason, count) in skipped {
        writeln!(out, "skipped {count}: {reason}")?;
    }
    for result in report.results.iter().filter(|r| r.outcome == Outcome::ExpectedFailure) {
        writeln!(out, "expected failure: {}: {}", result.name, result.reason)?;
    }
    for result in report.bad() {
        writeln!(out, "failed: {}: {}", result.name, result.reason)?;
    }
    Ok(())
}

//! Looking into checkpoints, and making them.

use crate::cli::CheckpointCommand;
use crate::output::{Progress, bold, bytes, count};
use crate::source;
use model::checkpoint::{
    Checkpoint, ConfigSummary, DtypeTally, Footprint, Inspection, Listing, MtpState, SynthOptions,
    inspect, inspect_config, synthesize,
};

use std::fmt::{Display, Write as _};
use std::io::Write;
use std::path::Path;

pub(crate) fn run(command: &CheckpointCommand) -> anyhow::Result<()> {
    match command {
        CheckpointCommand::Inspect { dir: Some(dir), json, .. } => inspect_dir(dir, *json),
        CheckpointCommand::Inspect { config: Some(config), json, .. } => {
            describe_config(config, *json)
        }
        // clap asks for one of the two.
        CheckpointCommand::Inspect { .. } => Ok(()),
        CheckpointCommand::Synth { config, out, seed, shard_mib } => {
            synth(config, out, *seed, *shard_mib)
        }
    }
}

fn inspect_dir(dir: &Path, json: bool) -> anyhow::Result<()> {
    let checkpoint = Checkpoint::open(dir)?;
    let report = inspect(&checkpoint);
    let mut out = std::io::stdout();
    if json {
        writeln!(out, "{:#}", serde_json::to_value(&report)?)?;
    } else {
        write!(out, "{}", table(&report)?)?;
    }
    anyhow::ensure!(
        report.is_clean(),
        "{}: the checkpoint does not match its config",
        dir.display()
    );
    Ok(())
}

fn describe_config(name: &str, json: bool) -> anyhow::Result<()> {
    let config = source::named_config(name)?;
    let summary: ConfigSummary = inspect_config(&config);
    let mut out = std::io::stdout();
    if json {
        return Ok(writeln!(out, "{:#}", serde_json::to_value(&summary)?)?);
    }
    let mut text = String::new();
    writeln!(text, "{}", bold(&format!("{name} (configuration only)")))?;
    footprint(&mut text, "main model", &summary.main)?;
    footprint(&mut text, "MTP layer", &summary.mtp)?;
    footprint(&mut text, "per token", &summary.active)?;
    dtypes(&mut text, &summary.dtypes)?;
    writeln!(text, "  KV cache     {} per token in BF16", bytes(summary.cache_bytes_per_token))?;
    Ok(write!(out, "{text}")?)
}

fn table(report: &Inspection) -> Result<String, std::fmt::Error> {
    let mut text = String::new();
    writeln!(text, "{}", bold(&report.location))?;
    footprint(&mut text, "main model", &report.main)?;
    match report.mtp_state {
        MtpState::Complete => footprint(&mut text, "MTP layer", &report.mtp)?,
        state => writeln!(text, "  MTP layer    {}", words(state))?,
    }
    footprint(&mut text, "per token", &report.active)?;
    dtypes(&mut text, &report.dtypes)?;
    let shown = 8;
    writeln!(text, "  {} file(s)", report.files.len())?;
    for file in report.files.iter().take(shown) {
        writeln!(
            text,
            "    {:<40} {:>6} tensors {:>10}",
            file.file,
            file.tensors,
            bytes(file.bytes)
        )?;
    }
    if report.files.len() > shown {
        writeln!(text, "    and {} more", report.files.len() - shown)?;
    }
    listing(&mut text, "missing", &report.missing, |name| name.clone())?;
    listing(&mut text, "unexpected", &report.unexpected, |name| name.clone())?;
    let mismatch = |m: &model::checkpoint::Mismatch| {
        format!("{} in {}: expected {}, found {}", m.tensor, m.file, m.expected, m.found)
    };
    listing(&mut text, "wrong shape", &report.wrong_shape, mismatch)?;
    listing(&mut text, "wrong dtype", &report.wrong_dtype, mismatch)?;
    for note in &report.notes {
        writeln!(text, "  note: {note}")?;
    }
    if report.is_clean() {
        writeln!(
            text,
            "  complete: every tensor of the configuration is there, in shape and dtype"
        )?;
    }
    Ok(text)
}

fn words(state: MtpState) -> &'static str {
    match state {
        MtpState::Complete => "complete",
        MtpState::Absent => "absent: the config has one, the files do not; the model runs without",
        MtpState::Partial => "incomplete: see below",
        _ => "none",
    }
}

fn footprint(text: &mut String, what: &str, f: &Footprint) -> std::fmt::Result {
    let parameters = count(f.parameters as f64);
    writeln!(
        text,
        "  {what:<12} {:>7} tensors {parameters:>8} parameters {:>10}",
        f.tensors,
        bytes(f.bytes)
    )
}

fn dtypes(text: &mut String, tallies: &[DtypeTally]) -> std::fmt::Result {
    tallies.iter().try_for_each(|t| {
        writeln!(text, "  {:<12} {:>7} tensors {:>30}", t.dtype, t.tensors, bytes(t.bytes))
    })
}

fn listing<T>(
    text: &mut String,
    what: &str,
    list: &Listing<T>,
    show: impl Fn(&T) -> String,
) -> std::fmt::Result {
    if list.count == 0 {
        return Ok(());
    }
    writeln!(text, "  {what}: {}", list.count)?;
    for item in &list.first {
        let line: &dyn Display = &show(item);
        writeln!(text, "    {line}")?;
    }
    if list.count > list.first.len() {
        writeln!(text, "    and {} more", list.count - list.first.len())?;
    }
    Ok(())
}

fn synth(config: &str, out: &Path, seed: u64, shard_mib: u64) -> anyhow::Result<()> {
    let config = source::named_config(config)?;
    let mut progress = Progress::new("writing");
    let options = SynthOptions { seed, shard_bytes: shard_mib << 20 };
    let result = synthesize(&config, out, options, &mut |done, total| progress.update(done, total));
    progress.finish();
    result?;
    let summary = inspect_config(&config);
    let size = bytes(summary.main.bytes + summary.mtp.bytes);
    writeln!(std::io::stderr(), "wrote {size} of random weights to {}", out.display())?;
    Ok(())
}

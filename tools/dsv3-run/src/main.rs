//! `dsv3-run`: runs, times and checks DeepSeek-V3 on a VACC-style accelerator or its simulator.
//!
//! This is the only crate that names backends, prints and exits.
#![expect(clippy::print_stderr, reason = "a command-line tool prints")]

mod checkpoint;
mod cli;
mod conformance;
mod devices;
mod eval;
mod generate;
mod logits;
mod output;
mod perf;
mod plan;
mod replay;
mod source;
mod system;
mod totals;
mod trace;

use clap::Parser;
use cli::{Cli, Command};
use std::process::ExitCode;

/// Exit status for input that cannot be used: flags, files, prompts, plans. As clap's own.
const BAD_INPUT: u8 = 2;
/// Exit status for a run that failed: the device, a runtime, the host.
const FAILED: u8 = 1;

fn main() -> ExitCode {
    let cli = Cli::parse();
    let result = match cli.command {
        None => generate::run(&cli.generate),
        Some(Command::Logits(args)) => logits::run(&args),
        Some(Command::Eval(args)) => eval::run(&args),
        Some(Command::Replay(args)) => replay::run(&args),
        Some(Command::Plan(args)) => plan::run(&args),
        Some(Command::Checkpoint { command }) => checkpoint::run(&command),
        Some(Command::Perf { command }) => perf::run(&command),
        Some(Command::Devices(args)) => devices::run(&args),
        Some(Command::Conformance(args)) => conformance::run(&args),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) if is_broken_pipe(&error) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{}: {}", output::paint_error("error"), describe(&error));
            ExitCode::from(exit_status(&error))
        }
    }
}

/// The error and its causes, each said once: libraries often repeat the cause in their own text.
fn describe(error: &anyhow::Error) -> String {
    let mut text = error.to_string();
    for cause in error.chain().skip(1) {
        let cause = cause.to_string();
        if !text.contains(&cause) {
            text = format!("{text}: {cause}");
        }
    }
    text
}

/// Whoever reads standard output has seen enough (`dsv3-run | head`).
fn is_broken_pipe(error: &anyhow::Error) -> bool {
    let mut causes = error.chain().filter_map(|cause| cause.downcast_ref::<std::io::Error>());
    causes.any(|io| io.kind() == std::io::ErrorKind::BrokenPipe)
}

fn exit_status(error: &anyhow::Error) -> u8 {
    let from_device = |cause: &(dyn std::error::Error + 'static)| {
        cause.is::<hal::Error>()
            || cause.is::<replay::Differs>()
            || cause.is::<conformance::SuiteFailed>()
            || matches!(cause.downcast_ref(), Some(model::engine::EngineError::Device(_)))
    };
    if error.chain().any(from_device) { FAILED } else { BAD_INPUT }
}

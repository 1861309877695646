//! Everything that continuous integration runs, as commands that anyone can run: `cargo xtask`.
#![expect(clippy::print_stdout, clippy::print_stderr, reason = "a command-line tool prints")]

mod bindings;
mod licences;
mod mutants;
mod rules;
mod speed;
mod support;

use anyhow::{Context, ensure};
use clap::{Parser, Subcommand};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

/// Checks and chores of this repository.
#[derive(Debug, Parser)]
#[command(name = "cargo xtask")]
struct Cli {
    #[command(subcommand)]
    task: Task,
}

#[derive(Debug, Subcommand)]
enum Task {
    /// Everything that continuous integration checks.
    Ci {
        /// Leave the tests out, where they have just run.
        #[arg(long)]
        skip_tests: bool,
    },
    /// Regenerates the Rust bindings of vacc.h and the list of functions not wrapped yet.
    Bindings {
        /// Change nothing; fail if what is committed differs.
        #[arg(long)]
        check: bool,
    },
    /// Licences of all dependencies against deny.toml, offline; cargo-deny too where installed.
    Licences,
    /// The speed claims of the README, measured on this host.
    Speed {
        /// A Python with oracle/requirements.txt installed, to measure transformers as well.
        #[arg(long, value_name = "PATH")]
        python: Option<PathBuf>,
    },
    /// Which ops each backend runs on which dtypes: docs/op-support.md, from the conformance suite.
    SupportMatrix {
        /// Change nothing; fail if what is committed differs.
        #[arg(long)]
        check: bool,
    },
    /// Breaks the simulator in many places, one at a time, and checks that the conformance suite
    /// notices; writes docs/mutations.md. Takes a while, and is not part of `ci`.
    Mutants {
        /// Try this one only.
        #[arg(long, value_name = "NAME")]
        only: Option<String>,
        /// Leave out those that an earlier run here has caught.
        #[arg(long, conflicts_with = "only")]
        resume: bool,
    },
    /// The architecture's rules that can be read off the sources.
    Rules,
}

fn main() -> ExitCode {
    let result = match Cli::parse().task {
        Task::Ci { skip_tests } => ci(skip_tests),
        Task::Bindings { check } => bindings::run(&root(), check),
        Task::Licences => licences::check(&root()),
        Task::Speed { python } => speed::measure(&root(), python.as_deref()),
        Task::SupportMatrix { check } => support::run(&root(), check),
        Task::Mutants { only, resume } => mutants::run(&root(), only.as_deref(), resume),
        Task::Rules => rules::check(&root()),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..")
}

fn ci(skip_tests: bool) -> anyhow::Result<()> {
    cargo(&["fmt", "--all", "--check"], &[])?;
    rules::check(&root())?;
    bindings::run(&root(), true)?;
    support::run(&root(), true)?;
    licences::check(&root())?;
    cargo(&["clippy", "--workspace", "--all-targets", "--locked", "--", "-D", "warnings"], &[])?;
    let docs = ["doc", "--workspace", "--no-deps", "--document-private-items", "--locked"];
    cargo(&docs, &[("RUSTDOCFLAGS", "-D warnings")])?;
    if !skip_tests {
        cargo(&["test", "--workspace", "--locked"], &[])?;
    }
    Ok(())
}

fn cargo(args: &[&str], env: &[(&str, &str)]) -> anyhow::Result<()> {
    println!("$ cargo {}", args.join(" "));
    let status = Command::new(env!("CARGO"))
        .args(args)
        .envs(env.iter().copied())
        .current_dir(root())
        .status()
        .context("starting cargo")?;
    ensure!(status.success(), "cargo {} failed", args[0]);
    Ok(())
}

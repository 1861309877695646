//! Performance questions: the simulator's time models, asked directly.

mod op;
mod step;
mod sweep;
mod validate;

use clap::Subcommand;

#[derive(Debug, Subcommand)]
pub(crate) enum PerfCommand {
    /// One operation on one die, or one exchange between dies: time, rates, what bounds it, how the
    /// kernel library cuts it up, and which assumed constants decide.
    Op(op::OpArgs),
    /// A step of the model on a whole machine: time, throughput, where it goes, what bounds it.
    #[command(after_help = step::EXAMPLES)]
    Step(Box<step::StepArgs>),
    /// Many steps: every combination of machines, plans, batches and lengths; all as a table, and the
    /// best of them.
    #[command(after_help = sweep::EXAMPLES)]
    Sweep(sweep::SweepArgs),
    /// Published measurements of kernels and systems against the model: every row with its signed error.
    Validate(validate::ValidateArgs),
}

/// A plan in a few letters: `TP8 DP4 EP 2mb MTP`.
fn plan_name(
    [tensor, pipeline, data]: [usize; 3],
    expert: bool,
    two_batch: bool,
    mtp: bool,
) -> String {
    let mut name = format!("TP{tensor}");
    for (letters, degree) in [("PP", pipeline), ("DP", data)] {
        if degree > 1 {
            name += &format!(" {letters}{degree}");
        }
    }
    for (letters, on) in [("EP", expert), ("2mb", two_batch), ("MTP", mtp)] {
        if on {
            name += &format!(" {letters}");
        }
    }
    name
}

pub(crate) fn run(command: &PerfCommand) -> anyhow::Result<()> {
    match command {
        PerfCommand::Op(args) => op::run(args),
        PerfCommand::Step(args) => step::run(args),
        PerfCommand::Sweep(args) => sweep::run(args),
        PerfCommand::Validate(args) => validate::run(args),
    }
}

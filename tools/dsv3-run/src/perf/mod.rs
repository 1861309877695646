//! Performance questions: the simulator's time models, asked directly.

mod op;
mod validate;

use clap::Subcommand;

#[derive(Debug, Subcommand)]
pub(crate) enum PerfCommand {
    /// One operation on one die, or one exchange between dies: time, rates, what bounds it, how the
    /// kernel library cuts it up, and which assumed constants decide.
    Op(op::OpArgs),
    /// Published measurements of kernels against the model: every row with its signed error.
    Validate(validate::ValidateArgs),
}

pub(crate) fn run(command: &PerfCommand) -> anyhow::Result<()> {
    match command {
        PerfCommand::Op(args) => op::run(args),
        PerfCommand::Validate(args) => validate::run(args),
    }
}

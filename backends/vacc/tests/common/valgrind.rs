//! Programs under valgrind: no error, and nothing left allocated that nobody can reach.

use std::ffi::OsStr;
use std::io::Write;
use std::path::Path;
use std::process::Command;

/// The program, to be run under valgrind, which makes it exit with 99 where it finds an error or a
/// leak. `None` where valgrind is not installed, which is said.
pub(crate) fn valgrind(program: impl AsRef<OsStr>) -> Option<Command> {
    if let Err(error) = Command::new("valgrind").arg("--version").output() {
        not_run(&format!("{} under valgrind ({error})", program.as_ref().display()));
        return None;
    }
    let mut command = Command::new("valgrind");
    command.args(["--quiet", "--error-exitcode=99", "--leak-check=full"]);
    command.args(["--show-leak-kinds=definite,indirect,possible"]);
    command.args(["--errors-for-leak-kinds=definite,indirect,possible"]);
    let known = Path::new(env!("CARGO_TARGET_TMPDIR")).join("valgrind.supp");
    std::fs::write(&known, include_str!("valgrind.supp")).unwrap();
    command.arg(format!("--suppressions={}", known.display()));
    // The simulator's threads take turns by sleeping and waking: one must not starve the others.
    command.arg("--fair-sched=yes").arg(program);
    Some(command)
}

/// Says what a machine lacks the tools for, past the test harness, which would swallow it.
pub(crate) fn not_run(what: &str) {
    let _ = writeln!(std::io::stderr(), "\nNOT RUN: {what}; install the package\n");
}

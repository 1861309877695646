//! The copy of the sources that mutations are applied to, and running the suite in it.

use super::data::Mutation;
use anyhow::{Context, ensure};
use std::collections::BTreeSet;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

/// A copy of the working tree under `target/`, always at the same path, with a build folder of its
/// own.
#[derive(Debug)]
pub(crate) struct Scratch {
    sources: PathBuf,
    build: PathBuf,
    log: PathBuf,
    cases: BTreeSet<String>,
}

/// How the suite went.
#[derive(Debug)]
pub(crate) enum Run {
    Passed,
    /// These cases failed, in their order.
    Failed(Vec<String>),
    /// The process ended without a verdict.
    Crashed,
    /// It did not end in time.
    Hung,
}

impl Scratch {
    /// Brings the copy up to date: files whose contents are the same keep their times, so that
    /// nothing is compiled in vain.
    pub(crate) fn sync(root: &Path) -> anyhow::Result<Scratch> {
        let folder = root.join("target/mutants");
        let sources = folder.join("workspace");
        std::fs::create_dir_all(&sources).with_context(|| sources.display().to_string())?;
        let listed = Command::new("git")
            .args(["ls-files", "-z", "--cached", "--others", "--exclude-standard"])
            .current_dir(root)
            .output()
            .context("starting git")?;
        ensure!(listed.status.success(), "git ls-files failed");
        let listed = String::from_utf8(listed.stdout).context("file names are not UTF-8")?;
        for name in listed.split('\0').filter(|name| root.join(name).is_file()) {
            copy(root, &sources, name)?;
        }
        let sources = sources.canonicalize()?;
        let folder = folder.canonicalize()?;
        let cases = conformance::cases().into_iter().map(|case| case.name).collect();
        Ok(Scratch { sources, build: folder.join("build"), log: folder.join("log"), cases })
    }

    /// Breaks the copy.
    pub(crate) fn apply(&self, mutation: &Mutation) -> anyhow::Result<()> {
        let path = self.sources.join(&mutation.file);
        let text = std::fs::read_to_string(&path).with_context(|| mutation.file.clone())?;
        let found = text.matches(&mutation.find).count();
        ensure!(found == 1, "{}: its text occurs {found} times, not once", mutation.name);
        Ok(std::fs::write(&path, text.replace(&mutation.find, &mutation.replace))?)
    }

    /// Mends it.
    pub(crate) fn restore(&self, root: &Path, mutation: &Mutation) -> anyhow::Result<()> {
        copy(root, &self.sources, &mutation.file)
    }

    /// Builds the simulator's conformance test, and says where it is.
    pub(crate) fn build(&self) -> anyhow::Result<PathBuf> {
        let output = Command::new(env!("CARGO"))
            .args(["test", "--package", "sim", "--test", "conformance", "--no-run", "--locked"])
            // Kernels compile much faster so, and small shapes do not need more.
            .args(["--config", "profile.dev.package.sim.opt-level=1"])
            .args(["--config", "profile.dev.debug=false"])
            .args(["--message-format", "json-render-diagnostics"])
            .env("CARGO_TARGET_DIR", &self.build)
            .current_dir(&self.sources)
            .output()
            .context("starting cargo")?;
        let errors = String::from_utf8_lossy(&output.stderr);
        ensure!(output.status.success(), "it does not compile:\n{errors}");
        let messages = String::from_utf8_lossy(&output.stdout);
        let program = messages
            .lines()
            .filter_map(|line| serde_json::from_str::<serde_json::Value>(line).ok())
            .filter_map(|message| Some(message["executable"].as_str()?.into()))
            .next_back();
        program.context("cargo names no test program")
    }

    /// Runs the suite, or part of it.
    pub(crate) fn run(
        &self,
        program: &Path,
        filter: Option<&str>,
        limit: Duration,
    ) -> anyhow::Result<Run> {
        let log = File::create(&self.log).with_context(|| self.log.display().to_string())?;
        let mut command = Command::new(program);
        command.arg("--nocapture").current_dir(&self.sources);
        command.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log);
        if let Some(filter) = filter {
            command.env("CONFORMANCE_FILTER", filter);
        }
        let Some(status) = wait(command.spawn().context("starting the suite")?, limit)? else {
            return Ok(Run::Hung);
        };
        if status.success() {
            return Ok(Run::Passed);
        }
        let text = String::from_utf8_lossy(&std::fs::read(&self.log)?).into_owned();
        let failed = failed_cases(&text, &self.cases);
        Ok(if failed.is_empty() { Run::Crashed } else { Run::Failed(failed) })
    }
}

fn copy(root: &Path, sources: &Path, name: &str) -> anyhow::Result<()> {
    let (from, to) = (root.join(name), sources.join(name));
    let bytes = std::fs::read(&from).with_context(|| name.to_string())?;
    if std::fs::read(&to).is_ok_and(|old| old == bytes) {
        return Ok(());
    }
    if let Some(folder) = to.parent() {
        std::fs::create_dir_all(folder)?;
    }
    std::fs::write(&to, bytes).with_context(|| to.display().to_string())
}

/// How it ended, or `None` if it had to be stopped.
fn wait(mut child: Child, limit: Duration) -> anyhow::Result<Option<ExitStatus>> {
    let began = Instant::now();
    while began.elapsed() < limit {
        if let Some(status) = child.try_wait()? {
            return Ok(Some(status));
        }
        std::thread::sleep(Duration::from_millis(50));
    }
    child.kill()?;
    child.wait()?;
    Ok(None)
}

/// The cases of the list that the test prints after "N cases failed:".
fn failed_cases(text: &str, cases: &BTreeSet<String>) -> Vec<String> {
    let list = text.split(" cases failed:\n").nth(1).unwrap_or_default();
    let names = list.lines().filter_map(|line| Some(line.split_once(": ")?.0));
    names.filter(|name| cases.contains(*name)).map(str::to_string).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn failed_cases_are_read_from_the_tests_own_words() {
        let cases = conformance::cases().into_iter().map(|c| c.name).collect();
        let text = "panicked at tests/x.rs:1:\n2 cases failed:\nmemory/alignment: 1: is off\n\
                    op/hostile/page: x\nnote: run with RUST_BACKTRACE\n";
        assert_eq!(failed_cases(text, &cases), ["memory/alignment", "op/hostile/page"]);
        assert_eq!(failed_cases("aborted", &cases), [""; 0]);
    }
}

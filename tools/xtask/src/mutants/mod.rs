//! Mutation testing of the conformance suite: the simulator is broken on purpose, in one place at a
//! time, and the suite must notice.
//!
//! The mutations are data (`hal/conformance/mutations.toml`). Each is applied to a copy of the
//! sources that lies at a fixed path, so that only the simulator is compiled again. What came of
//! it is written to `docs/mutations.md`.

mod data;
mod report;
mod scratch;

use anyhow::{Context, bail};
use data::Mutation;
use report::{Finding, Findings};
use scratch::{Run, Scratch};
use std::path::Path;
use std::time::{Duration, Instant};

/// How long the cases of one mutation may take before those that are left are given up. A mutation
/// that makes commands hang costs the suite's own limit for every case.
const LIMIT: Duration = Duration::from_secs(90);

/// Tries the mutations, or only that of this name, or with `resume` those that were not caught
/// before, and writes the report.
pub(crate) fn run(root: &Path, only: Option<&str>, resume: bool) -> anyhow::Result<()> {
    let mutations = data::load(root)?;
    let mut findings = Findings::load(root, &mutations)?;
    let chosen: Vec<&Mutation> = mutations
        .iter()
        .filter(|m| only.is_none_or(|only| m.name == only) && !(resume && findings.has(m)))
        .collect();
    if chosen.is_empty() && !resume {
        bail!("no mutation is called {:?}: see {}", only.unwrap_or_default(), data::FILE);
    }
    let scratch = Scratch::sync(root)?;
    let program = scratch.build().context("building the unmutated copy")?;
    if only.is_none() {
        match scratch.run(&program, None, 4 * LIMIT)? {
            Run::Passed => println!("control: the unmutated simulator passes"),
            other => bail!("the unmutated simulator does not pass: {other:?}"),
        }
    }
    let mut problems = Vec::new();
    for mutation in chosen {
        let began = Instant::now();
        scratch.apply(mutation)?;
        let tried = try_one(&scratch, mutation);
        scratch.restore(root, mutation)?;
        let seconds = began.elapsed().as_secs();
        match tried {
            Ok(finding) => {
                println!("{}: {finding} ({seconds} s)", mutation.name);
                findings.set(mutation, finding);
            }
            Err(problem) => {
                println!("{}: {problem:#} ({seconds} s)", mutation.name);
                findings.remove(mutation);
                problems.push(format!("{}: {problem:#}", mutation.name));
            }
        }
        findings.save(root)?;
    }
    report::write(root, &mutations, &findings)?;
    if !problems.is_empty() {
        bail!("{} mutations:\n  {}", problems.len(), problems.join("\n  "));
    }
    Ok(())
}

/// Builds and runs a mutated simulator; an error if it survives.
fn try_one(scratch: &Scratch, mutation: &Mutation) -> anyhow::Result<Finding> {
    let program = scratch.build()?;
    let filter = mutation.filter();
    match scratch.run(&program, Some(&filter), LIMIT)? {
        Run::Passed => bail!("survives {filter}: a conformance case is missing"),
        Run::Failed(cases) => match cases.contains(&mutation.case) {
            true => Ok(Finding { failed: Some(cases.len()), how: "fails".into(), filter }),
            false => bail!("{} does not fail, but: {}", mutation.case, cases.join(", ")),
        },
        // The whole process went down: what the case named does by itself must show it.
        Run::Crashed | Run::Hung => match scratch.run(&program, Some(&mutation.case), LIMIT)? {
            Run::Passed => bail!("{} passes, though others crash or hang", mutation.case),
            Run::Failed(_) => Ok(Finding { failed: None, how: "fails".into(), filter }),
            Run::Crashed => Ok(Finding { failed: None, how: "crashes".into(), filter }),
            Run::Hung => Ok(Finding { failed: None, how: "hangs".into(), filter }),
        },
    }
}

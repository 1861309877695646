//! What came of the mutations: kept between runs, and told in `docs/mutations.md`.

use super::data::{self, Mutation};
use anyhow::Context;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::fmt::{self, Write};
use std::path::Path;

const DOCUMENT: &str = "docs/mutations.md";
const KEPT: &str = "target/mutants/findings.json";

/// How one mutation was caught.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Finding {
    /// Cases that failed; unknown where the process went down or had to be stopped.
    pub(crate) failed: Option<usize>,
    /// What the case named does by itself.
    pub(crate) how: String,
    /// Which cases were run.
    pub(crate) filter: String,
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.failed {
            Some(failed) => write!(f, "caught: {failed} cases of {} fail", self.filter),
            None => write!(f, "caught: {} crashes or hangs, its case {}", self.filter, self.how),
        }
    }
}

/// What came of each mutation that was tried since it last changed.
#[derive(Debug, Default)]
pub(crate) struct Findings(BTreeMap<String, Entry>);

#[derive(Clone, Debug, Serialize, Deserialize)]
struct Entry {
    /// The mutation as it was then.
    key: String,
    finding: Finding,
}

fn key(mutation: &Mutation) -> String {
    format!("{mutation:?}")
}

impl Findings {
    /// Those of earlier runs that are about mutations as they are now.
    pub(crate) fn load(root: &Path, mutations: &[Mutation]) -> anyhow::Result<Findings> {
        let Ok(text) = std::fs::read_to_string(root.join(KEPT)) else {
            return Ok(Findings::default());
        };
        let mut all: BTreeMap<String, Entry> = serde_json::from_str(&text).context(KEPT)?;
        all.retain(|name, e| mutations.iter().any(|m| m.name == *name && key(m) == e.key));
        Ok(Findings(all))
    }

    pub(crate) fn set(&mut self, mutation: &Mutation, finding: Finding) {
        self.0.insert(mutation.name.clone(), Entry { key: key(mutation), finding });
    }

    pub(crate) fn has(&self, mutation: &Mutation) -> bool {
        self.0.contains_key(&mutation.name)
    }

    pub(crate) fn remove(&mut self, mutation: &Mutation) {
        self.0.remove(&mutation.name);
    }

    pub(crate) fn save(&self, root: &Path) -> anyhow::Result<()> {
        let text = serde_json::to_string_pretty(&self.0)?;
        std::fs::write(root.join(KEPT), text).context(KEPT)
    }
}

/// Writes the document. Mutations that survive, or were never tried, are missing from it, which a
/// test notices.
pub(crate) fn write(
    root: &Path,
    mutations: &[Mutation],
    findings: &Findings,
) -> anyhow::Result<()> {
    let cases = conformance::cases();
    let matching = |filter: &str| {
        let options =
            conformance::Options { filter: Some(filter.into()), ..conformance::Options::default() };
        cases.iter().filter(|case| options.lets_through(&case.name)).count()
    };
    let mut text = format!(
        "# What the conformance suite catches\n\n\
         Written by `cargo xtask mutants`. Each line is one place of the simulator broken on \
         purpose ({} holds the text that is replaced), and the case of the suite that fails. The \
         unmutated simulator passes all {} cases. *Cases failing* counts among those that were run, \
         which are the ones around the case named; where a mutation took the whole process down or \
         had to be stopped, the case was run by itself, and what it does is said instead.\n\n\
         | mutation | family | file | caught by | cases failing |\n|---|---|---|---|---|\n",
        data::FILE,
        cases.len()
    );
    for mutation in mutations {
        let Some(Entry { finding, .. }) = findings.0.get(&mutation.name) else { continue };
        let failing = match finding.failed {
            Some(failed) => format!("{failed} of {}", matching(&finding.filter)),
            None => finding.how.clone(),
        };
        let Mutation { name, family, file, case, .. } = mutation;
        let file = file.trim_start_matches("backends/sim/src/");
        writeln!(text, "| {name} | {family} | `{file}` | `{case}` | {failing} |")?;
    }
    std::fs::create_dir_all(root.join("docs"))?;
    std::fs::write(root.join(DOCUMENT), text).context(DOCUMENT)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_document_lists_every_mutation_with_its_case() {
        let root = crate::root();
        let text = std::fs::read_to_string(root.join(DOCUMENT)).unwrap();
        let rows: Vec<Vec<&str>> = text
            .lines()
            .filter(|line| line.starts_with("| "))
            .skip(1)
            .map(|line| line.trim_matches('|').split('|').map(str::trim).collect())
            .collect();
        let listed: Vec<(&str, String)> =
            rows.iter().map(|row| (row[0], row[3].trim_matches('`').to_string())).collect();
        let mutations = data::load(&root).unwrap();
        let expected: Vec<(&str, String)> =
            mutations.iter().map(|m| (m.name.as_str(), m.case.clone())).collect();
        assert_eq!(listed, expected, "run `cargo xtask mutants` and commit {DOCUMENT}");
        let cases: Vec<String> = conformance::cases().into_iter().map(|c| c.name).collect();
        for (name, case) in &listed {
            assert!(cases.contains(case), "{name}: there is no case {case}");
        }
    }
}

//! The mutations, read from their file.

use anyhow::Context;
use serde::Deserialize;
use std::path::Path;

/// Where they lie.
pub(crate) const FILE: &str = "hal/conformance/mutations.toml";

/// One way to break the simulator.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Mutation {
    /// What it breaks, in words with hyphens.
    pub(crate) name: String,
    /// What kind of promise it breaks.
    pub(crate) family: String,
    /// The file, from the root of the repository.
    pub(crate) file: String,
    /// Text that occurs once in the file.
    pub(crate) find: String,
    /// What takes its place.
    pub(crate) replace: String,
    /// The conformance case that must fail.
    pub(crate) case: String,
    /// Which cases to run, where neither the default nor all of them will do.
    pub(crate) only: Option<String>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    mutation: Vec<Mutation>,
}

impl Mutation {
    /// Which cases to run: those around the one that must fail.
    pub(crate) fn filter(&self) -> String {
        if let Some(only) = &self.only {
            return only.clone();
        }
        let parts: Vec<&str> = self.case.split('/').collect();
        // A family, or a kind of op or collective.
        let keep = if parts.len() > 2 { 2 } else { 1 };
        format!("{}/*", parts[..keep].join("/"))
    }
}

/// Reads them.
pub(crate) fn load(root: &Path) -> anyhow::Result<Vec<Mutation>> {
    let text = std::fs::read_to_string(root.join(FILE)).with_context(|| FILE.to_string())?;
    let file: File = toml::from_str(&text).with_context(|| FILE.to_string())?;
    Ok(file.mutation)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    #[test]
    fn every_mutation_still_has_its_place_and_its_case() {
        let root = crate::root();
        let mutations = load(&root).unwrap();
        assert!(mutations.len() >= 30);
        let names: BTreeSet<_> = mutations.iter().map(|m| &m.name).collect();
        assert_eq!(names.len(), mutations.len(), "names are unique");
        let cases: BTreeSet<_> = conformance::cases().into_iter().map(|c| c.name).collect();
        for m in &mutations {
            let text = std::fs::read_to_string(root.join(&m.file)).unwrap();
            assert_eq!(text.matches(&m.find).count(), 1, "{}: {:?} in {}", m.name, m.find, m.file);
            assert_ne!(m.find, m.replace, "{}", m.name);
            assert!(cases.contains(&m.case), "{}: there is no case {}", m.name, m.case);
        }
    }

    #[test]
    fn every_op_collective_and_family_has_a_mutation() {
        let mutations = load(&crate::root()).unwrap();
        let caught = |prefix: &str| mutations.iter().any(|m| m.case.starts_with(prefix));
        for kind in hal::OpKind::ALL {
            assert!(caught(&format!("op/{}/", kind.name())), "no mutation of {}", kind.name());
        }
        for kind in
            ["all_reduce", "reduce_scatter", "all_gather", "all_to_all", "broadcast", "send_"]
        {
            assert!(caught(&format!("collectives/{kind}")), "no mutation of {kind}");
        }
        for family in
            ["memory", "streams", "copies", "op", "supports", "collectives", "errors", "faults"]
        {
            assert!(caught(&format!("{family}/")), "no mutation of {family}");
        }
    }
}

//! What a backend hands in.

use hal::fault::FaultPlan;
use hal::{Device, Error, Result};
use std::fmt;
use std::sync::Arc;

/// What some cases need and not every backend has.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Feature {
    /// Commands compute values.
    Values,
    /// The device has a clock: completion times and traces.
    Clock,
    /// Faults can be injected.
    Faults,
    /// The backend itself refuses accesses that nothing orders.
    Hazards,
}

impl Feature {
    /// What a die has, by asking it: for a tool that meets a runtime it knows nothing about. A
    /// backend's own tests name their features, so that losing one is a failure and not a skip.
    ///
    /// # Errors
    ///
    /// What the die says when it cannot make a stream or fill a buffer.
    pub fn probe(die: &dyn Device) -> Result<Vec<Feature>> {
        let properties = die.properties();
        let mut found = Vec::new();
        if properties.functional {
            found.push(Feature::Values);
        }
        if properties.clock.is_some() {
            found.push(Feature::Clock);
        }
        if die.set_faults(Some(Arc::new(FaultPlan::default()))).is_ok() {
            die.set_faults(None)?;
            found.push(Feature::Faults);
        }
        let (writer, other) = (die.stream("probe 1")?, die.stream("probe 2")?);
        let buffer = writer.alloc(1)?;
        writer.fill(&buffer.whole(), 1)?;
        match other.fill(&buffer.whole(), 2) {
            Err(Error::Usage(_)) => found.push(Feature::Hazards),
            result => result?,
        }
        // Nothing of this may reach into a case.
        writer.point().synchronize(crate::lab::SOON)?;
        other.point().synchronize(crate::lab::SOON)?;
        Ok(found)
    }
}

impl fmt::Display for Feature {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Feature::Values => "values",
            Feature::Clock => "a clock",
            Feature::Faults => "fault injection",
            Feature::Hazards => "hazard detection",
        })
    }
}

/// Cases that a backend is not expected to pass.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Exclusion {
    /// Names, with `*` for any text.
    pub pattern: String,
    /// Why.
    pub reason: String,
}

impl Exclusion {
    /// Whether it means this case.
    pub fn matches(&self, name: &str) -> bool {
        glob(&self.pattern, name)
    }
}

/// Whether `name` is `pattern`, where `*` stands for any text.
pub(crate) fn glob(pattern: &str, name: &str) -> bool {
    let mut parts = pattern.split('*');
    let first = parts.next().unwrap_or_default();
    let Some(mut rest) = name.strip_prefix(first) else { return false };
    let mut parts: Vec<_> = parts.collect();
    let Some(last) = parts.pop() else { return rest.is_empty() };
    for part in parts {
        match rest.find(part) {
            Some(at) => rest = &rest[at + part.len()..],
            None => return false,
        }
    }
    rest.ends_with(last)
}

/// A backend under test.
pub trait Backend: Send + Sync {
    /// Its name in reports.
    fn name(&self) -> String;

    /// How many dies [`Backend::open`] can give.
    fn dies(&self) -> usize;

    /// The dies of a fresh system, in which nothing of earlier cases lives.
    ///
    /// # Errors
    ///
    /// Whatever keeps it from starting; the case fails with it.
    fn open(&self) -> Result<Vec<Arc<dyn Device>>>;

    /// What it has. Cases that need more are skipped, and say so.
    fn features(&self) -> Vec<Feature>;

    /// Cases that it can never pass. They are not run.
    fn unsupported(&self) -> Vec<Exclusion> {
        Vec::new()
    }

    /// Cases that it does not pass yet. They are run, and passing one is a failure of the list.
    fn expected_failures(&self) -> Vec<Exclusion> {
        Vec::new()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn patterns_match_whole_names() {
        for (pattern, name, expected) in [
            ("a/b", "a/b", true),
            ("a/b", "a/bc", false),
            ("a/*", "a/bc", true),
            ("*", "anything", true),
            ("a*c*e", "abcde", true),
            ("a*c*e", "abde", false),
            ("*b", "ab", true),
            ("*b", "abc", false),
        ] {
            assert_eq!(glob(pattern, name), expected, "{pattern} {name}");
        }
    }
}

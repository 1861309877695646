//! The conformance suite: what any backend must do, a third party's included.
//!
//! A backend implements [`Backend`]: how to open its dies, what it is, and which cases it does not
//! pass, with reasons. [`run()`] then runs every [case](cases()), each on its own thread with a limit,
//! so that a hang or a panic fails one case and not the suite.
//!
//! Cases are written against the contract of [`hal`] alone: kinds of errors, origins, values and
//! order, never a backend's wording. Values of ops are compared with [`op::reference`], which
//! computes in f64 from the ops' documentation; collectives with a plain sum in rank order.
//!
//! # What a pass does not prove
//!
//! Speed, and that values agree to the bit between two backends: tolerances are those of rounding.

mod backend;
mod collectives;
mod copies;
mod errors;
mod faults;
mod fused;
mod lab;
mod lists;
mod memory;
pub mod op;
mod ops;
mod run;
mod streams;
mod stuck;
mod support;

pub use backend::{Backend, Exclusion, Feature};
pub use lab::{Finding, Lab};
pub use run::{Case, CaseResult, Options, Outcome, Report, Summary, run};
pub use support::{Row, support_matrix, support_table};

/// Every case, in a fixed order. Names are unique: `family/what/details`.
pub fn cases() -> Vec<Case> {
    let mut all = Vec::new();
    memory::add_cases(&mut all);
    streams::add_cases(&mut all);
    copies::add_cases(&mut all);
    ops::add_cases(&mut all);
    fused::add_cases(&mut all);
    support::add_cases(&mut all);
    collectives::add_cases(&mut all);
    errors::add_cases(&mut all);
    faults::add_cases(&mut all);
    lists::add_cases(&mut all);
    all
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    #[test]
    fn there_are_many_cases_and_each_has_a_name_of_its_own() {
        let cases = super::cases();
        assert!(cases.len() >= 300, "{}", cases.len());
        let names: BTreeSet<_> = cases.iter().map(|c| c.name.as_str()).collect();
        assert_eq!(names.len(), cases.len());
        assert!(names.iter().all(|n| n.is_ascii() && !n.contains(' ')), "{names:?}");
    }
}

//! Failures of both sides, matched by what failed rather than by who was told when.

use crate::record::{Failed, FailedKind, Origin};
use crate::report::{FailureReport, Outcome};
use std::collections::BTreeMap;

/// What makes two errors the same failure.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Key {
    /// A die is gone: which command noticed first is a matter of moments.
    Lost(Option<u32>),
    /// A command failed while running.
    Command(Origin),
    /// A call was refused; the number of its record.
    Call(u64, FailedKind),
}

#[derive(Debug)]
struct Seen {
    record: u64,
    recorded: Option<Failed>,
    replayed: Option<Failed>,
}

/// Every failure seen, once.
#[derive(Debug, Default)]
pub(super) struct Failures(BTreeMap<Key, Seen>);

impl Failures {
    pub(super) fn recorded(&mut self, record: u64, failed: &Failed) {
        self.see(record, failed).recorded.get_or_insert_with(|| failed.clone());
    }

    pub(super) fn replayed(&mut self, record: u64, error: &hal::Error) {
        let failed = Failed::from(error);
        self.see(record, &failed).replayed.get_or_insert(failed);
    }

    fn see(&mut self, record: u64, failed: &Failed) -> &mut Seen {
        let key = match (&failed.origin, failed.kind) {
            (_, FailedKind::Lost) => Key::Lost(failed.die),
            (Some(origin), _) => Key::Command(origin.clone()),
            // Whether it is the caller's mistake or the device's limit, they need not agree on.
            (None, FailedKind::Unsupported) => Key::Call(record, FailedKind::Usage),
            (None, kind) => Key::Call(record, kind),
        };
        self.0.entry(key).or_insert(Seen { record, recorded: None, replayed: None })
    }

    /// All of them, in the order in which they were seen.
    pub(super) fn report(self) -> Vec<FailureReport> {
        let mut all: Vec<_> = self
            .0
            .into_values()
            .map(|Seen { record, recorded, replayed }| {
                let outcome = match (&recorded, &replayed) {
                    (Some(_), Some(_)) => Outcome::Same,
                    (Some(_), None) => Outcome::DidNotHappenAgain,
                    (None, _) => Outcome::New,
                };
                FailureReport { record, outcome, recorded, replayed }
            })
            .collect();
        all.sort_by_key(|failure| failure.record);
        all
    }
}

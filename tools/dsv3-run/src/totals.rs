//! Adding up where simulated time goes.

use hal::trace::{Bound, CommandKind, Span, TraceSink};
use serde::Serialize;
use std::sync::{Mutex, PoisonError};

/// Totals per kind of command.
#[derive(Debug, Default)]
pub(crate) struct Totals {
    /// A list rather than a map: there are some twenty kinds, and every command is looked up.
    by_kind: Mutex<Vec<(CommandKind, Total)>>,
}

/// One kind's total.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Total {
    pub(crate) op: &'static str,
    pub(crate) calls: u64,
    #[serde(skip)]
    pub(crate) picos: u64,
    pub(crate) time_ms: f64,
    pub(crate) bytes: u64,
    pub(crate) operations: u64,
    /// What bounded most of its calls.
    pub(crate) bound: &'static str,
    #[serde(skip)]
    bounds: Vec<(Bound, u64)>,
}

impl Total {
    fn of(kind: CommandKind) -> Self {
        Total {
            op: kind.name(),
            calls: 0,
            picos: 0,
            time_ms: 0.0,
            bytes: 0,
            operations: 0,
            bound: "",
            bounds: Vec::new(),
        }
    }
}

impl TraceSink for Totals {
    fn record(&self, span: &Span) {
        let mut by_kind = self.by_kind.lock().unwrap_or_else(PoisonError::into_inner);
        let known = by_kind.iter().position(|(kind, _)| *kind == span.kind);
        let at = known.unwrap_or_else(|| {
            by_kind.push((span.kind, Total::of(span.kind)));
            by_kind.len() - 1
        });
        let total = &mut by_kind[at].1;
        total.calls += 1;
        total.picos += span.duration();
        total.bytes += span.bytes;
        total.operations += span.operations;
        match total.bounds.iter_mut().find(|(bound, _)| *bound == span.bound) {
            Some((_, calls)) => *calls += 1,
            None => total.bounds.push((span.bound, 1)),
        }
    }
}

impl Totals {
    /// The totals, most expensive first.
    pub(crate) fn ranked(&self) -> Vec<Total> {
        let by_kind = self.by_kind.lock().unwrap_or_else(PoisonError::into_inner);
        let mut totals: Vec<Total> = by_kind.iter().map(|(_, total)| total.clone()).collect();
        for total in &mut totals {
            total.time_ms = total.picos as f64 * 1e-9;
            let most = total.bounds.iter().max_by_key(|(bound, calls)| (calls, bound.name()));
            total.bound = most.map_or("", |(bound, _)| bound.name());
        }
        totals.sort_by_key(|t| (std::cmp::Reverse(t.picos), t.op));
        totals
    }
}

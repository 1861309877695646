//! Adding up where simulated time goes.

use hal::trace::{CommandKind, Span, TraceSink};
use serde::Serialize;
use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};

/// Totals per kind of command.
#[derive(Debug, Default)]
pub(crate) struct Totals {
    by_kind: Mutex<BTreeMap<CommandKind, Total>>,
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
    bounds: BTreeMap<&'static str, u64>,
}

impl TraceSink for Totals {
    fn record(&self, span: &Span) {
        let mut by_kind = self.by_kind.lock().unwrap_or_else(PoisonError::into_inner);
        let total = by_kind.entry(span.kind).or_insert_with(|| Total {
            op: span.kind.name(),
            calls: 0,
            picos: 0,
            time_ms: 0.0,
            bytes: 0,
            operations: 0,
            bound: "",
            bounds: BTreeMap::new(),
        });
        total.calls += 1;
        total.picos += span.duration();
        total.bytes += span.bytes;
        total.operations += span.operations;
        *total.bounds.entry(span.bound.name()).or_default() += 1;
    }
}

impl Totals {
    /// The totals, most expensive first.
    pub(crate) fn ranked(&self) -> Vec<Total> {
        let by_kind = self.by_kind.lock().unwrap_or_else(PoisonError::into_inner);
        let mut totals: Vec<Total> = by_kind.values().cloned().collect();
        for total in &mut totals {
            total.time_ms = total.picos as f64 * 1e-9;
            let most = total.bounds.iter().max_by_key(|(_, calls)| **calls);
            total.bound = most.map_or("", |(name, _)| name);
        }
        totals.sort_by_key(|t| (std::cmp::Reverse(t.picos), t.op));
        totals
    }
}

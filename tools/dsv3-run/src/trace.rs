//! Adding up where simulated time goes.

use hal::trace::{CommandKind, Span, TraceSink};
use serde::Serialize;
use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};

/// Totals per kind of command. In parts, each for some of the dies, so that commands that end at the
/// same time do not wait for each other here.
#[derive(Debug, Default)]
pub(crate) struct Totals {
    parts: [Mutex<BTreeMap<CommandKind, Total>>; 16],
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

impl Total {
    fn new(kind: CommandKind) -> Self {
        Total {
            op: kind.name(),
            calls: 0,
            picos: 0,
            time_ms: 0.0,
            bytes: 0,
            operations: 0,
            bound: "",
            bounds: BTreeMap::new(),
        }
    }
}

impl TraceSink for Totals {
    fn record(&self, span: &Span) {
        let part = &self.parts[span.stream.device.0 as usize % self.parts.len()];
        let mut by_kind = part.lock().unwrap_or_else(PoisonError::into_inner);
        let total = by_kind.entry(span.kind).or_insert_with(|| Total::new(span.kind));
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
        let mut sums: BTreeMap<CommandKind, Total> = BTreeMap::new();
        for part in &self.parts {
            for (&kind, part) in &*part.lock().unwrap_or_else(PoisonError::into_inner) {
                let sum = sums.entry(kind).or_insert_with(|| Total::new(kind));
                sum.calls += part.calls;
                sum.picos += part.picos;
                sum.bytes += part.bytes;
                sum.operations += part.operations;
                for (bound, calls) in &part.bounds {
                    *sum.bounds.entry(bound).or_default() += calls;
                }
            }
        }
        let mut totals: Vec<Total> = sums.into_values().collect();
        for total in &mut totals {
            total.time_ms = total.picos as f64 * 1e-9;
            let most = total.bounds.iter().max_by_key(|(_, calls)| **calls);
            total.bound = most.map_or("", |(name, _)| name);
        }
        totals.sort_by_key(|t| (std::cmp::Reverse(t.picos), t.op));
        totals
    }
}

//! Published figures of whole systems, and what the same plan and workload take here.
//!
//! Nothing was chosen with these rows: the constants of `h800.toml` come from kernels.

use crate::routing::Routing;
use crate::step::{Estimator, Folding, PerfError};
use crate::workload::{Phase, Workload};
use model::config::Preset;
use model::engine::{EngineOptions, Overlap};
use model::plan::{ParallelOptions, ParallelPlan};
use serde::Serialize;
use sim::Machine;

/// A published figure against the prediction, in tokens per second and die.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Published {
    /// Its name in the table.
    pub id: &'static str,
    /// What was measured.
    pub what: &'static str,
    /// Where it stands.
    pub source: &'static str,
    /// Whether the figure was measured under the conditions that are simulated. Production figures
    /// are not: they contain idle time and imbalance that nobody published.
    pub comparable: bool,
    /// Tokens per second and die.
    pub measured: f64,
    /// The same, simulated.
    pub predicted: f64,
    /// Signed, against the measured figure.
    pub error: f64,
}

struct Row {
    id: &'static str,
    what: &'static str,
    source: &'static str,
    comparable: bool,
    measured: f64,
    data: usize,
    phase: Phase,
    mtp: bool,
}

const PROFILE: &str = "DeepSeek profile-data (github.com/deepseek-ai/profile-data), H800";
const PRODUCTION: &str = "DeepSeek open-infra-index, day 6, H800";

const ROWS: &[Row] = &[
    Row {
        id: "V1",
        what: "prefill, EP32, 4 prompts of 4096 tokens a die, two micro-batches, balanced",
        source: PROFILE,
        comparable: true,
        measured: 7839.0,
        data: 32,
        phase: Phase::Prefill { batch: 4, input_len: 4096, past: 0 },
        mtp: false,
    },
    Row {
        id: "V2",
        what: "decode, EP128, 128 sequences of 4096 tokens a die, two micro-batches, no MTP",
        source: PROFILE,
        comparable: true,
        measured: 2324.0,
        data: 128,
        phase: Phase::Decode { batch: 128, kv: 4096 },
        mtp: false,
    },
    Row {
        id: "V2, with MTP",
        what: "the same trace, read as with MTP at 0.85: whether it ran is not said",
        source: PROFILE,
        comparable: false,
        measured: 2324.0,
        data: 128,
        phase: Phase::Decode { batch: 128, kv: 4096 },
        mtp: true,
    },
    Row {
        id: "V3",
        what: "decode in production, EP144, mean of 4989 tokens; imbalance and load unknown",
        source: PRODUCTION,
        comparable: false,
        measured: 1850.0,
        data: 144,
        phase: Phase::Decode { batch: 128, kv: 4989 },
        mtp: true,
    },
];

/// Predicts every row.
///
/// # Errors
///
/// [`PerfError`], if the tree's own machine or model refuse a row.
pub fn published() -> Result<Vec<Published>, PerfError> {
    let machine = Machine::named("h800").map_err(|e| PerfError::Machine(e.to_string()))?;
    ROWS.iter().map(|row| predict(&machine, row)).collect()
}

fn predict(machine: &Machine, row: &Row) -> Result<Published, PerfError> {
    let config = Preset::DeepSeekV3.config();
    let parallel = ParallelOptions {
        data: row.data,
        expert: true,
        ranks_per_node: Some(machine.dies_per_host() as usize),
        ..ParallelOptions::default()
    };
    let plan =
        ParallelPlan::new(&config, parallel).map_err(|e| PerfError::Machine(e.to_string()))?;
    let options = EngineOptions {
        overlap: Overlap::TwoBatch,
        expert_capacity: Some(1.25),
        ..EngineOptions::default()
    };
    let workload =
        Workload { phase: row.phase, mtp: row.mtp, acceptance: 0.85, routing: Routing::Balanced };
    let estimator = Estimator::new(machine, plan.ranks())?;
    let told = estimator.step(&config, &plan, &options, &workload, Folding::default())?;
    let predicted = told.tokens_per_s_per_die;
    Ok(Published {
        id: row.id,
        what: row.what,
        source: row.source,
        comparable: row.comparable,
        measured: row.measured,
        predicted,
        error: predicted / row.measured - 1.0,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whole_systems_are_predicted_within_a_tenth() {
        let rows = published().unwrap();
        let comparable: Vec<_> = rows.iter().filter(|row| row.comparable).collect();
        assert_eq!(comparable.len(), 2);
        for row in comparable {
            assert!(row.error.abs() <= 0.10, "{} {:.0}: {:+.3}", row.id, row.predicted, row.error);
        }
    }
}

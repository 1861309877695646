//! Which assumed constants decide a step's time.

use crate::step::{Estimator, Folding};
use crate::workload::Workload;
use model::config::ModelConfig;
use model::engine::EngineOptions;
use model::plan::ParallelPlan;
use rayon::prelude::*;
use sim::Machine;
use sim::cost::question::{Moved, moves};

/// The assumed constants that move a step's milliseconds by more than 2% when they are halved or
/// doubled, the most influential first.
pub fn sensitivity(
    machine: &Machine,
    config: &ModelConfig,
    plan: &ParallelPlan,
    options: &EngineOptions,
    workload: &Workload,
    step_ms: f64,
) -> Vec<Moved> {
    let time = |changed: &Machine| {
        let estimator = Estimator::new(changed, plan.ranks()).ok()?;
        let step = estimator.step(config, plan, options, workload, Folding::default());
        step.ok().map(|estimate| estimate.step_ms)
    };
    // Each constant by itself, on all processors.
    let names: Vec<String> = machine.assumed();
    let mut all: Vec<Moved> = names
        .par_iter()
        .flat_map_iter(|name| {
            let mut one = machine.clone();
            // Only this one counts as assumed.
            for other in names.iter().filter(|other| *other != name) {
                if let Some(constant) = one.constant_mut(other) {
                    constant.provenance = sim::machine::Provenance::Derived;
                }
            }
            moves(&one, step_ms, time)
        })
        .collect();
    let by = |m: &Moved| (m.halved / step_ms - 1.0).abs().max((m.doubled / step_ms - 1.0).abs());
    all.sort_by(|a, b| by(b).total_cmp(&by(a)));
    all
}

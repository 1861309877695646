//! Where a step's time goes.

use crate::play::{Program, Run};
use crate::repeat::Repeated;
use model::config::ModelConfig;
use model::graph::Work;
use report::analysis::{Intervals, LayerKind};
use serde::Serialize;
use std::collections::BTreeMap;

/// Time of one kind of thing.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Part {
    /// The kind.
    pub name: String,
    /// Milliseconds that a rank is busy with it.
    pub ms: f64,
    /// Commands of a rank.
    pub commands: u64,
}

/// Where the time of a step goes, on the average rank. What runs at the same time counts each.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Breakdown {
    /// By op or collective, the longest first.
    pub by_op: Vec<Part>,
    /// By kind of layer.
    pub by_layer: Vec<Part>,
    /// By what bounds the commands: memory, matrix units, links, launching.
    pub by_bound: Vec<Part>,
    /// Milliseconds in which a rank computes.
    pub compute_ms: f64,
    /// Milliseconds in which a rank takes part in collectives.
    pub communication_ms: f64,
    /// Of those, the ones in which it does not compute.
    pub communication_exposed_ms: f64,
    /// Milliseconds in which it does neither: it waits for other ranks or for the host.
    pub idle_ms: f64,
    /// Milliseconds of the host: sending inputs, launching, noticing the end, and what it does between
    /// two steps.
    pub host_ms: f64,
}

impl Breakdown {
    /// The part of the communication that hides behind computation, 0 to 1.
    pub fn hidden_share(&self) -> f64 {
        match self.communication_ms > 0.0 {
            true => 1.0 - self.communication_exposed_ms / self.communication_ms,
            false => 0.0,
        }
    }
}

/// Sums over ranks, in picoseconds.
#[derive(Debug, Default)]
pub(crate) struct Sums {
    by_op: BTreeMap<&'static str, (f64, f64)>,
    by_layer: BTreeMap<&'static str, (f64, f64)>,
    by_bound: BTreeMap<&'static str, (f64, f64)>,
    compute: f64,
    communication: f64,
    exposed: f64,
    busy: f64,
}

impl Sums {
    /// Adds what a rank did, `weight` times, in a step that it began at 0.
    pub(crate) fn add(
        &mut self,
        config: &ModelConfig,
        program: &Program,
        runs: &[Run],
        repeated: &[Repeated],
        weight: f64,
    ) {
        self.within(config, program, runs, (0, u64::MAX), weight);
        for repeated in repeated {
            let times = weight * repeated.times as f64;
            self.within(config, program, runs, repeated.window, times);
        }
    }

    fn within(
        &mut self,
        config: &ModelConfig,
        program: &Program,
        runs: &[Run],
        (from, to): (u64, u64),
        weight: f64,
    ) {
        let (mut compute, mut communication) = (Intervals::default(), Intervals::default());
        for run in runs {
            let (start, end) = (run.start.clamp(from, to), run.end.clamp(from, to));
            let node = &program.graph.nodes()[run.node];
            let picos = (end - start) as f64 * weight;
            let begins = if (from..to).contains(&run.start) { weight } else { 0.0 };
            let add = |to: &mut BTreeMap<&'static str, (f64, f64)>, key| {
                let part: &mut (f64, f64) = to.entry(key).or_default();
                (part.0, part.1) = (part.0 + picos, part.1 + begins);
            };
            add(&mut self.by_op, node.work.name());
            let layer = LayerKind::of(&node.label, |layer| config.is_moe_layer(layer));
            add(&mut self.by_layer, layer.name());
            add(&mut self.by_bound, run.bound.name());
            match node.work {
                Work::Op(_) => compute.add(start, end),
                Work::Collectives { .. } => communication.add(start, end),
            }
        }
        let computing = compute.covered() as f64;
        let communicating = communication.covered() as f64;
        let busy = compute.and(communication).covered() as f64;
        self.compute += weight * computing;
        self.communication += weight * communicating;
        self.exposed += weight * (busy - computing);
        self.busy += weight * busy;
    }

    /// The average of so many ranks' breakdown of a device time and a host time.
    pub(crate) fn breakdown(&self, ranks: usize, device_picos: u64, host_picos: u64) -> Breakdown {
        let ranks = ranks.max(1) as f64;
        let ms = |picos: f64| picos / ranks * 1e-9;
        let parts = |all: &BTreeMap<&'static str, (f64, f64)>| {
            let mut parts: Vec<Part> = all
                .iter()
                .filter(|(_, (_, commands))| *commands > 0.0)
                .map(|(name, (picos, commands))| Part {
                    name: (*name).to_string(),
                    ms: ms(*picos),
                    commands: (commands / ranks).round() as u64,
                })
                .collect();
            parts.sort_by(|a, b| b.ms.total_cmp(&a.ms));
            parts
        };
        Breakdown {
            by_op: parts(&self.by_op),
            by_layer: parts(&self.by_layer),
            by_bound: parts(&self.by_bound),
            compute_ms: ms(self.compute),
            communication_ms: ms(self.communication),
            communication_exposed_ms: ms(self.exposed),
            idle_ms: (device_picos as f64 * 1e-9 - ms(self.busy)).max(0.0),
            host_ms: host_picos as f64 * 1e-9,
        }
    }
}

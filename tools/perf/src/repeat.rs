//! Layers that do the same at the same times: one of them is played, the others are counted.
//!
//! A timeline of integers knows no past but its state. If two layers that follow each other begin and
//! end all their commands at the same times after their own beginnings, on every lane of every rank,
//! then the state after the second is that after the first, and any number of further ones in between
//! moves all that follows by whole periods.

use crate::play::{Played, Program};
use model::config::ModelConfig;
use model::plan::RankPlan;
use std::collections::BTreeMap;

/// Layers of a kind that are played: the first ones differ, since others come before them, and so does
/// the last.
const PLAYED: usize = 6;

/// A rank with fewer layers, and how many layers are left out of each run of equal ones.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Shortened {
    pub(crate) rank: RankPlan,
    /// Dense layers left out, then mixture layers.
    pub(crate) left_out: [usize; 2],
}

/// The times of one stage that stand for more than themselves.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(crate) struct Repeated {
    /// The layer that stands for others.
    pub(crate) layer: usize,
    /// When it began, and when the next one did.
    pub(crate) window: (u64, u64),
    /// How many others.
    pub(crate) times: u64,
}

impl Repeated {
    /// Picoseconds of the layers that were not played.
    pub(crate) fn picos(&self) -> u64 {
        self.times * (self.window.1 - self.window.0)
    }
}

/// Shortens a rank's run of dense layers and its run of mixture layers.
pub(crate) fn shorten(config: &ModelConfig, rank: &RankPlan) -> Shortened {
    let std::ops::Range { start, end } = rank.layers.clone();
    let sparse = |layer: &usize| config.is_moe_layer(*layer);
    let first_sparse = (start..end).find(sparse).unwrap_or(end);
    // Dense layers among the mixture layers: no two runs.
    if !(first_sparse..end).all(|layer| sparse(&layer)) {
        return Shortened { rank: rank.clone(), left_out: [0, 0] };
    }
    let keep = |run: usize| if run > PLAYED + 1 { PLAYED } else { run };
    let (dense, mixture) = (first_sparse - start, end - first_sparse);
    let layers = first_sparse - keep(dense)..first_sparse + keep(mixture);
    Shortened {
        rank: RankPlan { layers, ..rank.clone() },
        left_out: [dense - keep(dense), mixture - keep(mixture)],
    }
}

/// When a layer's commands began and ended, after its own beginning: rank by rank.
type Signature = Vec<(usize, u64, u64)>;

/// Finds, for each stage and run, a layer that stands for those left out. [`None`] if there is none:
/// everything has to be played.
pub(crate) fn find(
    config: &ModelConfig,
    programs: &[Program],
    left_out: &[[usize; 2]],
    played: &Played,
) -> Option<Vec<Vec<Repeated>>> {
    let mut of_program: Vec<Vec<Repeated>> = vec![Vec::new(); programs.len()];
    let mut stages: BTreeMap<usize, Vec<usize>> = BTreeMap::new();
    for (index, program) in programs.iter().enumerate() {
        stages.entry(program.rank.stage.rank).or_default().push(index);
    }
    for members in stages.values() {
        for (run, &times) in left_out[members[0]].iter().enumerate() {
            if times == 0 {
                continue;
            }
            let of_run = |layer: &usize| config.is_moe_layer(*layer) == (run == 1);
            let layers: Vec<usize> =
                programs[members[0]].rank.layers.clone().filter(of_run).collect();
            let signed: Vec<(Vec<u64>, Signature)> =
                layers.iter().map(|&layer| sign(programs, members, played, layer)).collect();
            // Neither the first nor the last of the run.
            let at = (1..layers.len().saturating_sub(2)).rev().find(|&at| {
                let (a, b) = (&signed[at], &signed[at + 1]);
                let shift = b.0[0] - a.0[0];
                a.1 == b.1 && a.0.iter().zip(&b.0).all(|(a, b)| b - a == shift)
            })?;
            for (place, &member) in members.iter().enumerate() {
                let window = (signed[at].0[place], signed[at + 1].0[place]);
                let (layer, times) = (layers[at], times as u64);
                of_program[member].push(Repeated { layer, window, times });
            }
        }
    }
    Some(of_program)
}

/// When each rank began a layer, and what it did then.
fn sign(
    programs: &[Program],
    members: &[usize],
    played: &Played,
    layer: usize,
) -> (Vec<u64>, Signature) {
    let (mut begins, mut signature) = (Vec::new(), Signature::new());
    for &member in members {
        let own =
            || played.runs[member].iter().filter(|r| programs[member].layer(r.node) == Some(layer));
        let begin = own().map(|run| run.start).min().unwrap_or(0);
        signature.extend(own().map(|run| (run.lane, run.start - begin, run.end - begin)));
        begins.push(begin);
    }
    (begins, signature)
}

//! Many steps at once: grids over machines, plans, batches and lengths.

use crate::routing::{Routing, RoutingError};
use crate::step::{Estimate, Estimator, Folding, PerfError};
use crate::workload::{Phase, Workload};
use model::config::ModelConfig;
use model::engine::{EngineOptions, Overlap};
use model::numerics::Numerics;
use model::plan::{ParallelOptions, ParallelPlan};
use rayon::prelude::*;
use serde::{Deserialize, Serialize};
use sim::Machine;
use std::collections::HashMap;
use std::sync::atomic::{AtomicUsize, Ordering};

/// Why a sweep does not begin.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum SweepError {
    /// The file is no sweep.
    #[error("{0}")]
    Parse(String),
    /// Too much of it.
    #[error("the grids have {points} points; at most {most} are swept at once")]
    TooMany {
        /// Points of all grids.
        points: usize,
        /// The limit.
        most: usize,
    },
}

/// Most points of a sweep.
const MOST: usize = 1_000_000;

/// A file of grids.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    /// Model of all grids.
    #[serde(default)]
    config: Option<String>,
    grid: Vec<Grid>,
}

/// Every combination of the values of each list.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct Grid {
    /// Machines, by name or file.
    pub machine: Vec<String>,
    /// `decode`, `prefill`.
    pub phase: Vec<String>,
    /// Degrees; 1 where absent.
    #[serde(default = "one")]
    pub tensor_parallel_size: Vec<usize>,
    /// See above.
    #[serde(default = "one")]
    pub pipeline_parallel_size: Vec<usize>,
    /// See above.
    #[serde(default = "one")]
    pub data_parallel_size: Vec<usize>,
    /// Whether experts are spread over the ranks.
    #[serde(default = "no")]
    pub expert_parallel: Vec<bool>,
    /// `none`, `two-batch`.
    #[serde(default = "plain")]
    pub overlap: Vec<String>,
    /// `fp8`, `bf16`, `f32`.
    #[serde(default = "fp8")]
    pub numerics: Vec<String>,
    /// Sequences of each data rank.
    pub batch: Vec<usize>,
    /// Of decode: tokens of each sequence.
    #[serde(default)]
    pub kv: Vec<usize>,
    /// Of prefill: tokens of each prompt.
    #[serde(default)]
    pub input_len: Vec<usize>,
    /// Whether the MTP module drafts.
    #[serde(default = "no")]
    pub mtp: Vec<bool>,
    /// How often drafts are accepted.
    #[serde(default = "usual")]
    pub acceptance: Vec<f64>,
    /// `balanced`, `zipf:S`.
    #[serde(default = "balanced")]
    pub routing: Vec<String>,
}

fn one() -> Vec<usize> {
    vec![1]
}
fn no() -> Vec<bool> {
    vec![false]
}
fn plain() -> Vec<String> {
    vec!["none".into()]
}
fn fp8() -> Vec<String> {
    vec!["fp8".into()]
}
fn usual() -> Vec<f64> {
    vec![0.85]
}
fn balanced() -> Vec<String> {
    vec!["balanced".into()]
}

/// One point of a grid.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Point {
    /// Machine, by name or file.
    pub machine: String,
    /// The step.
    #[serde(flatten)]
    pub phase: Phase,
    /// Degrees.
    pub tensor_parallel_size: usize,
    /// Degrees.
    pub pipeline_parallel_size: usize,
    /// Degrees.
    pub data_parallel_size: usize,
    /// Whether experts are spread.
    pub expert_parallel: bool,
    /// `none` or `two-batch`.
    pub overlap: String,
    /// The numerics policy.
    pub numerics: String,
    /// Whether the MTP module drafts.
    pub mtp: bool,
    /// How often drafts are accepted.
    pub acceptance: f64,
    /// Where tokens' experts are.
    pub routing: String,
}

/// What became of a point.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Outcome {
    /// The point.
    #[serde(flatten)]
    pub point: Point,
    /// Its estimate.
    #[serde(flatten, skip_serializing_if = "Option::is_none")]
    pub estimate: Option<Estimate>,
    /// Or why it has none: a plan that breaks a rule, or does not fit.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
    /// The reason without the point's own numbers: the same for all points that fail alike.
    #[serde(skip)]
    pub reason: Option<String>,
}

impl Grid {
    /// Reads a file of `[[grid]]` tables: the model that it names, and all points.
    ///
    /// # Errors
    ///
    /// [`SweepError`], with the line and the field.
    pub fn parse(text: &str) -> Result<(Option<String>, Vec<Point>), SweepError> {
        let file: File = toml::from_str(text).map_err(|e| SweepError::Parse(e.to_string()))?;
        let mut points = Vec::new();
        let size: usize = file.grid.iter().map(Grid::size).fold(0, usize::saturating_add);
        if size > MOST {
            return Err(SweepError::TooMany { points: size, most: MOST });
        }
        for (number, grid) in file.grid.iter().enumerate() {
            grid.points(&mut points)
                .map_err(|problem| SweepError::Parse(format!("grid {}: {problem}", number + 1)))?;
        }
        Ok((file.config, points))
    }

    fn size(&self) -> usize {
        [
            self.machine.len(),
            self.phase.len(),
            self.tensor_parallel_size.len(),
            self.pipeline_parallel_size.len(),
            self.data_parallel_size.len(),
            self.expert_parallel.len(),
            self.overlap.len(),
            self.numerics.len(),
            self.batch.len(),
            self.kv.len().max(self.input_len.len()),
            self.mtp.len(),
            self.acceptance.len(),
            self.routing.len(),
        ]
        .into_iter()
        .fold(1, usize::saturating_mul)
    }

    /// Refuses lists that make no points, and numbers that no plan or step has.
    fn check(&self) -> Result<(), String> {
        let counts = [
            ("tensor-parallel-size", &self.tensor_parallel_size),
            ("pipeline-parallel-size", &self.pipeline_parallel_size),
            ("data-parallel-size", &self.data_parallel_size),
            ("batch", &self.batch),
            ("kv", &self.kv),
            ("input-len", &self.input_len),
        ];
        let lengths = [
            ("machine", self.machine.len()),
            ("phase", self.phase.len()),
            ("expert-parallel", self.expert_parallel.len()),
            ("overlap", self.overlap.len()),
            ("numerics", self.numerics.len()),
            ("mtp", self.mtp.len()),
            ("acceptance", self.acceptance.len()),
            ("routing", self.routing.len()),
        ];
        // Each phase asks for its own list of lengths.
        let counted = counts.iter().filter(|(name, _)| !["kv", "input-len"].contains(name));
        let mut all = lengths.into_iter().chain(counted.map(|(name, list)| (*name, list.len())));
        if let Some((name, _)) = all.find(|(_, length)| *length == 0) {
            return Err(format!("the list {name} is empty"));
        }
        if let Some((name, _)) = counts.iter().find(|(_, list)| list.contains(&0)) {
            return Err(format!("{name} has a 0; expected at least 1"));
        }
        if let Some(bad) = self.acceptance.iter().find(|share| !(0.0..=1.0).contains(*share)) {
            return Err(format!("acceptance {bad}; expected 0 to 1"));
        }
        Ok(())
    }

    fn points(&self, all: &mut Vec<Point>) -> Result<(), String> {
        self.check()?;
        for overlap in &self.overlap {
            parse_overlap(overlap)?;
        }
        for numerics in &self.numerics {
            numerics.parse::<Numerics>().map_err(|e| format!("numerics: {e}"))?;
        }
        for routing in &self.routing {
            routing.parse::<Routing>().map_err(|e| format!("routing: {e}"))?;
        }
        let phases = self.phases()?;
        // The last list changes fastest.
        for machine in &self.machine {
            for &phase in &phases {
                for &tensor_parallel_size in &self.tensor_parallel_size {
                    for &pipeline_parallel_size in &self.pipeline_parallel_size {
                        for &data_parallel_size in &self.data_parallel_size {
                            for &expert_parallel in &self.expert_parallel {
                                let plan = Point {
                                    machine: machine.clone(),
                                    phase,
                                    tensor_parallel_size,
                                    pipeline_parallel_size,
                                    data_parallel_size,
                                    expert_parallel,
                                    overlap: String::new(),
                                    numerics: String::new(),
                                    mtp: false,
                                    acceptance: 0.0,
                                    routing: String::new(),
                                };
                                self.settings(&plan, all);
                            }
                        }
                    }
                }
            }
        }
        Ok(())
    }

    fn settings(&self, plan: &Point, all: &mut Vec<Point>) {
        for overlap in &self.overlap {
            for numerics in &self.numerics {
                for &mtp in &self.mtp {
                    for &acceptance in &self.acceptance {
                        for routing in &self.routing {
                            all.push(Point {
                                overlap: overlap.clone(),
                                numerics: numerics.clone(),
                                mtp,
                                acceptance,
                                routing: routing.clone(),
                                ..plan.clone()
                            });
                        }
                    }
                }
            }
        }
    }

    fn phases(&self) -> Result<Vec<Phase>, String> {
        let mut phases = Vec::new();
        for phase in &self.phase {
            let lengths = match phase.as_str() {
                "decode" if !self.kv.is_empty() => &self.kv,
                "prefill" if !self.input_len.is_empty() => &self.input_len,
                "decode" => return Err("decode needs a list kv".into()),
                "prefill" => return Err("prefill needs a list input-len".into()),
                other => return Err(format!("phase {other:?}; expected decode or prefill")),
            };
            for &batch in &self.batch {
                phases.extend(lengths.iter().map(|&length| match phase.as_str() {
                    "decode" => Phase::Decode { batch, kv: length },
                    _ => Phase::Prefill { batch, input_len: length, past: 0 },
                }));
            }
        }
        Ok(phases)
    }
}

fn parse_overlap(text: &str) -> Result<Overlap, String> {
    match text {
        "none" => Ok(Overlap::None),
        "two-batch" => Ok(Overlap::TwoBatch),
        other => Err(format!("overlap {other:?}; expected none or two-batch")),
    }
}

/// Estimates every point, on all processors. `machines` are those that the points name; `done` is told
/// how many points are.
pub fn run(
    config: &ModelConfig,
    machines: &HashMap<String, Machine>,
    points: &[Point],
    done: &(dyn Fn(usize) + Sync),
) -> Vec<Outcome> {
    // Points on the same machine and dies share what costs they have worked out.
    let mut sizes: Vec<(&str, usize)> =
        points.iter().map(|p| (p.machine.as_str(), p.dies())).collect();
    sizes.sort_unstable();
    sizes.dedup();
    let estimators: HashMap<(&str, usize), Result<Estimator, String>> = sizes
        .into_iter()
        .map(|(name, dies)| {
            let machine = machines.get(name).ok_or_else(|| format!("no machine {name:?}"));
            let made = machine
                .and_then(|machine| Estimator::new(machine, dies).map_err(|e| e.to_string()));
            ((name, dies), made)
        })
        .collect();
    let count = AtomicUsize::new(0);
    points
        .par_iter()
        .map(|point| {
            let outcome = match &estimators[&(point.machine.as_str(), point.dies())] {
                Ok(estimator) => point.estimate(config, estimator),
                Err(problem) => Err(Impossible::rule(problem)),
            };
            done(count.fetch_add(1, Ordering::Relaxed) + 1);
            let (estimate, why) = match outcome {
                Ok(estimate) => (Some(estimate), None),
                Err(why) => (None, Some(why)),
            };
            let (error, reason) = why.map(|why| (why.error, why.reason)).unzip();
            Outcome { point: point.clone(), estimate, error, reason }
        })
        .collect()
}

/// Runs something on so many threads instead of one per processor.
///
/// # Errors
///
/// The host refuses threads.
pub fn on_threads<T: Send>(
    threads: usize,
    work: impl FnOnce() -> T + Send,
) -> Result<T, rayon::ThreadPoolBuildError> {
    Ok(rayon::ThreadPoolBuilder::new().num_threads(threads).build()?.install(work))
}

/// Why a point has no time: in full, and as it is said of all that are alike.
struct Impossible {
    error: String,
    reason: String,
}

impl Impossible {
    /// What is wrong, then after a semicolon what would be right.
    fn rule(error: &impl ToString) -> Self {
        let error = error.to_string();
        let reason = error.split(';').next().unwrap_or_default().to_string();
        Impossible { error, reason }
    }

    fn step(error: &PerfError) -> Self {
        let whole = Impossible::rule(error);
        match error.short() {
            Some(reason) => Impossible { reason, ..whole },
            None => whole,
        }
    }
}

impl Point {
    fn dies(&self) -> usize {
        let degrees =
            [self.tensor_parallel_size, self.pipeline_parallel_size, self.data_parallel_size];
        degrees.into_iter().fold(1, usize::saturating_mul)
    }

    fn estimate(
        &self,
        config: &ModelConfig,
        estimator: &Estimator,
    ) -> Result<Estimate, Impossible> {
        let per_host = estimator.machine().dies_per_host() as usize;
        let parallel = ParallelOptions {
            tensor: self.tensor_parallel_size,
            pipeline: self.pipeline_parallel_size,
            data: self.data_parallel_size,
            expert: self.expert_parallel,
            redundant_experts: None,
            ranks_per_node: (per_host < self.dies()).then_some(per_host),
        };
        let plan = ParallelPlan::new(config, parallel).map_err(|e| Impossible::rule(&e))?;
        let options = EngineOptions {
            numerics: self.numerics.parse::<Numerics>().map_err(|e| Impossible::rule(&e))?,
            overlap: parse_overlap(&self.overlap).map_err(|e| Impossible::rule(&e))?,
            expert_capacity: Some(1.25),
            ..EngineOptions::default()
        };
        let workload = Workload {
            phase: self.phase,
            mtp: self.mtp,
            acceptance: self.acceptance,
            routing: self.routing.parse().map_err(|e: RoutingError| Impossible::rule(&e))?,
        };
        let told = estimator.step(config, &plan, &options, &workload, Folding::default());
        told.map_err(|e| Impossible::step(&e))
    }
}

/// Of the decode points, those that no other beats in both tokens a second for each die and for each
/// user, by their places; the most for each die first.
pub fn pareto(outcomes: &[Outcome]) -> Vec<usize> {
    let rates = |at: usize| {
        let estimate = outcomes[at].estimate.as_ref()?;
        Some((estimate.tokens_per_s_per_die, estimate.tokens_per_s_per_user?))
    };
    let mut known: Vec<(usize, (f64, f64))> =
        (0..outcomes.len()).filter_map(|at| Some((at, rates(at)?))).collect();
    known.sort_by(|(_, a), (_, b)| b.0.total_cmp(&a.0).then(b.1.total_cmp(&a.1)));
    let mut front = Vec::new();
    let mut best = f64::NEG_INFINITY;
    for (at, (_, user)) in known {
        if user > best {
            best = user;
            front.push(at);
        }
    }
    front
}

//! Where tokens' experts are: balanced, or not.

use model::config::ModelConfig;
use model::plan::{ExpertPlacement, ParallelPlan, balance};
use rand::SeedableRng;
use rand::seq::SliceRandom;
use rand_chacha::ChaCha8Rng;
use serde::Serialize;
use std::str::FromStr;

/// How often each routed expert is chosen.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Routing {
    /// All equally often, as DeepSeek's bias makes them over time.
    Balanced,
    /// The `i`-th most popular in proportion to `i^-s`; which expert is how popular is drawn with a
    /// fixed seed.
    Zipf {
        /// The exponent; 0 is balanced.
        s: f64,
        /// The seed.
        seed: u64,
    },
    /// By counts: a histogram of a recorded run, one number for each routed expert.
    Histogram(Vec<u64>),
}

/// Why routing is not understood.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum RoutingError {
    /// A text that is no routing.
    #[error(
        "{0:?} is no routing; expected balanced, zipf:S or zipf:S:SEED (S from 0 to 4), or the path \
         of a JSON list with a count for each expert"
    )]
    Unknown(String),
    /// A histogram for another model.
    #[error("the histogram has {given} counts, and the model has {experts} routed experts")]
    Length {
        /// Counts given.
        given: usize,
        /// Counts needed.
        experts: usize,
    },
    /// A histogram that counts nothing.
    #[error("all counts of the histogram are 0")]
    Empty,
}

impl FromStr for Routing {
    type Err = RoutingError;

    /// `balanced`, `zipf:S`, `zipf:S:SEED`.
    fn from_str(text: &str) -> Result<Self, RoutingError> {
        let unknown = || RoutingError::Unknown(text.to_string());
        let mut parts = text.split(':');
        match parts.next() {
            Some("balanced") if parts.next().is_none() => Ok(Routing::Balanced),
            Some("zipf") => {
                let s: f64 = parts.next().and_then(|s| s.parse().ok()).ok_or_else(unknown)?;
                let seed = parts.next().map_or(Ok(0), str::parse).map_err(|_| unknown())?;
                match (0.0..=4.0).contains(&s) && parts.next().is_none() {
                    true => Ok(Routing::Zipf { s, seed }),
                    false => Err(unknown()),
                }
            }
            _ => Err(unknown()),
        }
    }
}

/// What routing means for a plan.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Loads {
    /// The part of all choices that falls on each physical expert; sums to 1.
    of_expert: Vec<f64>,
    placement: Option<ExpertPlacement>,
    balanced: bool,
}

impl Routing {
    /// The loads under a plan. With redundant experts, copies are placed for these loads
    /// ([`model::plan::balance`]), as a deployment that knows them would.
    pub(crate) fn loads(
        &self,
        config: &ModelConfig,
        plan: &ParallelPlan,
    ) -> Result<Loads, RoutingError> {
        let experts = config.n_routed_experts;
        let counts: Vec<u64> = match self {
            Routing::Balanced => vec![1; experts],
            Routing::Zipf { s, .. } if *s == 0.0 => vec![1; experts],
            Routing::Zipf { s, seed } => zipf(experts, *s, *seed),
            Routing::Histogram(counts) => counts.clone(),
        };
        if counts.len() != experts {
            return Err(RoutingError::Length { given: counts.len(), experts });
        }
        let all: u64 = counts.iter().sum();
        if all == 0 {
            return Err(RoutingError::Empty);
        }
        let balanced = counts.iter().all(|&c| c == counts[0]);
        let placement = plan.experts().map(|even| match balanced || even.physical() == experts {
            true => even.clone(),
            false => {
                let nodes = plan.stage_ranks() / plan.rank(0).node_size.max(1);
                let redundant = even.physical() - experts;
                balance(&counts, redundant, even.ranks(), config.n_group.max(1), nodes.max(1))
            }
        });
        let of_expert = match &placement {
            None => counts.iter().map(|&c| c as f64 / all as f64).collect(),
            Some(placement) => {
                let copies: Vec<usize> = placement.replicas().iter().map(Vec::len).collect();
                let experts = (0..placement.ranks()).flat_map(|r| placement.of_rank(r));
                experts
                    .map(|&e| counts[e as usize] as f64 / all as f64 / copies[e as usize] as f64)
                    .collect()
            }
        };
        Ok(Loads { of_expert, placement, balanced })
    }
}

impl Loads {
    /// Whether all ranks have the same to do.
    pub(crate) fn is_balanced(&self) -> bool {
        self.balanced
    }

    /// A rank's load against the mean.
    pub(crate) fn factor(&self, rank: usize) -> f64 {
        match &self.placement {
            None => 1.0,
            Some(placement) => {
                let each = placement.per_rank();
                let own = &self.of_expert[rank * each..(rank + 1) * each];
                own.iter().sum::<f64>() * placement.ranks() as f64
            }
        }
    }

    /// The largest factor of all ranks, at least 1.
    pub(crate) fn most(&self) -> f64 {
        let ranks = self.placement.as_ref().map_or(1, ExpertPlacement::ranks);
        (0..ranks).map(|rank| self.factor(rank)).fold(1.0, f64::max)
    }

    /// Experts of a rank that are expected to have rows when so many tokens choose `k` each; all
    /// experts are every rank's where they are not spread.
    pub(crate) fn active(&self, rank: usize, tokens: usize, k: usize) -> u32 {
        let own = match &self.placement {
            None => &self.of_expert[..],
            Some(placement) => {
                let each = placement.per_rank();
                &self.of_expert[rank * each..(rank + 1) * each]
            }
        };
        let some = |&share: &f64| 1.0 - (1.0 - (share * k as f64).min(1.0)).powf(tokens as f64);
        (own.iter().map(some).sum::<f64>().round() as u32).max(1)
    }
}

/// Counts in proportion to `rank^-s`, in an order drawn with the seed.
fn zipf(experts: usize, s: f64, seed: u64) -> Vec<u64> {
    let mut counts: Vec<u64> =
        (1..=experts).map(|rank| (1e9 * (rank as f64).powf(-s)).round() as u64).collect();
    counts.shuffle(&mut ChaCha8Rng::seed_from_u64(seed));
    counts
}

#[cfg(test)]
mod tests {
    use super::*;
    use model::config::Preset;
    use model::plan::ParallelOptions;

    #[test]
    fn texts_are_understood_or_refused_with_what_is_expected() {
        assert_eq!("balanced".parse(), Ok(Routing::Balanced));
        assert_eq!("zipf:0.5".parse(), Ok(Routing::Zipf { s: 0.5, seed: 0 }));
        assert_eq!("zipf:1:7".parse(), Ok(Routing::Zipf { s: 1.0, seed: 7 }));
        for text in ["", "zipf", "zipf:x", "zipf:-1", "zipf:1:2:3", "balanced:1", "uniform"] {
            let error = text.parse::<Routing>().unwrap_err().to_string();
            assert!(error.contains("balanced, zipf:S"), "{error}");
        }
    }

    #[test]
    fn skew_loads_some_ranks_and_copies_take_it_off() {
        let config = Preset::DeepSeekV3.config();
        let plan = |redundant_experts| {
            let base = ParallelOptions { data: 32, expert: true, ..ParallelOptions::default() };
            ParallelPlan::new(&config, ParallelOptions { redundant_experts, ..base }).unwrap()
        };
        let most = |routing: &Routing, redundant| {
            let loads = routing.loads(&config, &plan(redundant)).unwrap();
            let sum: f64 = (0..32).map(|rank| loads.factor(rank)).sum();
            assert!((sum - 32.0).abs() < 1e-9, "factors are against the mean");
            loads.most()
        };
        assert_eq!(most(&Routing::Balanced, None), 1.0);
        let skewed = Routing::Zipf { s: 0.8, seed: 3 };
        let (without, with) = (most(&skewed, None), most(&skewed, Some(32)));
        assert!(without > 1.5 && with < 1.1, "{without} without copies, {with} with 32");
        // Few tokens reach fewer experts where some are popular.
        let loads = |routing: &Routing| routing.loads(&config, &plan(None)).unwrap();
        let reached = |routing: &Routing| -> u32 {
            (0..32).map(|rank| loads(routing).active(rank, 32, 8)).sum()
        };
        assert!(reached(&skewed) < reached(&Routing::Balanced));
        let short = Routing::Histogram(vec![1; 8]).loads(&config, &plan(None)).unwrap_err();
        assert!(short.to_string().contains("8 counts"), "{short}");
    }
}

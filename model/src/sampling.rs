//! From logits to the next token: temperature, top-k, top-p, and a seeded draw.
//!
//! The order and the meaning are vLLM's: softmax of `logits / temperature`, of which top-k keeps the
//! k most likely tokens, of which top-p keeps the smallest set that holds at least `top_p` of the
//! remaining probability (always one token), renormalised. Equal logits rank by ascending id
//! throughout, so `top_k` of 1 is greedy decoding; vLLM would keep all that equal the k-th.
//!
//! Sampling takes exactly one number from the seeded stream for each token, greedy decoding none.
//! A draft token that was chosen without chance (an argmax draft, as MTP makes) is therefore
//! verified by sampling as usual and accepting the draft if it is what was drawn: it is accepted
//! with its probability p, the token emitted otherwise has the law of p without the draft, which is
//! the rejection rule of speculative sampling (Leviathan et al., 2023) for such drafts, and the
//! tokens are those of the same seed without speculation.

use std::cmp::Ordering;
use std::sync::Arc;

use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};

/// Why parameters or logits were refused.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum SamplingError {
    /// `temperature` is negative or not finite.
    #[error("temperature must be a finite number of at least 0 (0 is greedy), not {0}")]
    Temperature(f64),
    /// `top_k` is 0.
    #[error("top_k must be at least 1; leave it unset to consider all tokens")]
    TopK,
    /// `top_p` is outside (0, 1].
    #[error("top_p must be above 0 and at most 1 (1 considers all tokens), not {0}")]
    TopP(f64),
    /// No token may be sampled.
    #[error("no token id may be sampled: the tokenizer's vocabulary is empty")]
    NothingAllowed,
    /// The tokenizer has ids that the model gives no logit for.
    #[error(
        "the model gives {logits} logits, but the tokenizer has a token with id {highest_id}; \
         tokenizer and checkpoint do not belong together"
    )]
    TooFewLogits {
        /// Length of the logits.
        logits: usize,
        /// The highest id that may be sampled.
        highest_id: usize,
    },
    /// A logit is NaN or +infinity.
    #[error(
        "the logit of token {index} is {value} (the first of {count} that are not numbers below \
         infinity); the forward pass overflowed or read damaged weights"
    )]
    InvalidLogit {
        /// The first such id.
        index: usize,
        /// Its logit.
        value: f32,
        /// How many logits are NaN or +infinity.
        count: usize,
    },
    /// Every token that may be sampled has the logit -infinity.
    #[error("all logits of tokens that may be sampled are -inf; every token has been masked out")]
    AllMasked,
}

/// How the next token is chosen.
#[derive(Clone, Debug, PartialEq)]
pub struct SamplingParams {
    /// Divides the logits; 0 is greedy decoding. DeepSeek recommends 0.3 for V3-0324.
    pub temperature: f64,
    /// Consider only this many of the most likely tokens.
    pub top_k: Option<usize>,
    /// Consider only the most likely tokens that together have this probability.
    pub top_p: f64,
    /// Seed of the draws: equal seeds and logits give equal tokens.
    pub seed: u64,
}

impl Default for SamplingParams {
    /// Temperature 1 and no limits, as in the OpenAI API; seed 0.
    fn default() -> Self {
        Self { temperature: 1.0, top_k: None, top_p: 1.0, seed: 0 }
    }
}

impl SamplingParams {
    /// Always the most likely token.
    pub fn greedy() -> Self {
        Self { temperature: 0.0, ..Self::default() }
    }

    /// Checks the ranges.
    ///
    /// # Errors
    /// Names the first parameter out of range.
    pub fn validate(&self) -> Result<(), SamplingError> {
        if !self.temperature.is_finite() || self.temperature < 0.0 {
            return Err(SamplingError::Temperature(self.temperature));
        }
        if self.top_k == Some(0) {
            return Err(SamplingError::TopK);
        }
        if !(self.top_p > 0.0 && self.top_p <= 1.0) {
            return Err(SamplingError::TopP(self.top_p));
        }
        Ok(())
    }
}

/// The token ids that may be sampled. The others, such as the padding of the model's vocabulary,
/// never are, whatever their logits.
#[derive(Clone, Debug)]
pub enum AllowedIds {
    /// All ids below this.
    Below(usize),
    /// The ids whose entry is true; ids beyond the end are not allowed.
    Mask(Arc<[bool]>),
}

impl AllowedIds {
    fn highest(&self) -> Option<usize> {
        match self {
            Self::Below(count) => count.checked_sub(1),
            Self::Mask(mask) => mask.iter().rposition(|&allowed| allowed),
        }
    }

    fn contains(&self, id: usize) -> bool {
        match self {
            Self::Below(count) => id < *count,
            Self::Mask(mask) => mask.get(id).copied().unwrap_or(false),
        }
    }
}

/// Draws the tokens of one sequence.
#[derive(Clone, Debug)]
pub struct Sampler {
    params: SamplingParams,
    allowed: AllowedIds,
    highest: usize,
    stream: ChaCha8Rng,
    candidates: Vec<Candidate>,
    weights: Vec<f64>,
}

#[derive(Clone, Copy, Debug)]
struct Candidate {
    logit: f32,
    id: u32,
}

impl Candidate {
    /// Most likely first, then by ascending id. Logits are never NaN here.
    fn rank(&self, other: &Self) -> Ordering {
        other.logit.partial_cmp(&self.logit).unwrap_or(Ordering::Equal).then(self.id.cmp(&other.id))
    }
}

impl Sampler {
    /// A sampler at the beginning of its stream.
    ///
    /// # Errors
    /// If a parameter is out of range or no id is allowed.
    pub fn new(params: SamplingParams, allowed: AllowedIds) -> Result<Self, SamplingError> {
        params.validate()?;
        let highest = allowed.highest().ok_or(SamplingError::NothingAllowed)?;
        let stream = ChaCha8Rng::seed_from_u64(params.seed);
        let (candidates, weights) = (Vec::new(), Vec::new());
        Ok(Self { params, allowed, highest, stream, candidates, weights })
    }

    /// The parameters it was made with.
    pub fn params(&self) -> &SamplingParams {
        &self.params
    }

    /// The next token, given the logits of the whole vocabulary (padding included) at one position.
    ///
    /// # Errors
    /// If the logits are too few for the tokenizer, contain NaN or +infinity, or leave no token.
    /// The stream does not advance then.
    pub fn sample(&mut self, logits: &[f32]) -> Result<u32, SamplingError> {
        self.check(logits)?;
        if self.params.temperature == 0.0 {
            return self.greedy(logits);
        }
        self.keep_candidates(logits)?;
        // 53 random bits: every multiple of 2^-53 in [0, 1) alike.
        let uniform = (self.stream.next_u64() >> 11) as f64 / (1_u64 << 53) as f64;
        Ok(pick(&self.candidates, &self.weights, uniform))
    }

    /// The tokens that [`sample`](Self::sample) would choose from at these logits, each with its
    /// probability (which sum to 1), in the order in which it weighs them. Draws nothing.
    ///
    /// # Errors
    /// As [`sample`](Self::sample).
    pub fn probabilities(&mut self, logits: &[f32]) -> Result<Vec<(u32, f64)>, SamplingError> {
        self.check(logits)?;
        if self.params.temperature == 0.0 {
            return Ok(vec![(self.greedy(logits)?, 1.0)]);
        }
        self.keep_candidates(logits)?;
        let sum: f64 = self.weights.iter().sum();
        let ids = self.candidates.iter().map(|candidate| candidate.id);
        Ok(ids.zip(self.weights.iter().map(|weight| weight / sum)).collect())
    }

    fn check(&self, logits: &[f32]) -> Result<(), SamplingError> {
        let highest_id = self.highest;
        if logits.len() <= highest_id {
            return Err(SamplingError::TooFewLogits { logits: logits.len(), highest_id });
        }
        let invalid = |logit: &f32| logit.is_nan() || *logit == f32::INFINITY;
        let Some(index) = logits.iter().position(invalid) else { return Ok(()) };
        let count = logits.iter().filter(|logit| invalid(logit)).count();
        Err(SamplingError::InvalidLogit { index, value: logits[index], count })
    }

    fn greedy(&self, logits: &[f32]) -> Result<u32, SamplingError> {
        let mut best: Option<Candidate> = None;
        for (id, &logit) in logits[..=self.highest].iter().enumerate() {
            if logit > best.map_or(f32::NEG_INFINITY, |best| best.logit)
                && self.allowed.contains(id)
            {
                best = Some(Candidate { logit, id: id as u32 });
            }
        }
        best.map(|best| best.id).ok_or(SamplingError::AllMasked)
    }

    /// Leaves in `candidates` the tokens that temperature, top-k and top-p leave, and in `weights`
    /// their probabilities up to a common factor.
    fn keep_candidates(&mut self, logits: &[f32]) -> Result<(), SamplingError> {
        let (allowed, candidates) = (&self.allowed, &mut self.candidates);
        let finite =
            |&(id, &logit): &(usize, &f32)| logit > f32::NEG_INFINITY && allowed.contains(id);
        candidates.clear();
        candidates.extend(
            logits[..=self.highest]
                .iter()
                .enumerate()
                .filter(finite)
                .map(|(id, &logit)| Candidate { logit, id: id as u32 }),
        );
        if let Some(top_k) = self.params.top_k
            && top_k < candidates.len()
        {
            candidates.select_nth_unstable_by(top_k - 1, Candidate::rank);
            candidates.truncate(top_k);
            // The draw depends on the order, and the order that selection leaves is std's affair.
            candidates.sort_unstable_by(Candidate::rank);
        }
        let highest = candidates
            .iter()
            .map(|candidate| candidate.logit)
            .reduce(f32::max)
            .ok_or(SamplingError::AllMasked)?;
        let temperature = self.params.temperature;
        // In f64 the difference of two finite f32 is finite, so no temperature makes this NaN.
        let weight = |candidate: &Candidate| {
            ((f64::from(candidate.logit) - f64::from(highest)) / temperature).exp()
        };
        self.weights.clear();
        self.weights.extend(candidates.iter().map(weight));
        if self.params.top_p < 1.0 {
            let enough = self.params.top_p * self.weights.iter().sum::<f64>();
            let kept = nucleus(candidates, enough, weight);
            candidates.truncate(kept);
            self.weights.clear();
            self.weights.extend(candidates.iter().map(weight));
        }
        Ok(())
    }
}

/// Ranks the head of `candidates` and returns how many of them it takes to weigh `enough`.
///
/// Few tokens suffice in practice, so ever larger heads are selected and sorted, instead of sorting
/// 129,280 logits for the sake of ten.
fn nucleus(candidates: &mut [Candidate], enough: f64, weight: impl Fn(&Candidate) -> f64) -> usize {
    let (mut ranked, mut sum) = (0, 0.0);
    let mut head = 64;
    while ranked < candidates.len() {
        let rest = &mut candidates[ranked..];
        let step = head.min(rest.len());
        if step < rest.len() {
            rest.select_nth_unstable_by(step - 1, Candidate::rank);
        }
        rest[..step].sort_unstable_by(Candidate::rank);
        for candidate in &rest[..step] {
            ranked += 1;
            sum += weight(candidate);
            if sum >= enough {
                return ranked;
            }
        }
        head *= 8;
    }
    ranked
}

/// The candidate at `uniform` (in [0, 1)) of the cumulative weight. Never one of weight 0.
fn pick(candidates: &[Candidate], weights: &[f64], uniform: f64) -> u32 {
    let target = uniform * weights.iter().sum::<f64>();
    let (mut sum, mut last) = (0.0, 0);
    for (candidate, &weight) in candidates.iter().zip(weights) {
        if weight > 0.0 {
            last = candidate.id;
            sum += weight;
            if sum > target {
                break;
            }
        }
    }
    last
}

/// Natural logarithm of the probability of token `id` at temperature 1 and without top-k and top-p,
/// over all `logits`: what the OpenAI API reports as `logprob`.
///
/// `None` if there is no such token, a logit is NaN, or the highest one is not finite.
pub fn log_probability(logits: &[f32], id: u32) -> Option<f64> {
    let logit = f64::from(*logits.get(id as usize)?);
    let highest = f64::from(logits.iter().copied().fold(f32::NEG_INFINITY, f32::max));
    if !highest.is_finite() {
        return None;
    }
    let sum: f64 = logits.iter().map(|&logit| (f64::from(logit) - highest).exp()).sum();
    (!sum.is_nan()).then(|| logit - highest - sum.ln())
}

/// How far the best logit is above the second: what rounding would have to bridge for greedy
/// decoding to choose another token.
///
/// `None` if a logit is NaN or there are not two that differ from -infinity.
pub fn top2_gap(logits: &[f32]) -> Option<f32> {
    let (mut best, mut second) = (f32::NEG_INFINITY, f32::NEG_INFINITY);
    for &logit in logits {
        if logit.is_nan() {
            return None;
        }
        if logit > best {
            (second, best) = (best, logit);
        } else {
            second = second.max(logit);
        }
    }
    (second > f32::NEG_INFINITY).then_some(best - second)
}

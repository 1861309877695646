//! The sampler against a naive reference, and against the probabilities it claims to draw from.

use std::collections::BTreeSet;
use std::sync::Arc;

use model::sampling::{
    AllowedIds, Sampler, SamplingError, SamplingParams, log_probability, top2_gap,
};
use proptest::prelude::*;

const NEG_INF: f32 = f32::NEG_INFINITY;

fn params(temperature: f64, top_k: Option<usize>, top_p: f64, seed: u64) -> SamplingParams {
    SamplingParams { temperature, top_k, top_p, seed }
}

fn sampler(params: SamplingParams, vocabulary: usize) -> Sampler {
    Sampler::new(params, AllowedIds::Below(vocabulary)).unwrap()
}

fn mask(allowed: &[bool]) -> AllowedIds {
    AllowedIds::Mask(Arc::from(allowed))
}

fn greedy(logits: &[f32], allowed: AllowedIds) -> Result<u32, SamplingError> {
    Sampler::new(SamplingParams::greedy(), allowed).unwrap().sample(logits)
}

/// The definition, written for clarity: a full sort, one step after the other. Returns
/// (id, probability), most likely first.
fn reference(logits: &[f32], params: &SamplingParams, allowed: &[bool]) -> Vec<(u32, f64)> {
    let mut kept: Vec<(u32, f64)> = (0..)
        .zip(logits)
        .filter(|&(id, &logit)| allowed[id as usize] && logit > NEG_INF)
        .map(|(id, &logit)| (id, f64::from(logit) / params.temperature))
        .collect();
    kept.sort_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
    kept.truncate(params.top_k.unwrap_or(usize::MAX));
    let highest = kept[0].1;
    for (_, value) in &mut kept {
        *value = (*value - highest).exp();
    }
    normalise(&mut kept);
    let mut cumulative = 0.0;
    let needed = kept.iter().position(|(_, p)| {
        cumulative += p;
        cumulative >= params.top_p
    });
    kept.truncate(needed.map_or(kept.len(), |last| last + 1));
    normalise(&mut kept);
    kept
}

fn normalise(weights: &mut [(u32, f64)]) {
    let sum: f64 = weights.iter().map(|(_, weight)| weight).sum();
    weights.iter_mut().for_each(|(_, weight)| *weight /= sum);
}

#[test]
fn parameters_out_of_range_are_named() {
    for (params, words) in [
        (params(-0.1, None, 1.0, 0), "temperature"),
        (params(f64::NAN, None, 1.0, 0), "temperature"),
        (params(f64::INFINITY, None, 1.0, 0), "temperature"),
        (params(1.0, Some(0), 1.0, 0), "top_k"),
        (params(1.0, None, 0.0, 0), "top_p"),
        (params(1.0, None, 1.0001, 0), "top_p"),
        (params(1.0, None, f64::NAN, 0), "top_p"),
    ] {
        let message = Sampler::new(params, AllowedIds::Below(4)).unwrap_err().to_string();
        assert!(message.starts_with(words), "{message}");
    }
    for nothing in [AllowedIds::Below(0), mask(&[]), mask(&[false, false])] {
        let error = Sampler::new(SamplingParams::default(), nothing).unwrap_err();
        assert_eq!(error, SamplingError::NothingAllowed);
    }
}

#[test]
fn greedy_takes_the_best_allowed_token_and_the_lowest_id_of_equals() {
    let logits = [1.0, 3.0, 3.0, 9.0, NEG_INF, 10.0];
    assert_eq!(greedy(&logits, AllowedIds::Below(3)), Ok(1));
    assert_eq!(greedy(&logits, AllowedIds::Below(6)), Ok(5));
    assert_eq!(greedy(&logits, mask(&[true, false, true, false])), Ok(2));
    assert_eq!(greedy(&[-0.0, 0.0], AllowedIds::Below(2)), Ok(0));
}

#[test]
fn damaged_logits_are_reported_at_every_temperature() {
    for temperature in [0.0, 1.0] {
        let sample = |logits: &[f32], vocabulary: usize| {
            sampler(params(temperature, None, 1.0, 0), vocabulary).sample(logits)
        };
        let error = sample(&[0.0, f32::NAN, f32::INFINITY], 2).unwrap_err();
        assert!(
            matches!(error, SamplingError::InvalidLogit { index: 1, value, count: 2 } if value.is_nan())
        );
        assert!(error.to_string().contains("token 1 is NaN"), "{error}");
        let error = sample(&[f32::INFINITY, 0.0], 2);
        let expected = SamplingError::InvalidLogit { index: 0, value: f32::INFINITY, count: 1 };
        assert_eq!(error, Err(expected));
        assert_eq!(sample(&[NEG_INF, NEG_INF, 1.0], 2), Err(SamplingError::AllMasked));
        assert_eq!(sample(&[NEG_INF, -3e38, 1.0], 2), Ok(1));
        let expected = SamplingError::TooFewLogits { logits: 2, highest_id: 2 };
        assert_eq!(sample(&[0.0, 0.0], 3), Err(expected));
    }
}

#[test]
fn an_error_does_not_advance_the_stream() {
    let logits: Vec<f32> = (0..50).map(|i| (i % 7) as f32).collect();
    let (mut a, mut b) =
        (sampler(params(1.0, None, 1.0, 9), 50), sampler(params(1.0, None, 1.0, 9), 50));
    for _ in 0..20 {
        assert!(a.sample(&[f32::NAN; 50]).is_err());
        assert_eq!(a.sample(&logits), b.sample(&logits));
    }
}

/// Pins the stream: a change of it changes every seeded output that users have recorded. The
/// uniforms are ChaCha8 (seed_from_u64(7)) over 2^53, scaled to 1000 equally likely tokens.
#[test]
fn seeded_tokens_stay_as_they_are() {
    use rand_chacha::rand_core::{Rng, SeedableRng};
    let mut stream = rand_chacha::ChaCha8Rng::seed_from_u64(7);
    let mut sampler = sampler(params(0.7, None, 1.0, 7), 1000);
    let tokens: Vec<u32> = (0..8).map(|_| sampler.sample(&[0.5; 1000]).unwrap()).collect();
    for &token in &tokens {
        let uniform = (stream.next_u64() >> 11) as f64 / (1_u64 << 53) as f64;
        assert_eq!(token, (uniform * 1000.0) as u32);
    }
    assert_eq!(tokens, [157, 167, 704, 726, 601, 359, 83, 849]);
}

/// Pearson's statistic over `draws` draws; its mean is the degrees of freedom d and its variance
/// 2d, so d + 6 sqrt(2d) + 10 is passed by chance less than once in a million.
#[test]
fn tokens_are_drawn_with_their_probability() {
    let logits = [2.0, 0.5, 1.0, -1.0, 0.0, 1.0, 4.0, -2.0];
    let allowed = [true, true, true, true, true, true, false, true];
    let draws = 40_000;
    for params in [
        params(1.0, None, 1.0, 1),
        params(0.4, None, 1.0, 2),
        params(3.0, Some(5), 1.0, 3),
        params(1.0, None, 0.9, 4),
        params(1.5, Some(4), 0.8, 5),
    ] {
        let expected = reference(&logits, &params, &allowed);
        let mut counts = [0_u32; 8];
        let mut sampler = Sampler::new(params.clone(), mask(&allowed)).unwrap();
        for _ in 0..draws {
            counts[sampler.sample(&logits).unwrap() as usize] += 1;
        }
        let statistic: f64 = expected
            .iter()
            .map(|&(id, p)| (f64::from(counts[id as usize]) - p * f64::from(draws), p))
            .map(|(difference, p)| difference * difference / (p * f64::from(draws)))
            .sum();
        let freedom = (expected.len() - 1) as f64;
        assert!(statistic < freedom + 6.0 * (2.0 * freedom).sqrt() + 10.0, "{params:?} {counts:?}");
        let inside: u32 = expected.iter().map(|&(id, _)| counts[id as usize]).sum();
        assert_eq!(inside, draws, "{params:?}: a token outside the support was drawn");
    }
}

#[test]
fn top_p_keeps_the_smallest_set_that_reaches_it() {
    for (top_p, kept) in [(0.25, 1), (0.2501, 2), (0.5, 2), (0.75, 3), (0.7501, 4), (1.0, 4)] {
        let mut sampler = sampler(params(1.0, None, top_p, 0), 4);
        let probabilities = sampler.probabilities(&[2.0; 4]).unwrap();
        let expected: Vec<_> = (0..kept).map(|id| (id, 1.0 / f64::from(kept))).collect();
        assert_eq!(probabilities, expected, "{top_p}");
    }
}

#[test]
fn extreme_temperatures_neither_overflow_nor_divide_by_zero() {
    let logits = [f32::MAX, f32::MIN, 0.0, f32::MAX];
    for (temperature, support) in [(f64::MIN_POSITIVE, [0, 3]), (5e-324, [0, 3]), (1.0, [0, 3])] {
        let mut sampler = sampler(params(temperature, None, 1.0, 0), 4);
        let drawn: BTreeSet<u32> = (0..50).map(|_| sampler.sample(&logits).unwrap()).collect();
        assert_eq!(drawn, BTreeSet::from(support), "{temperature}");
    }
    let mut sampler = sampler(params(1e300, None, 1.0, 0), 4);
    let drawn: BTreeSet<u32> = (0..200).map(|_| sampler.sample(&logits).unwrap()).collect();
    assert_eq!(drawn.len(), 4);
}

#[test]
fn the_full_vocabulary_of_v3_is_handled() {
    let logits: Vec<f32> =
        (0..129_280_u32).map(|i| (i.wrapping_mul(2_654_435_761) >> 8) as f32 * 1e-6).collect();
    let allowed: Vec<bool> = (0..129_280).map(|id| id < 128_815).collect();
    for params in [params(0.3, None, 0.95, 1), params(5.0, Some(20_000), 0.99, 1)] {
        let support = reference(&logits, &params, &allowed).into_iter().map(|(id, _)| id);
        let mut sampler = Sampler::new(params, mask(&allowed)).unwrap();
        let kept = sampler.probabilities(&logits).unwrap().into_iter().map(|(id, _)| id);
        assert!(kept.eq(support));
    }
}

#[test]
fn log_probabilities_and_gaps() {
    let logits = [0.0, 1.0_f32.ln() + 2.0, -1.0, NEG_INF];
    let sum: f64 = logits.iter().map(|&logit| f64::from(logit).exp()).sum();
    for (id, &logit) in (0..).zip(&logits) {
        let expected = (f64::from(logit).exp() / sum).ln();
        let actual = log_probability(&logits, id).unwrap();
        assert!(actual == expected || (actual - expected).abs() < 1e-12, "{actual} {expected}");
    }
    assert_eq!(log_probability(&logits, 4), None);
    assert_eq!(log_probability(&[0.0, f32::NAN], 0), None);
    assert_eq!(log_probability(&[0.0, f32::INFINITY], 0), None);
    assert_eq!(log_probability(&[NEG_INF], 0), None);
    assert_eq!(log_probability(&[1e30, 0.0], 1), Some(-f64::from(1e30_f32)));

    assert_eq!(top2_gap(&[1.0, 4.0, 2.5, -7.0]), Some(1.5));
    assert_eq!(top2_gap(&[4.0, 4.0]), Some(0.0));
    assert_eq!(top2_gap(&[4.0]), None);
    assert_eq!(top2_gap(&[4.0, NEG_INF]), None);
    assert_eq!(top2_gap(&[4.0, 1.0, f32::NAN]), None);
}

/// Logits on a coarse grid, so that ties are common, with some masked ones.
fn vocabulary() -> impl Strategy<Value = Vec<(f32, bool)>> {
    let logit = prop_oneof![9 => (-12..12_i32).prop_map(|i| i as f32 / 4.0), 1 => Just(NEG_INF)];
    prop::collection::vec((logit, prop::bool::weighted(0.8)), 1..200)
        .prop_filter("a token to sample", |v| v.iter().any(|&(l, a)| a && l > NEG_INF))
}

fn config() -> ProptestConfig {
    ProptestConfig { cases: 256, failure_persistence: None, ..ProptestConfig::default() }
}

proptest! {
    #![proptest_config(config())]

    /// The tokens and probabilities are those of the reference, and only they are drawn. Random
    /// values of top_p do not fall on a cumulative probability, where rounding would decide.
    #[test]
    fn probabilities_are_those_of_the_reference(
        vocabulary in vocabulary(),
        temperature in 0.2..3.0_f64,
        top_k in prop::option::of(1..40_usize),
        top_p in prop_oneof![Just(1.0), 0.0137..0.9973_f64],
        seed: u64,
    ) {
        let (logits, allowed): (Vec<f32>, Vec<bool>) = vocabulary.into_iter().unzip();
        let params = params(temperature, top_k, top_p, seed);
        let expected = reference(&logits, &params, &allowed);
        let mut sampler = Sampler::new(params.clone(), mask(&allowed)).unwrap();
        let mut actual = sampler.probabilities(&logits).unwrap();
        actual.sort_by(|a, b| {
            let logit = |id: u32| logits[id as usize];
            logit(b.0).total_cmp(&logit(a.0)).then(a.0.cmp(&b.0))
        });
        prop_assert_eq!(actual.len(), expected.len());
        for (a, b) in actual.iter().zip(&expected) {
            prop_assert!(a.0 == b.0 && (a.1 - b.1).abs() < 1e-12, "{:?} {:?}", a, b);
        }

        let mut again = Sampler::new(params, mask(&allowed)).unwrap();
        for _ in 0..50 {
            let id = sampler.sample(&logits).unwrap();
            prop_assert!(expected.iter().any(|&(kept, _)| kept == id));
            prop_assert_eq!(again.sample(&logits).unwrap(), id, "same seed, same token");
        }
    }

    #[test]
    fn top_k_of_one_and_tiny_top_p_are_greedy(vocabulary in vocabulary(), seed: u64) {
        let (logits, allowed): (Vec<f32>, Vec<bool>) = vocabulary.into_iter().unzip();
        let expected = greedy(&logits, mask(&allowed)).unwrap();
        let naive = (0..)
            .zip(&logits)
            .filter(|&(id, _): &(u32, _)| allowed[id as usize])
            .fold(None, |best: Option<(u32, f32)>, (id, &logit)| match best {
                Some((_, highest)) if highest >= logit => best,
                _ => Some((id, logit)),
            });
        prop_assert_eq!(expected, naive.unwrap().0);
        for params in [params(1.0, Some(1), 1.0, seed), params(1.0, None, 1e-9, seed)] {
            let mut sampler = Sampler::new(params, mask(&allowed)).unwrap();
            prop_assert_eq!(sampler.sample(&logits).unwrap(), expected);
        }
    }
}

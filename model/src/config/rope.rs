//! Rotary frequencies and the two scale factors that YaRN brings along.
//!
//! Formulas: YaRN (Peng et al. 2023, section 3.2 to 3.4) as transformers computes them in
//! `_compute_yarn_parameters` and `yarn_apply_mscale`. DeepSeek's reference skips YaRN for contexts
//! of up to 4096 tokens; transformers and vLLM always apply it, and so does this crate.

use std::f64::consts::PI;

/// How the rotary embedding is stretched beyond the length seen in pre-training.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum RopeScaling {
    /// Plain rotary embedding.
    None,
    /// YaRN: low frequencies are interpolated, high ones kept, with a ramp between.
    Yarn {
        /// Stretch of the context (40 in V3).
        factor: f64,
        /// Rotations over the original context above which a frequency is kept (32).
        beta_fast: f64,
        /// Rotations below which a frequency is divided by `factor` (1).
        beta_slow: f64,
        /// Weight of ln(factor) in the cos/sin multiplier's numerator.
        mscale: Option<f64>,
        /// Weight of ln(factor) in its denominator and in the softmax scale.
        mscale_all_dim: Option<f64>,
        /// Context of pre-training, in tokens (4096).
        original_max_position_embeddings: usize,
        /// The cos/sin multiplier itself, where a file states it instead of deriving it.
        attention_factor: Option<f64>,
        /// Whether the ramp's ends are rounded outwards to whole dimensions (default true).
        truncate: bool,
    },
}

/// `0.1 * mscale * ln(factor) + 1`, or 1 for factors of up to 1.
fn yarn_mscale(factor: f64, mscale: f64) -> f64 {
    if factor <= 1.0 { 1.0 } else { 0.1 * mscale * factor.ln() + 1.0 }
}

/// Python's truth of an optional number: 0 counts as absent.
fn truthy(value: Option<f64>) -> Option<f64> {
    value.filter(|&number| number != 0.0)
}

impl RopeScaling {
    /// `m` of the softmax scale: `0.1 * mscale_all_dim * ln(factor) + 1`, and 1 without YaRN or
    /// `mscale_all_dim`. 1.3688879454 in V3.
    ///
    /// DeepSeek's own code takes `mscale` here; transformers and vLLM take `mscale_all_dim`, which
    /// is followed. The released files give both the same value.
    pub fn softmax_mscale(&self) -> f64 {
        match *self {
            RopeScaling::Yarn { factor, mscale_all_dim, .. } => {
                truthy(mscale_all_dim).map_or(1.0, |weight| yarn_mscale(factor, weight))
            }
            RopeScaling::None => 1.0,
        }
    }

    /// Multiplier of the rotary cosines and sines: the ratio of the two mscale terms, 1.0 in V3
    /// because they are equal; without both of them `0.1 * ln(factor) + 1`.
    pub fn attention_factor(&self) -> f64 {
        let RopeScaling::Yarn { factor, mscale, mscale_all_dim, attention_factor, .. } = *self
        else {
            return 1.0;
        };
        attention_factor.unwrap_or_else(|| match (truthy(mscale), truthy(mscale_all_dim)) {
            (Some(over), Some(under)) => yarn_mscale(factor, over) / yarn_mscale(factor, under),
            _ => yarn_mscale(factor, 1.0),
        })
    }

    /// Frequencies in radians per position for `dim` rotated dimensions, `dim / 2` of them.
    ///
    /// `f_i = theta^(-2i/dim)`; under YaRN `f_i * (1 - r_i) + f_i / factor * r_i`, where `r` ramps
    /// from 0 to 1 between the dimensions that make `beta_fast` and `beta_slow` rotations over the
    /// original context.
    pub fn inv_freq(&self, theta: f64, dim: usize) -> Vec<f64> {
        let plain = |pair: usize| theta.powf(-2.0 * pair as f64 / dim as f64);
        let RopeScaling::Yarn {
            factor,
            beta_fast,
            beta_slow,
            original_max_position_embeddings,
            truncate,
            ..
        } = *self
        else {
            return (0..dim / 2).map(plain).collect();
        };
        let original = original_max_position_embeddings as f64;
        let dimension_of = |rotations: f64| {
            dim as f64 * (original / (rotations * 2.0 * PI)).ln() / (2.0 * theta.ln())
        };
        let (mut low, mut high) = (dimension_of(beta_fast), dimension_of(beta_slow));
        if truncate {
            (low, high) = (low.floor(), high.ceil());
        }
        // `dim - 1`, not `dim / 2 - 1`: an oddity of the original code that all others copied.
        (low, high) = (low.max(0.0), high.min(dim as f64 - 1.0));
        if low == high {
            high += 0.001;
        }
        (0..dim / 2)
            .map(|pair| {
                let ramp = ((pair as f64 - low) / (high - low)).clamp(0.0, 1.0);
                plain(pair) * (1.0 - ramp) + plain(pair) / factor * ramp
            })
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Preset;

    fn close(found: f64, expected: f64, relative: f64) {
        assert!((found / expected - 1.0).abs() <= relative, "{found} is not {expected}");
    }

    /// Values of transformers' `_compute_yarn_parameters` for the released configuration.
    #[test]
    fn frequencies_of_the_released_model() {
        let inv_freq = Preset::DeepSeekV3.config().rope_inv_freq();
        assert_eq!(inv_freq.len(), 32);
        for (pair, expected) in [
            (0, 1.0),
            (10, 0.056_234_132_5),
            (11, 0.039_006_93),
            (12, 0.026_879_36),
            (16, 0.0055),
            (22, 1.778_279e-4),
            (23, 3.333_804e-5),
            (31, 3.333_804e-6),
        ] {
            close(f64::from(inv_freq[pair]), expected, 5e-7);
        }
        for (pair, &frequency) in inv_freq.iter().enumerate() {
            let plain = 10_000f64.powf(-(pair as f64) / 32.0);
            match pair {
                0..=10 => close(f64::from(frequency), plain, 1e-7),
                23.. => close(f64::from(frequency), plain / 40.0, 1e-7),
                _ => assert!(f64::from(frequency) < plain && f64::from(frequency) > plain / 40.0),
            }
        }
    }

    #[test]
    fn scales_of_the_released_model() {
        let config = Preset::DeepSeekV3.config();
        close(config.rope_scaling.softmax_mscale(), 1.368_887_945_4, 1e-10);
        close(config.softmax_scale(), 0.135_233_778_9, 1e-9);
        assert_eq!(config.rope_attention_factor(), 1.0);
    }

    #[test]
    fn factors_follow_which_mscales_are_given() {
        let yarn = |mscale, mscale_all_dim, attention_factor| RopeScaling::Yarn {
            factor: 40.0,
            beta_fast: 32.0,
            beta_slow: 1.0,
            mscale,
            mscale_all_dim,
            original_max_position_embeddings: 4096,
            attention_factor,
            truncate: true,
        };
        let full = 0.1 * 40f64.ln() + 1.0;
        let part = 0.1 * 0.707 * 40f64.ln() + 1.0;
        for (scaling, softmax, multiplier) in [
            (RopeScaling::None, 1.0, 1.0),
            (yarn(None, None, None), 1.0, full),
            (yarn(Some(1.0), None, None), 1.0, full),
            (yarn(Some(1.0), Some(0.0), None), 1.0, full),
            (yarn(None, Some(1.0), None), full, full),
            (yarn(Some(1.0), Some(0.707), None), part, full / part),
            (yarn(Some(1.0), Some(0.707), Some(0.5)), part, 0.5),
        ] {
            close(scaling.softmax_mscale(), softmax, 1e-12);
            close(scaling.attention_factor(), multiplier, 1e-12);
        }
    }

    /// A factor of 1 changes nothing, whatever the ramp; nor does `None`.
    #[test]
    fn no_stretch_is_plain_rope() {
        let scaling = RopeScaling::Yarn {
            factor: 1.0,
            beta_fast: 32.0,
            beta_slow: 1.0,
            mscale: Some(1.0),
            mscale_all_dim: Some(1.0),
            original_max_position_embeddings: 4096,
            attention_factor: None,
            truncate: false,
        };
        let plain = RopeScaling::None.inv_freq(10_000.0, 64);
        for (stretched, plain) in scaling.inv_freq(10_000.0, 64).into_iter().zip(plain) {
            close(stretched, plain, 1e-15);
        }
        assert_eq!(scaling.softmax_mscale(), 1.0);
    }

    /// Ramp ends that coincide must not divide by zero.
    #[test]
    fn degenerate_ramps_stay_finite() {
        for original in [1, 6, 4096, 1 << 30] {
            for (fast, slow) in [(32.0, 1.0), (1.0, 1.0), (1e9, 1e-9)] {
                let scaling = RopeScaling::Yarn {
                    factor: 40.0,
                    beta_fast: fast,
                    beta_slow: slow,
                    mscale: None,
                    mscale_all_dim: None,
                    original_max_position_embeddings: original,
                    attention_factor: None,
                    truncate: true,
                };
                let frequencies = scaling.inv_freq(10_000.0, 2);
                assert!(frequencies.iter().all(|f| f.is_finite() && *f > 0.0), "{scaling:?}");
            }
        }
    }
}

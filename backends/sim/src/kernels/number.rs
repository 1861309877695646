//! Conversions and elementary functions, the same bits on every processor.

use half::bf16;

/// The largest E4M3 value.
pub(crate) const E4M3_MAX: f32 = 448.0;

/// E4M3 to FP32, exactly (OCP FP8, 2023: bias 7, no infinities).
pub(crate) const fn decode_e4m3(byte: u8) -> f32 {
    if byte & 0x7f == 0x7f {
        return f32::NAN;
    }
    let bits = ((byte & 0x80) as u32) << 24 | ((byte & 0x7f) as u32) << 20;
    f32::from_bits(bits) * f32::from_bits((127 + 120) << 23)
}

/// The value of every E4M3 byte.
pub(crate) static E4M3_VALUES: [f32; 256] = {
    let mut values = [0.0; 256];
    let mut byte = 0;
    while byte < 256 {
        values[byte] = decode_e4m3(byte as u8);
        byte += 1;
    }
    values
};

/// FP32 to E4M3, to nearest even, saturating at ±448; NaN stays NaN.
#[inline(always)]
pub(crate) fn encode_e4m3(value: f32) -> u8 {
    let sign = ((value.to_bits() >> 24) & 0x80) as u8;
    let magnitude = value.abs();
    if magnitude.is_nan() {
        return sign | 0x7f;
    }
    let magnitude = magnitude.min(E4M3_MAX);
    if magnitude < f32::from_bits((127 - 6) << 23) {
        // Subnormal, in units of 2⁻⁹: adding 1.5·2²³ units rounds to an integer, ties to even.
        let units = magnitude * 512.0;
        let magic = 12_582_912.0;
        return sign | ((units + magic) - magic) as u8;
    }
    // Keep three bits of the mantissa, rounding half to even by carry.
    let bits = magnitude.to_bits();
    let rounded = bits + 0x7_ffff + ((bits >> 20) & 1);
    sign | ((rounded >> 20) - ((127 - 7) << 3)) as u8
}

/// FP32 to BF16, to nearest even; NaN stays NaN.
#[inline(always)]
pub(crate) fn to_bf16(value: f32) -> bf16 {
    let bits = value.to_bits();
    let rounded = bits.wrapping_add(0x7fff + ((bits >> 16) & 1)) >> 16;
    // A NaN must not round to infinity.
    let quiet = (bits >> 16) | 0x40;
    bf16::from_bits(if value.is_nan() { quiet } else { rounded } as u16)
}

/// `eˣ` within 2 ulp, in operations that are the same everywhere (Cody-Waite reduction, degree-6
/// polynomial of Cephes' `expf`).
#[inline(always)]
pub(crate) fn exp(x: f32) -> f32 {
    const LN2_HI: f32 = 0.693_359_4;
    const LN2_LO: f32 = -2.121_944_4e-4;
    // Beyond these the result is 0 or infinity, and the scaling below stays in range.
    let clamped = x.clamp(-104.0, 89.0);
    let n = (clamped * std::f32::consts::LOG2_E).round_ties_even();
    let r = n.mul_add(-LN2_LO, n.mul_add(-LN2_HI, clamped));
    let mut p = 1.987_569_1e-4_f32;
    for c in [1.398_199_9e-3, 8.333_452e-3, 4.166_579_6e-2, 0.166_666_65, 0.5] {
        p = p.mul_add(r, c);
    }
    let e = p.mul_add(r * r, r) + 1.0;
    // Two factors, so that results near the ends are scaled without overflow on the way.
    let n = n as i32;
    let half = n >> 1;
    let power = |n: i32| f32::from_bits(((n + 127) << 23) as u32);
    let scaled = e * power(half) * power(n - half);
    if x.is_nan() { x } else { scaled }
}

/// `1 / (1 + e⁻ˣ)`.
#[inline(always)]
pub(crate) fn sigmoid(x: f32) -> f32 {
    1.0 / (1.0 + exp(-x))
}

/// A dtype that activations come in.
pub(crate) trait Float: super::simd::Element {
    fn round(value: f32) -> Self;
}

impl Float for f32 {
    #[inline(always)]
    fn round(value: f32) -> Self {
        value
    }
}

impl Float for bf16 {
    #[inline(always)]
    fn round(value: f32) -> Self {
        to_bf16(value)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn e4m3_decodes_the_published_values() {
        for (byte, value) in [
            (0x00, 0.0),
            (0x01, 1.0 / 512.0),
            (0x08, 1.0 / 64.0),
            (0x38, 1.0),
            (0x7e, 448.0),
            (0xc0, -2.0),
        ] {
            assert_eq!(decode_e4m3(byte), value, "{byte:#x}");
        }
        assert!(decode_e4m3(0x7f).is_nan() && decode_e4m3(0xff).is_nan());
    }

    #[test]
    fn e4m3_encodes_to_the_nearest_and_ties_to_even() {
        let values: Vec<f32> = (0..0x7f).map(decode_e4m3).collect();
        for (byte, pair) in values.windows(2).enumerate() {
            let (low, high) = (pair[0], pair[1]);
            let middle = (low + high) / 2.0;
            let even = if byte % 2 == 0 { byte } else { byte + 1 } as u8;
            assert_eq!(encode_e4m3(low), byte as u8);
            assert_eq!(encode_e4m3(middle), even, "tie between {low} and {high}");
            assert_eq!(encode_e4m3(f32::from_bits(middle.to_bits() - 1)), byte as u8);
            assert_eq!(encode_e4m3(f32::from_bits(middle.to_bits() + 1)), byte as u8 + 1);
            assert_eq!(encode_e4m3(-high), (byte as u8 + 1) | 0x80);
        }
        for large in [448.0, 449.0, 1e30, f32::INFINITY] {
            assert_eq!((encode_e4m3(large), encode_e4m3(-large)), (0x7e, 0xfe));
        }
        assert_eq!(encode_e4m3(f32::NAN) & 0x7f, 0x7f);
    }

    #[test]
    fn bf16_rounds_as_the_half_crate_does() {
        for i in 0..=u32::from(u16::MAX) {
            for low in [0u32, 1, 0x7fff, 0x8000, 0x8001, 0xffff] {
                let value = f32::from_bits((i << 16) | low);
                let (ours, theirs) = (to_bf16(value), bf16::from_f32(value));
                assert!(
                    ours.to_bits() == theirs.to_bits() || (value.is_nan() && ours.is_nan()),
                    "{value:?}"
                );
            }
        }
    }

    #[test]
    fn exp_is_close_over_its_range() {
        let mut worst = 0.0f64;
        for i in -100_000..=88_000 {
            let x = i as f32 / 1000.0;
            let (got, exact) = (f64::from(exp(x)), f64::from(x).exp());
            // Below the normal range, half a subnormal step.
            let ulp = exact.max(f64::from(f32::MIN_POSITIVE)) * f64::from(f32::EPSILON);
            worst = worst.max((got - exact).abs() / ulp);
        }
        assert!(worst <= 2.0, "{worst} ulp");
        assert_eq!((exp(f32::NEG_INFINITY), exp(-200.0), exp(0.0)), (0.0, 0.0, 1.0));
        assert_eq!(exp(100.0), f32::INFINITY);
        assert!(exp(f32::NAN).is_nan());
    }
}

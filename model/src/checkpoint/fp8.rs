//! FP8 E4M3FN as far as reading and writing checkpoints needs it.
//!
//! 1 sign, 4 exponent (bias 7) and 3 mantissa bits; no infinities; NaN only at `0x7f` and `0xff`;
//! largest value 448 (OCP 8-bit floating point specification, 2023).

/// Index of the first NaN in FP8 E4M3 data, or `None`.
///
/// Runs at memory speed, meant to be called on each piece while it is copied: blocks are reduced
/// with a maximum, which compilers turn into SIMD, and only a block with a NaN is searched.
pub fn check_fp8_nan(bytes: &[u8]) -> Option<usize> {
    const BLOCK: usize = 4096;
    let is_nan = |byte: &u8| byte & 0x7f == 0x7f;
    bytes.chunks(BLOCK).enumerate().find_map(|(index, block)| {
        let largest = block.iter().fold(0, |largest: u8, byte| largest.max(byte & 0x7f));
        let within = if largest == 0x7f { block.iter().position(is_nan) } else { None };
        within.map(|offset| index * BLOCK + offset)
    })
}

/// Value of an FP8 E4M3 byte.
pub(super) fn decode(byte: u8) -> f32 {
    let (exponent, mantissa) = (i32::from(byte >> 3 & 0xf), f32::from(byte & 7));
    let magnitude = match (exponent, byte & 7) {
        (15, 7) => f32::NAN,
        (0, _) => mantissa * 2f32.powi(-9),
        _ => (1.0 + mantissa / 8.0) * 2f32.powi(exponent - 7),
    };
    if byte & 0x80 == 0 { magnitude } else { -magnitude }
}

/// The byte whose value is nearest, saturating at 448. For tables of a few values, not for data.
pub(super) fn encode_slowly(value: f32) -> u8 {
    let distance = |byte: u8| (decode(byte) - value.abs()).abs();
    let nearest = (0..=0x7e).min_by(|&a, &b| distance(a).total_cmp(&distance(b))).unwrap_or(0);
    nearest | if value < 0.0 { 0x80 } else { 0 }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn finds_the_first_nan_wherever_it_is() {
        let clean: Vec<u8> = (0..=255u8).filter(|byte| byte & 0x7f != 0x7f).collect();
        let clean = clean.repeat(50);
        assert_eq!(check_fp8_nan(&clean), None);
        assert_eq!(check_fp8_nan(&[]), None);
        for at in [0, 1, 4095, 4096, 8191, clean.len() - 1] {
            for nan in [0x7f, 0xff] {
                let mut bytes = clean.clone();
                bytes[at] = nan;
                *bytes.last_mut().unwrap() = nan;
                assert_eq!(check_fp8_nan(&bytes), Some(at));
            }
        }
    }

    #[test]
    fn codec_knows_the_landmarks() {
        for (byte, value) in
            [(0x00, 0.0), (0x01, 0.001_953_125), (0x38, 1.0), (0x7e, 448.0), (0xc0, -2.0)]
        {
            assert_eq!(decode(byte), value);
        }
        assert!(decode(0x7f).is_nan() && decode(0xff).is_nan());
        for byte in (0..=255u8).filter(|byte| byte & 0x7f != 0x7f && *byte != 0x80) {
            assert_eq!(encode_slowly(decode(byte)), byte);
        }
        assert_eq!(encode_slowly(1e9), 0x7e);
    }
}

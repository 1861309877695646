//! Comparing bytes, and numbers within a tolerance.

use hal::DType;

/// How far floating-point numbers of one read may be apart: each difference at most this part of
/// the largest magnitude among the recorded numbers of that read, `max|a − b| ≤ t · max|a|`.
///
/// Relative to the largest, not to each, because sums that cancel have small results with the
/// rounding errors of large terms. NaN equals NaN, infinities equal themselves. Numbers of other
/// dtypes, and bytes whose dtype is not known, must be equal.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Tolerance(f64);

impl Tolerance {
    /// A tolerance, finite and not negative.
    pub fn new(relative: f64) -> Option<Self> {
        (relative.is_finite() && relative >= 0.0).then_some(Tolerance(relative))
    }
}

/// How two reads differ.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Mismatch {
    /// Byte of the first difference; the first byte of its element where the dtype is known.
    pub(crate) at: usize,
    /// Elements that differ, or bytes.
    pub(crate) differ: usize,
    /// Elements in all, or bytes.
    pub(crate) of: usize,
    /// What the first was, and is.
    pub(crate) values: (String, String),
    /// The largest difference of finite numbers, relative to the largest recorded magnitude.
    pub(crate) relative: Option<f64>,
}

/// Compares what was read with what is read now, both of one length.
pub(crate) fn compare(
    recorded: &[u8],
    replayed: &[u8],
    dtype: Option<DType>,
    tolerance: Option<Tolerance>,
) -> Option<Mismatch> {
    if recorded == replayed {
        return None;
    }
    let dtype = dtype.filter(|d| recorded.len().is_multiple_of(d.size())).unwrap_or(DType::U8);
    let elements = || recorded.chunks_exact(dtype.size()).zip(replayed.chunks_exact(dtype.size()));
    let numbers = || elements().filter_map(|(a, b)| Some((number(dtype, a)?, number(dtype, b)?)));
    let magnitude = numbers().map(|(a, _)| a.abs()).filter(|a| a.is_finite()).fold(0.0, f64::max);
    let allowed = tolerance.map(|Tolerance(relative)| relative * magnitude);
    let differs = |a: &[u8], b: &[u8]| match (allowed, number(dtype, a), number(dtype, b)) {
        _ if a == b => false,
        (Some(allowed), Some(a), Some(b)) => {
            !(a == b || (a.is_nan() && b.is_nan()) || (a - b).abs() <= allowed)
        }
        _ => true,
    };
    let mut different = elements().enumerate().filter(|(_, (a, b))| differs(a, b));
    let (first, (a, b)) = different.next()?;
    let relative = numbers()
        .map(|(a, b)| (a - b).abs())
        .filter(|d| d.is_finite())
        .reduce(f64::max)
        .map(|largest| largest / magnitude)
        .filter(|r| r.is_finite());
    Some(Mismatch {
        at: first * dtype.size(),
        differ: 1 + different.count(),
        of: recorded.len() / dtype.size(),
        values: (show(dtype, a), show(dtype, b)),
        relative,
    })
}

/// The value of a floating-point element.
fn number(dtype: DType, bytes: &[u8]) -> Option<f64> {
    match (dtype, bytes) {
        (DType::F32, &[a, b, c, d]) => Some(f64::from(f32::from_le_bytes([a, b, c, d]))),
        (DType::Bf16, &[a, b]) => Some(f64::from(f32::from_le_bytes([0, 0, a, b]))),
        (DType::F8E4M3, &[byte]) => Some(e4m3(byte)),
        _ => None,
    }
}

/// See [`DType::F8E4M3`].
fn e4m3(byte: u8) -> f64 {
    let (exponent, mantissa) = (i32::from(byte >> 3 & 0xf), f64::from(byte & 7));
    let magnitude = match (exponent, byte & 7) {
        (0, _) => mantissa / 8.0 * 2f64.powi(-6),
        (15, 7) => f64::NAN,
        _ => (1.0 + mantissa / 8.0) * 2f64.powi(exponent - 7),
    };
    if byte & 0x80 == 0 { magnitude } else { -magnitude }
}

fn show(dtype: DType, bytes: &[u8]) -> String {
    match (dtype, bytes) {
        (DType::I32, &[a, b, c, d]) => i32::from_le_bytes([a, b, c, d]).to_string(),
        (DType::F32, &[a, b, c, d]) => f32::from_le_bytes([a, b, c, d]).to_string(),
        _ => match number(dtype, bytes) {
            Some(number) => number.to_string(),
            None => bytes.iter().map(|b| format!("{b:#04x}")).collect::<Vec<_>>().join(" "),
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn f32s(values: &[f32]) -> Vec<u8> {
        values.iter().flat_map(|v| v.to_le_bytes()).collect()
    }

    #[test]
    fn floats_are_compared_relative_to_the_largest() {
        let recorded = f32s(&[100.0, 0.0, f32::NAN, f32::INFINITY, -1.0]);
        let close = f32s(&[100.05, 0.05, -f32::NAN, f32::INFINITY, -1.05]);
        let with =
            |replayed: &[u8], t| compare(&recorded, replayed, Some(DType::F32), Tolerance::new(t));
        assert_eq!(with(&close, 1e-3), None);
        let mismatch = with(&close, 1e-4).unwrap();
        assert_eq!((mismatch.at, mismatch.differ, mismatch.of), (0, 3, 5));
        assert!((mismatch.relative.unwrap() - 5e-4).abs() < 1e-6);
        for (index, value) in [(2, 0.0), (3, f32::NEG_INFINITY), (3, 1e30), (1, f32::NAN)] {
            let mut values = vec![100.0, 0.0, f32::NAN, f32::INFINITY, -1.0];
            values[index] = value;
            let mismatch = with(&f32s(&values), 0.5).unwrap();
            assert_eq!((mismatch.at, mismatch.differ), (4 * index, 1), "{value}");
        }
    }

    #[test]
    fn other_bytes_are_equal_or_not() {
        let tolerance = Tolerance::new(1.0);
        let (a, b) = (7i32.to_le_bytes(), 8i32.to_le_bytes());
        let mismatch = compare(&a, &b, Some(DType::I32), tolerance).unwrap();
        assert_eq!(mismatch.values, ("7".to_string(), "8".to_string()));
        let mismatch = compare(&[1, 2, 3], &[1, 0, 0], None, tolerance).unwrap();
        assert_eq!((mismatch.at, mismatch.differ, mismatch.of), (1, 2, 3));
        assert_eq!(mismatch.values, ("0x02".to_string(), "0x00".to_string()));
        assert_eq!(compare(&a, &a, None, None), None);
        assert_eq!((Tolerance::new(f64::NAN), Tolerance::new(-1.0)), (None, None));
    }

    #[test]
    fn e4m3_values() {
        for (byte, value) in
            [(0x00, 0.0), (0x01, 2f64.powi(-9)), (0x38, 1.0), (0x7e, 448.0), (0xfe, -448.0)]
        {
            assert_eq!(e4m3(byte), value);
        }
        assert!(e4m3(0x7f).is_nan() && e4m3(0xff).is_nan());
    }
}

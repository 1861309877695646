//! Decimal fractions, exact from integers.

use std::fmt;

/// A number of so many decimal places, without the zeros at its end.
#[derive(Clone, Copy, Debug)]
pub(super) struct Decimal {
    value: u128,
    places: u32,
}

impl Decimal {
    /// Picoseconds as microseconds.
    pub(super) fn micros(picos: u64) -> Decimal {
        Decimal { value: picos.into(), places: 6 }
    }

    /// 10¹² a second, to three places.
    pub(super) fn tera_per_second(count: u64, picos: u64) -> Decimal {
        Decimal { value: u128::from(count) * 1000 / u128::from(picos.max(1)), places: 3 }
    }

    /// 10⁹ a second, to three places.
    pub(super) fn giga_per_second(count: u64, picos: u64) -> Decimal {
        Decimal::millis(mega_per_second(count, picos))
    }

    /// Thousandths.
    pub(super) fn millis(thousandths: u64) -> Decimal {
        Decimal { value: thousandths.into(), places: 3 }
    }
}

/// 10⁶ a second, rounded down.
pub(super) fn mega_per_second(count: u64, picos: u64) -> u64 {
    let rate = u128::from(count) * 1_000_000 / u128::from(picos.max(1));
    u64::try_from(rate).unwrap_or(u64::MAX)
}

impl fmt::Display for Decimal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let one = 10u128.pow(self.places);
        let (whole, mut fraction) = (self.value / one, self.value % one);
        write!(f, "{whole}")?;
        if fraction == 0 {
            return Ok(());
        }
        let mut places = self.places as usize;
        while fraction.is_multiple_of(10) {
            fraction /= 10;
            places -= 1;
        }
        write!(f, ".{fraction:0places$}")
    }
}

/// The duration to write for an event from `start` to `end`: the exact one, or the longest with
/// which a viewer that rounds its start and its duration to nanoseconds has it end where `end` may
/// come to lie at the latest.
pub(super) fn duration(start: u64, end: u64) -> u64 {
    // Halves may be rounded either way, since viewers compute in floating point.
    let latest_start = (start + 501) / 1000;
    let earliest_end = (end + 498) / 1000;
    let whole = earliest_end.saturating_sub(latest_start);
    (end - start).min(whole * 1000 + 498)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fractions_are_exact_and_short() {
        let micros = |picos| Decimal::micros(picos).to_string();
        assert_eq!(micros(0), "0");
        assert_eq!(micros(1), "0.000001");
        assert_eq!(micros(1_500_000), "1.5");
        assert_eq!(micros(20_000_000), "20");
        assert_eq!(micros(u64::MAX), "18446744073709.551615");
        assert_eq!(Decimal::tera_per_second(3, 2).to_string(), "1.5");
        assert_eq!(Decimal::giga_per_second(136, 1000).to_string(), "136");
        assert_eq!(Decimal::giga_per_second(1, 3).to_string(), "333.333");
        assert_eq!(mega_per_second(u64::MAX, 1), u64::MAX);
    }

    #[test]
    fn events_do_not_overlap_where_viewers_round() {
        let nearest = |picos: u64| {
            (Decimal::micros(picos).to_string().parse::<f64>().unwrap() * 1000.0).round() as u64
        };
        for offset in [0, 7_000_000_000_000] {
            for start in (0..2000).step_by(7).chain([499, 500, 501, 1499, 1500]) {
                for length in (0..3000).step_by(11).chain([499, 500, 501]) {
                    let (start, end) = (start + offset, start + offset + length);
                    let shown = duration(start, end);
                    assert!(shown <= length && shown + 2000 > length, "{start} {length}: {shown}");
                    assert!(nearest(start) + nearest(shown) <= nearest(end).max(nearest(start)));
                    assert!(start / 1000 + shown / 1000 <= end / 1000, "rounded down");
                }
            }
        }
    }
}

//! Published measurements, and what the model says about them.
//!
//! Rows and their sources are in `validation.toml`. A row that a constant of a machine file was
//! chosen with says so; all others are held out: predictions.

use super::question::{Question, answer};
use crate::machine::Machine;
use serde::{Deserialize, Serialize};

/// What a row measures.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Metric {
    /// 10¹² operations per second.
    Tflops,
    /// 10⁹ bytes per second.
    GbPerS,
    /// Microseconds.
    TimeUs,
}

/// A published measurement of one operation.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Row {
    /// Rows that are averaged together.
    pub group: String,
    /// Machine file.
    pub machine: String,
    /// The operation, under the row's own conditions.
    pub question: Question,
    /// What was measured.
    pub metric: Metric,
    /// The published figure.
    pub measured: f64,
    /// Where.
    pub source: String,
    /// The constant that was chosen with this row; absent for a prediction.
    #[serde(default)]
    pub calibrates: Option<String>,
}

/// A published figure that follows from sizes by arithmetic.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Exact {
    /// Its number in the list of targets.
    pub id: String,
    /// What it is.
    pub what: String,
    /// Factors of the product that gives it.
    pub factors: Vec<f64>,
    /// What the product is divided by.
    pub divisor: f64,
    /// The published figure, in `unit`.
    pub published: f64,
    /// Digits after the point that are published.
    pub digits: u32,
    /// Its unit.
    pub unit: String,
    /// Where, and what to know.
    pub source: String,
}

impl Exact {
    /// The product, rounded as published.
    pub fn value(&self) -> f64 {
        let scale = 10f64.powi(self.digits as i32);
        (self.factors.iter().product::<f64>() / self.divisor * scale).round() / scale
    }
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Table {
    row: Vec<Row>,
    exact: Vec<Exact>,
}

/// A row with its prediction.
#[derive(Clone, Debug, PartialEq)]
pub struct Outcome {
    /// The row.
    pub row: Row,
    /// The model's figure.
    pub predicted: f64,
    /// `predicted / measured - 1`.
    pub error: f64,
}

/// All rows, in the order of the file.
///
/// # Errors
///
/// In words, where the built-in table is not what it should be.
pub fn rows() -> Result<(Vec<Row>, Vec<Exact>), String> {
    let table: Table = toml::from_str(include_str!("validation.toml"))
        .map_err(|e| format!("validation.toml: {e}"))?;
    Ok((table.row, table.exact))
}

/// Predicts a row, on its own machine.
///
/// # Errors
///
/// As [`answer`]; an unknown machine.
pub fn predict(row: &Row) -> Result<Outcome, String> {
    let machine = Machine::named(&row.machine).map_err(|e| e.to_string())?;
    let told = answer(&machine, &row.question)?;
    let predicted = match row.metric {
        Metric::Tflops => told.tflops,
        Metric::GbPerS => told.gb_per_s,
        Metric::TimeUs => told.time_us,
    };
    Ok(Outcome { row: row.clone(), predicted, error: predicted / row.measured - 1.0 })
}

/// Mean and worst absolute error of outcomes.
pub fn mean_and_worst<'o>(outcomes: impl IntoIterator<Item = &'o Outcome>) -> (f64, f64) {
    let (mut sum, mut worst, mut count) = (0.0, 0f64, 0u32);
    for outcome in outcomes {
        sum += outcome.error.abs();
        worst = worst.max(outcome.error.abs());
        count += 1;
    }
    (sum / f64::from(count.max(1)), worst)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The targets: mean and worst absolute error of each group.
    const TARGETS: &[(&str, f64, f64)] = &[
        ("DeepGEMM dense", 0.10, 0.20),
        ("DeepGEMM grouped", 0.10, 0.20),
        ("FlashMLA", 0.10, 0.10),
        ("DeepEP normal", 0.15, 0.25),
        ("DeepEP low latency", 0.15, 0.25),
    ];

    #[test]
    fn published_kernels_are_predicted() {
        let outcomes: Vec<_> = rows().unwrap().0.iter().map(|r| predict(r).unwrap()).collect();
        let mut report = String::new();
        for o in &outcomes {
            let Outcome { row, predicted, error } = o;
            report += &format!(
                "{} {:?}: {predicted:.1} {} {:+.1}%\n",
                row.group,
                row.question,
                row.measured,
                error * 100.0
            );
        }
        for &(group, mean, worst) in TARGETS {
            let of_group = outcomes.iter().filter(|o| o.row.group == group);
            let (m, w) = mean_and_worst(of_group.clone());
            assert!(of_group.count() > 0 && m <= mean && w <= worst, "{group} {m} {w}\n{report}");
        }
        assert!(outcomes.iter().all(|o| TARGETS.iter().any(|t| t.0 == o.row.group)));
        let held_out = outcomes.iter().filter(|o| o.row.calibrates.is_none()).count();
        assert!(held_out * 3 > outcomes.len() * 2, "most rows are predictions: {held_out}");
    }

    #[test]
    fn calibrated_constants_exist() {
        for row in rows().unwrap().0 {
            let Some(constant) = row.calibrates else { continue };
            let mut machine = Machine::named(&row.machine).unwrap();
            assert!(machine.constant_mut(&constant).is_some(), "{constant}");
        }
    }

    #[test]
    fn arithmetic_figures_are_exact() {
        let exact = rows().unwrap().1;
        assert!(exact.len() >= 3);
        for e in exact {
            assert_eq!(e.value(), e.published, "{}: {}", e.id, e.what);
        }
    }
}

//! Ops with operands and what they should give: the part of the suite that backends may also use in
//! tests of their own kernels.

pub mod cases;
mod edges;
pub mod host;
mod hostile;
pub mod reference;

pub use cases::{Rng, cases};
pub use host::{HostMemory, HostTensor};
pub use hostile::hostile;

use hal::op::Access;
use hal::{DType, Op, OpKind};
use half::bf16;

/// Largest error allowed in an output of an op, relative to its largest value. Zero where the
/// contract leaves no freedom: the reference then rounds as the format does.
pub fn tolerance(kind: OpKind, dtype: DType) -> f64 {
    match (kind, dtype) {
        // One operation and one rounding, or none.
        (
            OpKind::GatherRows
            | OpKind::Dequantize
            | OpKind::CacheWrite
            | OpKind::CacheRead
            | OpKind::MoePermute
            | OpKind::Add
            | OpKind::Cast
            | OpKind::Copy
            | OpKind::ArgMax
            | OpKind::TopK,
            _,
        ) => 0.0,
        // A norm or product that rounds to the other neighbour moves the scale of its group by a
        // whole step of BF16, and what is quantised with it by one of FP8: an eighth at most. To
        // the bit they are compared with the pair of ops that they stand for.
        (OpKind::RmsNormQuantize | OpKind::SwiGluQuantize, DType::F8E4M3) => 0.125,
        (OpKind::RmsNormQuantize | OpKind::SwiGluQuantize, _) => 2f64.powi(-7),
        _ => rounding(dtype),
    }
}

/// The tolerance of sums and elementary functions.
fn rounding(dtype: DType) -> f64 {
    match dtype {
        // Half a step of BF16, and a little for sums that fall near a boundary.
        DType::Bf16 => 2f64.powi(-8),
        DType::F32 => 2e-6,
        _ => 0.0,
    }
}

/// The nearest value of a dtype, by way of FP32 as ops compute.
fn nearest(dtype: DType, value: f64) -> f64 {
    match dtype {
        DType::F32 => f64::from(value as f32),
        DType::Bf16 => bf16::from_f32(value as f32).to_f64(),
        _ => value,
    }
}

/// The written operands, with their names, in the order of the reference's results.
pub fn written<T>(op: &Op<T>) -> Vec<(&'static str, &T)> {
    let mut out = Vec::new();
    op.visit(|name, access: Access, operand| {
        if access.writes() {
            out.push((name, operand));
        }
    });
    out
}

/// Compares an output of an op with the reference; values that are NaN there were to be left alone.
///
/// # Errors
///
/// The first value that is off, with what was expected.
pub fn compare_output(
    kind: OpKind,
    dtype: DType,
    got: &[f64],
    expected: &[f64],
) -> Result<(), String> {
    let tolerance = tolerance(kind, dtype);
    if tolerance > 0.0 {
        return within(tolerance, got, expected);
    }
    let rounded: Vec<f64> = expected.iter().map(|&v| nearest(dtype, v)).collect();
    within(0.0, got, &rounded)
}

/// Compares values of any op with the reference: as [`compare_output`], with the tolerance of sums.
///
/// # Errors
///
/// The first value that is off, with what was expected.
pub fn compare(dtype: DType, got: &[f64], expected: &[f64]) -> Result<(), String> {
    within(rounding(dtype), got, expected)
}

fn within(tolerance: f64, got: &[f64], expected: &[f64]) -> Result<(), String> {
    if got.len() != expected.len() {
        return Err(format!("{} values, expected {}", got.len(), expected.len()));
    }
    let largest = expected.iter().filter(|v| v.is_finite()).fold(0.0, |m: f64, v| m.max(v.abs()));
    let allowed = tolerance * largest;
    for (i, (got, want)) in got.iter().zip(expected).enumerate() {
        // Not "off > allowed", which a NaN would pass. Equal infinities are close too.
        let close = got == want || (got - want).abs() <= allowed;
        if !want.is_nan() && !close {
            return Err(format!("[{i}] is {got}, expected {want} within {allowed:e}"));
        }
    }
    Ok(())
}

//! Ops with operands and what they should give: the part of the suite that backends may also use in
//! tests of their own kernels.

pub mod cases;
pub mod host;
pub mod reference;

pub use cases::{Rng, cases, hostile};
pub use host::{HostMemory, HostTensor};

use hal::op::Access;
use hal::{DType, Op};

/// Largest error allowed, relative to the largest value of the output.
pub fn tolerance(dtype: DType) -> f64 {
    match dtype {
        // Half a step of BF16, and a little for sums that fall near a boundary.
        DType::Bf16 => 2f64.powi(-8),
        DType::F32 => 2e-6,
        // FP8 and integers are exact: the reference rounds as the format does.
        _ => 0.0,
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

/// Compares an output with the reference; values that are NaN there were to be left alone.
///
/// # Errors
///
/// The first value that is off, with what was expected.
pub fn compare(dtype: DType, got: &[f64], expected: &[f64]) -> Result<(), String> {
    if got.len() != expected.len() {
        return Err(format!("{} values, expected {}", got.len(), expected.len()));
    }
    let largest = expected.iter().filter(|v| v.is_finite()).fold(0.0, |m: f64, v| m.max(v.abs()));
    let allowed = tolerance(dtype) * largest;
    for (i, (got, want)) in got.iter().zip(expected).enumerate() {
        // Not "off > allowed", which a NaN would pass.
        let close = (got - want).abs() <= allowed;
        if !want.is_nan() && !close {
            return Err(format!("[{i}] is {got}, expected {want} within {allowed:e}"));
        }
    }
    Ok(())
}

//! FP32 attributes in files: exactly as they were, also where text formats have no word for them.

use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// A number, or its bits where it is none.
#[derive(Serialize, Deserialize)]
#[serde(untagged)]
enum Written {
    /// Wider than the value, so that a reader that is off by an ulp still rounds to it.
    Number(f64),
    /// Infinities and NaNs, which JSON for one lacks.
    Bits { bits: u32 },
}

pub(super) fn serialize<S: Serializer>(value: &f32, to: S) -> Result<S::Ok, S::Error> {
    let written = match value.is_finite() {
        true => Written::Number(f64::from(*value)),
        false => Written::Bits { bits: value.to_bits() },
    };
    written.serialize(to)
}

pub(super) fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<f32, D::Error> {
    Ok(match Written::deserialize(from)? {
        Written::Number(number) => number as f32,
        Written::Bits { bits } => f32::from_bits(bits),
    })
}

//! A figure with its provenance.

use serde::de::value::MapAccessDeserializer;
use serde::de::{self, MapAccess, Visitor};
use serde::{Deserialize, Deserializer, Serialize};
use std::fmt;

/// Where a constant comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Provenance {
    /// The maker's or a paper's own figure.
    Published,
    /// Somebody measured it on the machine.
    Measured,
    /// Arithmetic from published or measured figures.
    Derived,
    /// Nobody outside the maker knows; a named guess.
    Assumed,
}

impl fmt::Display for Provenance {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Provenance::Published => "published",
            Provenance::Measured => "measured",
            Provenance::Derived => "derived",
            Provenance::Assumed => "assumed",
        })
    }
}

/// A figure, where it comes from, and the source or the reasoning in words.
///
/// In a file, `{ value = 132, provenance = "published", source = "..." }`, or a bare number, which
/// counts as assumed.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Constant {
    /// The figure, in the unit that the field's name says.
    pub value: f64,
    /// Where it comes from.
    pub provenance: Provenance,
    /// Document, measurement or reasoning.
    pub source: String,
}

/// What a bare number's source says.
const NO_SOURCE: &str = "a bare number in the machine file";

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Full {
    value: f64,
    provenance: Provenance,
    source: String,
}

impl<'de> Deserialize<'de> for Constant {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        // Not an untagged enum: that would hide which key is wrong.
        deserializer.deserialize_any(ConstantVisitor)
    }
}

struct ConstantVisitor;

impl ConstantVisitor {
    fn bare(value: f64) -> Constant {
        Constant { value, provenance: Provenance::Assumed, source: NO_SOURCE.into() }
    }
}

impl<'de> Visitor<'de> for ConstantVisitor {
    type Value = Constant;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a number, or { value = .., provenance = \"..\", source = \"..\" }")
    }

    fn visit_f64<E: de::Error>(self, value: f64) -> Result<Constant, E> {
        Ok(Self::bare(value))
    }

    fn visit_i64<E: de::Error>(self, value: i64) -> Result<Constant, E> {
        Ok(Self::bare(value as f64))
    }

    fn visit_u64<E: de::Error>(self, value: u64) -> Result<Constant, E> {
        Ok(Self::bare(value as f64))
    }

    fn visit_map<M: MapAccess<'de>>(self, map: M) -> Result<Constant, M::Error> {
        let Full { value, provenance, source } =
            Full::deserialize(MapAccessDeserializer::new(map))?;
        Ok(Constant { value, provenance, source })
    }
}

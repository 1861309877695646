//! Element types.

use serde::{Deserialize, Serialize};
use std::fmt;

/// The type of one element.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
#[non_exhaustive]
pub enum DType {
    /// IEEE 754 binary32.
    F32,
    /// bfloat16: binary32 with the lower 16 bits rounded away (to nearest even).
    Bf16,
    /// FP8 E4M3FN: bias 7, largest 448, NaN only at `0x7f`/`0xff`, no infinity (OCP FP8, 2023).
    #[serde(rename = "f8_e4m3")]
    F8E4M3,
    /// 32-bit signed integer: token ids, positions, offsets. Accelerators of this class have no
    /// native 64-bit integers.
    I32,
    /// Uninterpreted bytes.
    U8,
}

impl DType {
    /// Every dtype, for tests and tables that must cover them all.
    pub const ALL: [DType; 5] = [DType::F32, DType::Bf16, DType::F8E4M3, DType::I32, DType::U8];

    /// Bytes of one element.
    pub const fn size(self) -> usize {
        match self {
            DType::F32 | DType::I32 => 4,
            DType::Bf16 => 2,
            DType::F8E4M3 | DType::U8 => 1,
        }
    }

    /// The name used in files, traces and messages.
    pub const fn name(self) -> &'static str {
        match self {
            DType::F32 => "f32",
            DType::Bf16 => "bf16",
            DType::F8E4M3 => "f8_e4m3",
            DType::I32 => "i32",
            DType::U8 => "u8",
        }
    }
}

impl fmt::Display for DType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

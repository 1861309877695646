//! Numerics policies: which dtypes a model runs in.

use hal::DType;
use std::fmt;
use std::str::FromStr;

/// How numbers are represented. A result is a function of the inputs and of this alone; see the
/// crate's `ARCHITECTURE.md` for what each promises.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Numerics {
    /// DeepSeek's recipe (DeepSeek-V3 report, section 3.3): FP8 weights, activations quantised
    /// online per 1x128, products scaled and summed in FP32; BF16 elsewhere. On a checkpoint
    /// without FP8 weights this is [`Numerics::Bf16`].
    #[default]
    Fp8,
    /// Weights dequantised to BF16, BF16 operands, FP32 sums.
    Bf16,
    /// Weights dequantised to FP32, FP32 throughout: for comparison with other implementations.
    F32,
}

impl Numerics {
    /// Every policy.
    pub const ALL: [Numerics; 3] = [Numerics::Fp8, Numerics::Bf16, Numerics::F32];

    /// Dtype of activations, of the residual stream and of the KV cache.
    pub const fn activations(self) -> DType {
        match self {
            Numerics::Fp8 | Numerics::Bf16 => DType::Bf16,
            Numerics::F32 => DType::F32,
        }
    }

    /// The name, as flags and files spell it.
    pub const fn name(self) -> &'static str {
        match self {
            Numerics::Fp8 => "fp8",
            Numerics::Bf16 => "bf16",
            Numerics::F32 => "f32",
        }
    }
}

impl fmt::Display for Numerics {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// A name that is no numerics policy.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("unknown numerics policy {0:?}; expected fp8, bf16 or f32")]
pub struct UnknownNumerics(String);

impl FromStr for Numerics {
    type Err = UnknownNumerics;

    fn from_str(text: &str) -> Result<Self, UnknownNumerics> {
        let found = Numerics::ALL.into_iter().find(|n| n.name() == text);
        found.ok_or_else(|| UnknownNumerics(text.to_string()))
    }
}

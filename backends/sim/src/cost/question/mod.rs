//! Questions about one operation on one machine, as `dsv3-run perf op` and the validation table ask
//! them.

mod exchanges;
mod ops;

use crate::machine::{Machine, Provenance};
use hal::{CollectiveKind, DType};
use serde::{Deserialize, Serialize};

/// Operands of a matrix product.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Precision {
    /// FP8 operands with block scales, BF16 results.
    Fp8,
    /// BF16 throughout, FP32 sums.
    Bf16,
    /// FP32 throughout.
    F32,
}

impl Precision {
    fn dtype(self) -> DType {
        match self {
            Precision::Fp8 => DType::F8E4M3,
            Precision::Bf16 => DType::Bf16,
            Precision::F32 => DType::F32,
        }
    }

    /// What results and activations are in.
    fn wide(self) -> DType {
        if self == Precision::F32 { DType::F32 } else { DType::Bf16 }
    }
}

/// One operation. Sizes are per die.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "kebab-case", deny_unknown_fields)]
pub enum Question {
    /// `[m, k] x [n, k]ᵀ`.
    Gemm {
        /// Operands.
        dtype: Precision,
        /// Rows of activations.
        m: u64,
        /// Columns of the result.
        n: u64,
        /// What is summed over.
        k: u64,
    },
    /// One product per group, of `m` rows each.
    GroupedGemm {
        /// Operands.
        dtype: Precision,
        /// Groups: experts with rows.
        groups: u64,
        /// Rows of a group.
        m: u64,
        /// Columns of the result.
        n: u64,
        /// What is summed over.
        k: u64,
        /// Whether groups have places of their own and counts, as in decode.
        #[serde(default)]
        masked: bool,
    },
    /// Absorbed attention of DeepSeek-V3 over a paged latent cache.
    MlaDecode {
        /// Of the cache; FP8 is widened to BF16 before products.
        dtype: Precision,
        /// Sequences.
        batch: u64,
        /// Keys of each.
        kv: u64,
        /// Heads on this die.
        heads: u64,
        /// New tokens of each sequence: 2 with one speculative token.
        #[serde(default = "one")]
        queries: u64,
    },
    /// Expanded attention of DeepSeek-V3, causal, BF16.
    MlaPrefill {
        /// Tokens of a sequence.
        tokens: u64,
        /// Heads on this die.
        heads: u64,
        /// Sequences.
        #[serde(default = "one")]
        batch: u64,
    },
    /// A collective.
    Collective {
        /// Which.
        collective: CollectiveKind,
        /// Dies, from die 0 on.
        ranks: u64,
        /// Bytes of the reduced or broadcast tensor, of the gathered or scattered whole, or of all
        /// that a rank sends.
        bytes: u64,
    },
    /// Tokens to experts, or back.
    Moe {
        /// Whether back.
        #[serde(default)]
        combine: bool,
        /// Expert-parallel ranks.
        ep: u64,
        /// Tokens of a rank.
        tokens: u64,
        /// Experts of a token.
        top_k: u64,
        /// Elements of a token.
        hidden: u64,
        /// What travels.
        dtype: Precision,
        /// Whether every copy goes straight to its die.
        #[serde(default)]
        low_latency: bool,
        /// Experts in all; without it the least multiple of `ep` from 256 on.
        #[serde(default)]
        experts: Option<u64>,
        /// Most hosts of a token.
        #[serde(default = "four")]
        host_limit: u64,
        /// Whether dies of a host use the network too.
        #[serde(default)]
        network_only: bool,
    },
}

fn one() -> u64 {
    1
}

fn four() -> u64 {
    4
}

/// The answer: times are simulated.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Answer {
    /// Microseconds of the kernel, as a profiler shows it.
    pub time_us: f64,
    /// 10¹² operations per second; 0 where there are no matrix operations.
    pub tflops: f64,
    /// 10⁹ bytes per second, bytes as the published benchmarks count them: matrix operands and
    /// results without scales; keys, queries and results; what a collective's rank has; what an
    /// exchange's rank sends to hosts (own one included), to dies within one host, or in all in low
    /// latency.
    pub gb_per_s: f64,
    /// What decides.
    pub bound: &'static str,
    /// How the library cuts the work up.
    pub mapping: String,
    /// Microseconds that operations and bytes need at least.
    pub floor_us: f64,
    /// Microseconds between this kernel and the one before on a stream.
    pub gap_us: f64,
    /// Picoseconds of `time_us`.
    #[serde(skip)]
    pub picos: u64,
}

/// How an answer moves when a constant is halved or doubled.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Sensitivity {
    /// The constant.
    pub constant: String,
    /// Its value.
    pub value: f64,
    /// Microseconds with half of it.
    pub halved_us: f64,
    /// Microseconds with twice of it.
    pub doubled_us: f64,
}

/// Answers a question.
///
/// # Errors
///
/// In words, with the sizes: what is zero, does not divide, does not fit the die, or has no link.
pub fn answer(machine: &Machine, question: &Question) -> Result<Answer, String> {
    match *question {
        Question::Collective { collective, ranks, bytes } => {
            exchanges::collective(machine, collective, ranks, bytes)
        }
        Question::Moe { .. } => exchanges::moe(machine, question),
        _ => ops::answer(machine, question),
    }
}

/// The assumed constants that move an answer by more than 2% when they are halved or doubled, the
/// most influential first.
///
/// # Errors
///
/// As [`answer`].
pub fn sensitivity(machine: &Machine, question: &Question) -> Result<Vec<Sensitivity>, String> {
    let now = answer(machine, question)?.time_us;
    let moved = moves(machine, now, |changed| answer(changed, question).ok().map(|a| a.time_us));
    Ok(moved
        .into_iter()
        .map(|Moved { constant, value, halved, doubled }| Sensitivity {
            constant,
            value,
            halved_us: halved,
            doubled_us: doubled,
        })
        .collect())
}

/// How a time moves when a constant is halved or doubled.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Moved {
    /// The constant.
    pub constant: String,
    /// Its value.
    pub value: f64,
    /// The time with half of it.
    pub halved: f64,
    /// The time with twice of it.
    pub doubled: f64,
}

/// The assumed constants that move a time by more than 2% when they are halved or doubled, the most
/// influential first. `time` is asked about changed machines; [`None`] for one that cannot be.
pub fn moves(machine: &Machine, now: f64, time: impl Fn(&Machine) -> Option<f64>) -> Vec<Moved> {
    let mut all = Vec::new();
    for (name, constant) in machine.constants() {
        // How libraries cut work up is no matter of more or less.
        let choice =
            constant.value.fract() == 0.0 && name.starts_with("kernels.") && !name.ends_with("_us");
        if constant.provenance != Provenance::Assumed || choice {
            continue;
        }
        let with = |factor: f64| {
            let mut changed = machine.clone();
            if let Some(c) = changed.constant_mut(&name) {
                c.value *= factor;
                if name.ends_with("reach") {
                    c.value = c.value.min(1.0);
                }
            }
            time(&changed)
        };
        // What cannot be with the changed constant says nothing about time.
        let (halved, doubled) = (with(0.5).unwrap_or(now), with(2.0).unwrap_or(now));
        let moves = (halved / now - 1.0).abs().max((doubled / now - 1.0).abs());
        if moves > 0.02 {
            let value = constant.value;
            all.push((moves, Moved { constant: name, value, halved, doubled }));
        }
    }
    all.sort_by(|a, b| b.0.total_cmp(&a.0));
    all.into_iter().map(|(_, moved)| moved).collect()
}

fn positive(sizes: &[(&str, u64)]) -> Result<(), String> {
    for &(name, size) in sizes {
        if size == 0 {
            return Err(format!("{name} is 0: there is nothing to do; expected at least 1"));
        }
        if size > u64::from(u32::MAX) / 2 {
            return Err(format!(
                "{name} is {size}, more than any tensor's size of {}",
                u32::MAX / 2
            ));
        }
    }
    Ok(())
}

/// Refuses what does not fit a die.
fn fits(machine: &Machine, bytes: f64) -> Result<(), String> {
    if bytes > machine.memory_bytes() as f64 {
        return Err(format!(
            "operands and results take {:.1} GiB, but a die of {} has {:.1} GiB",
            bytes / f64::from(1 << 30),
            machine.name,
            machine.die.memory_gib.value
        ));
    }
    Ok(())
}

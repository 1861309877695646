//! Questions about one operation on one machine, as `dsv3-run perf op` and the validation table ask
//! them.

use super::network::{MoeExchange, MoeMode};
use super::tile::{Layout, TileModel};
use crate::machine::{Machine, Provenance};
use hal::op::{AttentionWork, BlockGrid, GroupedLinear, Linear, MlaDecode, MlaPrefill, Routing};
use hal::{CollectiveKind, DType, DeviceId, LinkKind, Op, TensorDesc};
use serde::{Deserialize, Serialize};

/// MLA of DeepSeek-V3: width of the latent, of the rotary key, of a head without it, of a value.
const RANK: usize = 512;
const ROPE: usize = 64;
const NOPE: usize = 128;
const VALUE: usize = 128;
/// Keys in a page of the cache.
const PAGE: usize = 64;

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
            ask_collective(machine, collective, ranks, bytes)
        }
        Question::Moe { .. } => ask_moe(machine, question),
        _ => ask_op(machine, question),
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
    let mut all = Vec::new();
    for (name, constant) in machine.constants() {
        let counts =
            constant.value.fract() == 0.0 && name.starts_with("kernels.") && !name.ends_with("_us");
        if constant.provenance != Provenance::Assumed || counts {
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
            answer(&changed, question).map(|a| a.time_us)
        };
        // What cannot be with the changed constant says nothing about time.
        let (halved_us, doubled_us) = (with(0.5).unwrap_or(now), with(2.0).unwrap_or(now));
        let moves = (halved_us / now - 1.0).abs().max((doubled_us / now - 1.0).abs());
        if moves > 0.02 {
            let value = constant.value;
            all.push((moves, Sensitivity { constant: name, value, halved_us, doubled_us }));
        }
    }
    all.sort_by(|a, b| b.0.total_cmp(&a.0));
    Ok(all.into_iter().map(|(_, s)| s).collect())
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

fn desc(dtype: DType, shape: &[u64]) -> TensorDesc {
    let shape: Vec<usize> = shape.iter().map(|&d| d as usize).collect();
    TensorDesc::new(dtype, &shape)
}

fn ask_op(machine: &Machine, question: &Question) -> Result<Answer, String> {
    let (op, layout, bytes) = match *question {
        Question::Gemm { dtype, m, n, k } => {
            positive(&[("m", m), ("n", n), ("k", k)])?;
            let bytes = product_bytes(dtype, 1, m, n, k);
            fits(machine, bytes)?;
            (gemm(dtype, m, n, k), None, bytes)
        }
        Question::GroupedGemm { dtype, groups, m, n, k, masked } => {
            positive(&[("groups", groups), ("m", m), ("n", n), ("k", k)])?;
            let bytes = product_bytes(dtype, groups, m, n, k);
            fits(machine, bytes)?;
            let most = u64::from(u32::MAX);
            let rows = groups.checked_mul(m).filter(|&r| r <= most);
            if rows.is_none() || n.saturating_mul(k) > most {
                return Err(format!(
                    "groups x m = {groups} x {m} and n x k = {n} x {k} must each stay below 2^32"
                ));
            }
            let layout = if masked { Layout::Masked } else { Layout::Contiguous };
            (grouped_gemm(dtype, groups, m, n, k), Some(layout), bytes)
        }
        Question::MlaDecode { dtype, batch, kv, heads, queries } => {
            let sizes = [("batch", batch), ("kv", kv), ("heads", heads), ("queries", queries)];
            positive(&sizes)?;
            if queries > kv {
                return Err(format!(
                    "{queries} new tokens among {kv} keys: kv counts the new tokens too"
                ));
            }
            let row = (RANK + ROPE) as f64;
            let cache = batch as f64 * kv as f64 * row * dtype.dtype().size() as f64;
            let rows = batch as f64 * queries as f64 * heads as f64;
            let bytes = cache + rows * (row + RANK as f64) * dtype.wide().size() as f64;
            fits(machine, bytes)?;
            (mla_decode(dtype, batch, kv, heads, queries), None, bytes)
        }
        Question::MlaPrefill { tokens, heads, batch } => {
            positive(&[("tokens", tokens), ("heads", heads), ("batch", batch)])?;
            let per_head = (NOPE + ROPE + NOPE + VALUE + VALUE) as f64;
            let bytes =
                batch as f64 * tokens as f64 * (heads as f64 * per_head + ROPE as f64) * 2.0;
            fits(machine, bytes)?;
            (mla_prefill(tokens, heads, batch), None, bytes)
        }
        Question::Collective { .. } | Question::Moe { .. } => {
            return Err("not an op".into());
        }
    };
    let model = TileModel::new(machine);
    let told = model.explain(&op, None, layout);
    let seconds = told.kernel_picos as f64 * 1e-12;
    Ok(Answer {
        time_us: told.kernel_picos as f64 * 1e-6,
        tflops: told.work.matrix_ops as f64 / seconds * 1e-12,
        gb_per_s: bytes / seconds * 1e-9,
        bound: told.bound.name(),
        mapping: told.mapping,
        floor_us: told.floor_picos as f64 * 1e-6,
        gap_us: told.gap_picos as f64 * 1e-6,
        picos: told.kernel_picos,
    })
}

fn product_bytes(dtype: Precision, groups: u64, m: u64, n: u64, k: u64) -> f64 {
    let (groups, m, n, k) = (groups as f64, m as f64, n as f64, k as f64);
    groups * ((m * k + n * k) * dtype.dtype().size() as f64 + m * n * dtype.wide().size() as f64)
}

fn gemm(dtype: Precision, m: u64, n: u64, k: u64) -> Op<TensorDesc> {
    let fp8 = dtype == Precision::Fp8;
    let groups = k.div_ceil(128);
    Linear {
        x: desc(dtype.dtype(), &[m, k]),
        x_scales: fp8.then(|| desc(DType::F32, &[m, groups])),
        w: desc(dtype.dtype(), &[n, k]),
        w_scales: fp8.then(|| desc(DType::F32, &[n.div_ceil(128), groups])),
        out: desc(dtype.wide(), &[m, n]),
        grid: BlockGrid::default(),
    }
    .into()
}

fn grouped_gemm(dtype: Precision, experts: u64, m: u64, n: u64, k: u64) -> Op<TensorDesc> {
    let fp8 = dtype == Precision::Fp8;
    let groups = k.div_ceil(128);
    let rows = experts * m;
    GroupedLinear {
        x: desc(dtype.dtype(), &[rows, k]),
        x_scales: fp8.then(|| desc(DType::F32, &[rows, groups])),
        w: desc(dtype.dtype(), &[experts, n, k]),
        w_scales: fp8.then(|| desc(DType::F32, &[experts, n.div_ceil(128), groups])),
        offsets: desc(DType::I32, &[experts + 1]),
        out: desc(dtype.wide(), &[rows, n]),
        grid: BlockGrid::default(),
        routing: Routing { rows: rows as u32, active_experts: experts as u32 },
    }
    .into()
}

fn mla_decode(dtype: Precision, batch: u64, kv: u64, heads: u64, queries: u64) -> Op<TensorDesc> {
    let (rank, rope, page) = (RANK as u64, ROPE as u64, PAGE as u64);
    let pairs = queries * (kv - queries) + queries * (queries + 1) / 2;
    let (wide, tokens) = (dtype.wide(), batch * queries);
    let pages = kv.div_ceil(page);
    MlaDecode {
        q_latent: desc(wide, &[tokens, heads, rank]),
        q_rope: desc(wide, &[tokens, heads, rope]),
        cache: desc(dtype.dtype(), &[batch * pages, page, rank + rope]),
        block_table: desc(DType::I32, &[batch, pages]),
        q_starts: desc(DType::I32, &[batch + 1]),
        kv_lens: desc(DType::I32, &[batch]),
        out: desc(wide, &[tokens, heads, rank]),
        scale: 1.0,
        work: AttentionWork { pairs: batch * pairs, keys: batch * kv },
    }
    .into()
}

fn mla_prefill(tokens: u64, heads: u64, batch: u64) -> Op<TensorDesc> {
    let all = batch * tokens;
    let bf16 = |shape: &[u64]| desc(DType::Bf16, shape);
    MlaPrefill {
        q: bf16(&[all, heads, (NOPE + ROPE) as u64]),
        kv: bf16(&[all, heads, (NOPE + VALUE) as u64]),
        k_rope: bf16(&[all, ROPE as u64]),
        q_starts: desc(DType::I32, &[batch + 1]),
        kv_starts: desc(DType::I32, &[batch + 1]),
        out: bf16(&[all, heads, VALUE as u64]),
        scale: 1.0,
        work: AttentionWork { pairs: batch * (tokens * (tokens + 1) / 2), keys: all },
    }
    .into()
}

fn ask_collective(
    machine: &Machine,
    kind: CollectiveKind,
    ranks: u64,
    bytes: u64,
) -> Result<Answer, String> {
    if ranks < 2 {
        return Err(format!("a collective of {ranks} rank(s) moves nothing; expected at least 2"));
    }
    let point = matches!(kind, CollectiveKind::Send | CollectiveKind::Recv);
    if point && ranks != 2 {
        return Err(format!("{} joins 2 ranks, not {ranks}", kind.name()));
    }
    if bytes == 0 {
        return Err("bytes is 0: there is nothing to move; expected at least 1".into());
    }
    fits(machine, bytes as f64)?;
    let ranks = u32::try_from(ranks).map_err(|_| format!("{ranks} ranks are too many"))?;
    let machine = machine.enlarged(ranks)?;
    let ids: Vec<DeviceId> = (0..ranks).map(DeviceId).collect();
    let topology = machine.topology();
    let model = TileModel::new(&machine);
    let told = model.network().collective(kind, bytes, &ids, &topology);
    // What a rank sends or receives at least, over all of its ports at once.
    let kinds = [LinkKind::OnCard, LinkKind::InHost, LinkKind::Network];
    let reached = |kind| ids[1..].iter().any(|&to| topology.kind(ids[0], to) == Some(kind));
    let ports: f64 = kinds
        .into_iter()
        .filter(|&kind| reached(kind))
        .filter_map(|kind| machine.link(kind))
        .map(|link| link.gb_s.value * 1e9)
        .sum();
    let share = match kind {
        CollectiveKind::AllReduce => 2.0 * f64::from(ranks - 1) / f64::from(ranks),
        CollectiveKind::Broadcast | CollectiveKind::Send | CollectiveKind::Recv => 1.0,
        _ => f64::from(ranks - 1) / f64::from(ranks),
    };
    let seconds = told.picos as f64 * 1e-12;
    Ok(Answer {
        time_us: told.picos as f64 * 1e-6,
        tflops: 0.0,
        gb_per_s: bytes as f64 / seconds * 1e-9,
        bound: told.bound.name(),
        mapping: told.algorithm.to_string(),
        floor_us: share * bytes as f64 / ports * 1e6,
        gap_us: machine.launch.device_us.value,
        picos: told.picos,
    })
}

fn ask_moe(machine: &Machine, question: &Question) -> Result<Answer, String> {
    let Question::Moe {
        combine: _,
        ep,
        tokens,
        top_k,
        hidden,
        dtype,
        low_latency,
        experts,
        host_limit,
        network_only,
    } = *question
    else {
        return Err("not an exchange".into());
    };
    let sizes =
        [("tokens", tokens), ("top-k", top_k), ("hidden", hidden), ("host limit", host_limit)];
    positive(&sizes)?;
    if ep < 2 {
        return Err(format!(
            "ep is {ep}: experts on one rank exchange nothing; expected at least 2"
        ));
    }
    let ranks = u32::try_from(ep).map_err(|_| format!("ep is {ep}: too many ranks"))?;
    let host = machine.dies_per_host();
    let machine = machine.enlarged(ranks)?;
    if ranks > host && ranks % host != 0 {
        return Err(format!(
            "ep is {ep}, but a host of {} has {host} dies: expected a multiple of {host}, or less",
            machine.name
        ));
    }
    let experts = experts.unwrap_or_else(|| 256u64.next_multiple_of(ep));
    if experts % ep != 0 || experts > u64::from(u32::MAX) {
        return Err(format!(
            "{experts} experts do not divide over {ep} ranks; {} would, with redundant experts",
            experts.next_multiple_of(ep)
        ));
    }
    if top_k > experts {
        return Err(format!("top-k is {top_k}, but there are {experts} experts"));
    }
    if dtype == Precision::Fp8 && hidden % 128 != 0 {
        return Err(format!(
            "hidden is {hidden}: FP8 tokens have a scale for each 128 elements, so it must be a \
             multiple of 128"
        ));
    }
    if network_only && machine.link.network.is_none() {
        return Err(format!("{} has no network", machine.name));
    }
    let small =
        |name: &str, v: u64| u32::try_from(v).map_err(|_| format!("{name} {v} is too large"));
    let exchange = MoeExchange {
        mode: if low_latency { MoeMode::LowLatency } else { MoeMode::Throughput },
        ep: ranks,
        tokens: small("tokens", tokens)?,
        top_k: small("top-k", top_k)?,
        hidden: small("hidden", hidden)?,
        element_bytes: dtype.dtype().size() as u32,
        experts: experts as u32,
        host_limit: small("host limit", host_limit)?,
        network_only,
    };
    let copies = tokens as f64 * top_k as f64 * exchange.token_bytes();
    fits(&machine, copies)?;
    let model = TileModel::new(&machine);
    let told = model.network().moe(&exchange);
    let seconds = told.picos as f64 * 1e-12;
    Ok(Answer {
        time_us: told.picos as f64 * 1e-6,
        tflops: 0.0,
        gb_per_s: told.logical_bytes / seconds * 1e-9,
        bound: if told.link_bound { "link" } else { "launch" },
        mapping: told.mapping,
        floor_us: told.link_seconds * 1e6,
        gap_us: machine.launch.device_us.value,
        picos: told.picos,
    })
}

//! Ops of one die: from sizes to descriptors, and from those to an answer.

use super::{Answer, Precision, Question, fits, positive};
use crate::cost::tile::{Layout, TileModel};
use crate::machine::Machine;
use hal::op::{AttentionWork, BlockGrid, GroupedLinear, Linear, MlaDecode, MlaPrefill, Routing};
use hal::{DType, Op, TensorDesc};

/// MLA of DeepSeek-V3: width of the latent, of the rotary key, of a head without it, of a value.
const RANK: usize = 512;
const ROPE: usize = 64;
const NOPE: usize = 128;
const VALUE: usize = 128;
/// Keys in a page of the cache.
const PAGE: usize = 64;

pub(super) fn answer(machine: &Machine, question: &Question) -> Result<Answer, String> {
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

fn desc(dtype: DType, shape: &[u64]) -> TensorDesc {
    let shape: Vec<usize> = shape.iter().map(|&d| d as usize).collect();
    TensorDesc::new(dtype, &shape)
}

//! How much an op computes and moves, whatever the device.

use super::*;
use crate::DType;
use serde::{Deserialize, Serialize};

/// What attention has to do: host knowledge that shapes do not carry, because sequence lengths
/// are values in device memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct AttentionWork {
    /// Pairs of a query token and a key that it sees, over all sequences.
    pub pairs: u64,
    /// Keys in all, each sequence's counted once.
    pub keys: u64,
}

impl AttentionWork {
    /// Adds a sequence with `queries` new tokens at the end of `keys` keys.
    pub fn add(&mut self, queries: u64, keys: u64) {
        self.keys += keys;
        // Query i sees keys - queries + i + 1 keys.
        self.pairs += queries * (keys - queries) + queries * (queries + 1) / 2;
    }
}

/// How the rows of a [`GroupedLinear`] came about.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Routing {
    /// Rows expected here: on one rank, tokens times experts per token.
    pub rows: u32,
    /// Experts that are expected to have rows, at least 1; what a cost model uses where the
    /// offsets hold no values.
    pub active_experts: u32,
}

impl Routing {
    /// Routing of `tokens` tokens to `per_token` each of `experts` experts, uniform and
    /// independent: on average `E·(1 − (1 − k/E)^T)` experts have rows.
    pub fn uniform(tokens: usize, per_token: usize, experts: usize) -> Self {
        let share = per_token as f64 / experts.max(1) as f64;
        let active =
            experts as f64 * (1.0 - (1.0 - share).powi(tokens.min(i32::MAX as usize) as i32));
        Routing {
            rows: (tokens * per_token).min(u32::MAX as usize) as u32,
            active_experts: (active.round() as u32).max(1),
        }
    }
}

/// Operations and bytes of an op.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Work {
    /// Matrix operations (a multiply-add counts two) and the dtype they run in.
    pub matrix_ops: u64,
    /// Operations of the vector units: exponentials, norms, conversions, a few per element.
    pub vector_ops: u64,
    /// Bytes read from memory at least: each operand once.
    pub read_bytes: u64,
    /// Bytes written.
    pub write_bytes: u64,
    /// Dtype of the matrix operands; [`None`] without matrix work.
    pub matrix_dtype: Option<DType>,
}

impl Work {
    /// Bytes read and written.
    pub const fn bytes(&self) -> u64 {
        self.read_bytes + self.write_bytes
    }
}

/// Counts the work of `op`. `routing` replaces a grouped op's own expectation where the actual
/// rows are known.
pub fn work(op: &Op<TensorDesc>, routing: Option<Routing>) -> Work {
    let mut work = Work::default();
    op.visit(|_, access, desc| {
        if access.reads() {
            work.read_bytes += desc.bytes();
        }
        if access.writes() {
            work.write_bytes += desc.bytes();
        }
    });
    let elements = |desc: &TensorDesc| desc.elements() as u64;
    let last = |desc: &TensorDesc| desc.last_dim() as u64;
    let size = |desc: &TensorDesc| desc.dtype().size() as u64;
    match op {
        Op::Linear(o) => {
            work.matrix_ops = 2 * elements(&o.out) * last(&o.x);
            work.matrix_dtype = Some(o.x.dtype());
        }
        Op::GroupedLinear(o) => {
            let routing = routing.unwrap_or(o.routing);
            let (rows, active) = (u64::from(routing.rows), u64::from(routing.active_experts));
            let experts = o.w.dim(0) as u64;
            let (n, k) = (o.w.dim(1) as u64, o.w.dim(2) as u64);
            work.matrix_ops = 2 * rows * n * k;
            work.matrix_dtype = Some(o.x.dtype());
            let scales = o.w_scales.map_or(0, |s| s.bytes()) / experts.max(1);
            let row_scales = o.x_scales.map_or(0, |s| last(&s) * 4);
            work.read_bytes = active.min(experts) * (n * k * size(&o.w) + scales)
                + rows * (k * size(&o.x) + row_scales)
                + o.offsets.bytes();
            work.write_bytes = rows * n * size(&o.out);
        }
        Op::BatchedLinear(o) => {
            work.matrix_ops = 2 * elements(&o.out) * last(&o.x);
            work.matrix_dtype = Some(o.x.dtype());
        }
        Op::MlaPrefill(o) => {
            let heads = o.q.dim(1) as u64;
            work.matrix_ops = 2 * o.work.pairs * heads * (last(&o.q) + last(&o.out));
            work.vector_ops = 8 * o.work.pairs * heads;
            work.matrix_dtype = Some(o.q.dtype());
        }
        Op::MlaDecode(o) => {
            let (heads, rank) = (o.q_latent.dim(1) as u64, last(&o.q_latent));
            let width = last(&o.cache);
            work.matrix_ops = 2 * o.work.pairs * heads * (width + rank);
            work.vector_ops = 8 * o.work.pairs * heads;
            work.matrix_dtype = Some(o.q_latent.dtype());
            // Only the pages in use are read, not the whole cache.
            work.read_bytes =
                work.read_bytes - o.cache.bytes() + o.work.keys * width * size(&o.cache);
        }
        Op::GatherRows(o) => work.read_bytes = o.out.bytes() + o.rows.bytes(),
        Op::CacheRead(o) => {
            work.read_bytes = o.out.bytes() + o.block_table.bytes() + o.kv_starts.bytes();
        }
        Op::CacheWrite(o) => {
            work.write_bytes = o.latent.bytes() + o.k_rope.bytes();
            work.read_bytes = work.write_bytes + o.slots.bytes();
        }
        Op::Rope(o) => {
            // Each token reads its own row of the table.
            work.read_bytes += o.positions.elements() as u64 * last(&o.table) * 4;
            work.read_bytes -= o.table.bytes();
            work.vector_ops = 3 * elements(&o.x);
        }
        Op::RmsNorm(o) => work.vector_ops = 4 * elements(&o.x),
        Op::Quantize(o) => {
            let rows = counted(&o.row_offsets, o.expected_rows, &o.x);
            work.vector_ops = 4 * rows * last(&o.x);
            work.read_bytes = rows_of(&o.x, rows) + bytes_of(&o.row_offsets);
            work.write_bytes = rows_of(&o.q, rows) + rows_of(&o.scales, rows);
        }
        // The operations of both; what lies between them never goes to memory.
        Op::RmsNormQuantize(o) => work.vector_ops = (4 + 4) * elements(&o.x),
        Op::Dequantize(o) => work.vector_ops = 2 * elements(&o.w),
        Op::SwiGlu(o) => {
            let rows = counted(&o.row_offsets, o.expected_rows, &o.x);
            work.vector_ops = 8 * rows * last(&o.out);
            work.read_bytes = rows_of(&o.x, rows) + bytes_of(&o.row_offsets);
            work.write_bytes = rows_of(&o.out, rows);
        }
        Op::SwiGluQuantize(o) => {
            let rows = counted(&o.row_offsets, o.expected_rows, &o.x);
            work.vector_ops = (8 + 4) * rows * last(&o.q);
            work.read_bytes = rows_of(&o.x, rows) + bytes_of(&o.row_offsets);
            work.write_bytes = rows_of(&o.q, rows) + rows_of(&o.scales, rows);
        }
        Op::Gate(o) => work.vector_ops = 16 * elements(&o.logits),
        Op::MoeDispatch(o) => {
            let rows = expected(o.expected_rows, &o.out);
            let moved = rows_of(&o.out, rows)
                + o.out_scales.map_or(0, |s| rows_of(&s, rows))
                + rows_of(&o.out_weights, rows);
            work.read_bytes =
                moved + o.experts.bytes() + bytes_of(&o.replicas) + bytes_of(&o.row_offsets);
            work.write_bytes =
                moved + rows_of(&o.out_experts, rows) + o.offsets.bytes() + o.rows.bytes();
            work.vector_ops = elements(&o.experts) + rows * last(&o.out_experts);
        }
        Op::MoePermute(o) => {
            // The copies that are expected, and the same share of the tokens that may be there.
            let rows = expected(o.expected_rows, &o.out);
            let share = |desc: &TensorDesc| {
                let (part, all) = (u128::from(rows), o.out.dim(0).max(1) as u128);
                (u128::from(desc.bytes()) * part / all) as u64
            };
            let scales = o.out_scales.map_or(0, |s| rows_of(&s, rows));
            work.read_bytes = rows_of(&o.out, rows) + share(&o.experts) + bytes_of(&o.row_offsets);
            work.write_bytes = rows_of(&o.out, rows) + scales + o.offsets.bytes() + share(&o.rows);
            work.vector_ops = share(&o.experts) / 4;
        }
        Op::MoeCombine(o) => {
            let rows = counted(&o.row_offsets, o.expected_rows, &o.out);
            let slots = rows * last(&o.rows);
            let copies = match o.expected_copies {
                0 => slots,
                copies => slots.min(u64::from(copies)),
            };
            // A row number for each slot, and a weight.
            let told = 4 + u64::from(o.weights.is_some()) * 4;
            work.vector_ops = 2 * copies * last(&o.y);
            work.read_bytes = copies * last(&o.y) * size(&o.y)
                + slots * told
                + o.base.map_or(0, |b| rows_of(&b, rows))
                + bytes_of(&o.row_offsets);
            work.write_bytes = rows_of(&o.out, rows);
        }
        Op::Add(o) => work.vector_ops = elements(&o.out),
        Op::Cast(o) => work.vector_ops = elements(&o.out),
        Op::Copy(_) => {}
        Op::ArgMax(o) => work.vector_ops = elements(&o.x),
        Op::TopK(o) => work.vector_ops = 2 * elements(&o.x),
    }
    work
}

/// Rows that are expected of a tensor that has room for more; 0 stands for all.
fn expected(rows: u32, room: &TensorDesc) -> u64 {
    let all = room.dim(0) as u64;
    if rows == 0 { all } else { all.min(u64::from(rows)) }
}

/// Rows of a tensor that are expected to count.
fn counted(row_offsets: &Option<TensorDesc>, rows: u32, of: &TensorDesc) -> u64 {
    if row_offsets.is_some() { expected(rows, of) } else { of.dim(0) as u64 }
}

/// Bytes of this many rows of a matrix.
fn rows_of(desc: &TensorDesc, rows: u64) -> u64 {
    desc.bytes() / (desc.dim(0) as u64).max(1) * rows
}

fn bytes_of(desc: &Option<TensorDesc>) -> u64 {
    desc.map_or(0, |desc| desc.bytes())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn attention_pairs_are_the_causal_triangle() {
        let mut work = AttentionWork::default();
        work.add(4, 4);
        assert_eq!((work.pairs, work.keys), (1 + 2 + 3 + 4, 4));
        work.add(1, 100);
        assert_eq!((work.pairs, work.keys), (110, 104));
    }

    #[test]
    fn uniform_routing_of_v3() {
        // arXiv 2412.19437: 8 of 256 experts. One token touches 8, very many touch all.
        assert_eq!(Routing::uniform(1, 8, 256), Routing { rows: 8, active_experts: 8 });
        assert_eq!(Routing::uniform(4096, 8, 256).active_experts, 256);
        assert_eq!(Routing::uniform(32, 8, 256).active_experts, 163);
    }

    #[test]
    fn only_the_expected_rows_count() {
        let i = |shape: &[usize]| TensorDesc::new(DType::I32, shape);
        let f = |shape: &[usize]| TensorDesc::new(DType::F32, shape);
        let swiglu = |rows, row_offsets, expected_rows| {
            let (x, out) = (f(&[rows, 8]), f(&[rows, 4]));
            super::work(&SwiGlu { x, out, row_offsets, expected_rows }.into(), None)
        };
        let offsets = Some(i(&[3]));
        let (part, whole) = (swiglu(100, offsets, 10), swiglu(10, None, 0));
        assert_eq!(part.vector_ops, whole.vector_ops);
        assert_eq!(part.bytes(), whole.bytes() + 12, "the offsets are read besides");
        assert_eq!(swiglu(10, None, 3), whole, "nothing says that rows do not count");
        assert_eq!(swiglu(10, offsets, 0).vector_ops, whole.vector_ops);
        assert_eq!(swiglu(10, offsets, 99).vector_ops, whole.vector_ops);
        let dispatch = |room: usize, expected_rows| {
            let op = MoeDispatch {
                x: f(&[4, 16]),
                x_scales: None,
                experts: i(&[4, 2]),
                weights: f(&[4, 2]),
                replicas: None,
                row_offsets: None,
                out: f(&[room, 16]),
                out_scales: None,
                out_experts: i(&[room, 2]),
                out_weights: f(&[room, 2]),
                offsets: i(&[3]),
                rows: i(&[4, 2]),
                experts_per_destination: 2,
                total_experts: 4,
                replica_offset: 0,
                expected_rows,
            };
            super::work(&op.into(), None)
        };
        assert_eq!(dispatch(1000, 5), dispatch(5, 0));
        // 5 rows of 16 and their weights both ways, 5 rows of experts, experts, offsets and rows.
        let expected = 2 * 5 * (16 + 2) * 4 + 5 * 2 * 4 + 4 * 2 * 4 + 3 * 4 + 4 * 2 * 4;
        assert_eq!(dispatch(5, 0).bytes(), expected);
    }

    #[test]
    fn fused_ops_do_the_same_without_the_way_to_memory_and_back() {
        let i = |shape: &[usize]| TensorDesc::new(DType::I32, shape);
        let b = |shape: &[usize]| TensorDesc::new(DType::Bf16, shape);
        let (q, scales) =
            (TensorDesc::new(DType::F8E4M3, &[7, 256]), TensorDesc::new(DType::F32, &[7, 2]));
        let (column_offset, scale_format, eps) = (0, ScaleFormat::Float, 1e-6);
        let quantize = |row_offsets, expected_rows| -> Work {
            let x = b(&[7, 256]);
            let op =
                Quantize { x, row_offsets, q, scales, column_offset, scale_format, expected_rows };
            super::work(&op.into(), None)
        };
        let compare = |fused: Work, first: Work, second: Work, between: u64| {
            assert_eq!(fused.vector_ops, first.vector_ops + second.vector_ops);
            assert_eq!(fused.bytes() + between, first.bytes() + second.bytes());
        };
        let (x, weight, residual) = (b(&[7, 256]), b(&[256]), Some(b(&[7, 256])));
        let norm = super::work(&RmsNorm { x, weight, residual, out: x, eps }.into(), None);
        for (out, between) in [(None, 2 * x.bytes()), (Some(x), x.bytes())] {
            let fused = RmsNormQuantize {
                x,
                weight,
                residual,
                out,
                q,
                scales,
                eps,
                column_offset,
                scale_format,
            };
            compare(super::work(&fused.into(), None), norm, quantize(None, 0), between);
        }
        for (row_offsets, expected_rows, rows) in [(None, 0, 7), (Some(i(&[4])), 3, 3)] {
            let (x, out) = (b(&[7, 512]), b(&[7, 256]));
            let swiglu = SwiGlu { x, out, row_offsets, expected_rows };
            let fused = SwiGluQuantize {
                x,
                row_offsets,
                q,
                scales,
                column_offset,
                scale_format,
                expected_rows,
            };
            // The row offsets are read once, not twice.
            let between = 2 * rows * 256 * 2 + bytes_of(&row_offsets);
            let second = quantize(row_offsets, expected_rows);
            let fused = super::work(&fused.into(), None);
            compare(fused, super::work(&swiglu.into(), None), second, between);
        }
    }

    #[test]
    fn flops_of_mla_match_the_published_counts() {
        // dsv3: per token, key and head 2·(192+128)=640 expanded and 2·(576+512)=2176 absorbed.
        let d = |shape: &[usize]| TensorDesc::new(DType::Bf16, shape);
        let i = |shape: &[usize]| TensorDesc::new(DType::I32, shape);
        let one = AttentionWork { pairs: 1, keys: 1 };
        let prefill = Op::from(MlaPrefill {
            q: d(&[1, 1, 192]),
            kv: d(&[1, 1, 256]),
            k_rope: d(&[1, 64]),
            q_starts: i(&[2]),
            kv_starts: i(&[2]),
            out: d(&[1, 1, 128]),
            scale: 1.0,
            work: one,
        });
        assert_eq!(super::work(&prefill, None).matrix_ops, 640);
        let decode = Op::from(MlaDecode {
            q_latent: d(&[1, 1, 512]),
            q_rope: d(&[1, 1, 64]),
            cache: d(&[1000, 64, 576]),
            block_table: i(&[1, 1]),
            q_starts: i(&[2]),
            kv_lens: i(&[1]),
            out: d(&[1, 1, 512]),
            scale: 1.0,
            work: one,
        });
        let work = super::work(&decode, None);
        assert_eq!(work.matrix_ops, 2176);
        assert!(work.read_bytes < 4096, "reads the keys in use, not the cache: {work:?}");
    }
}

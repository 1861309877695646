//! Shape, dtype and layout rules of every op.

use super::*;
use crate::DType;

/// Says what is wrong with an op's operands, or nothing.
///
/// The rules are those of each op's documentation. [`crate::Validated`] applies them before a
/// backend sees the op, and backends use them in [`crate::Device::supports`].
///
/// # Errors
///
/// The first rule broken, with the operand's name and what was found.
pub fn check(op: &Op<TensorDesc>) -> Result<(), String> {
    match op {
        Op::GatherRows(o) => {
            let (_, h) = matrix("table", &o.table, FLOAT)?;
            let [t] = shape("rows", &o.rows, &[DType::I32])?;
            is("out", &o.out, o.table.dtype(), &[t, h])?;
            within("first_row", o.first_row as usize + o.table.dim(0), o.total_rows as usize)
        }
        Op::RmsNorm(o) => {
            let (t, h) = matrix("x", &o.x, FLOAT)?;
            is("weight", &o.weight, o.x.dtype(), &[h])?;
            maybe("residual", &o.residual, o.x.dtype(), &[t, h])?;
            is("out", &o.out, o.x.dtype(), &[t, h])
        }
        Op::Quantize(o) => {
            let (t, k) = matrix("x", &o.x, FLOAT)?;
            row_offsets(&o.row_offsets)?;
            quantized(&o.q, &o.scales, o.column_offset, t, k)
        }
        Op::RmsNormQuantize(o) => {
            let (t, h) = matrix("x", &o.x, FLOAT)?;
            is("weight", &o.weight, o.x.dtype(), &[h])?;
            maybe("residual", &o.residual, o.x.dtype(), &[t, h])?;
            maybe("out", &o.out, o.x.dtype(), &[t, h])?;
            quantized(&o.q, &o.scales, o.column_offset, t, h)
        }
        Op::Dequantize(o) => {
            one_of("w", &o.w, &[DType::F8E4M3])?;
            one_of("out", &o.out, FLOAT)?;
            same_shape("out", &o.out, "w", &o.w)?;
            contiguous("w", &o.w)?;
            contiguous("out", &o.out)?;
            if !(2..=3).contains(&o.w.rank()) {
                return Err(format!("w {:?} is neither a matrix nor a stack of matrices", o.w));
            }
            let (n, k) = (o.w.dim(o.w.rank() - 2), o.w.last_dim());
            scales("w_scales", &o.w_scales, (o.w.rank() == 3).then_some(o.w.dim(0)), n, k, o.grid)
        }
        Op::Linear(o) => {
            let (t, k) = matrix("x", &o.x, MATRIX)?;
            let (n, wk) = matrix("w", &o.w, MATRIX)?;
            equal("columns of w", wk, "columns of x", k)?;
            contiguous("w", &o.w)?;
            operand_scales(&o.x, &o.x_scales, &o.w, &o.w_scales, None, o.grid)?;
            one_of("out", &o.out, FLOAT)?;
            is("out", &o.out, o.out.dtype(), &[t, n])
        }
        Op::GroupedLinear(o) => {
            let (r, k) = matrix("x", &o.x, MATRIX)?;
            let [e, n, wk] = shape("w", &o.w, MATRIX)?;
            equal("columns of w", wk, "columns of x", k)?;
            contiguous("w", &o.w)?;
            operand_scales(&o.x, &o.x_scales, &o.w, &o.w_scales, Some(e), o.grid)?;
            is("offsets", &o.offsets, DType::I32, &[e + 1])?;
            one_of("out", &o.out, FLOAT)?;
            is("out", &o.out, o.out.dtype(), &[r, n])
        }
        Op::BatchedLinear(o) => {
            let [t, h, k] = shape("x", &o.x, FLOAT)?;
            let [wh, a, b] = shape("w", &o.w, FLOAT)?;
            let (n, wk) = if o.k_major { (b, a) } else { (a, b) };
            equal("heads of w", wh, "heads of x", h)?;
            equal("K of w", wk, "K of x", k)?;
            one_of("w", &o.w, &[o.x.dtype()])?;
            is("out", &o.out, o.x.dtype(), &[t, h, n])
        }
        Op::Rope(o) => {
            let [t, _, d] = shape("x", &o.x, FLOAT)?;
            if d % 2 != 0 {
                return Err(format!("x {:?} has an odd rotary dimension", o.x));
            }
            is("positions", &o.positions, DType::I32, &[t])?;
            let (_, width) = matrix("table", &o.table, &[DType::F32])?;
            equal("columns of table", width, "rotary dimension", d)
        }
        Op::CacheWrite(o) => {
            let (t, r) = matrix("latent", &o.latent, FLOAT)?;
            let (_, d) = matrix("k_rope", &o.k_rope, FLOAT)?;
            is("k_rope", &o.k_rope, o.latent.dtype(), &[t, d])?;
            is("slots", &o.slots, DType::I32, &[t])?;
            cache(&o.cache, o.latent.dtype(), r + d)
        }
        Op::CacheRead(o) => {
            let (_, width) = matrix("out", &o.out, FLOAT)?;
            let [b, _] = shape("block_table", &o.block_table, &[DType::I32])?;
            is("kv_starts", &o.kv_starts, DType::I32, &[b + 1])?;
            cache(&o.cache, o.out.dtype(), width)
        }
        Op::MlaPrefill(o) => {
            let [t, h, qd] = shape("q", &o.q, FLOAT)?;
            let [s, kh, kvd] = shape("kv", &o.kv, FLOAT)?;
            let (_, d) = matrix("k_rope", &o.k_rope, FLOAT)?;
            equal("heads of kv", kh, "heads of q", h)?;
            one_of("kv", &o.kv, &[o.q.dtype()])?;
            is("k_rope", &o.k_rope, o.q.dtype(), &[s, d])?;
            let [starts] = shape("q_starts", &o.q_starts, &[DType::I32])?;
            is("kv_starts", &o.kv_starts, DType::I32, &[starts])?;
            let nope = qd.checked_sub(d).ok_or(format!("q {:?} is narrower than k_rope", o.q))?;
            let v = kvd.checked_sub(nope).ok_or(format!("kv {:?} has no room for V", o.kv))?;
            is("out", &o.out, o.q.dtype(), &[t, h, v])
        }
        Op::MlaDecode(o) => {
            let [t, h, r] = shape("q_latent", &o.q_latent, FLOAT)?;
            let [_, _, d] = shape("q_rope", &o.q_rope, FLOAT)?;
            is("q_rope", &o.q_rope, o.q_latent.dtype(), &[t, h, d])?;
            cache(&o.cache, o.q_latent.dtype(), r + d)?;
            let [b, _] = shape("block_table", &o.block_table, &[DType::I32])?;
            is("q_starts", &o.q_starts, DType::I32, &[b + 1])?;
            is("kv_lens", &o.kv_lens, DType::I32, &[b])?;
            is("out", &o.out, o.q_latent.dtype(), &[t, h, r])
        }
        Op::SwiGlu(o) => {
            let (t, inner) = gate_and_up(&o.x)?;
            row_offsets(&o.row_offsets)?;
            is("out", &o.out, o.x.dtype(), &[t, inner])
        }
        Op::SwiGluQuantize(o) => {
            let (t, inner) = gate_and_up(&o.x)?;
            row_offsets(&o.row_offsets)?;
            quantized(&o.q, &o.scales, o.column_offset, t, inner)
        }
        Op::Gate(o) => {
            let (t, e) = matrix("logits", &o.logits, &[DType::F32])?;
            maybe("bias", &o.bias, DType::F32, &[e])?;
            let (_, k) = matrix("experts", &o.experts, &[DType::I32])?;
            is("experts", &o.experts, DType::I32, &[t, k])?;
            is("weights", &o.weights, DType::F32, &[t, k])?;
            let (groups, kept) = (o.groups as usize, o.groups_kept as usize);
            if groups == 0 || e % groups != 0 || kept == 0 || kept > groups {
                return Err(format!("cannot keep {kept} of {groups} groups of {e} experts"));
            }
            within("experts per token", k, kept * (e / groups))
        }
        Op::MoeDispatch(o) => {
            let (t, h) = matrix("x", &o.x, MATRIX)?;
            let (_, k) = matrix("experts", &o.experts, &[DType::I32])?;
            is("experts", &o.experts, DType::I32, &[t, k])?;
            is("weights", &o.weights, DType::F32, &[t, k])?;
            row_offsets(&o.row_offsets)?;
            let (r, _) = matrix("out", &o.out, MATRIX)?;
            is("out", &o.out, o.x.dtype(), &[r, h])?;
            moving_scales(&o.x_scales, t, &o.out_scales, r)?;
            is("out_experts", &o.out_experts, DType::I32, &[r, k])?;
            is("out_weights", &o.out_weights, DType::F32, &[r, k])?;
            is("rows", &o.rows, DType::I32, &[t, k])?;
            let [starts] = shape("offsets", &o.offsets, &[DType::I32])?;
            let destinations = starts.checked_sub(1).ok_or("offsets is empty")?;
            if o.experts_per_destination == 0 {
                return Err("experts_per_destination is 0".into());
            }
            let experts = o.total_experts as usize;
            let physical = destinations * o.experts_per_destination as usize;
            match &o.replicas {
                Some(replicas) => {
                    let (_, most) = matrix("replicas", replicas, &[DType::I32])?;
                    is("replicas", replicas, DType::I32, &[experts, most])
                }
                None => within("experts", experts, physical),
            }
        }
        Op::MoePermute(o) => {
            let (t, h) = matrix("x", &o.x, MATRIX)?;
            let [_, k] = shape("experts", &o.experts, &[DType::I32])?;
            is("experts", &o.experts, DType::I32, &[t, k])?;
            let (r, _) = matrix("out", &o.out, MATRIX)?;
            is("out", &o.out, o.x.dtype(), &[r, h])?;
            is("rows", &o.rows, DType::I32, &[t, k])?;
            row_offsets(&o.row_offsets)?;
            moving_scales(&o.x_scales, t, &o.out_scales, r)?;
            let [starts] = shape("offsets", &o.offsets, &[DType::I32])?;
            let local = starts.checked_sub(1).ok_or("offsets is empty")?;
            within("local experts", o.first_expert as usize + local, o.total_experts as usize)
        }
        Op::MoeCombine(o) => {
            let (_, h) = matrix("y", &o.y, FLOAT)?;
            let (t, k) = matrix("rows", &o.rows, &[DType::I32])?;
            maybe("weights", &o.weights, DType::F32, &[t, k])?;
            row_offsets(&o.row_offsets)?;
            maybe("base", &o.base, o.y.dtype(), &[t, h])?;
            is("out", &o.out, o.y.dtype(), &[t, h])
        }
        Op::Add(o) => {
            one_of("a", &o.a, FLOAT)?;
            for (name, desc) in [("b", &o.b), ("out", &o.out)] {
                one_of(name, desc, &[o.a.dtype()])?;
                same_shape(name, desc, "a", &o.a)?;
            }
            Ok(())
        }
        Op::Cast(o) => {
            one_of("x", &o.x, FLOAT)?;
            one_of("out", &o.out, FLOAT)?;
            same_shape("out", &o.out, "x", &o.x)
        }
        Op::Copy(o) => {
            one_of("out", &o.out, &[o.x.dtype()])?;
            same_shape("out", &o.out, "x", &o.x)
        }
        Op::ArgMax(o) => {
            let (t, v) = matrix("x", &o.x, FLOAT)?;
            is("out", &o.out, DType::I32, &[t])?;
            limit(o.limit, v)
        }
        Op::TopK(o) => {
            let (t, v) = matrix("x", &o.x, FLOAT)?;
            let (_, k) = matrix("values", &o.values, &[DType::F32])?;
            is("values", &o.values, DType::F32, &[t, k])?;
            is("indices", &o.indices, DType::I32, &[t, k])?;
            within("k", k, o.limit as usize)?;
            limit(o.limit, v)
        }
    }
}

const FLOAT: &[DType] = &[DType::F32, DType::Bf16];
const MATRIX: &[DType] = &[DType::F32, DType::Bf16, DType::F8E4M3];

fn one_of(name: &str, desc: &TensorDesc, allowed: &[DType]) -> Result<(), String> {
    if allowed.contains(&desc.dtype()) {
        return Ok(());
    }
    let names: Vec<_> = allowed.iter().map(|d| d.name()).collect();
    Err(format!("{name} is {}, expected {}", desc.dtype(), names.join(" or ")))
}

fn shape<const N: usize>(
    name: &str,
    desc: &TensorDesc,
    allowed: &[DType],
) -> Result<[usize; N], String> {
    one_of(name, desc, allowed)?;
    if desc.rank() != N {
        return Err(format!("{name} {desc:?} has {} dimensions, expected {N}", desc.rank()));
    }
    Ok(std::array::from_fn(|axis| desc.dim(axis)))
}

fn matrix(name: &str, desc: &TensorDesc, allowed: &[DType]) -> Result<(usize, usize), String> {
    shape(name, desc, allowed).map(|[rows, columns]| (rows, columns))
}

fn is(name: &str, desc: &TensorDesc, dtype: DType, expected: &[usize]) -> Result<(), String> {
    let same = desc.dtype() == dtype
        && desc.rank() == expected.len()
        && expected.iter().enumerate().all(|(axis, &dim)| desc.dim(axis) == dim);
    if same { Ok(()) } else { Err(format!("{name} is {desc:?}, expected {dtype}{expected:?}")) }
}

fn maybe(
    name: &str,
    desc: &Option<TensorDesc>,
    dtype: DType,
    expected: &[usize],
) -> Result<(), String> {
    desc.as_ref().map_or(Ok(()), |desc| is(name, desc, dtype, expected))
}

fn same_shape(name: &str, desc: &TensorDesc, of: &str, other: &TensorDesc) -> Result<(), String> {
    if desc.shape() == other.shape() {
        return Ok(());
    }
    Err(format!("{name} {desc:?} has not the shape of {of} {other:?}"))
}

fn contiguous(name: &str, desc: &TensorDesc) -> Result<(), String> {
    if desc.is_contiguous() { Ok(()) } else { Err(format!("{name} {desc:?} has gaps")) }
}

fn equal(a_name: &str, a: usize, b_name: &str, b: usize) -> Result<(), String> {
    if a == b { Ok(()) } else { Err(format!("{a_name} ({a}) differ from {b_name} ({b})")) }
}

fn within(name: &str, value: usize, bound: usize) -> Result<(), String> {
    if value <= bound { Ok(()) } else { Err(format!("{name} ({value}) exceed {bound}")) }
}

fn offset(name: &str, value: u32) -> Result<(), String> {
    if (value as usize) < FP8_BLOCK {
        return Ok(());
    }
    Err(format!("{name} {value} is not inside one block of {FP8_BLOCK}"))
}

/// The halves of SwiGLU's input, side by side: rows, and columns of each.
fn gate_and_up(x: &TensorDesc) -> Result<(usize, usize), String> {
    match matrix("x", x, FLOAT)? {
        (rows, wide) if wide % 2 == 0 => Ok((rows, wide / 2)),
        _ => Err(format!("x {x:?} does not split into gate and up")),
    }
}

/// What quantisation of `[rows, columns]` writes.
fn quantized(
    q: &TensorDesc,
    scales: &TensorDesc,
    column_offset: u32,
    rows: usize,
    columns: usize,
) -> Result<(), String> {
    is("q", q, DType::F8E4M3, &[rows, columns])?;
    offset("column_offset", column_offset)?;
    let grid = BlockGrid { column_offset, ..BlockGrid::default() };
    is("scales", scales, DType::F32, &[rows, grid.scale_columns(columns)])
}

/// The offsets whose last element says how many rows count.
fn row_offsets(desc: &Option<TensorDesc>) -> Result<(), String> {
    let Some(desc) = desc else { return Ok(()) };
    match shape("row_offsets", desc, &[DType::I32])? {
        [0] => Err("row_offsets is empty".into()),
        [_] => Ok(()),
    }
}

/// Scales that move with the rows of `x` from T to R rows.
fn moving_scales(
    from: &Option<TensorDesc>,
    t: usize,
    to: &Option<TensorDesc>,
    r: usize,
) -> Result<(), String> {
    match (from, to) {
        (None, None) => Ok(()),
        (Some(from), Some(to)) => {
            let (_, groups) = matrix("x_scales", from, &[DType::F32])?;
            is("x_scales", from, DType::F32, &[t, groups])?;
            is("out_scales", to, DType::F32, &[r, groups])
        }
        _ => Err("x_scales and out_scales come together or not at all".into()),
    }
}

fn limit(limit: u32, columns: usize) -> Result<(), String> {
    if limit == 0 {
        return Err("limit is 0: no column may be chosen".into());
    }
    within("limit", limit as usize, columns)
}

fn cache(desc: &TensorDesc, dtype: DType, width: usize) -> Result<(), String> {
    let [_, _, columns] = shape("cache", desc, &[dtype])?;
    contiguous("cache", desc)?;
    equal("columns of cache", columns, "latent and rotary dimensions", width)
}

fn scales(
    name: &str,
    desc: &TensorDesc,
    stack: Option<usize>,
    rows: usize,
    columns: usize,
    grid: BlockGrid,
) -> Result<(), String> {
    offset("row_offset", grid.row_offset)?;
    offset("column_offset", grid.column_offset)?;
    if !rows.is_multiple_of(grid.stacks()) {
        return Err(format!("{rows} rows are not {} equal segments", grid.stacks()));
    }
    let (r, c) = (grid.scale_rows(rows), grid.scale_columns(columns));
    contiguous(name, desc)?;
    match stack {
        Some(e) => is(name, desc, DType::F32, &[e, r, c]),
        None => is(name, desc, DType::F32, &[r, c]),
    }
}

/// The scales of both operands of a matrix product: there for FP8, absent otherwise.
fn operand_scales(
    x: &TensorDesc,
    x_scales: &Option<TensorDesc>,
    w: &TensorDesc,
    w_scales: &Option<TensorDesc>,
    stack: Option<usize>,
    grid: BlockGrid,
) -> Result<(), String> {
    one_of("w", w, &[x.dtype()])?;
    let (rows, columns) = (w.dim(w.rank() - 2), w.last_dim());
    match (x.dtype(), x_scales, w_scales) {
        (DType::F8E4M3, Some(xs), Some(ws)) => {
            scales("w_scales", ws, stack, rows, columns, grid)?;
            is("x_scales", xs, DType::F32, &[x.dim(0), grid.scale_columns(columns)])
        }
        (DType::F8E4M3, ..) => Err("FP8 operands need x_scales and w_scales".into()),
        (_, None, None) => Ok(()),
        (dtype, ..) => Err(format!("{dtype} operands have no scales")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn d(dtype: DType, shape: &[usize]) -> TensorDesc {
        TensorDesc::new(dtype, shape)
    }

    #[test]
    fn fp8_linear_wants_scales_that_match_its_grid() {
        let linear = |w_scales, grid| {
            check(&Op::from(Linear {
                x: d(DType::F8E4M3, &[3, 576]),
                x_scales: Some(d(DType::F32, &[3, 5])),
                w: d(DType::F8E4M3, &[200, 576]),
                w_scales,
                out: d(DType::Bf16, &[3, 200]),
                grid,
            }))
        };
        assert_eq!(linear(Some(d(DType::F32, &[2, 5])), BlockGrid::default()), Ok(()));
        for (scales, grid, words) in [
            (None, BlockGrid::default(), "need x_scales and w_scales"),
            (Some(d(DType::F32, &[2, 4])), BlockGrid::default(), "w_scales is f32[2, 4]"),
            (
                Some(d(DType::F32, &[2, 5])),
                BlockGrid { row_offset: 128, ..BlockGrid::default() },
                "row_offset 128",
            ),
            (
                Some(d(DType::F32, &[2, 5])),
                BlockGrid { segments: 3, ..BlockGrid::default() },
                "3 equal segments",
            ),
        ] {
            let error = linear(scales, grid).unwrap_err();
            assert!(error.contains(words), "{error}");
        }
    }

    #[test]
    fn messages_name_the_operand_and_what_was_found() {
        let norm = RmsNorm {
            x: d(DType::Bf16, &[2, 8]),
            weight: d(DType::Bf16, &[9]),
            residual: None,
            out: d(DType::Bf16, &[2, 8]),
            eps: 1e-6,
        };
        assert_eq!(check(&norm.into()), Err("weight is bf16[9], expected bf16[8]".to_string()));
    }
}

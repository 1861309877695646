//! Ops whose operands hold values that no device may act on.

use super::cases::{ints, matrix, tensor};
use super::host::HostTensor;
use hal::op::*;
use hal::{DType, Op};

/// Ops whose index operands point outside, and words of the error.
pub fn hostile() -> Vec<(&'static str, Op<HostTensor>, &'static str)> {
    let f = |shape: &[usize]| tensor(DType::F32, shape, |_| 1.0);
    let decode = |pages: &[i32], q_starts: &[i32], kv_lens: &[i32]| -> Op<HostTensor> {
        MlaDecode {
            q_latent: f(&[2, 1, 3]),
            q_rope: f(&[2, 1, 2]),
            cache: f(&[4, 2, 5]),
            block_table: matrix(ints(pages), &[1, 2]),
            q_starts: ints(q_starts),
            kv_lens: ints(kv_lens),
            out: f(&[2, 1, 3]),
            scale: 1.0,
            work: AttentionWork::default(),
        }
        .into()
    };
    let permute = |expert: i32, row_offsets: Option<HostTensor>| -> Op<HostTensor> {
        MoePermute {
            x: f(&[1, 2]),
            x_scales: None,
            experts: matrix(ints(&[expert]), &[1, 1]),
            row_offsets,
            out: f(&[1, 2]),
            out_scales: None,
            offsets: ints(&[0, 0, 0]),
            rows: matrix(ints(&[0]), &[1, 1]),
            first_expert: 0,
            total_experts: 2,
            expected_rows: 0,
        }
        .into()
    };
    // Two tokens with two experts each, for two ranks with two experts each.
    let dispatch = |experts: &[i32], replicas: Option<&[i32]>, room: usize, last: i32| {
        let rows = ints(&[0; 4]);
        Op::from(MoeDispatch {
            x: f(&[2, 3]),
            x_scales: None,
            experts: matrix(ints(experts), &[2, 2]),
            weights: f(&[2, 2]),
            replicas: replicas.map(|r| matrix(ints(r), &[4, 1])),
            row_offsets: Some(ints(&[last])),
            out: f(&[room, 3]),
            out_scales: None,
            out_experts: matrix(ints(&vec![0; room * 2]), &[room, 2]),
            out_weights: f(&[room, 2]),
            offsets: ints(&[0; 3]),
            rows: matrix(rows, &[2, 2]),
            experts_per_destination: 2,
            total_experts: 4,
            replica_offset: 0,
            expected_rows: 0,
        })
    };
    let combine = |row: i32, last: i32| -> Op<HostTensor> {
        let (rows, row_offsets) = (matrix(ints(&[row]), &[1, 1]), Some(ints(&[0, last])));
        let (y, weights, out) = (f(&[1, 2]), Some(f(&[1, 1])), f(&[1, 2]));
        MoeCombine {
            y,
            rows,
            weights,
            base: None,
            row_offsets,
            out,
            expected_rows: 0,
            expected_copies: 0,
        }
        .into()
    };
    let swiglu = |last: i32| -> Op<HostTensor> {
        let row_offsets = Some(ints(&[last]));
        SwiGlu { x: f(&[2, 4]), out: f(&[2, 2]), row_offsets, expected_rows: 0 }.into()
    };
    let quantize = |last: i32| -> Op<HostTensor> {
        Quantize {
            x: f(&[2, 4]),
            q: tensor(DType::F8E4M3, &[2, 4], |_| 1.0),
            scales: f(&[2, 1]),
            row_offsets: Some(ints(&[last])),
            column_offset: 0,
            scale_format: ScaleFormat::Float,
            expected_rows: 0,
        }
        .into()
    };
    let gated_quantize = |last: i32| -> Op<HostTensor> {
        SwiGluQuantize {
            x: f(&[2, 8]),
            row_offsets: Some(ints(&[last])),
            q: tensor(DType::F8E4M3, &[2, 4], |_| 1.0),
            scales: f(&[2, 1]),
            column_offset: 0,
            scale_format: ScaleFormat::Float,
            expected_rows: 0,
        }
        .into()
    };
    let write = |slot: i32| -> Op<HostTensor> {
        let (latent, k_rope) = (f(&[1, 3]), f(&[1, 2]));
        CacheWrite { latent, k_rope, slots: ints(&[slot]), cache: f(&[4, 2, 5]) }.into()
    };
    let gather = |row| -> Op<HostTensor> {
        let (table, rows, out) = (f(&[4, 2]), ints(&[row]), f(&[1, 2]));
        GatherRows { table, rows, out, first_row: 0, total_rows: 4 }.into()
    };
    let rope = |position| -> Op<HostTensor> {
        Rope { x: f(&[1, 1, 2]), positions: ints(&[position]), table: f(&[3, 2]) }.into()
    };
    let grouped = |offsets: &[i32]| -> Op<HostTensor> {
        GroupedLinear {
            x: f(&[3, 4]),
            x_scales: None,
            w: f(&[2, 5, 4]),
            w_scales: None,
            offsets: ints(offsets),
            out: f(&[3, 5]),
            grid: BlockGrid::default(),
            routing: Routing::default(),
        }
        .into()
    };
    let argmax = |value: f64| -> Op<HostTensor> {
        ArgMax { x: tensor(DType::F32, &[1, 3], |_| value), out: ints(&[0]), limit: 3 }.into()
    };
    vec![
        ("page", decode(&[0, 9], &[0, 2], &[4]), "page 9 is not one of the cache's 4"),
        ("negative page", decode(&[-1, 0], &[0, 2], &[4]), "page -1"),
        ("too many keys", decode(&[0, 1], &[0, 2], &[5]), "5 keys need 3 pages"),
        ("negative keys", decode(&[0, 1], &[0, 2], &[-4]), "-4 keys"),
        ("fewer keys than queries", decode(&[0, 1], &[0, 2], &[1]), "2 queries but 1 keys"),
        ("starts", decode(&[0, 1], &[0, 3], &[4]), "at most 2"),
        ("expert", permute(2, None), "expert 2"),
        ("permuted rows beyond", permute(0, Some(ints(&[2]))), "end at 2"),
        ("row", combine(1, 1), "row 1 of token 0"),
        ("combined rows beyond", combine(0, 2), "end at 2"),
        ("gated rows beyond", swiglu(3), "end at 3"),
        ("negative gated rows", swiglu(-1), "end at -1"),
        ("quantised rows beyond", quantize(3), "end at 3"),
        ("gated and quantised rows beyond", gated_quantize(3), "end at 3"),
        ("expert to dispatch", dispatch(&[0, 1, 2, 4], None, 4, 2), "expert 4 of token 1"),
        ("tokens to dispatch", dispatch(&[0, 1, 2, 3], None, 4, 3), "end at 3"),
        (
            "room for what is sent",
            dispatch(&[0, 2, 1, 3], None, 3, 2),
            "4 rows to send do not fit 3",
        ),
        (
            "no replica",
            dispatch(&[0, 1, 2, 3], Some(&[0, 1, -1, 3]), 4, 2),
            "expert 2 has no replica",
        ),
        ("replica", dispatch(&[0, 1, 2, 3], Some(&[0, 4, 2, 3]), 4, 2), "physical expert 4"),
        ("slot", write(8), "slot 8"),
        ("gathered row", gather(4), "row 4"),
        ("negative gathered row", gather(-1), "row -1"),
        ("position", rope(3), "position 3"),
        ("negative position", rope(-7), "position -7"),
        ("offsets beyond the rows", grouped(&[0, 2, 4]), "at most 3"),
        ("falling offsets", grouped(&[0, 2, 1]), "do not ascend"),
        ("offsets not from zero", grouped(&[1, 2, 3]), "from 0"),
        ("negative offsets", grouped(&[0, -1, 3]), "do not ascend"),
        ("not a number", argmax(f64::NAN), "NaN at 0"),
    ]
}

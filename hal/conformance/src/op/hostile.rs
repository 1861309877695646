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
    let permute = |expert: i32| -> Op<HostTensor> {
        MoePermute {
            x: f(&[1, 2]),
            x_scales: None,
            experts: matrix(ints(&[expert]), &[1, 1]),
            out: f(&[1, 2]),
            out_scales: None,
            offsets: ints(&[0, 0, 0]),
            rows: matrix(ints(&[0]), &[1, 1]),
            first_expert: 0,
            total_experts: 2,
        }
        .into()
    };
    let combine = |row: i32| -> Op<HostTensor> {
        let rows = matrix(ints(&[row]), &[1, 1]);
        MoeCombine { y: f(&[1, 2]), rows, weights: f(&[1, 1]), base: None, out: f(&[1, 2]) }.into()
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
        ("expert", permute(2), "expert 2"),
        ("negative expert", permute(-1), "expert -1"),
        ("row", combine(1), "row 1 of token 0"),
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

//! The all-to-all whose counts are values in device memory.

use super::misuse::refuse;
use super::values::{RANKS, elements};
use super::{Rank, join};
use crate::backend::Feature;
use crate::lab::{Lab, SOON, Verdict, ensure, equal, failed, is, read, refused};
use crate::run::Case;
use hal::{Cause, Collective, DType, Operand, Tensor, TensorDesc};

pub(crate) fn add_cases(all: &mut Vec<Case>) {
    let values = [Feature::Values];
    for ranks in RANKS {
        for dtype in DType::ALL {
            let name = format!("collectives/all_to_all_v/{ranks}/{dtype}");
            let case = Case::new(name, move |lab| exchange(lab, ranks, dtype));
            all.push(case.dies(ranks).needs(&values));
        }
        let name = format!("collectives/all_to_all_v/there_and_back/{ranks}");
        let case = Case::new(name, move |lab| there_and_back(lab, ranks));
        all.push(case.dies(ranks).needs(&values));
    }
    for (name, wrong) in WRONG {
        let case = Case::new(format!("collectives/all_to_all_v/wrong/{name}"), move |lab| {
            fails(lab, *wrong)
        });
        all.push(case.alone().dies(3).needs(&values));
    }
    all.push(Case::new("collectives/refused/all_to_all_v", refused_shapes).dies(2));
}

/// Rows from one rank to another: zeros among them, and nothing symmetric.
fn count(from: usize, to: usize) -> usize {
    (from * 3 + to * 7) % 5
}

fn starts(counts: impl Iterator<Item = usize>) -> Vec<i32> {
    let mut all = vec![0];
    for n in counts {
        all.push(all.last().copied().unwrap_or(0) + n as i32);
    }
    all
}

fn bytes_of(values: &[i32]) -> Vec<u8> {
    values.iter().flat_map(|v| v.to_le_bytes()).collect()
}

/// The values of an I32 tensor.
fn ints(rank: &Rank, tensor: &Tensor) -> Verdict<Vec<i32>> {
    let bytes = rank.take(tensor)?;
    Ok(bytes.as_chunks::<4>().0.iter().map(|b| i32::from_le_bytes(*b)).collect())
}

impl Rank {
    /// Rows of this width, between guards.
    fn rows(&self, dtype: DType, width: usize, bytes: &[u8]) -> Verdict<Tensor> {
        let rows = bytes.len() / dtype.size() / width;
        Ok(self.place(dtype, bytes)?.with_desc(TensorDesc::new(dtype, &[rows, width])))
    }

    fn offsets(&self, values: &[i32]) -> Verdict<Tensor> {
        self.place(DType::I32, &bytes_of(values))
    }
}

/// Rows beyond those that are sent, and room beyond those that come.
const SPARE: usize = 2;

fn exchange(lab: &Lab, size: usize, dtype: DType) -> Verdict {
    let ranks = join(lab, size)?;
    // Two collectives of one batch share the offsets: the rows, and something narrow about each.
    let widths = [(dtype, 5), (DType::I32, 1)];
    let message = |(dtype, width): (DType, usize), from: usize, to: usize| {
        elements(dtype, count(from, to) * width, (from * 100 + to + width) as u64)
    };
    let spare = |(dtype, width): (DType, usize)| vec![0x3c; SPARE * width * dtype.size()];
    let mut outputs = Vec::new();
    for rank in &ranks {
        let r = rank.number;
        let send_offsets = rank.offsets(&starts((0..size).map(|to| count(r, to))))?;
        let recv_offsets = rank.offsets(&vec![-7; size + 1])?;
        let mut batch = Vec::new();
        for (i, (dtype, width)) in widths.into_iter().enumerate() {
            let mut send: Vec<u8> =
                (0..size).flat_map(|to| message((dtype, width), r, to)).collect();
            send.extend(spare((dtype, width)));
            let rows: usize = (0..size).map(|from| count(from, r)).sum();
            let room = vec![0x77; (rows + SPARE) * width * dtype.size()];
            batch.push(Collective::AllToAllV {
                send: rank.rows(dtype, width, &send)?,
                recv: rank.rows(dtype, width, &room)?,
                send_offsets: send_offsets.clone(),
                recv_offsets: (i == 0).then(|| recv_offsets.clone()),
                expected_rows: 3,
            });
        }
        rank.submit(&batch)?;
        outputs.push((batch, recv_offsets));
    }
    for (rank, (batch, recv_offsets)) in ranks.iter().zip(&outputs) {
        let r = rank.number;
        let expected = starts((0..size).map(|from| count(from, r)));
        equal("recv_offsets", ints(rank, recv_offsets)?, expected)?;
        for (collective, (dtype, width)) in batch.iter().zip(widths) {
            let (_, recv) = collective.tensors(r);
            let got = rank.take(recv.ok_or("no recv")?)?;
            let mut expected: Vec<u8> =
                (0..size).flat_map(|from| message((dtype, width), from, r)).collect();
            // Rows beyond are left as they are.
            expected.resize(expected.len() + SPARE * width * dtype.size(), 0x77);
            ensure(got == expected, || format!("rank {r} got others' rows of {width}"))?;
        }
    }
    Ok(())
}

/// What came goes back by the offsets that were written: every rank has its own rows again.
fn there_and_back(lab: &Lab, size: usize) -> Verdict {
    let ranks = join(lab, size)?;
    let mut outputs = Vec::new();
    for rank in &ranks {
        let r = rank.number;
        let rows: usize = (0..size).map(|to| count(r, to)).sum();
        let send = elements(DType::F32, rows * 3, r as u64 + 1);
        let room = vec![0; size * 5 * 12];
        let there = Collective::AllToAllV {
            send: rank.rows(DType::F32, 3, &send)?,
            recv: rank.rows(DType::F32, 3, &room)?,
            send_offsets: rank.offsets(&starts((0..size).map(|to| count(r, to))))?,
            recv_offsets: Some(rank.offsets(&vec![0; size + 1])?),
            expected_rows: 0,
        };
        let Collective::AllToAllV { recv: came, recv_offsets: Some(offsets), .. } = &there else {
            return Err("no way back".into());
        };
        let back = Collective::AllToAllV {
            send: came.clone(),
            recv: rank.rows(DType::F32, 3, &vec![0; send.len()])?,
            send_offsets: offsets.clone(),
            recv_offsets: None,
            expected_rows: 0,
        };
        rank.submit(&[there])?;
        rank.submit(std::slice::from_ref(&back))?;
        outputs.push((send, back));
    }
    for (rank, (sent, back)) in ranks.iter().zip(&outputs) {
        let (_, recv) = back.tensors(rank.number);
        ensure(rank.take(recv.ok_or("no recv")?)? == *sent, || {
            format!("rank {} has not its rows again", rank.number)
        })?;
    }
    Ok(())
}

/// What the last of three ranks does wrong: its offsets, its rows to send, its room, their width
/// and dtype; and whether that is a matter of values.
#[derive(Clone, Copy, Debug)]
struct Wrong {
    offsets: [i32; 4],
    room: usize,
    width: usize,
    dtype: DType,
    data: bool,
}

const FINE: Wrong =
    Wrong { offsets: [0, 1, 2, 3], room: 3, width: 2, dtype: DType::F32, data: true };

const WRONG: &[(&str, Wrong)] = &[
    ("falling_offsets", Wrong { offsets: [0, 2, 1, 3], ..FINE }),
    ("offsets_not_from_zero", Wrong { offsets: [1, 1, 2, 3], ..FINE }),
    ("negative_offsets", Wrong { offsets: [0, -1, 2, 3], ..FINE }),
    ("offsets_beyond_the_rows", Wrong { offsets: [0, 1, 2, 4], ..FINE }),
    ("no_room", Wrong { room: 2, ..FINE }),
    ("width", Wrong { width: 3, data: false, ..FINE }),
    ("dtype", Wrong { dtype: DType::I32, data: false, ..FINE }),
];

fn fails(lab: &Lab, wrong: Wrong) -> Verdict {
    let ranks = join(lab, 3)?;
    for rank in &ranks {
        let Wrong { offsets, room, width, dtype, .. } = if rank.number == 2 { wrong } else { FINE };
        let collective = Collective::AllToAllV {
            send: rank.rows(dtype, width, &vec![0; 3 * width * dtype.size()])?,
            recv: rank.rows(dtype, width, &vec![0; room * width * dtype.size()])?,
            send_offsets: rank.offsets(&offsets)?,
            recv_offsets: None,
            expected_rows: 3,
        };
        rank.submit(&[collective])?;
    }
    for rank in &ranks {
        let error = refused("a wrong exchange", rank.stream.synchronize(SOON))?;
        is(&error, "Failed", failed)?;
        let origin = error.origin().ok_or("no origin")?;
        equal("the op of the origin", origin.op, "all_to_all_v")?;
        let told = match &origin.cause {
            Cause::Data(_) => wrong.data,
            Cause::Mismatch(_) => !wrong.data,
            _ => false,
        };
        ensure(told, || format!("rank {}: {error}", rank.number))?;
        refused("the status", rank.communicator.status())?;
    }
    // The dies go on.
    let other = lab.stream(0)?;
    let word = crate::lab::upload(&*other, &[5; 4])?;
    equal("bytes", read(&*other, &word.whole())?, vec![5; 4])
}

fn refused_shapes(lab: &Lab) -> Verdict {
    let ranks = join(lab, 2)?;
    let rank = &ranks[0];
    let rows = |dtype: DType, rows: usize, width: usize| {
        rank.rows(dtype, width, &vec![0; rows * width * dtype.size()])
    };
    let offsets = || rank.offsets(&[0, 1, 2]);
    let one = |send: Tensor, recv: Tensor, send_offsets, recv_offsets| {
        let expected_rows = 0;
        refuse(
            &ranks,
            &[Collective::AllToAllV { send, recv, send_offsets, recv_offsets, expected_rows }],
        )
    };
    let f = || rows(DType::F32, 2, 3);
    one(f()?, rows(DType::F32, 2, 2)?, offsets()?, None)?;
    one(f()?, rows(DType::I32, 2, 3)?, offsets()?, None)?;
    one(f()?, rank.place(DType::F32, &[0; 24])?, offsets()?, None)?;
    one(f()?, f()?, rank.offsets(&[0, 1])?, None)?;
    one(f()?, f()?, rank.place(DType::F32, &[0; 12])?, None)?;
    one(f()?, f()?, offsets()?, Some(rank.offsets(&[0; 4])?))?;
    // Not in place, and nothing is written over what is read.
    let send = f()?;
    one(send.clone(), send, offsets()?, None)?;
    let shared = offsets()?;
    one(f()?, f()?, shared.clone(), Some(shared))?;
    equal("dtype of rows", f()?.desc().dtype(), DType::F32)
}

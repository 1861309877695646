//! What every kind of collective gives, on every number of ranks and dtype, bit for bit.

use super::join;
use crate::backend::Feature;
use crate::lab::{Lab, Verdict, ensure, pattern};
use crate::run::Case;
use hal::{Collective, DType, PeerCounts, Reduction};
use half::bf16;
use std::sync::Arc;

pub(super) const RANKS: [usize; 6] = [1, 2, 3, 4, 8, 32];

pub(super) fn add_cases(all: &mut Vec<Case>) {
    for ranks in RANKS {
        for dtype in DType::ALL {
            for in_place in [false, true] {
                let place = if in_place { "in_place" } else { "apart" };
                let mut group = |kind: &str, run: fn(&Lab, &Setting) -> Verdict| {
                    let setting = Setting { ranks, dtype, in_place };
                    let name = format!("collectives/{kind}/{ranks}/{dtype}/{place}");
                    let case = Case::new(name, move |lab| run(lab, &setting));
                    all.push(case.dies(ranks).needs(&[Feature::Values]));
                };
                if matches!(dtype, DType::F32 | DType::Bf16 | DType::I32) {
                    group("all_reduce", all_reduce);
                    group("reduce_scatter", reduce_scatter);
                }
                group("all_gather", all_gather);
            }
            let mut group = |kind: &str, run: fn(&Lab, &Setting) -> Verdict| {
                let setting = Setting { ranks, dtype, in_place: false };
                let case = Case::new(format!("collectives/{kind}/{ranks}/{dtype}"), move |lab| {
                    run(lab, &setting)
                });
                all.push(case.dies(ranks).needs(&[Feature::Values]));
            };
            group("all_to_all", all_to_all);
            group("all_to_all_counts", all_to_all_counts);
            group("broadcast", broadcast);
            if ranks > 1 {
                group("send_ring", send_ring);
                group("send_exchange", send_exchange);
            }
        }
    }
}

#[derive(Clone, Copy, Debug)]
struct Setting {
    ranks: usize,
    dtype: DType,
    in_place: bool,
}

/// Elements whose sum depends on its order, as bytes.
pub(super) fn elements(dtype: DType, n: usize, seed: u64) -> Vec<u8> {
    let mut rng = crate::op::Rng(seed);
    let mut one = || rng.normal() * 10f64.powf(rng.unit() * 4.0 - 2.0);
    match dtype {
        DType::F32 => (0..n).flat_map(|_| (one() as f32).to_le_bytes()).collect(),
        DType::Bf16 => (0..n).flat_map(|_| bf16::from_f64(one()).to_le_bytes()).collect(),
        DType::I32 => (0..n).flat_map(|_| ((one() * 1e7) as i32).to_le_bytes()).collect(),
        _ => pattern(n, seed),
    }
}

/// What the contract says: ascending ranks, in FP32 (integers wrap), rounded once.
pub(super) fn combine(dtype: DType, parts: &[&[u8]], reduction: Reduction) -> Vec<u8> {
    fn fold<const N: usize, T: Copy>(
        parts: &[&[u8]],
        decode: impl Fn([u8; N]) -> T,
        f: impl Fn(T, T) -> T,
        encode: impl Fn(T) -> [u8; N],
    ) -> Vec<u8> {
        let columns = (0..parts[0].len() / N).map(|i| {
            let element = |part: &&[u8]| decode(std::array::from_fn(|b| part[i * N + b]));
            let mut values = parts.iter().map(element);
            let first = values.next();
            first.map(|first| values.fold(first, &f))
        });
        columns.flatten().flat_map(encode).collect()
    }
    let float = |a: f32, b: f32| match reduction {
        Reduction::Sum => a + b,
        Reduction::Max => a.max(b),
        Reduction::Min => a.min(b),
    };
    match dtype {
        DType::F32 => fold(parts, f32::from_le_bytes, float, f32::to_le_bytes),
        DType::Bf16 => fold(
            parts,
            |b| bf16::from_le_bytes(b).to_f32(),
            float,
            |v| bf16::from_f32(v).to_le_bytes(),
        ),
        _ => fold(
            parts,
            i32::from_le_bytes,
            |a, b| match reduction {
                Reduction::Sum => a.wrapping_add(b),
                Reduction::Max => a.max(b),
                Reduction::Min => a.min(b),
            },
            i32::to_le_bytes,
        ),
    }
}

const REDUCTIONS: [Reduction; 3] = [Reduction::Sum, Reduction::Max, Reduction::Min];

/// Element counts: one, odd, ragged against 16 and 128.
const COUNTS: [usize; 3] = [1, 7, 131];

fn all_reduce(lab: &Lab, s: &Setting) -> Verdict {
    let ranks = join(lab, s.ranks)?;
    for n in COUNTS {
        for reduction in REDUCTIONS {
            let inputs: Vec<_> = (0..s.ranks).map(|r| elements(s.dtype, n, r as u64 + 1)).collect();
            let parts: Vec<&[u8]> = inputs.iter().map(Vec::as_slice).collect();
            let expected = combine(s.dtype, &parts, reduction);
            let mut outputs = Vec::new();
            for (rank, input) in ranks.iter().zip(&inputs) {
                let send = rank.place(s.dtype, input)?;
                let recv = match s.in_place {
                    true => send.clone(),
                    false => rank.place(s.dtype, &vec![0; input.len()])?,
                };
                let collective =
                    Collective::AllReduce { send: send.clone(), recv: recv.clone(), reduction };
                rank.submit(&[collective])?;
                outputs.push((send, recv));
            }
            for ((rank, (send, recv)), input) in ranks.iter().zip(&outputs).zip(&inputs) {
                ensure(rank.take(recv)? == expected, || {
                    format!("{reduction:?} of {n} differs on rank {}", rank.number)
                })?;
                ensure(s.in_place || rank.take(send)? == *input, || "send changed".into())?;
            }
        }
    }
    Ok(())
}

fn reduce_scatter(lab: &Lab, s: &Setting) -> Verdict {
    let ranks = join(lab, s.ranks)?;
    let size = s.dtype.size();
    for n in COUNTS {
        for reduction in REDUCTIONS {
            let inputs: Vec<_> =
                (0..s.ranks).map(|r| elements(s.dtype, n * s.ranks, r as u64 + 1)).collect();
            let mut outputs = Vec::new();
            for (rank, input) in ranks.iter().zip(&inputs) {
                let send = rank.place(s.dtype, input)?;
                let recv = match s.in_place {
                    true => send.narrowed(0, rank.number * n, n),
                    false => rank.place(s.dtype, &vec![0; n * size])?,
                };
                let collective = Collective::ReduceScatter { send, recv: recv.clone(), reduction };
                rank.submit(&[collective])?;
                outputs.push(recv);
            }
            for (rank, recv) in ranks.iter().zip(&outputs) {
                let range = rank.number * n * size..(rank.number + 1) * n * size;
                let parts: Vec<&[u8]> = inputs.iter().map(|i| &i[range.clone()]).collect();
                let expected = combine(s.dtype, &parts, reduction);
                let all = rank.take(recv)?;
                let got = if s.in_place { all[range.clone()].to_vec() } else { all };
                ensure(got == expected, || {
                    format!("{reduction:?} of {n} differs on rank {}", rank.number)
                })?;
            }
        }
    }
    Ok(())
}

fn all_gather(lab: &Lab, s: &Setting) -> Verdict {
    let ranks = join(lab, s.ranks)?;
    let size = s.dtype.size();
    for n in COUNTS {
        let inputs: Vec<_> = (0..s.ranks).map(|r| elements(s.dtype, n, r as u64 + 1)).collect();
        let mut outputs = Vec::new();
        for (rank, input) in ranks.iter().zip(&inputs) {
            let mut room = vec![0; s.ranks * n * size];
            if s.in_place {
                room[rank.number * n * size..][..n * size].copy_from_slice(input);
            }
            let recv = rank.place(s.dtype, &room)?;
            let send = match s.in_place {
                true => recv.narrowed(0, rank.number * n, n),
                false => rank.place(s.dtype, input)?,
            };
            rank.submit(&[Collective::AllGather { send, recv: recv.clone() }])?;
            outputs.push(recv);
        }
        for (rank, recv) in ranks.iter().zip(&outputs) {
            ensure(rank.take(recv)? == inputs.concat(), || {
                format!("{n} elements differ on rank {}", rank.number)
            })?;
        }
    }
    Ok(())
}

/// Elements of room beyond what an all-to-all tells of, and their bytes.
const SPARE: usize = 3;
const SPARE_BYTE: u8 = 0x3c;

fn exchange(lab: &Lab, s: &Setting, count: impl Fn(usize, usize) -> usize, told: bool) -> Verdict {
    let ranks = join(lab, s.ranks)?;
    let size = s.dtype.size();
    let message =
        |from: usize, to: usize| elements(s.dtype, count(from, to), (from * 100 + to + 1) as u64);
    let mut outputs = Vec::new();
    for rank in &ranks {
        let r = rank.number;
        let send: Vec<u8> = (0..s.ranks).flat_map(|to| message(r, to)).collect();
        let sums = |f: &dyn Fn(usize) -> usize| (0..s.ranks).map(f).collect::<Vec<_>>();
        let (out, into) = (sums(&|to| count(r, to)), sums(&|from| count(from, r)));
        // More room than is told of, which stays as it is.
        let more = if told { SPARE } else { 0 };
        let room = vec![SPARE_BYTE; (into.iter().sum::<usize>() + more) * size];
        let recv = rank.place(s.dtype, &room)?;
        let counts = told.then(|| Arc::new(PeerCounts { send: out, recv: into }));
        let send = rank.place(s.dtype, &send)?;
        rank.submit(&[Collective::AllToAll { send, recv: recv.clone(), counts }])?;
        outputs.push(recv);
    }
    for (rank, recv) in ranks.iter().zip(&outputs) {
        let mut expected: Vec<u8> =
            (0..s.ranks).flat_map(|from| message(from, rank.number)).collect();
        if told {
            expected.extend([SPARE_BYTE; SPARE].iter().flat_map(|&b| vec![b; size]));
        }
        ensure(rank.take(recv)? == expected, || format!("rank {} got others' parts", rank.number))?;
    }
    Ok(())
}

fn all_to_all(lab: &Lab, s: &Setting) -> Verdict {
    exchange(lab, s, |_, _| 5, false)
}

fn all_to_all_counts(lab: &Lab, s: &Setting) -> Verdict {
    // Zeros among them, and nothing symmetric.
    exchange(lab, s, |from, to| (from * 3 + to * 7) % 5, true)
}

fn broadcast(lab: &Lab, s: &Setting) -> Verdict {
    let ranks = join(lab, s.ranks)?;
    for root in [0, s.ranks - 1, s.ranks / 2] {
        let expected = elements(s.dtype, 131, 5 + root as u64);
        let mut tensors = Vec::new();
        for rank in &ranks {
            let bytes =
                if rank.number == root { expected.clone() } else { vec![0; expected.len()] };
            let tensor = rank.place(s.dtype, &bytes)?;
            rank.submit(&[Collective::Broadcast { tensor: tensor.clone(), root }])?;
            tensors.push(tensor);
        }
        for (rank, tensor) in ranks.iter().zip(&tensors) {
            ensure(rank.take(tensor)? == expected, || {
                format!("rank {} has not what root {root} sent", rank.number)
            })?;
        }
    }
    Ok(())
}

fn peers(
    lab: &Lab,
    s: &Setting,
    to: impl Fn(usize) -> usize,
    from: impl Fn(usize) -> usize,
) -> Verdict {
    let ranks = join(lab, s.ranks)?;
    for n in COUNTS {
        let mut received = Vec::new();
        for rank in &ranks {
            let send = rank.place(s.dtype, &elements(s.dtype, n, rank.number as u64 + 1))?;
            let recv = rank.place(s.dtype, &vec![0; n * s.dtype.size()])?;
            // Both in one batch, so that a ring does not wait for itself.
            rank.submit(&[
                Collective::Send { tensor: send, peer: to(rank.number) },
                Collective::Recv { tensor: recv.clone(), peer: from(rank.number) },
            ])?;
            received.push(recv);
        }
        for (rank, recv) in ranks.iter().zip(&received) {
            let expected = elements(s.dtype, n, from(rank.number) as u64 + 1);
            ensure(rank.take(recv)? == expected, || format!("rank {} got others'", rank.number))?;
        }
    }
    Ok(())
}

fn send_ring(lab: &Lab, s: &Setting) -> Verdict {
    let n = s.ranks;
    peers(lab, s, |r| (r + 1) % n, |r| (r + n - 1) % n)
}

fn send_exchange(lab: &Lab, s: &Setting) -> Verdict {
    // With the mirror image; the middle one of an odd number talks to itself.
    let n = s.ranks;
    peers(lab, s, |r| n - 1 - r, |r| n - 1 - r)
}

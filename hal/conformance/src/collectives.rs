//! Collectives on 1 to 32 ranks against a plain reference, and ranks that disagree.

use crate::backend::Feature;
use crate::lab::{
    BRIEFLY, Lab, SOON, Verdict, ensure, equal, failed, is, pattern, read, refused, timeout, usage,
};
use crate::run::Case;
use hal::{
    Cause, Collective, Communicator, DType, Error, PeerCounts, Reduction, Stream, Tensor,
    TensorDesc,
};
use half::bf16;
use std::sync::Arc;

const RANKS: [usize; 6] = [1, 2, 3, 4, 8, 32];

pub(crate) fn add_cases(all: &mut Vec<Case>) {
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
    let values = [Feature::Values];
    all.extend([
        Case::new("collectives/batch/several_at_once", batch).dies(4).needs(&values),
        Case::new("collectives/batch/empty", empty_batch).dies(2),
        Case::new("collectives/order/two_communicators", two_communicators).dies(4).needs(&values),
        Case::new("collectives/order/with_other_commands", with_commands).dies(4).needs(&values),
        Case::new("collectives/order/ranks_submit_in_any_order", any_order).dies(4).needs(&values),
        Case::new("collectives/order/arrival_does_not_matter", arrival).dies(4).needs(&values),
        Case::new("collectives/join/ranks_on_any_die", any_die).dies(4).needs(&values),
        Case::new("collectives/order/one_die_per_thread", thread_per_rank).dies(8).needs(&values),
        Case::new("collectives/join/rank_taken", rank_taken).dies(2),
        Case::new("collectives/join/size_differs", size_differs).dies(2),
        Case::new("collectives/join/rank_beyond_size", beyond_size),
        Case::new("collectives/join/ids_differ", ids_differ),
        Case::new("collectives/join/properties", join_properties).dies(3),
        Case::new("collectives/refused/sizes", refused_sizes).dies(2),
        Case::new("collectives/refused/fp8_sum", refused_dtype).dies(2),
        Case::new("collectives/refused/other_dies_stream", refused_stream).dies(2),
        Case::new("collectives/refused/mixed_batch", refused_mix).dies(2),
        Case::new("collectives/abort/releases_the_waiting", abort).alone().dies(3),
        Case::new("collectives/abort/takes_nothing_more", abort_then_submit).alone().dies(2),
        Case::new("collectives/abort/first_reason_stays", abort_twice).alone().dies(2),
        Case::new("collectives/order/sends_meet_receives_in_order", sends_in_order)
            .dies(2)
            .needs(&values),
        Case::new("collectives/mismatch/send_and_receive", peers_disagree).alone().dies(2),
        Case::new("collectives/missing_rank_times_out", missing).alone().dies(3),
    ]);
    for (name, theirs) in MISMATCHES {
        let case =
            Case::new(format!("collectives/mismatch/{name}"), move |lab| mismatch(lab, *theirs));
        all.push(case.alone().dies(3));
    }
}

#[derive(Clone, Copy, Debug)]
struct Setting {
    ranks: usize,
    dtype: DType,
    in_place: bool,
}

/// One rank, with what it needs.
struct Rank {
    number: usize,
    stream: Arc<dyn Stream>,
    communicator: Arc<dyn Communicator>,
}

fn join(lab: &Lab, size: usize) -> Verdict<Vec<Rank>> {
    let id = lab.die(0).communicator_id()?;
    (0..size)
        .map(|number| {
            let communicator = lab.die(number).communicator(id, number, size)?;
            Ok(Rank { number, stream: lab.stream(number)?, communicator })
        })
        .collect()
}

/// Bytes on both sides of every tensor that nothing may touch.
const GUARD: usize = 256;

impl Rank {
    fn submit(&self, batch: &[Collective]) -> hal::Result<()> {
        self.stream.submit_collectives(&self.communicator, batch, &"conformance".into())
    }

    /// A tensor with these bytes, between guards.
    fn place(&self, dtype: DType, bytes: &[u8]) -> Verdict<Tensor> {
        let around = [&[0x77; GUARD], bytes, &[0x77; GUARD]].concat();
        let buffer = crate::lab::upload(&*self.stream, &around)?;
        let desc = TensorDesc::new(dtype, &[bytes.len() / dtype.size()]);
        Ok(Tensor::new(buffer, GUARD as u64, desc))
    }

    /// Its bytes, after making sure of the guards.
    fn take(&self, tensor: &Tensor) -> Verdict<Vec<u8>> {
        let all = read(&*self.stream, &tensor.buffer().whole())?;
        let (start, end) = (GUARD, all.len() - GUARD);
        let guards = all[..start].iter().chain(&all[end..]);
        ensure(guards.clone().all(|&b| b == 0x77), || {
            format!("rank {} was written outside its tensor", self.number)
        })?;
        Ok(all[start..end].to_vec())
    }
}

/// Elements whose sum depends on its order, as bytes.
fn elements(dtype: DType, n: usize, seed: u64) -> Vec<u8> {
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
fn combine(dtype: DType, parts: &[&[u8]], reduction: Reduction) -> Vec<u8> {
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

fn sum_of(tensor: &Tensor) -> Collective {
    Collective::AllReduce { send: tensor.clone(), recv: tensor.clone(), reduction: Reduction::Sum }
}

fn float(rank: &Rank, value: f32) -> Verdict<Tensor> {
    rank.place(DType::F32, &value.to_le_bytes())
}

fn value(rank: &Rank, tensor: &Tensor) -> Verdict<f32> {
    let bytes = rank.take(tensor)?;
    Ok(f32::from_le_bytes(std::array::from_fn(|i| bytes[i])))
}

fn batch(lab: &Lab) -> Verdict {
    let ranks = join(lab, 4)?;
    let mut all = Vec::new();
    for rank in &ranks {
        let x = float(rank, rank.number as f32)?;
        let y = float(rank, 10.0)?;
        let gathered = rank.place(DType::F32, &[0; 16])?;
        let before = rank.stream.point().value();
        let gather = Collective::AllGather { send: x.clone(), recv: gathered.clone() };
        rank.submit(&[sum_of(&y), gather, Collective::Broadcast { tensor: x.clone(), root: 2 }])?;
        equal("commands of a batch", rank.stream.point().value() - before, 1)?;
        all.push((x, y, gathered));
    }
    for (rank, (x, y, gathered)) in ranks.iter().zip(&all) {
        equal("the broadcast", value(rank, x)?, 2.0)?;
        equal("the sum", value(rank, y)?, 40.0)?;
        let expected: Vec<u8> = (0..4u8).flat_map(|r| f32::from(r).to_le_bytes()).collect();
        equal("the gathered", rank.take(gathered)?, expected)?;
    }
    Ok(())
}

fn empty_batch(lab: &Lab) -> Verdict {
    let ranks = join(lab, 2)?;
    let before = ranks[0].stream.point().value();
    ranks[0].submit(&[])?;
    equal("commands submitted", ranks[0].stream.point().value(), before)
}

fn two_communicators(lab: &Lab) -> Verdict {
    let (all, pairs) = (join(lab, 4)?, [join(lab, 2)?]);
    for round in 0..5 {
        let x = all.iter().map(|r| float(r, 1.0)).collect::<Verdict<Vec<_>>>()?;
        all.iter().zip(&x).try_for_each(|(rank, x)| rank.submit(&[sum_of(x)]))?;
        for (rank, (big, x)) in pairs[0].iter().zip(all.iter().zip(&x)) {
            rank.stream.wait(&big.stream.point())?;
            rank.submit(&[sum_of(x)])?;
        }
        for (rank, x) in pairs[0].iter().zip(&x) {
            equal("the sum of sums", value(rank, x)?, 8.0)?;
        }
        equal("the rank outside", value(&all[3], &x[3])?, 4.0)
            .map_err(|f| crate::lab::Finding(format!("round {round}: {f}")))?;
    }
    Ok(())
}

fn with_commands(lab: &Lab) -> Verdict {
    let ranks = join(lab, 4)?;
    let x = ranks.iter().map(|r| float(r, 1.0)).collect::<Verdict<Vec<_>>>()?;
    for _ in 0..20 {
        for (rank, x) in ranks.iter().zip(&x) {
            rank.submit(&[sum_of(x)])?;
            let halved = crate::lab::add(x, x, x);
            rank.stream.submit(&halved.into())?;
        }
        for (rank, x) in ranks.iter().zip(&x) {
            // Back to 1: copy the sign of order, not of value.
            equal("x", value(rank, x)?, 8.0)?;
            rank.stream.write(&x.region(), &1f32.to_le_bytes())?;
        }
    }
    Ok(())
}

fn any_order(lab: &Lab) -> Verdict {
    let ranks = join(lab, 4)?;
    for order in [[0, 1, 2, 3], [3, 2, 1, 0], [2, 0, 3, 1]] {
        let x = ranks.iter().map(|r| float(r, r.number as f32)).collect::<Verdict<Vec<_>>>()?;
        for r in order {
            ranks[r].submit(&[sum_of(&x[r])])?;
        }
        for (rank, x) in ranks.iter().zip(&x) {
            equal("the sum", value(rank, x)?, 6.0)?;
        }
    }
    Ok(())
}

/// Sums have the bits of ascending ranks, and parts lie in the order of ranks, whoever comes first.
fn arrival(lab: &Lab) -> Verdict {
    let ranks = join(lab, 4)?;
    let inputs: Vec<_> = (0..4).map(|r| elements(DType::F32, 33, r + 1)).collect();
    let parts: Vec<&[u8]> = inputs.iter().map(Vec::as_slice).collect();
    let total = combine(DType::F32, &parts, Reduction::Sum);
    for order in [[0, 1, 2, 3], [3, 2, 1, 0], [2, 0, 3, 1]] {
        let mut outputs = vec![None; 4];
        for r in order {
            let rank = &ranks[r];
            let send = rank.place(DType::F32, &inputs[r])?;
            let sum = rank.place(DType::F32, &vec![0; inputs[r].len()])?;
            let all = rank.place(DType::F32, &vec![0; inputs.concat().len()])?;
            rank.submit(&[
                Collective::AllReduce {
                    send: send.clone(),
                    recv: sum.clone(),
                    reduction: Reduction::Sum,
                },
                Collective::AllGather { send, recv: all.clone() },
            ])?;
            if r != order[3] {
                // Surely there before the next one.
                let error = refused("waiting alone", rank.stream.synchronize(BRIEFLY))?;
                is(&error, "Timeout", timeout)?;
            }
            outputs[r] = Some((sum, all));
        }
        for (rank, output) in ranks.iter().zip(&outputs) {
            let (sum, all) = output.as_ref().ok_or("a rank did not submit")?;
            ensure(rank.take(sum)? == total, || format!("sum of rank {}: {order:?}", rank.number))?;
            ensure(rank.take(all)? == inputs.concat(), || {
                format!("parts of rank {}: {order:?}", rank.number)
            })?;
        }
    }
    Ok(())
}

/// A rank is what it joined as, not the number of its die.
fn any_die(lab: &Lab) -> Verdict {
    let id = lab.die(0).communicator_id()?;
    let dies = [2, 0, 3, 1];
    let mut ranks = Vec::new();
    for (number, die) in dies.into_iter().enumerate() {
        let communicator = lab.die(die).communicator(id, number, 4)?;
        equal("die", communicator.device(), lab.die(die).properties().id)?;
        ranks.push(Rank { number, stream: lab.stream(die)?, communicator });
    }
    let mut outputs = Vec::new();
    for rank in &ranks {
        let send = rank.place(DType::I32, &(rank.number as i32).to_le_bytes())?;
        let recv = rank.place(DType::I32, &[0; 16])?;
        rank.submit(&[Collective::AllGather { send, recv: recv.clone() }])?;
        outputs.push(recv);
    }
    let expected: Vec<u8> = (0..4i32).flat_map(i32::to_le_bytes).collect();
    for (rank, recv) in ranks.iter().zip(&outputs) {
        equal("the gathered", rank.take(recv)?, expected.clone())?;
    }
    Ok(())
}

fn thread_per_rank(lab: &Lab) -> Verdict {
    let ranks = join(lab, 8)?;
    std::thread::scope(|scope| {
        let work = |rank: &Rank| -> Verdict {
            for round in 0..20 {
                let x = float(rank, (rank.number + round) as f32)?;
                rank.submit(&[sum_of(&x)])?;
                equal("the sum", value(rank, &x)?, (28 + 8 * round) as f32)?;
            }
            Ok(())
        };
        let threads: Vec<_> = ranks.iter().map(|rank| scope.spawn(move || work(rank))).collect();
        threads.into_iter().try_for_each(|thread| match thread.join() {
            Ok(verdict) => verdict,
            Err(_) => Err("a rank's thread panicked".into()),
        })
    })
}

fn rank_taken(lab: &Lab) -> Verdict {
    let id = lab.die(0).communicator_id()?;
    let _first = lab.die(0).communicator(id, 0, 2)?;
    is(&refused("a taken rank", lab.die(1).communicator(id, 0, 2))?, "Usage", usage)
}

fn size_differs(lab: &Lab) -> Verdict {
    let id = lab.die(0).communicator_id()?;
    let _first = lab.die(0).communicator(id, 0, 2)?;
    is(&refused("another size", lab.die(1).communicator(id, 1, 3))?, "Usage", usage)
}

fn beyond_size(lab: &Lab) -> Verdict {
    for (rank, size) in [(2, 2), (0, 0), (usize::MAX, 4)] {
        let id = lab.die(0).communicator_id()?;
        let error = refused("an impossible rank", lab.die(0).communicator(id, rank, size))?;
        is(&error, "Usage", usage)?;
    }
    Ok(())
}

fn ids_differ(lab: &Lab) -> Verdict {
    let (a, b) = (lab.die(0).communicator_id()?, lab.die(0).communicator_id()?);
    ensure(a != b, || "two groups have one id".into())
}

fn join_properties(lab: &Lab) -> Verdict {
    for (r, rank) in join(lab, 3)?.iter().enumerate() {
        equal("rank", rank.communicator.rank(), r)?;
        equal("size", rank.communicator.size(), 3)?;
        equal("die", rank.communicator.device(), lab.die(r).properties().id)?;
        rank.communicator.status()?;
    }
    Ok(())
}

/// A batch is refused, submits nothing, and leaves the group as it was.
fn refuse(ranks: &[Rank], batch: &[Collective]) -> Verdict {
    let before = ranks[0].stream.point().value();
    is(&refused("the batch", ranks[0].submit(batch))?, "Usage", usage)?;
    equal("commands submitted", ranks[0].stream.point().value(), before)?;
    let x = ranks.iter().map(|r| float(r, 1.0)).collect::<Verdict<Vec<_>>>()?;
    ranks.iter().zip(&x).try_for_each(|(rank, x)| rank.submit(&[sum_of(x)]))?;
    equal("a sum afterwards", value(&ranks[0], &x[0])?, ranks.len() as f32)
}

fn refused_sizes(lab: &Lab) -> Verdict {
    let ranks = join(lab, 2)?;
    let t = |n: usize| ranks[0].place(DType::F32, &vec![0; n * 4]);
    refuse(
        &ranks,
        &[Collective::AllReduce { send: t(4)?, recv: t(5)?, reduction: Reduction::Sum }],
    )?;
    refuse(&ranks, &[Collective::AllGather { send: t(4)?, recv: t(4)? }])?;
    refuse(&ranks, &[Collective::AllToAll { send: t(3)?, recv: t(3)?, counts: None }])?;
    refuse(&ranks, &[Collective::Broadcast { tensor: t(1)?, root: 2 }])?;
    refuse(&ranks, &[Collective::Send { tensor: t(1)?, peer: 2 }])?;
    let counts = Some(Arc::new(PeerCounts { send: vec![5, 5], recv: vec![1, 1] }));
    refuse(&ranks, &[Collective::AllToAll { send: t(4)?, recv: t(4)?, counts }])
}

fn refused_dtype(lab: &Lab) -> Verdict {
    let ranks = join(lab, 2)?;
    for dtype in [DType::F8E4M3, DType::U8] {
        refuse(&ranks, &[sum_of(&ranks[0].place(dtype, &[0; 4])?)])?;
    }
    Ok(())
}

fn refused_stream(lab: &Lab) -> Verdict {
    let ranks = join(lab, 2)?;
    let x = float(&ranks[1], 1.0)?;
    let result =
        ranks[1].stream.submit_collectives(&ranks[0].communicator, &[sum_of(&x)], &"x".into());
    is(&refused("another die's stream", result)?, "Usage", usage)
}

fn refused_mix(lab: &Lab) -> Verdict {
    let ranks = join(lab, 2)?;
    let (x, y) = (float(&ranks[0], 1.0)?, float(&ranks[0], 1.0)?);
    refuse(&ranks, &[sum_of(&x), Collective::Send { tensor: y, peer: 1 }])
}

fn abort(lab: &Lab) -> Verdict {
    let ranks = join(lab, 3)?;
    for rank in &ranks[..2] {
        rank.submit(&[sum_of(&float(rank, 1.0)?)])?;
    }
    is(&refused("waiting", ranks[0].stream.synchronize(BRIEFLY))?, "Timeout", timeout)?;
    ranks[2].communicator.abort("gave up");
    for rank in &ranks[..2] {
        let error = refused("waiting after the abort", rank.stream.synchronize(SOON))?;
        is(&error, "Failed", failed)?;
        let cause = error.origin().map(|o| o.cause.clone());
        ensure(matches!(&cause, Some(Cause::Aborted(why)) if &**why == "gave up"), || {
            format!("cause {cause:?}")
        })?;
    }
    for rank in &ranks {
        refused("the status", rank.communicator.status())?;
    }
    Ok(())
}

fn abort_then_submit(lab: &Lab) -> Verdict {
    let ranks = join(lab, 2)?;
    ranks[0].communicator.abort("enough");
    let x = float(&ranks[1], 1.0)?;
    let result = ranks[1].submit(&[sum_of(&x)]);
    is(&refused("a batch after the abort", result)?, "Failed", failed)?;
    // The stream itself is well.
    equal("x", value(&ranks[1], &x)?, 1.0)
}

fn abort_twice(lab: &Lab) -> Verdict {
    let ranks = join(lab, 2)?;
    ranks[0].communicator.abort("first");
    ranks[1].communicator.abort("second");
    for rank in &ranks {
        let error = refused("the status", rank.communicator.status())?;
        let cause = error.origin().map(|o| o.cause.clone());
        ensure(matches!(&cause, Some(Cause::Aborted(why)) if &**why == "first"), || {
            format!("rank {}: cause {cause:?}", rank.number)
        })?;
    }
    Ok(())
}

/// Several sends to one peer meet its receives one by one, whoever comes first.
fn sends_in_order(lab: &Lab) -> Verdict {
    let ranks = join(lab, 2)?;
    for receive_first in [false, true] {
        let x = (0..4).map(|i| float(&ranks[0], i as f32)).collect::<Verdict<Vec<_>>>()?;
        let y = (0..4).map(|_| float(&ranks[1], -1.0)).collect::<Verdict<Vec<_>>>()?;
        let send = |i: usize| Collective::Send { tensor: x[i].clone(), peer: 1 };
        let receive = |i: usize| Collective::Recv { tensor: y[i].clone(), peer: 0 };
        // Two in one batch, and two by themselves.
        let sends = || -> Verdict {
            ranks[0].submit(&[send(0), send(1)])?;
            ranks[0].submit(&[send(2)])?;
            Ok(ranks[0].submit(&[send(3)])?)
        };
        let receives = || -> Verdict {
            ranks[1].submit(&[receive(0)])?;
            ranks[1].submit(&[receive(1), receive(2)])?;
            Ok(ranks[1].submit(&[receive(3)])?)
        };
        match receive_first {
            false => sends().and_then(|()| receives())?,
            true => receives().and_then(|()| sends())?,
        }
        for (i, y) in y.iter().enumerate() {
            equal("what was received", value(&ranks[1], y)?, i as f32)?;
        }
    }
    Ok(())
}

fn peers_disagree(lab: &Lab) -> Verdict {
    for (dtype, bytes) in [(DType::F32, 20), (DType::I32, 16)] {
        let ranks = join(lab, 2)?;
        let sent = ranks[0].place(DType::F32, &[0; 16])?;
        let expected = ranks[1].place(dtype, &vec![0; bytes])?;
        ranks[0].submit(&[Collective::Send { tensor: sent, peer: 1 }])?;
        ranks[1].submit(&[Collective::Recv { tensor: expected, peer: 0 }])?;
        for rank in &ranks {
            let error = refused("a mismatch", rank.stream.synchronize(SOON))?;
            let cause = error.origin().map(|o| o.cause.clone());
            ensure(matches!(cause, Some(Cause::Mismatch(_))), || {
                format!("rank {}: expected a mismatch, got: {error}", rank.number)
            })?;
        }
    }
    Ok(())
}

fn missing(lab: &Lab) -> Verdict {
    let ranks = join(lab, 3)?;
    let x = ranks.iter().map(|r| float(r, 1.0)).collect::<Verdict<Vec<_>>>()?;
    for (rank, x) in ranks.iter().zip(&x).take(2) {
        rank.submit(&[sum_of(x)])?;
    }
    let error = refused("waiting", ranks[0].stream.synchronize(BRIEFLY))?;
    match &error {
        Error::Timeout { pending, .. } => ensure(pending.contains("all_reduce"), || {
            format!("the timeout does not name the all_reduce: {pending}")
        })?,
        other => return Err(format!("expected Timeout, got: {other}").into()),
    }
    // Late is not never.
    ranks[2].submit(&[sum_of(&x[2])])?;
    for (rank, x) in ranks.iter().zip(&x) {
        equal("the sum", value(rank, x)?, 3.0)?;
    }
    Ok(())
}

/// What the last of three ranks submits while the others sum four floats.
type Odd = fn(&Rank) -> Verdict<Vec<Collective>>;

const MISMATCHES: &[(&str, Odd)] = &[
    ("kind", |rank| {
        Ok(vec![Collective::Broadcast { tensor: rank.place(DType::F32, &[0; 16])?, root: 0 }])
    }),
    ("elements", |rank| Ok(vec![sum_of(&rank.place(DType::F32, &[0; 20])?)])),
    ("dtype", |rank| Ok(vec![sum_of(&rank.place(DType::I32, &[0; 16])?)])),
    ("reduction", |rank| {
        let t = rank.place(DType::F32, &[0; 16])?;
        Ok(vec![Collective::AllReduce { send: t.clone(), recv: t, reduction: Reduction::Max }])
    }),
    ("batch_length", |rank| {
        let (a, b) = (rank.place(DType::F32, &[0; 16])?, rank.place(DType::F32, &[0; 16])?);
        Ok(vec![sum_of(&a), sum_of(&b)])
    }),
    ("peer_counts", |rank| {
        let (send, recv) = (rank.place(DType::F32, &[0; 48])?, rank.place(DType::F32, &[0; 48])?);
        let counts = Some(Arc::new(PeerCounts { send: vec![1, 2, 1], recv: vec![1, 1, 1] }));
        Ok(vec![Collective::AllToAll { send, recv, counts }])
    }),
    ("root", |rank| {
        Ok(vec![Collective::Broadcast { tensor: rank.place(DType::F32, &[0; 16])?, root: 1 }])
    }),
];

fn mismatch(lab: &Lab, odd: Odd) -> Verdict {
    let ranks = join(lab, 3)?;
    let theirs = odd(&ranks[2])?;
    for rank in &ranks[..2] {
        let t = rank.place(DType::F32, &[0; 16])?;
        let usual = match &theirs[0] {
            // The others exchange one element with each.
            Collective::AllToAll { .. } => {
                let counts = Some(Arc::new(PeerCounts { send: vec![1; 3], recv: vec![1; 3] }));
                let recv = rank.place(DType::F32, &[0; 16])?;
                Collective::AllToAll { send: t, recv, counts }
            }
            Collective::Broadcast { root: 1, .. } => Collective::Broadcast { tensor: t, root: 0 },
            _ => sum_of(&t),
        };
        rank.submit(&[usual])?;
    }
    ranks[2].submit(&theirs)?;
    for rank in &ranks {
        let error = refused("a mismatch", rank.stream.synchronize(SOON))?;
        let cause = error.origin().map(|o| o.cause.clone());
        ensure(matches!(cause, Some(Cause::Mismatch(_))), || {
            format!("rank {}: expected a mismatch, got: {error}", rank.number)
        })?;
        refused("the status", rank.communicator.status())?;
    }
    Ok(())
}

//! Collectives against plain arithmetic, and what happens when ranks fail or disagree.

mod common;

use common::{SOON, die, floats, read, system};
use hal::fault::FaultPlan;
use hal::{
    Collective, Communicator, DType, Device, Error, Label, Operand, PeerCounts, Reduction, Stream,
    Tensor,
};
use sim::{Mode, System};
use std::sync::Arc;
use std::time::Duration;

struct Rank {
    device: Arc<dyn Device>,
    stream: Arc<dyn Stream>,
    communicator: Arc<dyn Communicator>,
}

fn ranks(system: &System, size: usize) -> Vec<Rank> {
    let id = die(system, 0).communicator_id().unwrap();
    (0..size)
        .map(|rank| {
            let device = die(system, rank as u32);
            let stream = device.stream("comm").unwrap();
            let communicator = device.communicator(id, rank, size).unwrap();
            Rank { device, stream, communicator }
        })
        .collect()
}

impl Rank {
    fn submit(&self, batch: &[Collective]) -> hal::Result<()> {
        self.stream.submit_collectives(&self.communicator, batch, &Label::Static("test"))
    }

    fn floats(&self, values: impl IntoIterator<Item = f32>) -> Tensor {
        floats(&*self.stream, &values.into_iter().collect::<Vec<_>>())
    }

    fn read(&self, tensor: &Tensor) -> Vec<f32> {
        read(&*self.stream, tensor)
    }
}

/// What rank `r` holds at index `i`: distinct, and exact in every sum.
fn value(r: usize, i: usize) -> f32 {
    (r * 100 + i) as f32
}

const SIZES: [usize; 6] = [1, 2, 3, 4, 8, 32];

#[test]
fn all_reduce_in_place_and_not() {
    for size in SIZES {
        let system = system(Mode::Full, 2);
        let ranks = ranks(&system, size);
        for in_place in [false, true] {
            let tensors: Vec<_> = ranks
                .iter()
                .enumerate()
                .map(|(r, rank)| {
                    let send = rank.floats((0..7).map(|i| value(r, i)));
                    let recv = if in_place { send.clone() } else { rank.floats([0.0; 7]) };
                    (send, recv)
                })
                .collect();
            for (rank, (send, recv)) in ranks.iter().zip(&tensors) {
                let (send, recv) = (send.clone(), recv.clone());
                rank.submit(&[Collective::AllReduce { send, recv, reduction: Reduction::Sum }])
                    .unwrap();
            }
            let expected: Vec<f32> = (0..7).map(|i| (0..size).map(|r| value(r, i)).sum()).collect();
            for (rank, (_, recv)) in ranks.iter().zip(&tensors) {
                assert_eq!(rank.read(recv), expected, "{size} ranks, in place: {in_place}");
            }
        }
    }
}

#[test]
fn gather_scatter_and_broadcast() {
    for size in SIZES {
        let system = system(Mode::Full, 2);
        let ranks = ranks(&system, size);
        let mut results = Vec::new();
        for (r, rank) in ranks.iter().enumerate() {
            let gathered = rank.floats(vec![-1.0; 3 * size]);
            // In place: the rank's own part of the whole.
            let own = gathered.narrowed(0, 3 * r, 3);
            let bytes: Vec<u8> = (0..3).flat_map(|i| value(r, i).to_le_bytes()).collect();
            rank.stream.write(&own.region(), &bytes).unwrap();
            let all = rank.floats((0..2 * size).map(|i| value(r, i)));
            let part = rank.floats([0.0; 2]);
            let root = size - 1;
            let word = rank.floats([if r == root { 42.0 } else { 0.0 }]);
            rank.submit(&[
                Collective::AllGather { send: own, recv: gathered.clone() },
                Collective::ReduceScatter {
                    send: all,
                    recv: part.clone(),
                    reduction: Reduction::Max,
                },
                Collective::Broadcast { tensor: word.clone(), root },
            ])
            .unwrap();
            results.push((gathered, part, word));
        }
        let whole: Vec<f32> = (0..size).flat_map(|r| (0..3).map(move |i| value(r, i))).collect();
        for (r, (rank, (gathered, part, word))) in ranks.iter().zip(&results).enumerate() {
            assert_eq!(rank.read(gathered), whole);
            assert_eq!(rank.read(part), [value(size - 1, 2 * r), value(size - 1, 2 * r + 1)]);
            assert_eq!(rank.read(word), [42.0]);
        }
    }
}

#[test]
fn all_to_all_with_counts_per_peer() {
    for size in SIZES {
        let system = system(Mode::Full, 2);
        let ranks = ranks(&system, size);
        // Rank a sends (a + b) % 3 elements to rank b: zeros among them.
        let count = |a: usize, b: usize| (a + b) % 3;
        let mut received = Vec::new();
        for (r, rank) in ranks.iter().enumerate() {
            let send = rank.floats(
                (0..size).flat_map(|b| (0..count(r, b)).map(move |i| value(r, 10 * b + i))),
            );
            let counts = PeerCounts {
                send: (0..size).map(|b| count(r, b)).collect(),
                recv: (0..size).map(|a| count(a, r)).collect(),
            };
            let total = counts.recv.iter().sum::<usize>();
            let recv = rank.floats(vec![0.0; total.max(1)]);
            let counts = Some(Arc::new(counts));
            let recv_part = recv.narrowed(0, 0, total);
            if send.desc().elements() > 0 && total > 0 || size > 1 {
                rank.submit(&[Collective::AllToAll { send, recv: recv_part.clone(), counts }])
                    .unwrap();
            }
            received.push(recv_part);
        }
        if size == 1 {
            continue;
        }
        for (r, (rank, recv)) in ranks.iter().zip(&received).enumerate() {
            let expected: Vec<f32> = (0..size)
                .flat_map(|a| (0..count(a, r)).map(move |i| value(a, 10 * r + i)))
                .collect();
            assert_eq!(rank.read(recv), expected, "rank {r} of {size}");
        }
    }
}

#[test]
fn a_ring_of_sends_and_receives_does_not_deadlock() {
    for size in SIZES {
        let system = system(Mode::Full, 2);
        let ranks = ranks(&system, size);
        let mut received = Vec::new();
        for (r, rank) in ranks.iter().enumerate() {
            let send = rank.floats([value(r, 1)]);
            let recv = rank.floats([0.0]);
            let (next, previous) = ((r + 1) % size, (r + size - 1) % size);
            rank.submit(&[
                Collective::Send { tensor: send, peer: next },
                Collective::Recv { tensor: recv.clone(), peer: previous },
            ])
            .unwrap();
            received.push(recv);
        }
        for (r, (rank, recv)) in ranks.iter().zip(&received).enumerate() {
            assert_eq!(rank.read(recv), [value((r + size - 1) % size, 1)]);
        }
    }
}

#[test]
fn bf16_sums_are_rounded_once_in_rank_order() {
    use half::bf16;
    let system = system(Mode::Full, 2);
    let ranks = ranks(&system, 4);
    // 256 + 1 + 1 + 1: rounding at each step would lose every one of them.
    let inputs = [256.0, 1.0, 1.0, 1.0];
    let mut tensors = Vec::new();
    for (rank, input) in ranks.iter().zip(inputs) {
        let tensor = rank.stream.alloc_tensor(DType::Bf16, &[1]).unwrap();
        rank.stream.write(&tensor.region(), &bf16::from_f32(input).to_le_bytes()).unwrap();
        let both = (tensor.clone(), tensor.clone());
        rank.submit(&[Collective::AllReduce {
            send: both.0,
            recv: both.1,
            reduction: Reduction::Sum,
        }])
        .unwrap();
        tensors.push(tensor);
    }
    for (rank, tensor) in ranks.iter().zip(&tensors) {
        let mut bytes = [0; 2];
        rank.stream.read(&tensor.region(), &mut bytes, SOON).unwrap();
        assert_eq!(bf16::from_le_bytes(bytes), bf16::from_f32(259.0));
    }
}

#[test]
fn disagreement_is_reported_on_every_rank() {
    type Batch = fn(&Rank, usize) -> Collective;
    let reduce: Batch = |rank, n| {
        let t = rank.floats(vec![0.0; n]);
        Collective::AllReduce { send: t.clone(), recv: t, reduction: Reduction::Sum }
    };
    let maximum: Batch = |rank, n| {
        let t = rank.floats(vec![0.0; n]);
        Collective::AllReduce { send: t.clone(), recv: t, reduction: Reduction::Max }
    };
    let broadcast: Batch =
        |rank, n| Collective::Broadcast { tensor: rank.floats(vec![0.0; n]), root: 0 };
    let send: Batch = |rank, n| Collective::Send { tensor: rank.floats(vec![0.0; n]), peer: 1 };
    let receive: Batch = |rank, n| Collective::Recv { tensor: rank.floats(vec![0.0; n]), peer: 0 };
    for (name, first, second) in [
        ("size", (reduce, 4), (reduce, 5)),
        ("kind", (reduce, 4), (broadcast, 4)),
        ("reduction", (reduce, 4), (maximum, 4)),
        ("peer to peer", (send, 4), (receive, 3)),
    ] {
        let system = system(Mode::Full, 2);
        let ranks = ranks(&system, 2);
        for (rank, (batch, n)) in ranks.iter().zip([first, second]) {
            let collective = batch(rank, n);
            rank.submit(&[collective]).unwrap();
        }
        for rank in &ranks {
            let error = rank.stream.synchronize(SOON).unwrap_err();
            assert!(error.origin().is_some(), "{name}: {error}");
            let status = rank.communicator.status().unwrap_err().to_string();
            assert!(
                error.to_string().contains("rank 0") && status == error.to_string(),
                "{name}: {error}"
            );
        }
    }
}

#[test]
fn impossible_collectives_are_refused_at_once() {
    let system = system(Mode::Full, 2);
    let ranks = ranks(&system, 2);
    let rank = &ranks[0];
    let t = |n: usize| rank.floats(vec![0.0; n]);
    let counts = Some(Arc::new(PeerCounts { send: vec![1, 9], recv: vec![1, 1] }));
    for (batch, words) in [
        (vec![Collective::AllGather { send: t(2), recv: t(3) }], "expected 4"),
        (vec![Collective::Broadcast { tensor: t(1), root: 2 }], "rank 2 of 2"),
        (vec![Collective::AllToAll { send: t(4), recv: t(4), counts }], "add up to 10 of 4"),
        (
            vec![
                Collective::Broadcast { tensor: t(1), root: 0 },
                Collective::Send { tensor: t(1), peer: 1 },
            ],
            "either group collectives or sends",
        ),
    ] {
        let error = rank.submit(&batch).unwrap_err().to_string();
        assert!(error.contains(words), "{error}");
    }
    let id = rank.communicator.id();
    assert!(die(&system, 3).communicator(id, 1, 2).is_err(), "the rank is taken");
    assert!(die(&system, 3).communicator(id, 2, 3).is_err(), "the size differs");
}

#[test]
fn a_rank_that_fails_or_is_lost_releases_the_others() {
    for (fault, lost) in [
        ("device=1,op=all_reduce,action=fail:flaky link", false),
        ("device=1,op=all_reduce,action=lose", true),
    ] {
        let system = system(Mode::Full, 2);
        let ranks = ranks(&system, 4);
        let plan = Arc::new(FaultPlan::new([fault.parse().unwrap()]));
        ranks.iter().for_each(|r| r.device.set_faults(Some(plan.clone())).unwrap());
        for rank in &ranks {
            let t = rank.floats([1.0]);
            let batch =
                [Collective::AllReduce { send: t.clone(), recv: t, reduction: Reduction::Sum }];
            // A rank may already know of the failure when it submits.
            let _ = rank.submit(&batch);
        }
        for (r, rank) in ranks.iter().enumerate() {
            let error = match rank.communicator.status() {
                Err(error) => error,
                Ok(()) => rank.stream.synchronize(SOON).unwrap_err(),
            };
            match lost {
                true => assert!(matches!(error, Error::Lost { .. }), "rank {r}: {error}"),
                false => assert!(error.to_string().contains("flaky link"), "rank {r}: {error}"),
            }
        }
    }
}

#[test]
fn a_missing_rank_times_out_and_abort_releases_the_waiting() {
    let system = system(Mode::Full, 2);
    let ranks = ranks(&system, 3);
    for rank in &ranks[..2] {
        let t = rank.floats([1.0]);
        rank.submit(&[Collective::AllReduce {
            send: t.clone(),
            recv: t,
            reduction: Reduction::Sum,
        }])
        .unwrap();
    }
    let error = ranks[0].stream.synchronize(Duration::from_millis(50)).unwrap_err().to_string();
    assert!(error.contains("all_reduce") && error.contains("waits for the other ranks"), "{error}");
    ranks[2].communicator.abort("operator gave up");
    for rank in &ranks[..2] {
        let error = rank.stream.synchronize(SOON).unwrap_err().to_string();
        assert!(error.contains("operator gave up"), "{error}");
    }
    let t = ranks[2].floats([1.0]);
    let late = ranks[2].submit(&[Collective::Broadcast { tensor: t, root: 0 }]);
    assert!(late.is_err(), "an aborted communicator takes nothing");
}

#[test]
fn time_waits_for_the_slowest_rank_and_does_not_depend_on_threads() {
    let run = |threads: usize, mode| {
        let system = system(mode, threads);
        let ranks = ranks(&system, 8);
        for _ in 0..10 {
            for (r, rank) in ranks.iter().enumerate() {
                let t = rank.stream.alloc_tensor(DType::F32, &[1 << 12]).unwrap();
                (0..=r).for_each(|_| rank.stream.fill(&t.region(), 0).unwrap());
                let batch =
                    [Collective::AllReduce { send: t.clone(), recv: t, reduction: Reduction::Sum }];
                rank.submit(&batch).unwrap();
            }
        }
        ranks.iter().for_each(|r| r.stream.synchronize(SOON).unwrap());
        let ends = ranks.iter().map(|r| r.stream.point().completed_at().unwrap().picos);
        ends.collect::<Vec<_>>()
    };
    let reference = run(1, Mode::Full);
    assert!(reference.iter().all(|&end| end == reference[0]), "all end together: {reference:?}");
    assert_eq!(run(4, Mode::Full), reference);
    assert_eq!(run(2, Mode::TimingOnly), reference);
}

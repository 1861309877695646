//! Recordings of several dies: collectives, copies between dies, several threads, aborts.

mod common;

use common::{Bench, SOON, floats, kinds, read, record, replay, replayed, rewrite};
use hal::op::Add;
use hal::{
    Collective, Communicator, Device, Error, Label, Op, PeerCounts, Reduction, Stream, Tensor,
};
use replay::record::Call;
use replay::{Options, Outcome};
use sim::Mode;
use std::sync::Arc;
use std::time::Duration;

const RANKS: usize = 4;

struct Rank<'a> {
    die: &'a Arc<dyn Device>,
    stream: Arc<dyn Stream>,
    communicator: Arc<dyn Communicator>,
}

fn ranks(bench: &Bench) -> Vec<Rank<'_>> {
    let id = bench.dies[0].communicator_id().unwrap();
    let join = |(rank, die): (usize, &'_ Arc<dyn Device>)| {
        let communicator = die.communicator(id, rank, RANKS).unwrap();
        (die.stream("comm").unwrap(), communicator)
    };
    let joined: Vec<_> = bench.dies.iter().enumerate().map(join).collect();
    let ranks = bench.dies.iter().zip(joined);
    ranks.map(|(die, (stream, communicator))| Rank { die, stream, communicator }).collect()
}

impl Rank<'_> {
    fn submit(&self, batch: &[Collective], label: &'static str) {
        let label = Label::Static(label);
        self.stream.submit_collectives(&self.communicator, batch, &label).unwrap();
    }
}

/// One rank's part: every collective, an op in between, and a read of each result.
fn every_collective(rank: &Rank<'_>) {
    let r = rank.communicator.rank();
    let own = |n: usize| floats(&*rank.stream, &[n], (100 * r) as f32);
    let (a, b, c, d) = (own(8), own(8), own(8 * RANKS), own(2));
    rank.submit(
        &[
            Collective::AllReduce { send: a.clone(), recv: a.clone(), reduction: Reduction::Sum },
            Collective::AllReduce { send: b.clone(), recv: own(8), reduction: Reduction::Max },
        ],
        "reduce",
    );
    let add = Add { a: a.clone(), b: a.clone(), out: a.clone() };
    rank.stream.submit(&Op::from(add).label("double")).unwrap();
    rank.submit(&[Collective::AllGather { send: a.clone(), recv: c.clone() }], "gather");
    let scattered = own(8);
    rank.submit(
        &[Collective::ReduceScatter {
            send: c.clone(),
            recv: scattered.clone(),
            reduction: Reduction::Sum,
        }],
        "scatter",
    );
    // Rank r sends i elements to rank i, and gets r from each.
    let counts = PeerCounts { send: (0..RANKS).collect(), recv: vec![r; RANKS] };
    let exchanged = own(8 * RANKS);
    let all_to_all = Collective::AllToAll {
        send: c.clone(),
        recv: exchanged.clone(),
        counts: Some(Arc::new(counts)),
    };
    rank.submit(&[all_to_all], "exchange");
    rank.submit(&[Collective::Broadcast { tensor: d.clone(), root: 2 }], "broadcast");
    let (next, before) = ((r + 1) % RANKS, (r + RANKS - 1) % RANKS);
    let received = own(8);
    rank.submit(
        &[
            Collective::Send { tensor: scattered.clone(), peer: next },
            Collective::Recv { tensor: received.clone(), peer: before },
        ],
        "ring",
    );
    for tensor in [&a, &c, &exchanged, &d, &received] {
        read(&*rank.stream, tensor);
    }
}

fn threaded(bench: &Bench) {
    let ranks = ranks(bench);
    std::thread::scope(|scope| {
        ranks.iter().for_each(|rank| {
            scope.spawn(|| every_collective(rank));
        });
    });
}

#[test]
fn what_several_threads_recorded_one_thread_replays() {
    for all_outputs in [false, true] {
        let file = record((Mode::Full, RANKS as u32, all_outputs), |_| {}, threaded);
        let kinds = kinds(&file);
        assert_eq!((kinds["join"], kinds["leave"], kinds["read"]), (RANKS, RANKS, 5 * RANKS));
        let report = replay(&file);
        assert!(report.is_equal(), "{report:#?}");
        assert_eq!(report.commands, report.recorded_commands);
        assert_eq!(report.reads, 5 * RANKS as u64);
        assert_eq!(report.recorded_dies.len(), RANKS);
        // Two reductions, an op, a gather, a scatter, an exchange, a ring, and all but the root's
        // broadcast.
        let outputs = if all_outputs { 8 * RANKS as u64 - 1 } else { 0 };
        assert_eq!(report.hashes, outputs);
    }
}

#[test]
fn a_difference_names_the_collective_that_brought_it() {
    let file = record((Mode::Full, RANKS as u32, false), |_| {}, threaded);
    // Rank 2's two elements, which a broadcast takes to all.
    let mut changed = 0;
    let other = rewrite(&file, |_, record, bytes| {
        if let (Call::Write { to, .. }, Some(bytes)) = (&record.call, bytes)
            && to.len == 8
            && bytes[..4] == 200f32.to_le_bytes()
        {
            bytes[3] ^= 0x80;
            changed += 1;
        }
    });
    let report = replay(&other);
    assert_eq!((changed, report.different), (1, RANKS as u64), "{report:#?}");
    let mut writers: Vec<_> = report
        .differences
        .iter()
        .map(|d| {
            let wrote = d.wrote.as_ref().unwrap();
            (wrote.die, wrote.op.as_str(), d.recorded.as_str(), d.replayed.as_str())
        })
        .collect();
    writers.sort_unstable();
    // The root's own memory was last written by the host.
    assert_eq!(writers[0], (0, "broadcast", "200", "-200"));
    assert_eq!(writers[2].1, "write");
    assert_eq!(writers[3], (3, "broadcast", "200", "-200"));
}

#[test]
fn copies_and_waits_between_dies() {
    let program = |bench: &Bench| {
        let streams: Vec<_> = bench.dies.iter().map(|die| die.stream("s").unwrap()).collect();
        let here = floats(&*streams[0], &[16], 1.0);
        let there: Tensor = floats(&*streams[1], &[16], 0.0);
        streams[1].wait(&streams[0].point()).unwrap();
        streams[1].copy(&there.region(), &here.region()).unwrap();
        drop(here);
        drop(streams[0].clone());
        assert_eq!(read(&*streams[1], &there)[..4], 1f32.to_le_bytes());
    };
    let file = record((Mode::Full, 2, true), |_| {}, program);
    let report = replay(&file);
    assert!(report.is_equal(), "{report:#?}");
    assert_eq!((report.reads, report.skipped), (1, 0));
}

#[test]
fn an_abort_fails_again() {
    let program = |bench: &Bench| {
        let ranks = ranks(bench);
        let tensor = floats(&*ranks[0].stream, &[4], 0.0);
        ranks[0].submit(&[Collective::Broadcast { tensor, root: 0 }], "alone");
        ranks[1].communicator.abort("nobody comes");
        let error = ranks[0].stream.synchronize(SOON).unwrap_err();
        assert!(error.to_string().contains("nobody comes"), "{error}");
        assert!(matches!(ranks[0].communicator.status(), Err(Error::Failed(_))));
        assert_eq!(ranks[0].die.properties().id.0, 0);
    };
    let file = record((Mode::Full, RANKS as u32, false), |_| {}, program);
    let report = replay(&file);
    assert!(report.is_equal(), "{report:#?}");
    assert_eq!(report.failures.len(), 1);
    assert_eq!(report.failures[0].outcome, Outcome::Same);
    // A recording without the abort waits, and says so.
    let patient = rewrite(&file, |_, record, _| {
        if matches!(record.call, Call::Abort { .. }) {
            record.call = Call::Failure { stream: 0 };
        }
    });
    let options = Options { timeout: Duration::from_millis(50), ..Options::default() };
    let report = replayed(&patient, &common::system(Mode::Full), |_| {}, &options).unwrap();
    assert!(report.failures.iter().any(|f| f.outcome == Outcome::DidNotHappenAgain));
}

//! Expert parallelism out of its parts: dispatch, all-to-all, permute, combine, and back, against
//! the plain weighted sum; by one hop to ranks, and by two, to nodes and to their ranks.

mod common;

use common::{SOON, die, floats, read, system};
use hal::op::{MoeCombine, MoeDispatch, MoePermute};
use hal::{
    Collective, Communicator, DType, Label, Op, Operand, Region, Stream, Tensor, TensorDesc,
};
use proptest::prelude::*;
use sim::{Mode, System};
use std::sync::Arc;

/// A routing problem of one rank: what its tokens chose.
#[derive(Clone, Debug)]
struct Tokens {
    per_token: usize,
    experts: Vec<i32>,
    weights: Vec<f32>,
    x: Vec<f32>,
}

const H: usize = 3;

impl Tokens {
    fn count(&self) -> usize {
        self.x.len() / H
    }

    /// `Σ_j w_j · f(e_j, x)` per token, where expert `e` multiplies by `e + 1`.
    fn weighted_sums(&self) -> Vec<f32> {
        let sum = |t: usize, h: usize| -> f32 {
            let slots = t * self.per_token..(t + 1) * self.per_token;
            let there = slots.filter(|&s| self.experts[s] >= 0);
            there.map(|s| self.weights[s] * (self.experts[s] + 1) as f32 * self.x[t * H + h]).sum()
        };
        (0..self.count())
            .flat_map(|t| (0..H).map(move |h| (t, h)))
            .map(|(t, h)| sum(t, h))
            .collect()
    }
}

/// Tokens with distinct experts each, some slots empty, and small integers: sums are exact.
fn tokens(count: usize, per_token: usize, experts: usize) -> impl Strategy<Value = Tokens> {
    let slots = count * per_token;
    (
        prop::collection::vec(any::<prop::sample::Index>(), slots),
        prop::collection::vec(0..4u8, slots),
        prop::collection::vec(1..8u8, slots),
        prop::collection::vec(-8..8i8, count * H),
    )
        .prop_map(move |(choices, empty, weights, x)| {
            let mut chosen = Vec::new();
            for t in 0..count {
                let mut left: Vec<i32> = (0..experts as i32).collect();
                for s in t * per_token..(t + 1) * per_token {
                    let expert = left.remove(choices[s].index(left.len()));
                    chosen.push(if empty[s] == 0 { -1 } else { expert });
                }
            }
            Tokens {
                per_token,
                experts: chosen,
                weights: weights.into_iter().map(f32::from).collect(),
                x: x.into_iter().map(f32::from).collect(),
            }
        })
}

/// Memory and commands of one die.
struct Die {
    stream: Arc<dyn Stream>,
}

impl Die {
    fn ints(&self, values: &[i32], shape: &[usize]) -> Tensor {
        let tensor = self.stream.alloc_tensor(DType::I32, shape).unwrap();
        let bytes: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
        self.stream.write(&tensor.region(), &bytes).unwrap();
        tensor
    }

    fn floats(&self, values: &[f32], shape: &[usize]) -> Tensor {
        floats(&*self.stream, values).with_desc(TensorDesc::new(DType::F32, shape))
    }

    /// Room that is full of garbage: neither an expert nor a number.
    fn room(&self, dtype: DType, shape: &[usize]) -> Tensor {
        let tensor = self.stream.alloc_tensor(dtype, shape).unwrap();
        let Region { buffer, .. } = tensor.region();
        self.stream.fill(&buffer.whole(), 0x7f).unwrap();
        tensor
    }

    fn read_ints(&self, tensor: &Tensor) -> Vec<i32> {
        let mut bytes = vec![0; tensor.region().len as usize];
        self.stream.read(&tensor.region(), &mut bytes, SOON).unwrap();
        bytes.as_chunks::<4>().0.iter().map(|b| i32::from_le_bytes(*b)).collect()
    }

    fn run(&self, op: impl Into<Op>) {
        self.stream.submit(&op.into().label("test")).unwrap();
    }
}

/// Rows of tokens with their choices, as they lie on one die.
#[derive(Clone)]
struct Rows {
    x: Tensor,
    experts: Tensor,
    weights: Tensor,
    /// The rows that count, where not all do.
    offsets: Option<Tensor>,
}

impl Rows {
    fn of(die: &Die, tokens: &Tokens) -> Rows {
        let shape = [tokens.count(), tokens.per_token];
        Rows {
            x: die.floats(&tokens.x, &[tokens.count(), H]),
            experts: die.ints(&tokens.experts, &shape),
            weights: die.floats(&tokens.weights, &shape),
            offsets: None,
        }
    }

    fn room(die: &Die, rows: usize, per_token: usize, destinations: usize) -> Rows {
        Rows {
            x: die.room(DType::F32, &[rows, H]),
            experts: die.room(DType::I32, &[rows, per_token]),
            weights: die.room(DType::F32, &[rows, per_token]),
            offsets: Some(die.room(DType::I32, &[destinations + 1])),
        }
    }

    fn dims(&self) -> (usize, usize) {
        (self.experts.desc().dim(0), self.experts.desc().dim(1))
    }
}

/// How experts are spread over destinations.
#[derive(Clone, Copy)]
struct Spread {
    destinations: usize,
    each: usize,
}

/// Packs `from` by destination: the rows to send, and the number of each token's rows.
fn dispatch(die: &Die, from: &Rows, spread: Spread) -> (Rows, Tensor) {
    let (tokens, per_token) = from.dims();
    let room = tokens * per_token.min(spread.destinations);
    let to = Rows::room(die, room, per_token, spread.destinations);
    let rows = die.room(DType::I32, &[tokens, per_token]);
    die.run(MoeDispatch {
        x: from.x.clone(),
        x_scales: None,
        experts: from.experts.clone(),
        weights: from.weights.clone(),
        replicas: None,
        row_offsets: from.offsets.clone(),
        out: to.x.clone(),
        out_scales: None,
        out_experts: to.experts.clone(),
        out_weights: to.weights.clone(),
        offsets: to.offsets.clone().unwrap(),
        rows: rows.clone(),
        experts_per_destination: spread.each as u32,
        total_experts: (spread.destinations * spread.each) as u32,
        replica_offset: 0,
        expected_rows: 0,
    });
    (to, rows)
}

fn all_to_all(
    die: &Die,
    group: &Arc<dyn Communicator>,
    sends: &[(&Tensor, &Tensor)],
    (send_offsets, recv_offsets): (&Tensor, Option<&Tensor>),
) {
    let one = |(i, (send, recv)): (usize, &(&Tensor, &Tensor))| Collective::AllToAllV {
        send: (*send).clone(),
        recv: (*recv).clone(),
        send_offsets: send_offsets.clone(),
        recv_offsets: recv_offsets.filter(|_| i == 0).cloned(),
        expected_rows: 1,
    };
    let batch: Vec<_> = sends.iter().enumerate().map(one).collect();
    die.stream.submit_collectives(group, &batch, &Label::Static("exchange")).unwrap();
}

/// What one hop leaves behind for the way back.
struct Hop {
    sent: Rows,
    rows: Tensor,
    received: Rows,
}

/// Sends each row to the destinations of its experts.
fn there(die: &Die, group: &Arc<dyn Communicator>, from: &Rows, spread: Spread) -> Hop {
    let (sent, rows) = dispatch(die, from, spread);
    let (tokens, per_token) = from.dims();
    // Every rank may send all that it has here.
    let received = Rows::room(die, tokens * spread.destinations, per_token, spread.destinations);
    all_to_all(
        die,
        group,
        &[
            (&sent.x, &received.x),
            (&sent.experts, &received.experts),
            (&sent.weights, &received.weights),
        ],
        (sent.offsets.as_ref().unwrap(), received.offsets.as_ref()),
    );
    Hop { sent, rows, received }
}

/// Brings results of the received rows home and adds up what comes back for each token.
fn back(die: &Die, group: &Arc<dyn Communicator>, hop: &Hop, from: &Rows, y: &Tensor) -> Tensor {
    let returned = die.room(DType::F32, &[hop.sent.x.desc().dim(0), H]);
    all_to_all(die, group, &[(y, &returned)], (hop.received.offsets.as_ref().unwrap(), None));
    let out = die.room(DType::F32, &[from.dims().0, H]);
    die.run(MoeCombine {
        y: returned,
        rows: hop.rows.clone(),
        weights: None,
        base: None,
        row_offsets: from.offsets.clone(),
        out: out.clone(),
        expected_rows: 0,
        expected_copies: 0,
    });
    out
}

/// The experts of one rank on the rows that came, weighted: expert `e` multiplies by `e + 1`. The
/// multiplication happens on the host, where it is plain.
fn experts(die: &Die, rows: &Rows, first: usize, each: usize) -> Tensor {
    let (tokens, per_token) = rows.dims();
    let room = tokens * per_token.min(each);
    let permuted = die.room(DType::F32, &[room, H]);
    let (offsets, numbers) =
        (die.room(DType::I32, &[each + 1]), die.room(DType::I32, &[tokens, per_token]));
    die.run(MoePermute {
        x: rows.x.clone(),
        x_scales: None,
        experts: rows.experts.clone(),
        row_offsets: rows.offsets.clone(),
        out: permuted.clone(),
        out_scales: None,
        offsets: offsets.clone(),
        rows: numbers.clone(),
        first_expert: 0,
        total_experts: each as u32,
        expected_rows: 0,
    });
    let (mut values, starts) = (read(&*die.stream, &permuted), die.read_ints(&offsets));
    for e in 0..each {
        for v in &mut values[starts[e] as usize * H..starts[e + 1] as usize * H] {
            *v *= (first + e + 1) as f32;
        }
    }
    let out = die.room(DType::F32, &[tokens, H]);
    die.run(MoeCombine {
        y: die.floats(&values, &[room, H]),
        rows: numbers,
        weights: Some(rows.weights.clone()),
        base: None,
        row_offsets: rows.offsets.clone(),
        out: out.clone(),
        expected_rows: 0,
        expected_copies: 0,
    });
    out
}

fn dies(system: &System, count: usize) -> Vec<Die> {
    (0..count).map(|d| Die { stream: die(system, d as u32).stream("ep").unwrap() }).collect()
}

/// The members of a group of these dies, in rank order.
fn group(system: &System, members: &[usize]) -> Vec<Arc<dyn Communicator>> {
    let id = die(system, members[0] as u32).communicator_id().unwrap();
    let join = |(rank, &d): (usize, &usize)| {
        die(system, d as u32).communicator(id, rank, members.len()).unwrap()
    };
    members.iter().enumerate().map(join).collect()
}

fn one_hop(of_rank: &[Tokens], each: usize) {
    let size = of_rank.len();
    let system = system(Mode::Full, 2);
    let dies = dies(&system, size);
    let ranks = group(&system, &(0..size).collect::<Vec<_>>());
    let spread = Spread { destinations: size, each };
    let from: Vec<Rows> = dies.iter().zip(of_rank).map(|(d, t)| Rows::of(d, t)).collect();
    let hops: Vec<Hop> = (0..size).map(|r| there(&dies[r], &ranks[r], &from[r], spread)).collect();
    let results: Vec<Tensor> =
        (0..size).map(|r| experts(&dies[r], &hops[r].received, r * each, each)).collect();
    let out: Vec<Tensor> =
        (0..size).map(|r| back(&dies[r], &ranks[r], &hops[r], &from[r], &results[r])).collect();
    for (r, tokens) in of_rank.iter().enumerate() {
        assert_eq!(read(&*dies[r].stream, &out[r]), tokens.weighted_sums(), "rank {r}");
    }
}

fn two_hops(of_rank: &[Tokens], nodes: usize, each: usize) {
    let size = of_rank.len();
    let per_node = size / nodes;
    let system = system(Mode::Full, 2);
    let dies = dies(&system, size);
    // Across nodes, among those with the same place in them; then within the node.
    let mut across: Vec<Option<Arc<dyn Communicator>>> = vec![None; size];
    let mut within = across.clone();
    for place in 0..per_node {
        let members: Vec<usize> = (0..nodes).map(|n| n * per_node + place).collect();
        for (&d, rank) in members.iter().zip(group(&system, &members)) {
            across[d] = Some(rank);
        }
    }
    for node in 0..nodes {
        let members: Vec<usize> = (0..per_node).map(|p| node * per_node + p).collect();
        for (&d, rank) in members.iter().zip(group(&system, &members)) {
            within[d] = Some(rank);
        }
    }
    let [across, within] = [across, within].map(|g| g.into_iter().flatten().collect::<Vec<_>>());
    let (to_nodes, to_ranks) = (
        Spread { destinations: nodes, each: each * per_node },
        Spread { destinations: per_node, each },
    );
    let from: Vec<Rows> = dies.iter().zip(of_rank).map(|(d, t)| Rows::of(d, t)).collect();
    let all = 0..size;
    let first: Vec<Hop> =
        all.clone().map(|d| there(&dies[d], &across[d], &from[d], to_nodes)).collect();
    let second: Vec<Hop> =
        all.clone().map(|d| there(&dies[d], &within[d], &first[d].received, to_ranks)).collect();
    let results: Vec<Tensor> =
        all.clone().map(|d| experts(&dies[d], &second[d].received, d * each, each)).collect();
    let at_node: Vec<Tensor> = all
        .clone()
        .map(|d| back(&dies[d], &within[d], &second[d], &first[d].received, &results[d]))
        .collect();
    let out: Vec<Tensor> =
        all.map(|d| back(&dies[d], &across[d], &first[d], &from[d], &at_node[d])).collect();
    for (d, tokens) in of_rank.iter().enumerate() {
        assert_eq!(read(&*dies[d].stream, &out[d]), tokens.weighted_sums(), "die {d}");
    }
}

/// Tokens of each rank: ranks of the group, experts on each, and what was chosen.
fn problem(sizes: &'static [usize]) -> impl Strategy<Value = (Vec<Tokens>, usize)> {
    (prop::sample::select(sizes), 1..4usize).prop_flat_map(|(size, each)| {
        let all = (1..=4.min(size * each), 1..6usize);
        all.prop_flat_map(move |(per_token, count)| {
            let one = tokens(count, per_token, size * each);
            (prop::collection::vec(one, size), Just(each))
        })
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn one_hop_equals_the_weighted_sum((of_rank, each) in problem(&[1, 2, 4])) {
        one_hop(&of_rank, each);
    }

    #[test]
    fn two_hops_equal_the_weighted_sum((of_rank, each) in problem(&[4])) {
        two_hops(&of_rank, 2, each);
    }

    #[test]
    fn every_pair_arrives_once_at_its_destination(
        (destinations, each, copies, replica_offset) in (1..6usize, 1..4usize, 1..4usize, 0..5u32),
        (count, counted) in (0..9usize, 0..9usize),
        seed in tokens(9, 3, 5),
    ) {
        let system = system(Mode::FunctionalOnly, 1);
        let die = &dies(&system, 1)[0];
        let (logical, physical) = (5, destinations * each);
        // Replicas of expert `e`: one to `copies` physical experts, spread as they come.
        let replicas: Vec<Vec<i32>> = (0..logical)
            .map(|e| (0..1 + e % copies).map(|c| ((e * 7 + c * 3) % physical) as i32).collect())
            .collect();
        let padded = replicas.iter().flat_map(|r| {
            r.iter().copied().chain(std::iter::repeat(-1)).take(copies).collect::<Vec<_>>()
        });
        let table: Vec<i32> = padded.collect();
        let (k, counted) = (seed.per_token, counted.min(count));
        let room = count * k.min(destinations);
        let to = Rows::room(die, room, k, destinations);
        let rows = die.room(DType::I32, &[count, k]);
        let part = |values: &[f32], width: usize| {
            die.floats(&values[..count * width], &[count, width])
        };
        die.run(MoeDispatch {
            x: part(&seed.x, H),
            x_scales: None,
            experts: die.ints(&seed.experts[..count * k], &[count, k]),
            weights: part(&seed.weights, k),
            replicas: Some(die.ints(&table, &[logical, copies])),
            row_offsets: Some(die.ints(&[0, counted as i32], &[2])),
            out: to.x.clone(),
            out_scales: None,
            out_experts: to.experts.clone(),
            out_weights: to.weights.clone(),
            offsets: to.offsets.clone().unwrap(),
            rows: rows.clone(),
            experts_per_destination: each as u32,
            total_experts: logical as u32,
            replica_offset,
            expected_rows: 0,
        });
        let starts = die.read_ints(to.offsets.as_ref().unwrap());
        let (arrived, rows) = (die.read_ints(&to.experts), die.read_ints(&rows));
        let (x, weights) = (read(&*die.stream, &to.x), read(&*die.stream, &to.weights));
        let mut used = vec![false; starts[destinations] as usize];
        for t in 0..count {
            let mut seen = Vec::new();
            for j in 0..k {
                let (row, expert) = (rows[t * k + j], seed.experts[t * k + j]);
                if t >= counted || expert < 0 {
                    prop_assert_eq!(row, -1);
                    continue;
                }
                let among = &replicas[expert as usize];
                let chosen = among[(t + replica_offset as usize) % among.len()] as usize;
                let home = chosen / each;
                let earlier = seen.iter().find(|(other, _)| *other == home).map(|(_, row)| *row);
                prop_assert_eq!(row < 0, earlier.is_some(), "one row for each destination");
                let row = match earlier {
                    Some(row) => row,
                    None => {
                        let row = row as usize;
                        prop_assert!(!std::mem::replace(&mut used[row], true));
                        prop_assert!(starts[home] <= row as i32 && (row as i32) < starts[home + 1]);
                        prop_assert_eq!(&x[row * H..][..H], &seed.x[t * H..][..H]);
                        prop_assert_eq!(&weights[row * k..][..k], &seed.weights[t * k..][..k]);
                        seen.push((home, row));
                        row
                    }
                };
                prop_assert_eq!(arrived[row * k + j], (chosen % each) as i32);
            }
            // A slot whose expert lives elsewhere is no expert there.
            for &(home, row) in &seen {
                for j in 0..k {
                    let expert = seed.experts[t * k + j];
                    let lives = expert >= 0 && {
                        let among = &replicas[expert as usize];
                        among[(t + replica_offset as usize) % among.len()] as usize / each == home
                    };
                    prop_assert_eq!(arrived[row * k + j] >= 0, lives);
                }
            }
            // Tokens come in order.
            for pair in seen.windows(2) {
                prop_assert!(pair[0].0 != pair[1].0);
            }
        }
        prop_assert!(used.iter().all(|&u| u), "no row without a token");
    }
}

/// Rows of a destination lie in the order of their tokens, whatever the slots.
#[test]
fn rows_come_by_destination_then_by_token() {
    let system = system(Mode::FunctionalOnly, 1);
    let die = &dies(&system, 1)[0];
    let tokens = Tokens {
        per_token: 2,
        experts: vec![3, 0, 1, -1, 2, 3, 0, 1],
        weights: vec![1.0; 8],
        x: (0..4 * H).map(|i| i as f32).collect(),
    };
    let (to, rows) = dispatch(die, &Rows::of(die, &tokens), Spread { destinations: 2, each: 2 });
    assert_eq!(die.read_ints(to.offsets.as_ref().unwrap()), [0, 3, 5]);
    assert_eq!(die.read_ints(&rows), [3, 0, 1, -1, 4, -1, 2, -1]);
    let experts = die.read_ints(&to.experts);
    assert_eq!(experts[..10], [-1, 0, 1, -1, 0, 1, 1, -1, 0, 1]);
    let sources: Vec<f32> = read(&*die.stream, &to.x).chunks(H).map(|row| row[0] / 3.0).collect();
    assert_eq!(sources[..5], [0.0, 1.0, 3.0, 0.0, 2.0]);
}

/// Where no values exist, an exchange takes the time of the rows that are expected; where they do,
/// of those that the busiest rank sends.
#[test]
fn time_is_that_of_the_rows_sent() {
    let time = |mode: Mode, sent: i32, expected_rows: u32| {
        let system = system(mode, 1);
        let dies = dies(&system, 2);
        let ranks = group(&system, &[0, 1]);
        for (die, rank) in dies.iter().zip(&ranks) {
            let [send, recv] =
                [0, 1].map(|_| die.stream.alloc_tensor(DType::F32, &[1000, 4096]).unwrap());
            let send_offsets = die.ints(&[0, sent / 2, sent], &[3]);
            let batch = [Collective::AllToAllV {
                send,
                recv,
                send_offsets,
                recv_offsets: None,
                expected_rows,
            }];
            die.stream.submit_collectives(rank, &batch, &Label::Static("exchange")).unwrap();
        }
        dies[0].stream.synchronize(SOON).unwrap();
        dies[0].stream.point().completed_at().unwrap().picos
    };
    let timing = |rows| time(Mode::TimingOnly, 0, rows);
    assert!(timing(800) > timing(100) && timing(100) > timing(1));
    assert_eq!(time(Mode::Full, 800, 1), timing(800));
    assert_eq!(time(Mode::Full, 0, 800), timing(0));
}

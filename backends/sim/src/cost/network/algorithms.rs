//! The algorithms that collective libraries choose between, as rounds of flows.
//!
//! Thakur, Rabenseifner, Gropp, "Optimization of Collective Communication Operations in MPICH"
//! (2005), and the ring, direct and hierarchical forms of NCCL.

use super::ports::Ports;
use hal::{CollectiveKind, LinkKind};

/// An algorithm's name and seconds.
pub(crate) type Candidate = (&'static str, f64);

/// All that can do `kind` over these ranks, with their times for `bytes` (see
/// [`crate::cost::Exchanged`]).
pub(crate) fn candidates(kind: CollectiveKind, bytes: f64, ports: &Ports<'_>) -> Vec<Candidate> {
    let n = ports.len() as f64;
    let share = bytes / n;
    match kind {
        CollectiveKind::AllReduce => {
            let mut all = vec![
                ("one-shot: everything to everybody", ports.all_pairs(bytes)),
                ("two-shot: direct reduce-scatter and all-gather", 2.0 * ports.all_pairs(share)),
                ("ring", 2.0 * ring(ports, bytes)),
                ("recursive doubling", doubling(ports, bytes)),
                ("recursive halving and doubling", 2.0 * halving(ports, bytes)),
            ];
            all.extend(hierarchical(ports, bytes));
            all
        }
        CollectiveKind::AllGather | CollectiveKind::ReduceScatter => vec![
            ("direct", ports.all_pairs(share)),
            ("ring", ring(ports, bytes)),
            ("recursive halving", halving(ports, bytes)),
        ],
        CollectiveKind::AllToAll => {
            vec![("direct", ports.all_pairs(share)), ("Bruck", bruck(ports, bytes))]
        }
        // Only the sender knows how much goes to whom: nobody can pass it on.
        CollectiveKind::AllToAllV => vec![("direct", ports.all_pairs(share))],
        CollectiveKind::Broadcast => vec![
            ("binomial tree", binomial(ports, bytes)),
            ("scatter and all-gather", binomial_scatter(ports, bytes) + ring(ports, bytes)),
            (
                "scatter and direct all-gather",
                binomial_scatter(ports, bytes) + ports.all_pairs(share),
            ),
        ],
        CollectiveKind::Send | CollectiveKind::Recv => {
            vec![("point to point", ports.round(&[(0, 1, bytes)]))]
        }
    }
}

/// The `n - 1` steps of a ring in which each rank passes a share on. Between hosts there are as many
/// rings as a host has ranks, each of which leaves a host by another die: all network ports work.
fn ring(ports: &Ports<'_>, bytes: f64) -> f64 {
    let n = ports.len();
    let hosts = ports.groups(LinkKind::InHost);
    let rails = match hosts.len() {
        1 => 1,
        _ => hosts.iter().map(Vec::len).min().unwrap_or(1),
    };
    let chunk = bytes / n as f64 / rails as f64;
    let mut moves = Vec::with_capacity(n * rails);
    for rail in 0..rails {
        let order: Vec<usize> = hosts
            .iter()
            .flat_map(|host| (0..host.len()).map(move |i| host[(i + rail) % host.len()]))
            .collect();
        moves.extend((0..n).map(|i| (order[i], order[(i + 1) % n], chunk)));
    }
    (n - 1) as f64 * ports.round(&moves)
}

/// Distances 1, 2, 4, … below the number of ranks.
fn distances(n: usize) -> impl Iterator<Item = usize> {
    std::iter::successors(Some(1), |d| Some(d * 2)).take_while(move |&d| d < n)
}

/// Partners that differ in one bit. Ranks beyond the largest power of two hand their part to a
/// partner first and get the result last: two more rounds.
fn exchanges(ports: &Ports<'_>, bytes: impl Fn(usize) -> f64, whole: f64) -> f64 {
    let n = ports.len();
    let core = if n.is_power_of_two() { n } else { n.next_power_of_two() / 2 };
    let mut seconds: f64 = distances(core)
        .map(|d| {
            let moves: Vec<_> = (0..core).map(|i| (i, i ^ d, bytes(d))).collect();
            ports.round(&moves)
        })
        .sum();
    if core < n {
        let moves: Vec<_> = (core..n).map(|i| (i, i - core, whole)).collect();
        seconds += 2.0 * ports.round(&moves);
    }
    seconds
}

/// All-reduce in log₂ n rounds of everything.
fn doubling(ports: &Ports<'_>, bytes: f64) -> f64 {
    exchanges(ports, |_| bytes, bytes)
}

/// Reduce-scatter or all-gather in log₂ n rounds: half to the nearest partner, least to the
/// farthest.
fn halving(ports: &Ports<'_>, bytes: f64) -> f64 {
    exchanges(ports, |distance| bytes / (2 * distance) as f64, bytes / 2.0)
}

/// All-to-all in ⌈log₂ n⌉ rounds of half of everything.
fn bruck(ports: &Ports<'_>, bytes: f64) -> f64 {
    let n = ports.len();
    distances(n)
        .map(|d| {
            let moves: Vec<_> = (0..n).map(|i| (i, (i + d) % n, bytes / 2.0)).collect();
            ports.round(&moves)
        })
        .sum()
}

/// Broadcast by a tree that doubles; the farthest first, so that hosts are reached early.
fn binomial(ports: &Ports<'_>, bytes: f64) -> f64 {
    tree(ports, |_| bytes)
}

/// A tree in which each rank gets what its subtree needs.
fn binomial_scatter(ports: &Ports<'_>, bytes: f64) -> f64 {
    let n = ports.len() as f64;
    tree(ports, |distance| bytes * distance as f64 / n)
}

fn tree(ports: &Ports<'_>, bytes: impl Fn(usize) -> f64) -> f64 {
    let n = ports.len();
    let far: Vec<usize> = distances(n).collect();
    far.iter()
        .rev()
        .map(|&d| {
            let senders = (0..n).step_by(2 * d).filter(|i| i + d < n);
            let moves: Vec<_> = senders.map(|i| (i, i + d, bytes(d))).collect();
            ports.round(&moves)
        })
        .sum()
}

/// Reduce-scatter among near ranks, all-reduce of each share among the far ones that hold it,
/// all-gather among near ranks; near is a card or a host. [`None`] where groups are unequal or there
/// is one level only.
fn hierarchical(ports: &Ports<'_>, bytes: f64) -> Vec<Candidate> {
    let levels = [
        ("hierarchical over cards", LinkKind::OnCard),
        ("hierarchical over hosts", LinkKind::InHost),
    ];
    let level = |(name, kind): (&'static str, LinkKind)| {
        let groups = ports.groups(kind);
        let near = groups[0].len();
        if groups.len() < 2 || near < 2 || groups.iter().any(|g| g.len() != near) {
            return None;
        }
        let group = ports.subset(&groups[0]);
        let inside = 2.0 * group.all_pairs(bytes / near as f64);
        // Each share's owners at once: they may meet at ports that dies of a card share.
        let share = bytes / near as f64;
        let far = groups.len();
        let lanes = |a: usize, b: usize, part: f64| {
            let pairs = groups[a].iter().zip(&groups[b]);
            pairs.map(move |(&x, &y)| (x, y, part)).collect::<Vec<_>>()
        };
        let pairs = |part: f64| -> Vec<(usize, usize, f64)> {
            let others = |a| (0..far).filter(move |&b| b != a).map(move |b| (a, b));
            (0..far).flat_map(others).flat_map(|(a, b)| lanes(a, b, part)).collect()
        };
        let across_ring = || {
            let part = share / far as f64;
            let moves: Vec<_> = (0..far).flat_map(|a| lanes(a, (a + 1) % far, part)).collect();
            2.0 * (far - 1) as f64 * ports.round(&moves)
        };
        // Listing pairs is worth it for few groups only; many go round a ring.
        let across = match far {
            0..=16 => {
                let two_shot = 2.0 * ports.round(&pairs(share / far as f64));
                two_shot.min(ports.round(&pairs(share))).min(across_ring())
            }
            _ => across_ring().min(across_doubling(ports, &groups, share)),
        };
        Some((name, inside + across))
    };
    levels.into_iter().filter_map(level).collect()
}

/// All-reduce of each share over the groups, by recursive doubling.
fn across_doubling(ports: &Ports<'_>, groups: &[Vec<usize>], share: f64) -> f64 {
    let far = groups.len();
    let core = if far.is_power_of_two() { far } else { far.next_power_of_two() / 2 };
    let round = |pairs: Vec<(usize, usize)>| {
        let moves: Vec<_> = pairs
            .into_iter()
            .flat_map(|(a, b)| groups[a].iter().zip(&groups[b]).map(move |(&x, &y)| (x, y, share)))
            .collect();
        ports.round(&moves)
    };
    let mut seconds: f64 =
        distances(core).map(|d| round((0..core).map(|i| (i, i ^ d)).collect())).sum();
    if core < far {
        seconds += 2.0 * round((core..far).map(|i| (i, i - core)).collect());
    }
    seconds
}

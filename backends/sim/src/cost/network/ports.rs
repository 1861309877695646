//! The ports of a set of ranks: what their flows share.

use super::flows::{Flow, completion};
use hal::{DeviceId, DiePlacement, LinkKind, Topology};
use std::collections::HashMap;

/// The kinds of link that cost something, nearest first.
pub(crate) const KINDS: [LinkKind; 3] = [LinkKind::OnCard, LinkKind::InHost, LinkKind::Network];

/// Ranks with their places, and the ports between them. A die sends through one port and receives
/// through another, a pair for each kind of link; neighbours may share them.
#[derive(Debug)]
pub(crate) struct Ports<'t> {
    topology: &'t Topology,
    /// Dies that share a port, by kind.
    sharers: [u32; 3],
    pub(crate) ranks: Vec<DeviceId>,
    places: Vec<DiePlacement>,
}

/// How many peers of a rank are how near.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Peers([u64; 3]);

impl<'t> Ports<'t> {
    /// Ranks in the order in which neighbours are near: by die number.
    pub(crate) fn new(topology: &'t Topology, sharers: [u32; 3], ranks: &[DeviceId]) -> Self {
        let mut ranks = ranks.to_vec();
        ranks.sort_unstable();
        ranks.dedup();
        let places = ranks.iter().map(|&r| topology.placement(r).unwrap_or_default()).collect();
        Ports { topology, sharers, ranks, places }
    }

    pub(crate) fn len(&self) -> usize {
        self.ranks.len()
    }

    /// The part of the ranks at these places of the list.
    pub(crate) fn subset(&self, members: &[usize]) -> Ports<'t> {
        let ranks: Vec<_> = members.iter().map(|&m| self.ranks[m]).collect();
        Ports::new(self.topology, self.sharers, &ranks)
    }

    /// Ranks by card or host: lists of places in the list of ranks.
    pub(crate) fn groups(&self, of: LinkKind) -> Vec<Vec<usize>> {
        let mut groups: Vec<(u32, Vec<usize>)> = Vec::new();
        for (i, place) in self.places.iter().enumerate() {
            let id = if of == LinkKind::OnCard { place.card } else { place.host };
            match groups.last_mut() {
                Some((last, members)) if *last == id => members.push(i),
                _ => groups.push((id, vec![i])),
            }
        }
        groups.into_iter().map(|(_, members)| members).collect()
    }

    fn kind(&self, a: usize, b: usize) -> Option<usize> {
        let kind = self.topology.kind(self.ranks[a], self.ranks[b])?;
        KINDS.iter().position(|&k| k == kind)
    }

    /// Bytes per second and seconds to the first byte of a kind of link, from any pair that has it.
    fn figures(&self, kind: usize) -> Option<(f64, f64)> {
        let first = *self.ranks.first()?;
        // Links are per kind; any pair of dies of the topology shows it.
        let pair = (0..self.topology.dies() as u32)
            .map(DeviceId)
            .find(|&d| self.topology.kind(first, d) == Some(KINDS[kind]))?;
        let link = self.topology.link(first, pair)?;
        Some((link.bytes_per_second, link.latency_ps as f64 * 1e-12))
    }

    /// Seconds of a round in which each `(from, to)` moves so many bytes, all at once: the longest
    /// latency, then fair sharing.
    pub(crate) fn round(&self, moves: &[(usize, usize, f64)]) -> f64 {
        let figures: [_; 3] = std::array::from_fn(|k| self.figures(k));
        let mut numbers: HashMap<(usize, bool, u32), usize> = HashMap::new();
        let mut capacity = Vec::new();
        let mut flows = Vec::with_capacity(moves.len());
        let mut latency = 0f64;
        for &(from, to, bytes) in moves {
            let Some(kind) = self.kind(from, to) else { continue };
            let Some((rate, first_byte)) = figures[kind] else { continue };
            latency = latency.max(first_byte);
            let port =
                |rank: usize, sends: bool, numbers: &mut HashMap<_, _>, caps: &mut Vec<f64>| {
                    let group = self.ranks[rank].0 / self.sharers[kind];
                    *numbers.entry((kind, sends, group)).or_insert_with(|| {
                        caps.push(rate);
                        caps.len() - 1
                    })
                };
            let out = port(from, true, &mut numbers, &mut capacity);
            let into = port(to, false, &mut numbers, &mut capacity);
            flows.push(Flow { ports: [out, into], bytes });
        }
        latency + completion(flows, &capacity)
    }

    /// Seconds in which every rank sends `bytes` to every other, all at once. Counts peers instead
    /// of listing pairs, of which 2,048 ranks have four million: with equal flows, the fullest port
    /// decides.
    pub(crate) fn all_pairs(&self, bytes: f64) -> f64 {
        let count = |ids: fn(&DiePlacement) -> u32| {
            let mut counts: HashMap<u32, u64> = HashMap::new();
            for place in &self.places {
                *counts.entry(ids(place)).or_default() += 1;
            }
            counts
        };
        let (cards, hosts) = (count(|p| p.card), count(|p| p.host));
        let mut load: HashMap<(usize, u32), u64> = HashMap::new();
        let mut used = [false; 3];
        for (rank, place) in self.ranks.iter().zip(&self.places) {
            let (card, host) = (cards[&place.card], hosts[&place.host]);
            let peers = Peers([card - 1, host - card, self.len() as u64 - host]);
            for (kind, &count) in peers.0.iter().enumerate().filter(|(_, count)| **count > 0) {
                used[kind] = true;
                *load.entry((kind, rank.0 / self.sharers[kind])).or_default() += count;
            }
        }
        let figures: [_; 3] = std::array::from_fn(|k| used[k].then(|| self.figures(k)).flatten());
        let latency = figures.iter().flatten().map(|f| f.1).fold(0.0, f64::max);
        let busiest = load
            .iter()
            .filter_map(|(&(kind, _), &flows)| Some(flows as f64 * bytes / figures[kind]?.0));
        latency + busiest.fold(0.0, f64::max)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Machine;

    #[test]
    fn counting_peers_equals_listing_flows() {
        for (name, ranks) in [
            ("h800", (0..8).collect::<Vec<u32>>()),
            ("h800", (0..32).collect()),
            ("va16", (0..32).collect()),
            ("va16", (0..4).collect()),
            ("va16", vec![0, 1, 4, 5, 8, 9]),
            ("cloudmatrix384", (0..48).collect()),
        ] {
            let machine = Machine::named(name).unwrap();
            let topology = machine.topology();
            let sharers = KINDS.map(|k| machine.link(k).map_or(1, |l| l.sharers()));
            let ids: Vec<_> = ranks.iter().copied().map(DeviceId).collect();
            let ports = Ports::new(&topology, sharers, &ids);
            let n = ports.len();
            let pairs: Vec<_> = (0..n)
                .flat_map(|a| (0..n).map(move |b| (a, b, 1e6)))
                .filter(|(a, b, _)| a != b)
                .collect();
            let (counted, listed) = (ports.all_pairs(1e6), ports.round(&pairs));
            assert!((counted / listed - 1.0).abs() < 1e-3, "{name} {n}: {counted} {listed}");
        }
    }
}

//! Where dies sit and what joins them.

use crate::DeviceId;
use serde::{Deserialize, Serialize};
use std::fmt;

/// Where a die sits.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct DiePlacement {
    /// Host, numbered within the system.
    pub host: u32,
    /// Card, numbered within the system.
    pub card: u32,
    /// Die, numbered within its card.
    pub die_on_card: u32,
}

/// What a link is made of, from nearest to farthest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum LinkKind {
    /// A die and itself.
    SameDie,
    /// Two dies of one card.
    OnCard,
    /// Two cards of one host.
    InHost,
    /// Two hosts.
    Network,
}

impl fmt::Display for LinkKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            LinkKind::SameDie => "same die",
            LinkKind::OnCard => "on card",
            LinkKind::InHost => "in host",
            LinkKind::Network => "network",
        })
    }
}

/// The path from one die to another.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Link {
    /// What it is made of.
    pub kind: LinkKind,
    /// Reachable bandwidth in bytes per second, one way.
    pub bytes_per_second: f64,
    /// Time for the first byte, in picoseconds.
    pub latency_ps: u64,
    /// Whether a die can copy to the other without the host.
    pub peer_copy: bool,
}

/// Cards, hosts and the links between every pair of dies.
///
/// Links are described per kind rather than per pair: in every system modelled so far the path
/// depends on the placement of its ends alone, and 2,048 dies have four million pairs.
#[doc(alias = "nvidia-smi topo -m")]
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Topology {
    placements: Vec<DiePlacement>,
    links: Vec<Link>,
}

impl Topology {
    /// Dies by placement, and at most one link per kind. A kind without a link means that such
    /// pairs are not joined.
    pub fn new(placements: Vec<DiePlacement>, links: Vec<Link>) -> Self {
        Topology { placements, links }
    }

    /// Number of dies.
    pub fn dies(&self) -> usize {
        self.placements.len()
    }

    /// Where a die sits, or `None` beyond the last one.
    pub fn placement(&self, die: DeviceId) -> Option<DiePlacement> {
        self.placements.get(die.0 as usize).copied()
    }

    /// The kind of path between two dies.
    pub fn kind(&self, a: DeviceId, b: DeviceId) -> Option<LinkKind> {
        let (x, y) = (self.placement(a)?, self.placement(b)?);
        Some(if a == b {
            LinkKind::SameDie
        } else if x.card == y.card {
            LinkKind::OnCard
        } else if x.host == y.host {
            LinkKind::InHost
        } else {
            LinkKind::Network
        })
    }

    /// The path between two dies, or `None` where nothing joins them.
    pub fn link(&self, a: DeviceId, b: DeviceId) -> Option<Link> {
        let kind = self.kind(a, b)?;
        self.links.iter().find(|link| link.kind == kind).copied()
    }

    /// The farthest kind of link among a set of dies: what bounds a flat collective over them.
    pub fn widest(&self, dies: &[DeviceId]) -> Option<Link> {
        let (first, rest) = dies.split_first()?;
        rest.iter().filter_map(|&d| self.link(*first, d)).max_by_key(|link| link.kind)
    }

    /// How many hosts and cards the dies are spread over.
    pub fn spread(&self, dies: &[DeviceId]) -> (usize, usize) {
        let places = || dies.iter().filter_map(|&d| self.placement(d));
        let count = |mut ids: Vec<u32>| {
            ids.sort_unstable();
            ids.dedup();
            ids.len()
        };
        (count(places().map(|p| p.host).collect()), count(places().map(|p| p.card).collect()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn links_follow_placement() {
        let place = |i: u32| DiePlacement { host: i / 8, card: i / 4, die_on_card: i % 4 };
        let link = |kind, gb: f64| Link {
            kind,
            bytes_per_second: gb * 1e9,
            latency_ps: 1,
            peer_copy: true,
        };
        let links = vec![link(LinkKind::OnCard, 50.0), link(LinkKind::InHost, 20.0)];
        let topology = Topology::new((0..16).map(place).collect(), links);
        let kind = |a, b| topology.link(DeviceId(a), DeviceId(b)).map(|l| l.kind);
        assert_eq!(kind(0, 3), Some(LinkKind::OnCard));
        assert_eq!(kind(3, 4), Some(LinkKind::InHost));
        assert_eq!(kind(0, 8), None, "hosts are not joined in this system");
        assert_eq!(kind(0, 16), None, "there are 16 dies only");
        let all: Vec<_> = (0..8).map(DeviceId).collect();
        assert_eq!(topology.widest(&all).unwrap().kind, LinkKind::InHost);
        assert_eq!(topology.spread(&all), (1, 2));
    }
}

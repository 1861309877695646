//! What goes over links: collectives and exchanges between experts.

mod algorithms;
mod flows;
mod moe;
mod ports;

pub use moe::{MoeCost, MoeExchange, MoeMode};

use crate::machine::{LinkConstants, Machine};
use hal::trace::Bound;
use hal::{CollectiveKind, DeviceId, LinkKind, Topology};
use parking_lot::RwLock;
use ports::{KINDS, Ports};
use std::collections::HashMap;

/// A collective's time, and how it goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Exchange {
    /// Picoseconds, without the gap before the kernel.
    pub picos: u64,
    /// The algorithm chosen.
    pub algorithm: &'static str,
    /// What decides.
    pub bound: Bound,
}

/// Collectives that are kept; a run whose sizes never repeat starts over when there are more.
const MOST_KNOWN: usize = 1 << 14;

/// By kind and bytes.
type Sizes = HashMap<(CollectiveKind, u64), Exchange>;

/// A machine's links, and what its libraries do with them.
#[derive(Debug)]
pub struct Network {
    /// Dies that share a port, by kind of link.
    sharers: [u32; 3],
    links: [Option<LinkConstants>; 3],
    dies_per_host: u32,
    dies_per_card: u32,
    memory_rate: f64,
    kernel: f64,
    collective: f64,
    exchange: f64,
    token: f64,
    known: RwLock<HashMap<Box<[DeviceId]>, Sizes>>,
}

impl Network {
    /// The network of a machine.
    pub fn new(machine: &Machine) -> Self {
        let k = &machine.kernels;
        Network {
            sharers: KINDS.map(|kind| machine.link(kind).map_or(1, LinkConstants::sharers)),
            links: KINDS.map(|kind| machine.link(kind).cloned()),
            dies_per_host: machine.dies_per_host(),
            dies_per_card: machine.system.dies_per_card,
            memory_rate: machine.memory_rate(),
            kernel: machine.launch.kernel_us.value * 1e-6,
            collective: k.collective_us.value * 1e-6,
            exchange: k.exchange_us.value * 1e-6,
            token: k.token_us.value * 1e-6,
            known: RwLock::default(),
        }
    }

    /// The time of a collective in which the rank with the most to do sends or receives `bytes`,
    /// by the fastest algorithm. Sizes as for [`super::CostModel::collective`].
    pub fn collective(
        &self,
        kind: CollectiveKind,
        bytes: u64,
        ranks: &[DeviceId],
        topology: &Topology,
    ) -> Exchange {
        if let Some(known) =
            self.known.read().get(ranks).and_then(|sizes| sizes.get(&(kind, bytes)))
        {
            return *known;
        }
        let exchange = self.choose(kind, bytes, ranks, topology);
        let mut known = self.known.write();
        if known.values().map(HashMap::len).sum::<usize>() >= MOST_KNOWN {
            known.clear();
        }
        known.entry(ranks.into()).or_default().insert((kind, bytes), exchange);
        exchange
    }

    fn choose(
        &self,
        kind: CollectiveKind,
        bytes: u64,
        ranks: &[DeviceId],
        topology: &Topology,
    ) -> Exchange {
        let ports = Ports::new(topology, self.sharers, ranks);
        if ports.len() < 2 {
            // One rank: at most a copy.
            let copy = 2.0 * bytes as f64 / self.memory_rate;
            let picos = ((self.kernel + copy) * 1e12).ceil() as u64;
            return Exchange { picos, algorithm: "a copy", bound: Bound::Memory };
        }
        let nothing = algorithms::candidates(kind, 0.0, &ports);
        let all = algorithms::candidates(kind, bytes as f64, &ports);
        let (index, &(algorithm, seconds)) = all
            .iter()
            .enumerate()
            .min_by(|a, b| a.1.1.total_cmp(&b.1.1))
            .unwrap_or((0, &("none", 0.0)));
        let latency = nothing.get(index).map_or(0.0, |c| c.1) + self.collective;
        let whole = self.collective + seconds;
        Exchange {
            picos: (whole * 1e12).ceil() as u64,
            algorithm,
            bound: if whole > 2.0 * latency { Bound::Link } else { Bound::Launch },
        }
    }

    pub(crate) fn dies_per_host(&self) -> u32 {
        self.dies_per_host
    }

    /// Seconds for a rank's bytes over the network while all ranks do the same, and the latency.
    fn network_seconds(&self, bytes: f64) -> (f64, f64) {
        self.link_seconds(LinkKind::Network, bytes)
    }

    /// Seconds for a rank's bytes inside its host, spread evenly over the dies there; with
    /// `own_copies`, those for itself go the same way.
    fn host_seconds(&self, bytes: f64, dies: f64, own_copies: bool) -> (f64, f64) {
        let on_card = (f64::from(self.dies_per_card).min(dies) - 1.0).max(0.0);
        let own = if own_copies { 1.0 } else { 0.0 };
        let far = (dies - 1.0 - on_card).max(0.0);
        let all = (on_card + far + own).max(1.0);
        // Own copies use whatever port the library's buffers sit behind: the wider group's.
        let (far, on_card) = if far > 0.0 { (far + own, on_card) } else { (0.0, on_card + own) };
        let (a, a_latency) = self.link_seconds(LinkKind::InHost, bytes * far / all);
        let (b, b_latency) = self.link_seconds(LinkKind::OnCard, bytes * on_card / all);
        (a.max(b), a_latency.max(b_latency))
    }

    fn link_seconds(&self, kind: LinkKind, bytes: f64) -> (f64, f64) {
        let at = KINDS.iter().position(|&k| k == kind);
        match at.and_then(|at| self.links[at].as_ref().zip(Some(self.sharers[at]))) {
            Some((link, sharers)) if bytes > 0.0 => {
                let rate = link.gb_s.value * 1e9 / f64::from(sharers);
                (bytes / rate, link.latency_us.value * 1e-6)
            }
            _ => (0.0, 0.0),
        }
    }
}

#[cfg(test)]
mod tests;

//! What goes over links: collectives and exchanges between experts.

mod algorithms;
mod flows;
mod moe;
mod ports;

pub use moe::{MoeCost, MoeExchange, MoeMode};

use super::Exchanged;
use crate::machine::{LinkConstants, Machine};
use crate::timeline::{Resource, Shares};
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
    /// What it uses of each die.
    pub shares: Shares,
}

/// Collectives that are kept; a run whose sizes never repeat starts over when there are more.
const MOST_KNOWN: usize = 1 << 14;

/// By kind, bytes and rows.
type Sizes = HashMap<(CollectiveKind, u64, u64), Exchange>;

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
    low_latency_rows: u64,
    communication_cores: f64,
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
            low_latency_rows: k.low_latency_rows.value as u64,
            communication_cores: (k.communication_cores.value / machine.die.cores.value).min(1.0),
            known: RwLock::default(),
        }
    }

    /// The time of a collective, by the fastest algorithm.
    pub fn collective(
        &self,
        what: &Exchanged,
        ranks: &[DeviceId],
        topology: &Topology,
    ) -> Exchange {
        let key = (what.kind, what.bytes, what.rows);
        if let Some(known) = self.known.read().get(ranks).and_then(|sizes| sizes.get(&key)) {
            return *known;
        }
        let exchange = self.choose(what, ranks, topology);
        let mut known = self.known.write();
        if known.values().map(HashMap::len).sum::<usize>() >= MOST_KNOWN {
            known.clear();
        }
        known.entry(ranks.into()).or_default().insert(key, exchange);
        exchange
    }

    fn choose(&self, what: &Exchanged, ranks: &[DeviceId], topology: &Topology) -> Exchange {
        let Exchanged { kind, bytes, rows } = *what;
        let ports = Ports::new(topology, self.sharers, ranks);
        if ports.len() < 2 {
            // One rank: at most a copy.
            let copy = 2.0 * bytes as f64 / self.memory_rate;
            let seconds = self.kernel + copy;
            return Exchange {
                picos: (seconds * 1e12).ceil() as u64,
                algorithm: "a copy",
                bound: Bound::Memory,
                shares: Shares::NONE.with(Resource::Memory, copy / seconds),
            };
        }
        let nothing = algorithms::candidates(kind, 0.0, &ports);
        let all = algorithms::candidates(kind, bytes as f64, &ports);
        let (index, &(algorithm, seconds)) = all
            .iter()
            .enumerate()
            .min_by(|a, b| a.1.1.total_cmp(&b.1.1))
            .unwrap_or((0, &("none", 0.0)));
        let first_byte = nothing.get(index).map_or(0.0, |c| c.1);
        // Rows that values send are packed and announced as expert exchanges are: see [`moe`].
        let by_rows = kind == CollectiveKind::AllToAllV;
        let low_latency = by_rows && rows <= self.low_latency_rows;
        let fixed = match (by_rows, low_latency) {
            // Data, then the count that tells the receiver.
            (true, true) => rows as f64 * self.token + first_byte,
            (true, false) => self.exchange,
            (false, _) => self.collective,
        };
        let (latency, whole) = (first_byte + fixed, seconds + fixed);
        let port = topology.widest(ranks).and_then(|link| Resource::port(link.kind));
        let mut shares = Shares::NONE
            .with(Resource::Memory, 2.0 * bytes as f64 / self.memory_rate / whole)
            .with(Resource::Compute, if low_latency { 0.0 } else { self.communication_cores });
        if let Some(port) = port {
            shares = shares.with(port, (seconds - first_byte) / whole);
        }
        Exchange {
            picos: (whole * 1e12).ceil() as u64,
            algorithm,
            bound: if whole > 2.0 * latency { Bound::Link } else { Bound::Launch },
            shares,
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

//! Exchanges of tokens between experts: two hops with de-duplication for throughput, direct for
//! latency, as DeepEP does.

use super::Network;
use hal::op::FP8_BLOCK;

/// Which kernels.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum MoeMode {
    /// Two hops: a token crosses to a host once, and is spread to the dies there.
    Throughput,
    /// Every copy goes straight to its die.
    LowLatency,
}

/// An expert-parallel exchange, there (dispatch) or back (combine, where results are summed as they
/// meet: the same way with the same counts): balanced, uniform routing over all experts of the hosts kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct MoeExchange {
    /// Kernels.
    pub mode: MoeMode,
    /// Expert-parallel ranks.
    pub ep: u32,
    /// Tokens of each rank.
    pub tokens: u32,
    /// Experts of a token.
    pub top_k: u32,
    /// Elements of a token.
    pub hidden: u32,
    /// Bytes of an element: 1 for FP8, whose scales travel too, 2 for BF16.
    pub element_bytes: u32,
    /// Experts in all.
    pub experts: u32,
    /// Most hosts of a token (DeepSeek-V3: 4); low latency knows no limit.
    pub host_limit: u32,
    /// Whether dies of a host go through the network too.
    pub network_only: bool,
}

/// What an exchange costs, and why.
#[derive(Clone, Debug, PartialEq)]
pub struct MoeCost {
    /// Picoseconds of the kernel, for the slowest rank.
    pub picos: u64,
    /// Bytes of a rank as DeepEP's benchmark counts them: to each host once (own one included) over
    /// several hosts; to each die once within one; every copy in low latency.
    pub logical_bytes: f64,
    /// Bytes of a rank over the network, and within its host.
    pub network_bytes: f64,
    /// See `network_bytes`.
    pub host_bytes: f64,
    /// How it goes.
    pub mapping: String,
    /// Seconds that the busiest link needs.
    pub link_seconds: f64,
    /// Whether links decide, rather than counting and flags.
    pub link_bound: bool,
}

impl MoeExchange {
    /// Bytes of a token on the way.
    pub fn token_bytes(&self) -> f64 {
        let scales = if self.element_bytes == 1 {
            (self.hidden as usize).div_ceil(FP8_BLOCK) * 4
        } else {
            0
        };
        f64::from(self.hidden) * f64::from(self.element_bytes) + scales as f64
    }
}

/// The probability that a token with `k` of `all` experts, each equally likely, has none among
/// `some`.
fn none_among(all: f64, some: f64, k: u32) -> f64 {
    (0..k).map(f64::from).fold(1.0, |p, i| {
        if all - i <= 0.0 { p } else { p * ((all - some - i) / (all - i)).max(0.0) }
    })
}

/// Counts of one exchange, per rank.
struct Traffic {
    hosts: f64,
    per_host: f64,
    /// Hosts and dies that a token meets, its own included.
    met_hosts: f64,
    met_dies: f64,
}

impl Network {
    /// The time of an expert-parallel exchange.
    pub fn moe(&self, x: &MoeExchange) -> MoeCost {
        let per_host = f64::from(x.ep.min(self.dies_per_host()).max(1));
        let hosts = (f64::from(x.ep.max(1)) / per_host).ceil();
        let limit = if x.mode == MoeMode::LowLatency { hosts } else { f64::from(x.host_limit) };
        let kept = limit.clamp(1.0, hosts);
        let experts = f64::from(x.experts);
        // A token's experts are spread over the hosts kept for it.
        let among = experts * kept / hosts;
        let met = |some: f64, of: f64| of * (1.0 - none_among(among, some, x.top_k));
        let traffic = Traffic {
            hosts,
            per_host,
            met_hosts: met(experts / hosts, kept),
            met_dies: met(experts / f64::from(x.ep.max(1)), kept * per_host),
        };
        match x.mode {
            MoeMode::Throughput => self.throughput(x, &traffic),
            MoeMode::LowLatency => self.low_latency(x, &traffic),
        }
    }

    fn throughput(&self, x: &MoeExchange, t: &Traffic) -> MoeCost {
        let tokens = f64::from(x.tokens) * x.token_bytes();
        let network_bytes = tokens * t.met_hosts * (t.hosts - 1.0) / t.hosts;
        // Copies for the own die pass the same buffers.
        let host_bytes = tokens * t.met_dies;
        let (network, network_latency) = self.network_seconds(network_bytes);
        let (inside, host_latency) = self.host_seconds(host_bytes, t.per_host, true);
        let latency = if t.hosts > 1.0 { network_latency } else { 0.0 } + host_latency;
        let links = network.max(inside);
        let seconds = self.exchange + latency + links;
        let several = t.hosts > 1.0;
        MoeCost {
            picos: (seconds * 1e12).ceil() as u64,
            logical_bytes: if several { tokens * t.met_hosts } else { host_bytes },
            network_bytes,
            host_bytes,
            link_seconds: links,
            link_bound: links > self.exchange + latency,
            mapping: format!(
                "{}; a token meets {:.2} host(s) and {:.2} dies of {} on {}; {} decide",
                if several {
                    "two hops: once to each host over the network, there to each die"
                } else {
                    "one hop: once to each die of the host"
                },
                t.met_hosts,
                t.met_dies,
                x.ep,
                t.hosts,
                if network > inside { "links between hosts" } else { "links inside the host" }
            ),
        }
    }

    fn low_latency(&self, x: &MoeExchange, t: &Traffic) -> MoeCost {
        let ep = f64::from(x.ep.max(1));
        let copies = f64::from(x.tokens) * f64::from(x.top_k);
        let bytes = copies * x.token_bytes();
        let near = if x.network_only { 0.0 } else { t.per_host - 1.0 };
        let network_bytes = bytes * (ep - 1.0 - near).max(0.0) / ep;
        let host_bytes = bytes * near / ep;
        let (network, network_latency) = self.network_seconds(network_bytes);
        let (inside, host_latency) = self.host_seconds(host_bytes, t.per_host, false);
        // Data, then the count that tells the receiver.
        let latency = 2.0 * if network_bytes > 0.0 { network_latency } else { host_latency };
        let issue = copies * self.token;
        let links = network.max(inside);
        MoeCost {
            picos: ((issue + latency + links) * 1e12).ceil() as u64,
            logical_bytes: bytes,
            network_bytes,
            host_bytes,
            link_seconds: links,
            link_bound: links > issue + latency,
            mapping: format!(
                "direct: {copies} copies of {:.0} B to {} dies, {:.0}% over the network; {} decide",
                x.token_bytes(),
                x.ep,
                100.0 * network_bytes / bytes.max(1.0),
                if network > inside { "links between hosts" } else { "links inside the host" }
            ),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Machine;

    #[test]
    fn expected_meetings_are_hypergeometric() {
        // 8 of 256 experts, 32 on a die: C(224, 8) / C(256, 8) = 0.3382 miss it.
        assert!((none_among(256.0, 32.0, 8) - 0.338_2).abs() < 1e-3);
        assert_eq!(none_among(8.0, 8.0, 1), 0.0);
        assert_eq!(none_among(256.0, 0.0, 8), 1.0);
    }

    #[test]
    fn bytes_are_those_of_the_published_benchmark() {
        let network = Network::new(&Machine::named("h800").unwrap());
        let x = MoeExchange {
            mode: MoeMode::LowLatency,
            ep: 8,
            tokens: 128,
            top_k: 8,
            hidden: 7168,
            element_bytes: 1,
            experts: 256,
            host_limit: 4,
            network_only: false,
        };
        // validation: 128 x 8 x (7168 + 56 x 4) B = 7.57 MB.
        assert_eq!(network.moe(&x).logical_bytes, 7_569_408.0);
        // A token goes to each host once: 4 hosts kept are almost always all met.
        let x = MoeExchange { mode: MoeMode::Throughput, ep: 64, tokens: 4096, ..x };
        let met = network.moe(&x).logical_bytes / (4096.0 * x.token_bytes());
        assert!((3.5..4.0).contains(&met), "{met}");
    }
}

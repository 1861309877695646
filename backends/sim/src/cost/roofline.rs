//! The first time model: each op takes as long as its scarcest resource, plus a launch.

use super::{Cost, CostModel, Exchanged, Path};
use crate::machine::{Machine, picos};
use crate::timeline::{Resource, Shares};
use hal::op::{self, Routing, Work};
use hal::trace::Bound;
use hal::{CollectiveKind, DType, DeviceId, Op, TensorDesc, Topology};

/// `time = launch + max(matrix ops / matrix rate, vector ops / vector rate, bytes / bandwidth)`
/// (Williams, Waterman, Patterson 2009). No tiles, no overlap of commands, no contention.
#[derive(Clone, Debug)]
pub struct Roofline {
    machine: Machine,
    launch: u64,
    host_issue: u64,
    host_sync: u64,
}

impl Roofline {
    /// The model of a machine.
    pub fn new(machine: &Machine) -> Self {
        Roofline {
            launch: picos(machine.launch.device_us.value),
            host_issue: picos(machine.launch.host_us.value),
            host_sync: picos(machine.launch.sync_us.value),
            machine: machine.clone(),
        }
    }

    /// Picoseconds that a work's scarcest resource needs, without a launch: no kernel is faster.
    pub fn work_picos(&self, work: &Work) -> u64 {
        self.parts(work).iter().map(|&(_, seconds)| (seconds * 1e12) as u64).max().unwrap_or(0)
    }

    /// The resource that a work needs longest.
    pub fn scarcest(&self, work: &Work) -> Bound {
        let parts = self.parts(work);
        parts.into_iter().max_by(|a, b| a.1.total_cmp(&b.1)).map_or(Bound::Unknown, |p| p.0)
    }

    fn parts(&self, work: &Work) -> [(Bound, f64); 3] {
        let dtype = work.matrix_dtype.unwrap_or(DType::F32);
        [
            (Bound::Memory, work.bytes() as f64 / self.machine.memory_rate()),
            (Bound::Matrix, work.matrix_ops as f64 / self.machine.matrix_rate(dtype)),
            (Bound::Vector, work.vector_ops as f64 / (self.machine.die.vector_gops.value * 1e9)),
        ]
    }

    fn cost(&self, parts: &[(Bound, f64)], operations: u64, bytes: u64) -> Cost {
        // Below the launch itself, what a command does hardly matters.
        let mut longest = (Bound::Launch, self.launch as f64 * 1e-12);
        let mut work = 0f64;
        for &(bound, seconds) in parts {
            work = work.max(seconds);
            if seconds > longest.1 {
                longest = (bound, seconds);
            }
        }
        let picos = self.launch + (work * 1e12).ceil() as u64;
        // Shares of what the work would use if nothing but its scarcest resource took time.
        let part = |bound| {
            let seconds: f64 = parts.iter().filter(|p| p.0 == bound).map(|p| p.1).sum();
            if picos == 0 { 0.0 } else { seconds * 1e12 / picos as f64 }
        };
        let shares = Shares::NONE
            .with(Resource::Memory, part(Bound::Memory))
            .with(Resource::Compute, part(Bound::Matrix).max(part(Bound::Vector)));
        Cost { picos, operations, bytes, bound: longest.0, shares }
    }
}

impl CostModel for Roofline {
    fn op(&self, op: &Op<TensorDesc>, routing: Option<Routing>) -> Cost {
        let work = op::work(op, routing);
        let parts = self.parts(&work);
        self.cost(&parts, work.matrix_ops + work.vector_ops, work.bytes())
    }

    fn transfer(&self, bytes: u64, path: Path, topology: &Topology) -> Cost {
        let memory = 2.0 * bytes as f64 / self.machine.memory_rate();
        let link = match path {
            Path::Local => return self.cost(&[(Bound::Memory, memory)], 0, 2 * bytes),
            Path::Host => {
                let host = &self.machine.link.host;
                Some((host.gb_s.value * 1e9, host.latency_us.value * 1e-6))
            }
            Path::Peer(a, b) => {
                topology.link(a, b).map(|l| (l.bytes_per_second, l.latency_ps as f64 * 1e-12))
            }
        };
        // Pairs without a link were refused when the copy was submitted.
        let (rate, latency) = link.unwrap_or((f64::INFINITY, 0.0));
        self.cost(&[(Bound::Link, latency + bytes as f64 / rate)], 0, bytes)
    }

    fn fill(&self, bytes: u64) -> Cost {
        self.cost(&[(Bound::Memory, bytes as f64 / self.machine.memory_rate())], 0, bytes)
    }

    fn collective(&self, what: &Exchanged, ranks: &[DeviceId], topology: &Topology) -> Cost {
        let Exchanged { kind, bytes, .. } = *what;
        let n = ranks.len() as f64;
        let Some(link) = topology.widest(ranks) else {
            return self.cost(
                &[(Bound::Memory, bytes as f64 / self.machine.memory_rate())],
                0,
                bytes,
            );
        };
        let (rate, latency) = (link.bytes_per_second, link.latency_ps as f64 * 1e-12);
        let whole = bytes as f64 / rate;
        let share = whole * (n - 1.0) / n;
        let doublings = n.log2().ceil();
        // Each kind by the cheapest of the algorithms that collective libraries choose between:
        // ring (bandwidth), recursive doubling (few long messages), direct exchange (latency).
        let seconds = match kind {
            CollectiveKind::AllReduce => {
                let ring = 2.0 * share + 2.0 * (n - 1.0) * latency;
                let doubling = doublings * (whole + latency);
                let direct = (n - 1.0) * whole + latency;
                ring.min(doubling).min(direct)
            }
            CollectiveKind::AllGather
            | CollectiveKind::ReduceScatter
            | CollectiveKind::AllToAll
            | CollectiveKind::AllToAllV => {
                let ring = share + (n - 1.0) * latency;
                let doubling = match kind {
                    CollectiveKind::AllToAll | CollectiveKind::AllToAllV => {
                        doublings * (whole / 2.0 + latency)
                    }
                    _ => share + doublings * latency,
                };
                let direct = share + latency;
                ring.min(doubling).min(direct)
            }
            CollectiveKind::Broadcast => {
                (doublings * (whole + latency)).min(2.0 * share + (n - 1.0) * latency)
            }
            CollectiveKind::Send | CollectiveKind::Recv => whole + latency,
        };
        self.cost(&[(Bound::Link, seconds)], 0, bytes)
    }

    fn host_issue(&self) -> u64 {
        self.host_issue
    }

    fn host_sync(&self) -> u64 {
        self.host_sync
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use hal::op::{BlockGrid, Linear};

    fn gemm(m: usize, n: usize, k: usize) -> Op<TensorDesc> {
        let d = |dtype, shape: &[usize]| TensorDesc::new(dtype, shape);
        Linear {
            x: d(DType::F8E4M3, &[m, k]),
            x_scales: Some(d(DType::F32, &[m, k.div_ceil(128)])),
            w: d(DType::F8E4M3, &[n, k]),
            w_scales: Some(d(DType::F32, &[n.div_ceil(128), k.div_ceil(128)])),
            out: d(DType::Bf16, &[m, n]),
            grid: BlockGrid::default(),
        }
        .into()
    }

    #[test]
    fn roofline_bounds_deepgemm_from_below() {
        // DeepGEMM on H800 (README, April 2025): a roofline is a floor, so measured is slower, but
        // not by more than the distance that real kernels keep.
        let model = Roofline::new(&Machine::named("h800").unwrap());
        for (m, n, k, tflops) in
            [(64, 7168, 16384, 336.0), (4096, 7168, 16384, 1520.0), (4096, 2112, 7168, 1127.0)]
        {
            let cost = model.op(&gemm(m, n, k), None);
            let measured = 2.0 * (m * n * k) as f64 / (tflops * 1e12) * 1e12;
            let ratio = measured / cost.picos as f64;
            assert!((1.0..1.6).contains(&ratio), "{m}x{n}x{k}: measured/floor {ratio}");
        }
        assert_eq!(model.op(&gemm(64, 7168, 16384), None).bound, Bound::Memory);
        assert_eq!(model.op(&gemm(4096, 7168, 16384), None).bound, Bound::Matrix);
        assert_eq!(model.op(&gemm(1, 128, 128), None).bound, Bound::Launch);
    }

    #[test]
    fn large_all_reduce_is_a_ring_and_small_is_latency() {
        let machine = Machine::named("va16").unwrap();
        let (model, topology) = (Roofline::new(&machine), machine.topology());
        let ranks: Vec<_> = (0..32).map(DeviceId).collect();
        let time = |bytes| {
            let what = Exchanged { kind: CollectiveKind::AllReduce, bytes, rows: 0 };
            model.collective(&what, &ranks, &topology).picos - model.launch
        };
        let link = topology.widest(&ranks).unwrap();
        let ring_floor = 2.0 * 31.0 / 32.0 * 1e9 / link.bytes_per_second * 1e12;
        let ratio = time(1_000_000_000) as f64 / ring_floor;
        assert!((1.0..1.01).contains(&ratio), "{ratio}");
        assert!(time(16) < 6 * link.latency_ps, "tiny messages do not go round a ring");
    }
}

//! The time model of kernels: how ops map to the cores of the machine file.
//!
//! An op becomes a [`Program`]: tiles with loads, compute and stores, on cores that overlap them by
//! staging. A program's time comes from a closed form that counts equal tiles once
//! ([`Detail::Folded`]) or from playing every tile ([`Detail::Tiles`]); tests hold the two together.
//! Which tiles, the kernel library decides, as the machine file describes it.

mod attention;
mod cache;
mod die;
mod event;
mod gemm;
mod program;
mod rowwise;

pub use gemm::Layout;

use super::{Cost, CostModel, Exchanged, Path, Roofline, network::Network};
use crate::machine::{Machine, picos};
use crate::timeline::{Resource, Shares};
use attention::{Decode, Prefill};
use cache::Cache;
use die::DieFigures;
use gemm::Product;
use hal::op::{self, Routing, Work};
use hal::trace::Bound;
use hal::{DeviceId, Op, TensorDesc, Topology};
use program::{Limit, Program};

/// How closely a program is looked at.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Detail {
    /// Equal tiles counted once.
    #[default]
    Folded,
    /// Tile by tile.
    Tiles,
}

/// The default time model. See the module.
#[derive(Debug)]
pub struct TileModel {
    die: DieFigures,
    floor: Roofline,
    network: Network,
    launch: u64,
    detail: Detail,
    cache: Cache,
}

/// What a kernel costs, and why.
#[derive(Clone, Debug, PartialEq)]
pub struct Explained {
    /// Picoseconds of the kernel itself, as a profiler shows it: without the gap before it.
    pub kernel_picos: u64,
    /// Picoseconds between it and the command before: part of a command's cost in a stream.
    pub gap_picos: u64,
    /// Picoseconds that operations and bytes need at least.
    pub floor_picos: u64,
    /// Operations and bytes.
    pub work: Work,
    /// What decides.
    pub bound: Bound,
    /// How the kernel library cuts it up.
    pub mapping: String,
    /// What it uses of its die while it runs, the gap included.
    pub shares: Shares,
}

impl TileModel {
    /// The model of a machine.
    pub fn new(machine: &Machine) -> Self {
        Self::with_detail(machine, Detail::Folded)
    }

    /// The model of a machine, tile by tile if wanted.
    pub fn with_detail(machine: &Machine, detail: Detail) -> Self {
        TileModel {
            die: DieFigures::new(machine),
            floor: Roofline::new(machine),
            network: Network::new(machine),
            launch: picos(machine.launch.device_us.value),
            detail,
            cache: Cache::default(),
        }
    }

    /// What bounds every time from below.
    pub fn floor(&self) -> &Roofline {
        &self.floor
    }

    /// Collectives and expert exchanges.
    pub fn network(&self) -> &Network {
        &self.network
    }

    /// An op's time, and where it comes from. `layout` says how a grouped op's rows lie; without
    /// it, the faster of the two is taken.
    pub fn explain(
        &self,
        op: &Op<TensorDesc>,
        routing: Option<Routing>,
        layout: Option<Layout>,
    ) -> Explained {
        let work = op::work(op, routing);
        let (mapping, program) = self.program(op, &work, routing, layout);
        let seconds = self.seconds(&program);
        Explained {
            shares: self.shares(&program, &work, seconds),
            kernel_picos: (seconds * 1e12).ceil() as u64,
            gap_picos: self.launch,
            floor_picos: self.floor.work_picos(&work),
            bound: match program.limit() {
                Limit::Startup => Bound::Launch,
                Limit::Compute if work.matrix_dtype.is_some() => Bound::Matrix,
                Limit::Compute => Bound::Vector,
                Limit::Memory => Bound::Memory,
                // Caches and ports feed the matrix units or pass memory on: what they serve.
                Limit::Cache | Limit::Port => self.floor.scarcest(&work),
            },
            work,
            mapping,
        }
    }

    fn seconds(&self, program: &Program) -> f64 {
        match self.detail {
            Detail::Folded => program.folded(),
            Detail::Tiles => event::seconds(program),
        }
    }

    /// What a program that takes so many seconds uses of its die.
    ///
    /// Its part of the cores is told by what it loses with those that communication takes: a kernel
    /// that memory bounds does as well with fewer, one that fills all cores does not.
    fn shares(&self, program: &Program, work: &Work, seconds: f64) -> Shares {
        let gap = self.launch as f64 * 1e-12;
        let rates = &self.die.stream_rates;
        let memory = work.read_bytes as f64 / rates.load + work.write_bytes as f64 / rates.store;
        let cores = self.die.cores as f64;
        let left = self.die.cores - self.die.communication_cores;
        let with_fewer = match left == self.die.cores || left == 0 {
            true => seconds,
            false => self.seconds(&Program { cores: program.cores.min(left), ..program.clone() }),
        };
        let compute = left as f64 / cores * (gap + with_fewer) / (gap + seconds);
        // No more than the cores that have tiles.
        let compute = compute.min(program.tiles() as f64 / cores);
        Shares::NONE
            .with(Resource::Compute, compute)
            .with(Resource::Memory, memory / (gap + seconds))
    }

    fn program(
        &self,
        op: &Op<TensorDesc>,
        work: &Work,
        routing: Option<Routing>,
        layout: Option<Layout>,
    ) -> (String, Program) {
        let found = match op {
            Op::MlaDecode(o) => {
                let sequences = o.kv_lens.elements() as u64;
                let (tokens, heads) = (o.q_latent.dim(0) as u64, o.q_latent.dim(1) as u64);
                attention::decode(
                    &self.die,
                    &Decode {
                        sequences,
                        rows: (tokens * heads).div_ceil(sequences.max(1)),
                        keys: o.work.keys,
                        width: o.cache.last_dim() as u64,
                        rank: o.q_latent.last_dim() as u64,
                        dtype: o.q_latent.dtype(),
                        cache_size: o.cache.dtype().size() as u64,
                        reads: work.read_bytes as f64,
                        writes: work.write_bytes as f64,
                    },
                )
            }
            Op::MlaPrefill(o) => attention::prefill(
                &self.die,
                &Prefill {
                    tokens: o.q.dim(0) as u64,
                    keys: o.kv.dim(0) as u64,
                    pairs: o.work.pairs,
                    heads: o.q.dim(1) as u64,
                    key: o.q.last_dim() as u64,
                    value: o.out.last_dim() as u64,
                    dtype: o.q.dtype(),
                    reads: work.read_bytes as f64,
                    writes: work.write_bytes as f64,
                },
            ),
            _ => self.product(op, work, routing, layout),
        };
        found.unwrap_or_else(|| rowwise::rowwise(&self.die, op, work))
    }

    /// The program of a matrix product, or [`None`] for other ops.
    fn product(
        &self,
        op: &Op<TensorDesc>,
        work: &Work,
        routing: Option<Routing>,
        layout: Option<Layout>,
    ) -> Option<(String, Program)> {
        let product = |layout, groups, m, n, k, x: &TensorDesc, out: &TensorDesc| Product {
            layout,
            groups,
            m,
            n,
            k,
            dtype: x.dtype(),
            out_size: out.dtype().size() as u64,
            reads: work.read_bytes as f64,
            writes: work.write_bytes as f64,
        };
        let chosen = match op {
            Op::Linear(o) => {
                let (n, k) = (o.w.dim(0) as u64, o.w.dim(1) as u64);
                let m = o.x.rows() as u64;
                gemm::choose(&self.die, &product(Layout::Dense, 1, m, n, k, &o.x, &o.out))
            }
            Op::BatchedLinear(o) => {
                let (n, k) = (o.out.last_dim() as u64, o.x.last_dim() as u64);
                let (heads, m) = (o.w.dim(0) as u64, o.x.dim(0) as u64);
                gemm::choose(&self.die, &product(Layout::Masked, heads, m, n, k, &o.x, &o.out))
            }
            Op::GroupedLinear(o) => {
                let routing = routing.unwrap_or(o.routing);
                let experts = (o.w.dim(0) as u64).max(1);
                let groups = u64::from(routing.active_experts).clamp(1, experts);
                let m = u64::from(routing.rows).div_ceil(groups);
                let (n, k) = (o.w.dim(1) as u64, o.w.dim(2) as u64);
                let one = |layout| {
                    gemm::choose(&self.die, &product(layout, groups, m, n, k, &o.x, &o.out))
                };
                match layout {
                    Some(layout) => one(layout),
                    None => {
                        let (a, b) = (one(Layout::Masked), one(Layout::Contiguous));
                        match (a, b) {
                            (Some(a), Some(b)) => {
                                Some(if b.1.seconds() < a.1.seconds() { b } else { a })
                            }
                            (a, b) => a.or(b),
                        }
                    }
                }
            }
            _ => None,
        };
        chosen.map(|(mapping, program)| (mapping.to_string(), program))
    }
}

impl CostModel for TileModel {
    fn op(&self, op: &Op<TensorDesc>, routing: Option<Routing>) -> Cost {
        self.cache.get(op, routing, || {
            let told = self.explain(op, routing, None);
            Cost {
                picos: told.gap_picos + told.kernel_picos,
                operations: told.work.matrix_ops + told.work.vector_ops,
                bytes: told.work.bytes(),
                bound: told.bound,
                shares: told.shares,
            }
        })
    }

    fn transfer(&self, bytes: u64, path: Path, topology: &Topology) -> Cost {
        self.floor.transfer(bytes, path, topology)
    }

    fn fill(&self, bytes: u64) -> Cost {
        self.floor.fill(bytes)
    }

    fn collective(&self, what: &Exchanged, ranks: &[DeviceId], topology: &Topology) -> Cost {
        let told = self.network.collective(what, ranks, topology);
        let (picos, bytes) = (self.launch + told.picos, what.bytes);
        Cost { picos, operations: 0, bytes, bound: told.bound, shares: told.shares }
    }

    fn host_issue(&self) -> u64 {
        self.floor.host_issue()
    }

    fn host_sync(&self) -> u64 {
        self.floor.host_sync()
    }
}

#[cfg(test)]
mod tests;

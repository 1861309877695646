//! How long commands take. Knows shapes and the machine, never values' storage.
//!
//! The functional kernels and the time model meet in one place only: a [`CostModel`] is asked about
//! an op's descriptors, and about the routing that the kernels found where they ran.

pub mod network;
pub mod question;
mod roofline;
mod tile;
pub mod validation;

pub use network::Network;
pub use roofline::Roofline;
pub use tile::{Detail, Explained, Layout, TileModel};

use hal::op::Routing;
use hal::trace::Bound;
use hal::{CollectiveKind, DeviceId, Op, TensorDesc, Topology};

/// What a command costs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Cost {
    /// Device time in picoseconds, launch included.
    pub picos: u64,
    /// Operations done.
    pub operations: u64,
    /// Bytes moved in device memory or over links.
    pub bytes: u64,
    /// What decides.
    pub bound: Bound,
}

impl Cost {
    /// A command that only marks a place in its stream.
    pub const NOTHING: Cost = Cost { picos: 0, operations: 0, bytes: 0, bound: Bound::Unknown };
}

/// Where a transfer goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Path {
    /// Inside a die's memory.
    Local,
    /// Between a die and its host.
    Host,
    /// Between two dies.
    Peer(DeviceId, DeviceId),
}

/// A machine's time model. A pure function of its arguments, in integer picoseconds.
pub trait CostModel: Send + Sync + std::fmt::Debug {
    /// An op. `routing` is what a grouped op's rows turned out to be, where values exist.
    fn op(&self, op: &Op<TensorDesc>, routing: Option<Routing>) -> Cost;

    /// A copy of `bytes`.
    fn transfer(&self, bytes: u64, path: Path, topology: &Topology) -> Cost;

    /// Setting `bytes`.
    fn fill(&self, bytes: u64) -> Cost;

    /// A collective in which the rank with the most to do sends or receives `bytes`: the reduced
    /// or broadcast tensor, the gathered or scattered whole, or all that one rank sends.
    fn collective(
        &self,
        kind: CollectiveKind,
        bytes: u64,
        ranks: &[DeviceId],
        topology: &Topology,
    ) -> Cost;

    /// Picoseconds of host time to issue a command.
    fn host_issue(&self) -> u64;

    /// Picoseconds from a command's end until the host knows.
    fn host_sync(&self) -> u64;
}

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

use crate::timeline::Shares;
use hal::op::Routing;
use hal::trace::{Bound, CommandKind, Span};
use hal::{Clock, Collective, CollectiveKind, DeviceId, Label, Op, StreamId, TensorDesc, Topology};

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
    /// What it uses of its die while it runs.
    pub shares: Shares,
}

/// What a rank brings to a collective: of all ranks, the one with the most.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Exchanged {
    /// The kind.
    pub kind: CollectiveKind,
    /// The reduced or broadcast tensor, the gathered or scattered whole, or all that one rank sends
    /// or receives.
    pub bytes: u64,
    /// Rows that it sends or receives, where rows go to ranks by values in memory.
    pub rows: u64,
}

impl Exchanged {
    /// A rank's part of a collective, before values tell: rows are as many as are expected.
    pub fn of(collective: &Collective<TensorDesc>, rank: usize) -> Self {
        let kind = collective.kind();
        let (send, recv) = collective.tensors(rank);
        let bytes = |desc: Option<&TensorDesc>| desc.map_or(0, TensorDesc::bytes);
        match collective {
            Collective::AllToAllV { send, expected_rows, .. } => {
                let row = (send.dim(1) * send.dtype().size()) as u64;
                let rows = u64::from(*expected_rows);
                Exchanged { kind, bytes: rows * row, rows }
            }
            _ => Exchanged { kind, bytes: bytes(send).max(bytes(recv)), rows: 0 },
        }
    }
}

impl Cost {
    /// A command that only marks a place in its stream.
    pub const NOTHING: Cost =
        Cost { picos: 0, operations: 0, bytes: 0, bound: Bound::Unknown, shares: Shares::NONE };

    /// What a trace says of a command at this cost, before it has times.
    pub fn span(&self, stream: StreamId, sequence: u64, kind: CommandKind, label: Label) -> Span {
        Span {
            stream,
            sequence,
            kind,
            label,
            clock: Clock::Simulated,
            ready: 0,
            start: 0,
            end: 0,
            operations: self.operations,
            bytes: self.bytes,
            bound: self.bound,
            waited_for: None,
        }
    }
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

    /// A collective.
    fn collective(&self, what: &Exchanged, ranks: &[DeviceId], topology: &Topology) -> Cost;

    /// Picoseconds of host time to issue a command.
    fn host_issue(&self) -> u64;

    /// Picoseconds from a command's end until the host knows.
    fn host_sync(&self) -> u64;
}

impl dyn CostModel {
    /// A batch of collectives: those of one kind travel together.
    pub fn batch(
        &self,
        batch: impl IntoIterator<Item = Exchanged>,
        ranks: &[DeviceId],
        topology: &Topology,
    ) -> Cost {
        let mut together: Vec<Exchanged> = Vec::new();
        for part in batch {
            match together.iter_mut().find(|known| known.kind == part.kind) {
                Some(known) => {
                    known.bytes += part.bytes;
                    known.rows = known.rows.max(part.rows);
                }
                None => together.push(part),
            }
        }
        let costs = together.iter().map(|part| self.collective(part, ranks, topology));
        costs
            .reduce(|a, b| Cost {
                picos: a.picos + b.picos,
                operations: a.operations + b.operations,
                bytes: a.bytes + b.bytes,
                ..if a.picos < b.picos { b } else { a }
            })
            .unwrap_or(Cost::NOTHING)
    }
}

//! What each rank brings to a collective, and whether all mean the same.

use crate::cost::Exchanged;
use crate::memory::SimTensor;
use hal::{Collective, CollectiveKind, DType, PeerCounts, Reduction};
use std::sync::Arc;

/// One rank's part of one collective.
#[derive(Debug)]
pub(crate) struct Part {
    pub(crate) kind: CollectiveKind,
    pub(crate) shape: Shape,
    pub(crate) send: Option<SimTensor>,
    pub(crate) recv: Option<SimTensor>,
    /// Read, where the rows to send are cut by values.
    pub(crate) send_offsets: Option<SimTensor>,
    /// Written, where asked for.
    pub(crate) recv_offsets: Option<SimTensor>,
    /// Rows that a rank is expected to send, where values would tell.
    expected_rows: u32,
}

/// What a collective needs to know besides its tensors.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Shape {
    Reduce(Reduction),
    Gather,
    Scatter(Reduction),
    Exchange(Option<Arc<PeerCounts>>),
    ExchangeRows { width: usize },
    Broadcast { root: usize },
    Send { peer: usize },
    Receive { peer: usize },
}

impl Part {
    /// The part of a collective that [`hal::collective::check`] has passed.
    pub(crate) fn new(collective: &Collective<SimTensor>, rank: usize) -> Part {
        let (mut send_offsets, mut recv_offsets, mut expected_rows) = (None, None, 0);
        let shape = match collective {
            Collective::AllReduce { reduction, .. } => Shape::Reduce(*reduction),
            Collective::AllGather { .. } => Shape::Gather,
            Collective::ReduceScatter { reduction, .. } => Shape::Scatter(*reduction),
            Collective::AllToAll { counts, .. } => Shape::Exchange(counts.clone()),
            Collective::AllToAllV {
                send,
                send_offsets: from,
                recv_offsets: to,
                expected_rows: rows,
                ..
            } => {
                (send_offsets, recv_offsets, expected_rows) =
                    (Some(from.clone()), to.clone(), *rows);
                Shape::ExchangeRows { width: send.desc.dim(1) }
            }
            Collective::Broadcast { root, .. } => Shape::Broadcast { root: *root },
            Collective::Send { peer, .. } => Shape::Send { peer: *peer },
            Collective::Recv { peer, .. } => Shape::Receive { peer: *peer },
        };
        let (send, recv) = collective.tensors(rank);
        Part {
            kind: collective.kind(),
            shape,
            send: send.cloned(),
            recv: recv.cloned(),
            send_offsets,
            recv_offsets,
            expected_rows,
        }
    }

    pub(crate) fn is_peer_to_peer(&self) -> bool {
        matches!(self.shape, Shape::Send { .. } | Shape::Receive { .. })
    }

    pub(crate) fn dtype(&self) -> DType {
        let tensor = self.send.as_ref().or(self.recv.as_ref());
        tensor.map_or(DType::U8, |t| t.desc.dtype())
    }

    /// The bytes that decide its cost: the larger of its two tensors, or of what is sent and
    /// received, or expected to be.
    pub(crate) fn bytes(&self) -> u64 {
        let of = |t: &Option<SimTensor>| t.as_ref().map_or(0, |t| t.desc.bytes());
        match &self.shape {
            Shape::Exchange(Some(counts)) => {
                let elements = counts.send.iter().sum::<usize>().max(counts.recv.iter().sum());
                (elements * self.dtype().size()) as u64
            }
            Shape::ExchangeRows { width } => {
                u64::from(self.expected_rows) * (width * self.dtype().size()) as u64
            }
            _ => of(&self.send).max(of(&self.recv)),
        }
    }
}

impl Part {
    /// What the cost model needs to know, where so many bytes are sent or received at most.
    pub(crate) fn exchanged(&self, bytes: u64) -> Exchanged {
        let rows = match &self.shape {
            Shape::ExchangeRows { width } => bytes / ((width * self.dtype().size()) as u64).max(1),
            _ => 0,
        };
        Exchanged { kind: self.kind, bytes, rows }
    }
}

/// Checks that all ranks mean the same thing.
pub(crate) fn check(ranks: &[&[Part]]) -> Result<(), String> {
    let first = ranks[0];
    for (r, parts) in ranks.iter().enumerate() {
        if parts.len() != first.len() {
            return Err(format!(
                "rank 0 submitted {} collectives and rank {r} {}",
                first.len(),
                parts.len()
            ));
        }
        for (i, (mine, theirs)) in parts.iter().zip(first).enumerate() {
            let same_shape = match (&mine.shape, &theirs.shape) {
                (Shape::Exchange(_), Shape::Exchange(_)) => true,
                (a, b) => a == b,
            };
            let elements =
                |p: &Part| p.send.as_ref().or(p.recv.as_ref()).map(|t| t.desc.elements());
            let same_size = matches!(mine.shape, Shape::Exchange(_) | Shape::ExchangeRows { .. })
                || elements(mine) == elements(theirs);
            if mine.kind != theirs.kind
                || !same_shape
                || !same_size
                || mine.dtype() != theirs.dtype()
            {
                let tell = |p: &Part| {
                    format!(
                        "{} of {:?} {} ({:?})",
                        p.kind.name(),
                        elements(p).unwrap_or(0),
                        p.dtype(),
                        p.shape
                    )
                };
                return Err(format!(
                    "number {i} is {} on rank 0 and {} on rank {r}",
                    tell(theirs),
                    tell(mine)
                ));
            }
        }
    }
    for i in 0..first.len() {
        check_counts(ranks, i)?;
    }
    Ok(())
}

/// What rank `a` sends to `b` is what `b` expects from `a`.
fn check_counts(ranks: &[&[Part]], i: usize) -> Result<(), String> {
    let size = ranks.len();
    let counts = |r: usize| match &ranks[r][i].shape {
        Shape::Exchange(Some(counts)) => Some(counts.clone()),
        Shape::Exchange(None) => {
            let each = ranks[r][i].send.as_ref().map_or(0, |t| t.desc.elements()) / size;
            Some(Arc::new(PeerCounts { send: vec![each; size], recv: vec![each; size] }))
        }
        _ => None,
    };
    let Some(all) = (0..size).map(counts).collect::<Option<Vec<_>>>() else { return Ok(()) };
    for (a, mine) in all.iter().enumerate() {
        for (b, theirs) in all.iter().enumerate() {
            if mine.send[b] != theirs.recv[a] {
                return Err(format!(
                    "rank {a} sends {} elements to rank {b}, which expects {}",
                    mine.send[b], theirs.recv[a]
                ));
            }
        }
    }
    Ok(())
}

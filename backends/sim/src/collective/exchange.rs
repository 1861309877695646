//! The data movement of group collectives, in rank order, so that sums are the same in every run.

use super::span;
use crate::memory::{BorrowError, Guards, SimTensor, Slot};
use hal::op::Access;
use hal::{Collective, CollectiveKind, DType, PeerCounts, Reduction};
use half::bf16;
use std::sync::Arc;

/// One rank's part of one collective.
#[derive(Debug)]
pub(crate) struct Part {
    pub(crate) kind: CollectiveKind,
    pub(crate) shape: Shape,
    pub(crate) send: Option<SimTensor>,
    pub(crate) recv: Option<SimTensor>,
}

/// What a collective needs to know besides its tensors.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Shape {
    Reduce(Reduction),
    Gather,
    Scatter(Reduction),
    Exchange(Option<Arc<PeerCounts>>),
    Broadcast { root: usize },
    Send { peer: usize },
    Receive { peer: usize },
}

impl Part {
    /// The part of a collective that [`hal::collective::check`] has passed.
    pub(crate) fn new(
        collective: &Collective,
        send: Option<SimTensor>,
        recv: Option<SimTensor>,
    ) -> Part {
        let shape = match collective {
            Collective::AllReduce { reduction, .. } => Shape::Reduce(*reduction),
            Collective::AllGather { .. } => Shape::Gather,
            Collective::ReduceScatter { reduction, .. } => Shape::Scatter(*reduction),
            Collective::AllToAll { counts, .. } => Shape::Exchange(counts.clone()),
            Collective::Broadcast { root, .. } => Shape::Broadcast { root: *root },
            Collective::Send { peer, .. } => Shape::Send { peer: *peer },
            Collective::Recv { peer, .. } => Shape::Receive { peer: *peer },
        };
        Part { kind: collective.kind(), shape, send, recv }
    }

    pub(crate) fn is_peer_to_peer(&self) -> bool {
        matches!(self.shape, Shape::Send { .. } | Shape::Receive { .. })
    }

    fn dtype(&self) -> DType {
        let tensor = self.send.as_ref().or(self.recv.as_ref());
        tensor.map_or(DType::U8, |t| t.desc.dtype())
    }

    /// The bytes that decide its cost: the larger of its two tensors.
    pub(crate) fn bytes(&self) -> u64 {
        let of = |t: &Option<SimTensor>| t.as_ref().map_or(0, |t| t.desc.bytes());
        match &self.shape {
            Shape::Exchange(Some(counts)) => {
                let elements = counts.send.iter().sum::<usize>().max(counts.recv.iter().sum());
                (elements * self.dtype().size()) as u64
            }
            _ => of(&self.send).max(of(&self.recv)),
        }
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
            let same_size =
                matches!(mine.shape, Shape::Exchange(_)) || elements(mine) == elements(theirs);
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

/// Moves the data of every collective of the batch.
pub(crate) fn run(ranks: &[&[Part]]) -> Result<(), BorrowError> {
    // All destinations are free, or nothing is written: a busy buffer means that the whole batch
    // is tried again.
    let writes: Vec<_> =
        ranks.iter().flat_map(|p| p.iter()).filter_map(|p| p.recv.as_ref()).collect();
    let spans: Vec<_> = writes.iter().map(|t| span(t, Access::Write)).collect();
    drop(Guards::lock(&spans)?);
    for i in 0..ranks[0].len() {
        let parts: Vec<&Part> = ranks.iter().map(|p| &p[i]).collect();
        let inputs = parts.iter().map(|p| read(p)).collect::<Result<Vec<_>, _>>()?;
        for (rank, part) in parts.iter().enumerate() {
            if let Some(recv) = &part.recv {
                write(recv, &output(&parts, &inputs, rank))?;
            }
        }
    }
    Ok(())
}

fn read(part: &Part) -> Result<Vec<u8>, BorrowError> {
    let Some(send) = &part.send else { return Ok(Vec::new()) };
    let bytes = send.memory.try_read(send.offset, send.desc.extent(), <[u8]>::to_vec);
    bytes.ok_or(BorrowError::Busy)
}

fn write(recv: &SimTensor, bytes: &[u8]) -> Result<(), BorrowError> {
    let spans = [span(recv, Access::Write)];
    let mut guards = Guards::lock(&spans)?;
    if let [Slot::Write(to)] = guards.carve(&spans)?.as_mut_slice() {
        let len = bytes.len().min(to.len());
        to[..len].copy_from_slice(&bytes[..len]);
    }
    Ok(())
}

/// What `rank` receives.
fn output(parts: &[&Part], inputs: &[Vec<u8>], rank: usize) -> Vec<u8> {
    let dtype = parts[rank].dtype();
    let size = parts.len();
    match &parts[rank].shape {
        Shape::Reduce(reduction) => {
            let all: Vec<&[u8]> = inputs.iter().map(Vec::as_slice).collect();
            reduce(&all, dtype, *reduction)
        }
        Shape::Scatter(reduction) => {
            let each = inputs[0].len() / size;
            let slices: Vec<&[u8]> =
                inputs.iter().map(|input| &input[rank * each..(rank + 1) * each]).collect();
            reduce(&slices, dtype, *reduction)
        }
        Shape::Gather => inputs.concat(),
        Shape::Broadcast { root } => inputs[*root].clone(),
        Shape::Exchange(_) => {
            let mut out = Vec::new();
            for (part, input) in parts.iter().zip(inputs) {
                let (start, len) = match &part.shape {
                    Shape::Exchange(Some(c)) => {
                        (c.send[..rank].iter().sum::<usize>(), c.send[rank])
                    }
                    _ => {
                        let each = input.len() / dtype.size() / size;
                        (rank * each, each)
                    }
                };
                out.extend_from_slice(&input[start * dtype.size()..(start + len) * dtype.size()]);
            }
            out
        }
        Shape::Send { .. } | Shape::Receive { .. } => Vec::new(),
    }
}

/// Combines in ascending rank order, in FP32 (or in wrapping integers), and rounds once.
fn reduce(inputs: &[&[u8]], dtype: DType, reduction: Reduction) -> Vec<u8> {
    match dtype {
        DType::F32 => fold(inputs, reduction, f32::from_le_bytes, f32::to_le_bytes),
        DType::Bf16 => fold(
            inputs,
            reduction,
            |b| bf16::from_le_bytes(b).to_f32(),
            |v| bf16::from_f32(v).to_le_bytes(),
        ),
        _ => {
            let combine = |a: i32, b: i32| match reduction {
                Reduction::Sum => a.wrapping_add(b),
                Reduction::Max => a.max(b),
                Reduction::Min => a.min(b),
            };
            fold_with(inputs, combine, i32::from_le_bytes, i32::to_le_bytes)
        }
    }
}

fn fold<const N: usize>(
    inputs: &[&[u8]],
    reduction: Reduction,
    decode: impl Fn([u8; N]) -> f32,
    encode: impl Fn(f32) -> [u8; N],
) -> Vec<u8> {
    let combine = |a: f32, b: f32| match reduction {
        Reduction::Sum => a + b,
        // NaN wins, as it would in a sum.
        Reduction::Max if a.is_nan() || a > b => a,
        Reduction::Min if a.is_nan() || a < b => a,
        Reduction::Max | Reduction::Min => b,
    };
    fold_with(inputs, combine, decode, encode)
}

fn fold_with<const N: usize, T>(
    inputs: &[&[u8]],
    combine: impl Fn(T, T) -> T,
    decode: impl Fn([u8; N]) -> T,
    encode: impl Fn(T) -> [u8; N],
) -> Vec<u8> {
    let mut out = Vec::with_capacity(inputs[0].len());
    for at in 0..inputs[0].len() / N {
        let element = |input: &[u8]| decode(std::array::from_fn(|i| input[at * N + i]));
        let (first, rest) = (element(inputs[0]), &inputs[1..]);
        out.extend_from_slice(&encode(rest.iter().map(|i| element(i)).fold(first, &combine)));
    }
    out
}

//! The data movement of group collectives.

use super::exchange::{Part, Shape};
use super::reduce::reduce;
use crate::memory::{BorrowError, Buffers, SimTensor};
use hal::Operand;
use std::ops::Range;

/// Why a batch is not carried out.
#[derive(Debug)]
pub(crate) enum Obstacle {
    /// Another command holds part of the memory: try again.
    Busy,
    /// Values of this rank make it impossible.
    Data(usize, String),
}

/// Moves the data of every collective of the batch, and says for each the bytes that the rank with
/// the most to do sends or receives.
///
/// All memory is locked from the first read to the last write: a batch that is tried again has
/// changed nothing, and works in place on what it expects.
pub(crate) fn run(ranks: &[&[Part]]) -> Result<Vec<u64>, Obstacle> {
    let parts = || ranks.iter().flat_map(|parts| parts.iter());
    let reads = parts().flat_map(|p| p.send.iter().chain(&p.send_offsets)).map(|t| (t, false));
    let writes = parts().flat_map(|p| p.recv.iter().chain(&p.recv_offsets)).map(|t| (t, true));
    let wanted = reads.chain(writes).map(|(t, written)| (&*t.memory, written)).collect();
    let mut memory = Buffers::lock(wanted).map_err(|_: BorrowError| Obstacle::Busy)?;
    (0..ranks[0].len())
        .map(|i| one(&mut memory, &ranks.iter().map(|parts| &parts[i]).collect::<Vec<_>>()))
        .collect()
}

/// What every rank gets: one result for all, or one for each.
enum Results {
    Same(Vec<u8>),
    Each(Vec<Vec<u8>>),
}

fn one(memory: &mut Buffers<'_>, parts: &[&Part]) -> Result<u64, Obstacle> {
    let dtype = parts[0].dtype();
    let inputs: Vec<&[u8]> =
        parts.iter().map(|p| p.send.as_ref().map_or(&[][..], |t| memory.read(t))).collect();
    let mut bytes = parts.iter().map(|p| p.bytes()).max().unwrap_or(0);
    let mut starts = Vec::new();
    let results = match &parts[0].shape {
        Shape::Reduce(reduction) => Results::Same(reduce(&inputs, dtype, *reduction)),
        Shape::Scatter(reduction) => {
            let each = inputs[0].len() / parts.len();
            let of = |rank: usize| {
                let part = rank * each..(rank + 1) * each;
                let slices: Vec<&[u8]> = inputs.iter().map(|i| &i[part.clone()]).collect();
                reduce(&slices, dtype, *reduction)
            };
            Results::Each((0..parts.len()).map(of).collect())
        }
        Shape::Gather => Results::Same(inputs.concat()),
        Shape::Broadcast { root } => Results::Same(inputs[*root].to_vec()),
        Shape::Exchange(_) => {
            let ranges: Vec<Vec<Range<usize>>> =
                parts.iter().zip(&inputs).map(|(p, input)| peers(p, input, parts.len())).collect();
            Results::Each(exchange(&inputs, &ranges))
        }
        Shape::ExchangeRows { .. } => {
            let ranges = (0..parts.len())
                .map(|r| sent(memory, parts[r], parts.len()).map_err(|e| Obstacle::Data(r, e)))
                .collect::<Result<Vec<_>, _>>()?;
            let out = |rank: usize| -> usize { ranges[rank].iter().map(Range::len).sum() };
            let into = |rank: usize| -> usize { ranges.iter().map(|r| r[rank].len()).sum() };
            let most = (0..parts.len()).map(|rank| out(rank).max(into(rank))).max();
            bytes = most.unwrap_or(0) as u64;
            starts = received(parts, &ranges)?;
            Results::Each(exchange(&inputs, &ranges))
        }
        Shape::Send { .. } | Shape::Receive { .. } => return Ok(bytes),
    };
    for (rank, part) in parts.iter().enumerate() {
        let from = match &results {
            Results::Same(bytes) => bytes,
            Results::Each(all) => &all[rank],
        };
        if let Some(recv) = &part.recv {
            let to = memory.write(recv);
            let len = from.len().min(to.len());
            to[..len].copy_from_slice(&from[..len]);
        }
        if let (Some(offsets), Some(starts)) = (&part.recv_offsets, starts.get(rank)) {
            let words = starts.iter().flat_map(|n| n.to_le_bytes());
            memory.write(offsets).iter_mut().zip(words).for_each(|(to, byte)| *to = byte);
        }
    }
    Ok(bytes)
}

/// What each rank gets of all that are cut in ranges of bytes, in rank order.
fn exchange(inputs: &[&[u8]], ranges: &[Vec<Range<usize>>]) -> Vec<Vec<u8>> {
    let for_rank = |rank: usize| {
        let slices: Vec<&[u8]> =
            inputs.iter().zip(ranges).map(|(input, ranges)| &input[ranges[rank].clone()]).collect();
        slices.concat()
    };
    (0..inputs.len()).map(for_rank).collect()
}

/// The bytes that go to each rank, by counts that the host knew.
fn peers(part: &Part, input: &[u8], size: usize) -> Vec<Range<usize>> {
    let width = part.dtype().size();
    let mut at = 0;
    let mut next = |len: usize| {
        at += len;
        at - len..at
    };
    match &part.shape {
        Shape::Exchange(Some(counts)) => counts.send.iter().map(|n| next(n * width)).collect(),
        _ => (0..size).map(|_| next(input.len() / size)).collect(),
    }
}

/// The bytes that go to each rank, by the offsets in memory.
fn sent(memory: &Buffers<'_>, part: &Part, size: usize) -> Result<Vec<Range<usize>>, String> {
    let (Some(send), Some(offsets)) = (&part.send, &part.send_offsets) else {
        return Ok(vec![0..0; size]);
    };
    let words = memory.read(offsets).as_chunks::<4>().0;
    let offsets: Vec<i32> = words.iter().map(|b| i32::from_le_bytes(*b)).collect();
    crate::kernels::check_starts("send_offsets", &offsets, send.desc.dim(0))?;
    let row = row_bytes(send);
    Ok(offsets.windows(2).map(|pair| pair[0] as usize * row..pair[1] as usize * row).collect())
}

/// Where each rank's rows begin on each rank, after checking that they fit.
fn received(parts: &[&Part], ranges: &[Vec<Range<usize>>]) -> Result<Vec<Vec<i32>>, Obstacle> {
    let on = |(rank, part): (usize, &&Part)| {
        let Some(recv) = &part.recv else { return Ok(Vec::new()) };
        let row = row_bytes(recv).max(1);
        let mut starts = vec![0];
        let mut rows = 0;
        for from in ranges {
            rows += from[rank].len() / row;
            starts.push(i32::try_from(rows).unwrap_or(i32::MAX));
        }
        let room = recv.desc.dim(0);
        match rows <= room {
            true => Ok(starts),
            false => {
                let text = format!("rank {rank} is sent {rows} rows and has room for {room}");
                Err(Obstacle::Data(rank, text))
            }
        }
    };
    parts.iter().enumerate().map(on).collect()
}

fn row_bytes(t: &SimTensor) -> usize {
    t.desc().dim(1) * t.desc().dtype().size()
}

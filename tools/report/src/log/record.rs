//! A span as bytes: 56, and up to 24 more for what it waited for.

use super::names::Names;
use hal::trace::{Span, WaitedFor};
use hal::{CommunicatorId, DeviceId, StreamId};

const NOTHING: u8 = 0;
const COMMAND: u8 = 1;
const RANKS: u8 = 2;

pub(super) fn encode(span: &Span, names: &mut Names, out: &mut Vec<u8>) {
    out.extend(names.label(&span.label).to_le_bytes());
    let tag = match span.waited_for {
        Some(WaitedFor::Command { .. }) => COMMAND,
        Some(WaitedFor::Ranks { .. }) => RANKS,
        _ => NOTHING,
    };
    out.extend([names.kind(span.kind), names.bound(span.bound), names.clock(span.clock), tag]);
    let Span { sequence, ready, start, end, operations, bytes, .. } = *span;
    for number in [sequence, ready, start, end, operations, bytes] {
        out.extend(number.to_le_bytes());
    }
    match span.waited_for {
        Some(WaitedFor::Command { stream, sequence }) => {
            out.extend(stream.device.0.to_le_bytes());
            out.extend(stream.index.to_le_bytes());
            out.extend(sequence.to_le_bytes());
        }
        Some(WaitedFor::Ranks { communicator, round }) => {
            let [high, low] = communicator.0;
            [high, low, round].iter().for_each(|number| out.extend(number.to_le_bytes()));
        }
        _ => {}
    }
}

fn four(bytes: &mut &[u8]) -> Option<u32> {
    let (number, rest) = bytes.split_first_chunk()?;
    *bytes = rest;
    Some(u32::from_le_bytes(*number))
}

fn eight(bytes: &mut &[u8]) -> Option<u64> {
    let (number, rest) = bytes.split_first_chunk()?;
    *bytes = rest;
    Some(u64::from_le_bytes(*number))
}

/// The first span of `bytes`, which it is taken from.
pub(super) fn decode(stream: StreamId, names: &Names, bytes: &mut &[u8]) -> Option<Span> {
    let label = names.label_of(four(bytes)?)?;
    let (&[kind, bound, clock, tag], rest) = bytes.split_first_chunk()?;
    *bytes = rest;
    Some(Span {
        stream,
        sequence: eight(bytes)?,
        kind: names.kind_of(kind)?,
        label,
        clock: names.clock_of(clock)?,
        ready: eight(bytes)?,
        start: eight(bytes)?,
        end: eight(bytes)?,
        operations: eight(bytes)?,
        bytes: eight(bytes)?,
        bound: names.bound_of(bound)?,
        waited_for: match tag {
            COMMAND => {
                let stream = StreamId { device: DeviceId(four(bytes)?), index: four(bytes)? };
                Some(WaitedFor::Command { stream, sequence: eight(bytes)? })
            }
            RANKS => {
                let communicator = CommunicatorId([eight(bytes)?, eight(bytes)?]);
                Some(WaitedFor::Ranks { communicator, round: eight(bytes)? })
            }
            _ => None,
        },
    })
}

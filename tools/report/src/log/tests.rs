use super::*;
use hal::trace::{Bound, CommandKind, WaitedFor};
use hal::{Clock, CollectiveKind, CommunicatorId, DeviceId, OpKind};

fn span(stream: StreamId, sequence: u64) -> Span {
    let command = WaitedFor::Command { stream, sequence };
    let ranks = WaitedFor::Ranks { communicator: CommunicatorId([sequence, 7]), round: 3 };
    Span {
        stream,
        sequence,
        kind: match sequence % 3 {
            0 => CommandKind::Op(OpKind::Linear),
            1 => CommandKind::Collective(CollectiveKind::AllReduce),
            _ => CommandKind::Wait,
        },
        label: format!("label {}", sequence % 7).into(),
        clock: Clock::Simulated,
        ready: sequence * 10,
        start: sequence * 10 + 1,
        end: sequence * 10 + 9,
        operations: sequence << 40,
        bytes: sequence << 50,
        bound: if sequence.is_multiple_of(2) { Bound::Memory } else { Bound::Link },
        waited_for: [None, Some(ranks), Some(command)][sequence as usize % 3],
    }
}

fn stream(die: u32, index: u32) -> StreamId {
    StreamId { device: DeviceId(die), index }
}

#[test]
fn what_goes_in_comes_out_by_stream_and_phase() {
    let log = SpanLog::new(&std::env::temp_dir()).unwrap();
    let (a, b) = (stream(1, 0), stream(0, 1));
    // More than a chunk, in turns, and with a gap.
    let first = 3 * CHUNK as u64 / 56;
    for sequence in 1..=first {
        log.record(&span(a, sequence));
    }
    log.next_phase();
    for sequence in first + 1..=first + 10 {
        log.record(&span(a, sequence));
        log.record(&span(b, sequence + 100));
    }
    log.next_phase();
    log.record(&span(a, first + 20));
    let recorded = log.close().unwrap();
    assert!(recorded.lanes[&a].chunks.len() > 2, "it went to disk in pieces");
    assert_eq!(recorded.streams().collect::<Vec<_>>(), [b, a]);
    assert_eq!((recorded.len(), recorded.phases()), (first + 21, 3));
    let texts = |spans: Spans<'_>| -> Vec<String> {
        spans.map(|span| format!("{:?}", span.unwrap())).collect()
    };
    let made = |stream, sequences: &[u64]| -> Vec<String> {
        sequences.iter().map(|s| format!("{:?}", span(stream, *s))).collect()
    };
    let all: Vec<u64> = (1..=first + 10).chain([first + 20]).collect();
    assert_eq!(texts(recorded.spans(a)), made(a, &all));
    let phase = |stream, n| texts(recorded.spans_of_phase(stream, n));
    assert_eq!(phase(a, 0), made(a, &all[..first as usize]));
    assert_eq!(phase(a, 1), made(a, &all[first as usize..][..10]));
    assert_eq!(phase(a, 2), made(a, &[first + 20]));
    assert!(phase(b, 0).is_empty() && phase(b, 2).is_empty() && phase(a, 3).is_empty());
    assert_eq!(phase(b, 1).len(), 10);
    let there = |sequence| recorded.contains(a, sequence);
    assert!(there(1) && there(first + 10) && there(first + 20));
    assert!(!there(0) && !there(first + 11) && !recorded.contains(b, 1));
    log.record(&span(a, 1));
    assert!(log.close().is_err(), "closed once");
}

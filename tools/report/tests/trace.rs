//! Trace files: one to the byte, and what must hold of any.

use hal::trace::{Bound, CommandKind, Span, TraceSink, WaitedFor};
use hal::{Clock, CollectiveKind, CommunicatorId, DeviceId, DiePlacement, Label, OpKind, StreamId};
use proptest::prelude::*;
use report::SpanLog;
use report::trace::{Names, write};
use serde_json::Value;
use std::collections::{BTreeMap, HashMap};

const COMPUTE: u32 = 0;
const COMMUNICATION: u32 = 1;

fn stream(die: u32, index: u32) -> StreamId {
    StreamId { device: DeviceId(die), index }
}

fn span(stream: StreamId, sequence: u64, kind: CommandKind, [ready, start, end]: [u64; 3]) -> Span {
    let bound = match kind {
        CommandKind::Op(_) => Bound::Memory,
        CommandKind::Wait => Bound::Unknown,
        _ => Bound::Link,
    };
    Span {
        stream,
        sequence,
        kind,
        label: Label::Static(kind.name()),
        clock: Clock::Simulated,
        ready,
        start,
        end,
        operations: 0,
        bytes: 0,
        bound,
        waited_for: None,
    }
}

const LINEAR: CommandKind = CommandKind::Op(OpKind::Linear);
const REDUCE: CommandKind = CommandKind::Collective(CollectiveKind::AllReduce);

fn traced(spans: &[Span], names: &Names) -> String {
    let log = SpanLog::new(&std::env::temp_dir()).unwrap();
    spans.iter().for_each(|span| log.record(span));
    let mut out = Vec::new();
    let events = write(&log.close().unwrap(), names, &mut out).unwrap();
    let text = String::from_utf8(out).unwrap();
    let parsed: Value = serde_json::from_str(&text).unwrap();
    assert_eq!(parsed["traceEvents"].as_array().unwrap().len() as u64, events);
    text
}

/// Two ranks compute, meet in an all-reduce, and go on; the second takes longer.
fn two_ranks() -> Vec<Span> {
    let id = CommunicatorId([u64::MAX, 1]);
    let rank = |die: u32, took: u64| {
        let (compute, comms) = (stream(die, COMPUTE), stream(die, COMMUNICATION));
        let mut linear = span(compute, 7, LINEAR, [1_000_000, 1_000_000, 1_000_000 + took]);
        linear.label = Label::Static("layer 4 \"q_a\"");
        (linear.operations, linear.bytes) = (3 * took / 2, took / 10);
        let mut before = span(comms, 1, CommandKind::Wait, [0, linear.end, linear.end]);
        before.waited_for = Some(WaitedFor::Command { stream: compute, sequence: 7 });
        let mut reduce = span(comms, 2, REDUCE, [linear.end, 4_000_001, 4_500_502]);
        reduce.waited_for = Some(WaitedFor::Ranks { communicator: id, round: 9 });
        reduce.bytes = 10_000;
        let mut after = span(compute, 8, CommandKind::Wait, [linear.end, reduce.end, reduce.end]);
        after.waited_for = Some(WaitedFor::Command { stream: comms, sequence: 2 });
        let next = span(compute, 9, LINEAR, [reduce.end, reduce.end, reduce.end + 250_000]);
        [linear, before, reduce, after, next]
    };
    [rank(0, 2_000_000), rank(1, 3_000_001)].concat()
}

fn two_names() -> Names {
    let placed = |die| (DeviceId(die), DiePlacement { host: 0, card: die, die_on_card: 0 });
    let named = |die| {
        let label = |index, label: &str| (stream(die, index), label.to_string());
        [label(COMPUTE, "compute"), label(COMMUNICATION, "communication")]
    };
    Names {
        dies: [0, 1].map(placed).into(),
        streams: [0, 1].into_iter().flat_map(named).collect(),
        about: vec![("machine".to_string(), "two dies".to_string())],
        ..Names::default()
    }
}

#[test]
fn a_small_trace_is_this_to_the_byte() {
    let text = traced(&two_ranks(), &two_names());
    assert_eq!(text, include_str!("golden/two_ranks.json"));
    // In whatever order streams are heard of.
    let mut shuffled = two_ranks();
    shuffled.sort_by_key(|s| (std::cmp::Reverse(s.stream), s.sequence));
    assert_eq!(traced(&shuffled, &two_names()), text);
}

#[test]
fn nothing_gives_an_empty_trace() {
    let text = traced(&[], &Names::default());
    assert!(text.contains("\"traceEvents\":[\n]"), "{text}");
}

#[test]
fn a_note_follows_the_name_of_a_die() {
    let notes = [(DeviceId(1), "for 7 more".to_string())].into();
    let text = traced(&two_ranks(), &Names { notes, ..two_names() });
    assert!(text.contains("\"die 0 (card 0, host 0)\""), "{text}");
    assert!(text.contains("\"die 1 (card 1, host 0), for 7 more\""), "{text}");
}

#[test]
fn a_wait_for_what_is_not_in_the_trace_has_no_arrow() {
    let mut wait = span(stream(0, 1), 5, CommandKind::Wait, [0, 10, 10]);
    wait.waited_for = Some(WaitedFor::Command { stream: stream(0, 0), sequence: 3 });
    let text = traced(&[wait, span(stream(0, 1), 6, LINEAR, [10, 10, 20])], &Names::default());
    assert!(!text.contains("\"ph\":\"s\"") && !text.contains("\"ph\":\"f\""), "{text}");
}

#[test]
fn the_two_sides_of_a_transfer_are_joined() {
    use CollectiveKind::{Recv, Send};
    let (a, b) = (stream(0, 0), stream(1, 0));
    let side = |kind, this, other, ready| {
        let mut span = span(this, 2, CommandKind::Collective(kind), [ready, 5000, 9000]);
        span.waited_for = Some(WaitedFor::Command { stream: other, sequence: 2 });
        span
    };
    let spans = [
        span(a, 1, LINEAR, [0, 0, 5000]),
        side(Send, a, b, 5000),
        span(b, 1, LINEAR, [0, 0, 2000]),
        side(Recv, b, a, 2000),
    ];
    let text = traced(&spans, &Names::default());
    let arrows = text.lines().filter(|line| line.contains("waited for rank"));
    let arrows: Vec<&str> = arrows.map(|line| line.trim_end_matches(',')).collect();
    let arrow = |at: usize| serde_json::from_str::<Value>(arrows[at]).unwrap();
    assert_eq!(arrows.len(), 2, "{text}");
    assert_eq!((arrow(0)["ph"].as_str(), arrow(0)["pid"].as_u64()), (Some("s"), Some(1)));
    assert_eq!((arrow(1)["ph"].as_str(), arrow(1)["pid"].as_u64()), (Some("f"), Some(2)));
}

/// Commands of two streams on each of two dies, back to back or with gaps, some of them waits for
/// what is done.
fn any_spans() -> impl Strategy<Value = Vec<Span>> {
    let command = (0..4u64, 0..5000u64, 0..3000u64, any::<prop::sample::Index>());
    prop::collection::vec((0..4u32, command), 0..60).prop_map(|commands| {
        let mut spans: Vec<Span> = Vec::new();
        let mut ends: HashMap<StreamId, (u64, u64)> = HashMap::new();
        for (at, (kind, took, gap, target)) in commands {
            let on = stream(at / 2, at % 2);
            let (sequence, ready) = ends.get(&on).copied().unwrap_or((0, 0));
            let done: Vec<Span> = spans.iter().filter(|s| s.stream != on).cloned().collect();
            let made = if kind == 0 && !done.is_empty() {
                let target = &done[target.index(done.len())];
                let at = ready.max(target.end);
                let mut wait = span(on, sequence + 1, CommandKind::Wait, [ready, at, at]);
                let Span { stream, sequence, .. } = *target;
                wait.waited_for = Some(WaitedFor::Command { stream, sequence });
                wait
            } else {
                let start = ready + gap * (kind % 2);
                let kind = if kind == 3 { REDUCE } else { LINEAR };
                let mut command = span(on, sequence + 1, kind, [start, start, start + took]);
                command.bytes = took * kind.name().len() as u64;
                command
            };
            ends.insert(on, (made.sequence, made.end));
            spans.push(made);
        }
        spans
    })
}

fn number(value: &Value) -> f64 {
    value.as_f64().unwrap()
}

proptest! {
    #[test]
    fn arrows_pair_up_and_events_of_a_thread_do_not_overlap(spans in any_spans()) {
        let parsed: Value = serde_json::from_str(&traced(&spans, &Names::default())).unwrap();
        let events = parsed["traceEvents"].as_array().unwrap();
        let phase = |name: &'static str| events.iter().filter(move |e| e["ph"] == name);
        prop_assert_eq!(phase("X").count(), spans.len());
        // Each arrow begins once and ends once, later.
        let ends: BTreeMap<u64, &Value> =
            phase("f").map(|e| (e["id"].as_u64().unwrap(), e)).collect();
        let begins: BTreeMap<u64, &Value> =
            phase("s").map(|e| (e["id"].as_u64().unwrap(), e)).collect();
        prop_assert_eq!(begins.len(), phase("s").count());
        prop_assert_eq!(ends.len(), phase("f").count());
        prop_assert!(begins.keys().eq(ends.keys()));
        for (id, begin) in &begins {
            prop_assert_eq!(&begin["name"], &ends[id]["name"]);
            prop_assert!(number(&begin["ts"]) <= number(&ends[id]["ts"]));
        }
        // Every wait has its arrow.
        let waits = spans.iter().filter(|s| s.kind == CommandKind::Wait).count();
        prop_assert_eq!(begins.len(), waits);
        // As a viewer sees it: in nanoseconds, rounded.
        let nanos = |value: &Value| (number(value) * 1000.0).round() as u64;
        let mut ended: HashMap<u64, u64> = HashMap::new();
        for event in phase("X") {
            let (start, took) = (nanos(&event["ts"]), nanos(&event["dur"]));
            let end = ended.entry(event["tid"].as_u64().unwrap()).or_default();
            prop_assert!(start >= *end, "{event} begins before the one before has ended");
            *end = start + took;
        }
        // Counters end at nothing, and change only in time.
        let mut counters: HashMap<(u64, &str), (f64, f64)> = HashMap::new();
        for event in phase("C") {
            let key = (event["pid"].as_u64().unwrap(), event["name"].as_str().unwrap());
            let (at, value) = (number(&event["ts"]), number(&event["args"]["GB/s"]));
            let last = counters.insert(key, (at, value));
            prop_assert!(last.is_none_or(|(before, old)| before < at && old != value), "{event}");
        }
        prop_assert!(counters.values().all(|(_, value)| *value == 0.0));
    }
}

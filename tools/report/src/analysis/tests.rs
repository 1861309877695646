use super::*;
use hal::trace::Bound;
use hal::{Clock, CollectiveKind, DeviceId, OpKind};
use proptest::prelude::*;

const LINEAR: CommandKind = CommandKind::Op(OpKind::Linear);
const REDUCE: CommandKind = CommandKind::Collective(CollectiveKind::AllReduce);
const KINDS: [CommandKind; 5] =
    [LINEAR, REDUCE, CommandKind::Wait, CommandKind::Read, CommandKind::Fill];
const BOUNDS: [Bound; 3] = [Bound::Memory, Bound::Link, Bound::Launch];
const LABELS: [&str; 4] = ["layer 0 o", "layer 5 o", "embed", "read"];

fn span(die: u32, index: u32, kind: CommandKind, start: u64, end: u64) -> Span {
    Span {
        stream: StreamId { device: DeviceId(die), index },
        sequence: 1,
        kind,
        label: LABELS[start as usize % LABELS.len()].into(),
        clock: Clock::Simulated,
        ready: start.saturating_sub(2),
        start,
        end,
        operations: 2,
        bytes: 3,
        bound: BOUNDS[end as usize % BOUNDS.len()],
        waited_for: None,
    }
}

#[test]
fn communication_hides_behind_computation_of_the_same_die_only() {
    let spans = [
        span(0, 0, LINEAR, 100, 160),
        span(0, 1, REDUCE, 140, 200),
        span(1, 0, LINEAR, 100, 120),
        span(1, 1, REDUCE, 140, 200),
        span(1, 0, CommandKind::Wait, 150, 150),
    ];
    let step = StepTime::of(&spans, 3).unwrap();
    assert_eq!((step.begin_ps, step.end_ps, step.duration_ps()), (100, 200, 100));
    let communication = |die: usize| step.dies[die].times.communication;
    let expected = |exposed_ps, hidden_share| {
        let hidden_share = Some(hidden_share);
        Communication { busy_ps: 60, exposed_ps, hidden_share, waiting_ps: 2 }
    };
    assert_eq!(communication(0), expected(40, 1.0 / 3.0));
    assert_eq!(communication(1), expected(60, 0.0));
    assert_eq!(step.mean.communication, expected(50, 1.0 / 6.0));
    assert_eq!((step.dies[0].times.idle_ps, step.dies[1].times.idle_ps), (0, 20));
    assert_eq!(step.mean.by_op["linear"].time_ps, 40);
    assert_eq!(step.mean.by_layer[&LayerKind::DenseLayers], (60 + 60 + 20 + 60) / 2);
    assert!(StepTime::of(&[], 3).is_none());
}

#[test]
fn the_json_has_these_keys() {
    let step = StepTime::of(&[span(2, 1, REDUCE, 10, 20)], 3).unwrap();
    let json = serde_json::to_value(&step).unwrap();
    let times = |extra: serde_json::Value| {
        let mut times = serde_json::json!({
            "busy_ps": 10, "idle_ps": 0, "computation_ps": 0,
            "communication":
                { "busy_ps": 10, "exposed_ps": 10, "hidden_share": 0.0, "waiting_ps": 2 },
            "by_op": { "all_reduce": { "calls": 1, "time_ps": 10, "operations": 2, "bytes": 3 } },
            "by_layer": { "embedding": 10 },
            "by_bound": { "launch": { "time_ps": 10, "share": 1.0 } },
        });
        times.as_object_mut().unwrap().extend(extra.as_object().unwrap().clone());
        times
    };
    let streams = serde_json::json!([{ "stream": 1, "busy_ps": 10, "idle_ps": 0 }]);
    let die = times(serde_json::json!({ "die": 2, "streams": streams }));
    let mean = times(serde_json::json!({}));
    let whole = serde_json::json!({ "begin_ps": 10, "end_ps": 20, "mean": mean, "dies": [die] });
    assert_eq!(json, whole);
}

/// Spans in any order, overlapping as they like.
fn any_spans() -> impl Strategy<Value = Vec<Span>> {
    let span = (0..3u32, 0..3u32, 0..KINDS.len(), 0..150u64, 0..40u64).prop_map(
        |(die, stream, kind, start, took)| span(die, stream, KINDS[kind], start, start + took),
    );
    prop::collection::vec(span, 1..40)
}

proptest! {
    #[test]
    fn sums_add_up_and_agree_with_a_count_of_every_picosecond(spans in any_spans()) {
        let step = StepTime::of(&spans, 3).unwrap();
        let count = |which: &dyn Fn(u64) -> bool| {
            (step.begin_ps..step.end_ps).filter(|at| which(*at)).count() as u64
        };
        for DieTime { die, times, streams } in &step.dies {
            let runs = |at: u64, which: &dyn Fn(&Span) -> bool| {
                spans.iter().any(|s| {
                    s.device().0 == *die && s.start <= at && at < s.end && which(s)
                })
            };
            let computes = |s: &Span| matches!(s.kind, CommandKind::Op(_) | CommandKind::Fill);
            let communicates = |s: &Span| s.kind == REDUCE;
            prop_assert_eq!(times.busy_ps, count(&|at| runs(at, &|_| true)));
            prop_assert_eq!(times.busy_ps + times.idle_ps, step.duration_ps());
            prop_assert_eq!(times.computation_ps, count(&|at| runs(at, &computes)));
            let communication = times.communication;
            prop_assert_eq!(communication.busy_ps, count(&|at| runs(at, &communicates)));
            let exposed = count(&|at| runs(at, &communicates) && !runs(at, &computes));
            prop_assert_eq!(communication.exposed_ps, exposed);
            prop_assert!(communication.exposed_ps <= communication.busy_ps);
            prop_assert!(communication.hidden_share.is_none_or(|s| (0.0..=1.0).contains(&s)));
            for stream in streams {
                let of_stream = |s: &Span| s.stream.index == stream.stream;
                prop_assert_eq!(stream.busy_ps, count(&|at| runs(at, &of_stream)));
                prop_assert_eq!(stream.busy_ps + stream.idle_ps, step.duration_ps());
            }
            // Each command is in one kind, one part and one bound.
            let own = spans.iter().filter(|s| s.device().0 == *die);
            let all: u64 = own.map(Span::duration).sum();
            prop_assert_eq!(times.by_op.values().map(|op| op.time_ps).sum::<u64>(), all);
            prop_assert_eq!(times.by_layer.values().sum::<u64>(), all);
            prop_assert_eq!(times.by_bound.values().map(|b| b.time_ps).sum::<u64>(), all);
            let shares: f64 = times.by_bound.values().map(|b| b.share).sum();
            prop_assert!(all == 0 || (shares - 1.0).abs() < 1e-12);
        }
    }

    #[test]
    fn the_order_of_spans_does_not_matter(spans in any_spans()) {
        let mut reversed = spans.clone();
        reversed.reverse();
        prop_assert_eq!(StepTime::of(&spans, 3), StepTime::of(&reversed, 3));
    }
}

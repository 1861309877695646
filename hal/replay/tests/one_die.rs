//! Recording a program on one die, and what replaying it finds.

mod common;

use common::{Bench, SOON, floats, kinds, read, record, replay, replayed, rewrite, small_program};
use hal::fault::FaultPlan;
use hal::op::{Add, ArgMax};
use hal::{DType, Device, Error, Op, Operand};
use replay::record::Call;
use replay::{Options, Outcome, ReplayError, Tolerance};
use sim::Mode;
use std::io::Cursor;
use std::sync::Arc;
use std::time::Duration;

fn healthy(_: &dyn Device) {}

fn faulty(rule: &str) -> impl Fn(&dyn Device) {
    let plan = Arc::new(FaultPlan::new([rule.parse().unwrap()]));
    move |device| device.set_faults(Some(plan.clone())).unwrap()
}

#[test]
fn every_call_is_recorded_and_replays_equal() {
    for all_outputs in [false, true] {
        let file = record((Mode::Full, 1, all_outputs), healthy, small_program);
        let kinds = kinds(&file);
        for (kind, expected) in [
            ("die", 1),
            ("stream", 2),
            ("close_stream", 2),
            ("alloc", 7),
            ("alloc_host", 2),
            ("free", 9),
            ("write", 2),
            ("read", 3),
            ("copy", 4),
            // Two norms, and one of each of the two ops that recur with new memory.
            ("define", 6),
            ("submit", 6),
            ("wait", 1),
            ("synchronize", 2),
            ("host_write", 2),
            ("host_read", 2),
            ("end", 1),
            ("probe", if all_outputs { 6 } else { 0 }),
            ("probed", if all_outputs { 6 } else { 0 }),
            ("fill", if all_outputs { 8 } else { 1 }),
        ] {
            assert_eq!(kinds.get(kind).copied().unwrap_or(0), expected, "{kind}: {kinds:?}");
        }
        let report = replay(&file);
        assert!(report.is_equal(), "{report:#?}");
        assert_eq!(report.commands, report.recorded_commands);
        let expected = if all_outputs { 30 } else { 17 };
        assert_eq!((report.commands, report.skipped), (expected, 0));
        assert_eq!((report.reads, report.compared_bytes), (5, 4 * 96 + 32));
        assert_eq!(report.hashes, if all_outputs { 6 } else { 0 });
        assert!(report.recording_complete && report.run_finished);
    }
}

#[test]
fn a_value_that_differs_is_found_with_the_command_that_wrote_it() {
    let file = record((Mode::Full, 1, false), healthy, small_program);
    // The run whose weights had one other bit: element 2 of the norm's weight.
    let other = rewrite(&file, |_, record, bytes| {
        if let (Call::Write { to, .. }, Some(bytes)) = (&record.call, bytes)
            && to.len == 12
        {
            bytes[10] ^= 0x40;
        }
    });
    let report = replay(&other);
    assert!(!report.is_equal());
    assert_eq!((report.different, report.failures.len()), (3, 0), "{report:#?}");
    // What was written first comes first: the partial read at the end, of bytes 8..40 of the norms.
    let first = &report.differences[0];
    assert_eq!((first.byte, first.of), (Some(8), Some(32)));
    let wrote = first.wrote.as_ref().unwrap();
    assert_eq!((wrote.op.as_str(), wrote.label.as_str()), ("rms_norm", "norm 0"));
    assert_eq!((wrote.operand.as_str(), wrote.stream.as_str()), ("out", "compute"));
    // The pinned copy of the first sum: row 0, column 2.
    let copy = report.differences.iter().find(|d| d.of == Some(24)).unwrap();
    assert_eq!(copy.byte, Some(8));
    let text = copy.to_string();
    for words in
        ["written by transfer (dst; command 6 of stream \"compute\" on die 0", "by add \"sum\""]
    {
        assert!(text.contains(words), "{text}");
    }
}

#[test]
fn hashes_of_outputs_find_the_first_op_that_differs() {
    let file = record((Mode::Full, 1, true), healthy, small_program);
    // The device that computed the second norm otherwise: the norms are the first two hashes.
    let mut seen = 0;
    let other = rewrite(&file, |_, record, _| {
        if let Call::Probed { hash, .. } = &mut record.call {
            seen += 1;
            *hash ^= u64::from(seen == 2);
        }
    });
    let report = replay(&other);
    assert_eq!((report.different, report.hashes, report.reads), (1, 6, 5));
    let wrote = report.differences[0].wrote.as_ref().unwrap();
    assert_eq!((wrote.op.as_str(), wrote.label.as_str()), ("rms_norm", "norm 1"));
    let tolerance = Options { tolerance: Tolerance::new(0.1), ..Options::default() };
    let report = replayed(&other, &common::system(Mode::Full), healthy, &tolerance).unwrap();
    assert!(report.is_equal(), "hashes cannot be near each other");
    assert_eq!(report.not_compared, 1);
}

#[test]
fn tolerance_is_for_floats_of_known_dtype_alone() {
    let program = |bench: &Bench| {
        let stream = bench.dies[0].stream("s").unwrap();
        let x = floats(&*stream, &[2, 4], 1.0);
        let sum = stream.alloc_tensor(DType::F32, &[2, 4]).unwrap();
        let add = Add { a: x.clone(), b: x.clone(), out: sum.clone() };
        stream.submit(&add.into_command()).unwrap();
        let chosen = stream.alloc_tensor(DType::I32, &[2]).unwrap();
        let argmax = ArgMax { x: sum.clone(), out: chosen.clone(), limit: 4 };
        stream.submit(&Op::from(argmax).into()).unwrap();
        read(&*stream, &sum);
        read(&*stream, &chosen);
    };
    let file = record((Mode::Full, 1, false), healthy, program);
    let tolerance = Options { tolerance: Tolerance::new(1e-2), ..Options::default() };
    for (len, byte, plain, tolerant) in [(32, 1, 1, 0), (32, 3, 1, 1), (8, 0, 1, 1)] {
        let other = rewrite(&file, |_, record, bytes| {
            if let (Call::Read { from, .. }, Some(bytes)) = (&record.call, bytes)
                && from.len == len
            {
                bytes[byte] ^= 1;
            }
        });
        assert_eq!(replay(&other).different, plain, "{len} {byte}");
        let system = common::system(Mode::Full);
        let report = replayed(&other, &system, healthy, &tolerance).unwrap();
        assert_eq!(report.different, tolerant, "{len} {byte}: {report:#?}");
    }
}

trait IntoCommand {
    fn into_command(self) -> hal::Command;
}

impl IntoCommand for Add<hal::Tensor> {
    fn into_command(self) -> hal::Command {
        Op::from(self).label("twice")
    }
}

/// Submits until the stream tells of the failure, and reads.
fn until_it_fails(bench: &Bench, patience: Duration) {
    let stream = bench.dies[0].stream("s").unwrap();
    let x = floats(&*stream, &[8], 1.0);
    for _ in 0..6 {
        let add = Add { a: x.clone(), b: x.clone(), out: x.clone() };
        let Ok(()) = stream.submit(&add.into_command()) else { return };
    }
    let mut bytes = [0; 32];
    let read = stream.read(&x.region(), &mut bytes, patience);
    if read.is_err() {
        assert!(
            stream.point().timeline().failure().is_some()
                || matches!(read, Err(Error::Timeout { .. }))
        );
    }
}

#[test]
fn failures_are_told_to_have_happened_again_or_not() {
    let rules = [
        ("op=add,nth=2,action=fail:bad parity", "bad parity"),
        ("op=add,nth=2,action=lose", "lost"),
        ("op=add,nth=2,action=hang", "timed out"),
    ];
    for (rule, words) in rules {
        // Only what hangs is not waited for, so that a busy host changes nothing.
        let patience = if rule.contains("hang") { Duration::from_millis(500) } else { SOON };
        let until_it_fails = |bench: &Bench| until_it_fails(bench, patience);
        let file = record((Mode::Full, 1, false), faulty(rule), until_it_fails);
        let options = Options { timeout: patience, ..Options::default() };
        let report = replayed(&file, &common::system(Mode::Full), faulty(rule), &options).unwrap();
        assert!(report.is_equal(), "{rule}: {report:#?}");
        let [failure] = &report.failures[..] else { panic!("{rule}: {report:#?}") };
        assert_eq!(failure.outcome, Outcome::Same);
        assert!(failure.to_string().contains(words), "{failure}");

        let report = replayed(&file, &common::system(Mode::Full), healthy, &options).unwrap();
        assert!(!report.is_equal(), "{rule}");
        let text = report.failures[0].to_string();
        assert!(text.contains("did not happen again") && text.contains(words), "{text}");

        let well = record((Mode::Full, 1, false), healthy, until_it_fails);
        let report = replayed(&well, &common::system(Mode::Full), faulty(rule), &options).unwrap();
        assert!(!report.is_equal(), "{rule}");
        assert!(report.failures.iter().all(|f| f.outcome == Outcome::New), "{report:#?}");
        assert!(report.failures[0].to_string().contains(words), "{report:#?}");
    }
    // Another command fails: neither is the other.
    let file = record((Mode::Full, 1, false), faulty(rules[0].0), |b| until_it_fails(b, SOON));
    let elsewhere = faulty("op=add,nth=3,action=fail:bad parity");
    let options = Options::default();
    let report = replayed(&file, &common::system(Mode::Full), elsewhere, &options).unwrap();
    let outcomes: Vec<_> = report.failures.iter().map(|f| f.outcome).collect();
    assert!(outcomes.contains(&Outcome::New) && outcomes.contains(&Outcome::DidNotHappenAgain));
}

#[test]
fn refusals_are_recorded_and_compared() {
    let program = |bench: &Bench| {
        let die = &bench.dies[0];
        let stream = die.stream("s").unwrap();
        assert!(matches!(stream.alloc(1 << 50), Err(Error::OutOfMemory { .. })));
        let x = floats(&*stream, &[8], 1.0);
        let overlap = (x.buffer().region(0, 20).unwrap(), x.buffer().region(4, 20).unwrap());
        assert!(matches!(stream.copy(&overlap.0, &overlap.1), Err(Error::Usage(_))));
        let short = x.buffer().region(0, 8).unwrap();
        assert!(matches!(stream.write(&short, &[0; 4]), Err(Error::Usage(_))));
        let device_memory = x.buffer().raw().read_host(0, &mut [0; 4]);
        assert!(matches!(device_memory, Err(Error::Usage(_))));
        let far = hal::Tensor::new(x.buffer().clone(), 16, *x.desc());
        let add = Add { a: far, b: x.clone(), out: x.clone() };
        assert!(matches!(stream.submit(&add.into_command()), Err(Error::Usage(_))));
        read(&*stream, &x);
    };
    let file = record((Mode::Full, 1, false), healthy, program);
    let report = replay(&file);
    assert!(report.is_equal(), "{report:#?}");
    assert_eq!((report.failures.len(), report.reads), (5, 1), "{report:#?}");
    // The same, claimed to have succeeded, is a file that no device is shown.
    let claimed = rewrite(&file, |_, record, _| {
        if matches!(record.call, Call::Submit { .. }) {
            record.error = None;
        }
    });
    let system = common::system(Mode::Full);
    let error = replayed(&claimed, &system, healthy, &Options::default()).unwrap_err();
    assert!(matches!(error, ReplayError::Format(_)));
    assert!(error.to_string().contains("leaves Buffer#"), "{error}");
}

#[test]
fn time_without_values_compares_nothing() {
    let program = |bench: &Bench| {
        let stream = bench.dies[0].stream("s").unwrap();
        let x = floats(&*stream, &[8], 1.0);
        let add = Add { a: x.clone(), b: x.clone(), out: x.clone() };
        stream.submit(&add.into_command()).unwrap();
        read(&*stream, &x);
    };
    let timing = record((Mode::TimingOnly, 1, true), healthy, program);
    let full = record((Mode::Full, 1, true), healthy, program);
    for (file, mode, compared, left) in [
        (&timing, Mode::Full, 0, 1),
        (&full, Mode::TimingOnly, 0, 2),
        (&full, Mode::FunctionalOnly, 2, 0),
    ] {
        let report = replayed(file, &common::system(mode), healthy, &Options::default()).unwrap();
        assert!(report.is_equal(), "{report:#?}");
        assert_eq!(report.reads + report.hashes, compared, "{mode:?}");
        assert_eq!(report.not_compared, left, "{mode:?}");
    }
}

#[test]
fn a_recorder_that_is_dropped_leaves_a_recording() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("run.hal");
    let recorder = replay::Recorder::create(&path, &replay::Header::default()).unwrap();
    let system = common::system(Mode::Full);
    let die = recorder.wrap(system.open(hal::DeviceId(0)).unwrap());
    let stream = die.stream("s").unwrap();
    let x = floats(&*stream, &[8], 1.0);
    assert!(!path.exists());
    // As far as it has come when the host begins to wait, it can be replayed even now.
    stream.synchronize(SOON).unwrap();
    let partial = std::fs::read(folder.path().join("run.hal.partial")).unwrap();
    let unfinished = Options { allow_unfinished: true, ..Options::default() };
    let report = replayed(&partial, &system, healthy, &unfinished).unwrap();
    assert!(report.is_equal() && !report.recording_complete);
    assert_eq!(report.commands, 1);
    let error = replayed(&partial, &system, healthy, &Options::default()).unwrap_err();
    assert!(error.to_string().contains("before its end record"), "{error}");
    drop(recorder);
    let file = std::fs::read(&path).unwrap();
    let report = replay(&file);
    assert!(report.recording_complete && !report.run_finished);
    // The device goes on.
    assert_eq!(read(&*stream, &x).len(), 32);
}

#[test]
fn a_dump_has_one_line_for_each_call() {
    let file = record((Mode::Full, 1, true), healthy, small_program);
    let mut reader = replay::file::Reader::new(Cursor::new(&file)).unwrap();
    let mut text = Vec::new();
    replay::dump(&mut reader, false, &mut text).unwrap();
    let text = String::from_utf8(text).unwrap();
    let defined = kinds(&file)["define"];
    assert_eq!(text.lines().count(), 1 + common::records(&file).len() - defined);
    for line in [
        "# recorded by test: a b c",
        "die 0 opened: va16 by sim, 34359738368 bytes",
        "die 0 \"compute\" wait for 4 of die 0 \"load\"",
        "die 0 \"compute\" rms_norm \"norm 1\" x=f32[4, 3] strides [6, 1]@b0+12 weight=f32[3]@b1+0 \
         ->out=f32[4, 3] strides [6, 1]@b2+12",
        "probe 1 of out=f32[4, 3] strides [6, 1]@b2+12",
    ] {
        assert!(text.contains(line), "no {line:?} in\n{text}");
    }
}

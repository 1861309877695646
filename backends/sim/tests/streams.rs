//! Streams: order, waits, timelines, memory, errors.

mod common;

use common::{SOON, die, floats, read, system};
use hal::fault::FaultPlan;
use hal::op::Add;
use hal::trace::WaitedFor;
use hal::{DType, Error, Op, Tensor};
use sim::Mode;
use std::sync::Arc;
use std::time::Duration;

fn add(a: &Tensor, b: &Tensor, out: &Tensor) -> Op {
    Add { a: a.clone(), b: b.clone(), out: out.clone() }.into()
}

#[test]
fn commands_of_a_stream_see_each_others_results() {
    let system = system(Mode::Full, 2);
    let stream = die(&system, 0).stream("s").unwrap();
    let one = floats(&*stream, &[1.0; 100]);
    let sum = floats(&*stream, &[0.0; 100]);
    for _ in 0..1000 {
        stream.submit(&add(&sum, &one, &sum).into()).unwrap();
    }
    assert_eq!(read(&*stream, &sum), vec![1000.0; 100]);
}

#[test]
fn waits_order_streams_and_unordered_access_is_refused() {
    let system = system(Mode::Full, 2);
    let device = die(&system, 0);
    let (a, b) = (device.stream("a").unwrap(), device.stream("b").unwrap());
    let x = floats(&*a, &[1.0; 8]);
    let y = floats(&*b, &[2.0; 8]);
    let refused = b.submit(&add(&x, &y, &y).label("early")).unwrap_err();
    let text = refused.to_string();
    assert!(matches!(refused, Error::Usage(_)), "{text}");
    for words in ["hazard", "\"early\"", "die 0 stream 0", "wait for a point"] {
        assert!(text.contains(words), "{text}");
    }
    b.wait(&a.point()).unwrap();
    b.submit(&add(&x, &y, &y).into()).unwrap();
    assert_eq!(read(&*b, &y), vec![3.0; 8]);
    // Host synchronisation orders as well as a wait does.
    b.synchronize(SOON).unwrap();
    a.submit(&add(&x, &y, &x).into()).unwrap();
    assert_eq!(read(&*a, &x), vec![4.0; 8]);
}

#[test]
fn copies_go_in_all_directions_at_odd_offsets() {
    let system = system(Mode::Full, 2);
    let (here, there) = (die(&system, 0), die(&system, 5));
    let (s, t) = (here.stream("here").unwrap(), there.stream("there").unwrap());
    let bytes: Vec<u8> = (0..100).collect();
    let host = here.alloc_host(100).unwrap();
    host.raw().write_host(0, &bytes).unwrap();
    let device = s.alloc(200).unwrap();
    s.fill(&device.whole(), 0xee).unwrap();
    s.copy(&device.region(3, 97).unwrap(), &host.region(1, 97).unwrap()).unwrap();
    let remote = t.alloc(97).unwrap();
    s.wait(&t.point()).unwrap();
    s.copy(&remote.whole(), &device.region(3, 97).unwrap()).unwrap();
    t.wait(&s.point()).unwrap();
    let back = there.alloc_host(97).unwrap();
    t.copy(&back.whole(), &remote.whole()).unwrap();
    t.synchronize(SOON).unwrap();
    let mut got = vec![0; 97];
    back.raw().read_host(0, &mut got).unwrap();
    assert_eq!(got, bytes[1..98]);
    let mut around = vec![0; 104];
    s.read(&device.region(0, 104).unwrap(), &mut around, SOON).unwrap();
    assert_eq!((&around[..3], &around[100..]), (&[0xee; 3][..], &[0xee; 4][..]), "sentinels");
}

/// Dies that were sent the same bytes may share them in the host's memory; nobody else can tell.
#[test]
fn what_one_die_writes_does_not_show_on_another() {
    let system = system(Mode::Full, 2);
    let bytes: Vec<u8> = (0..100_000u32).map(|i| (i % 251) as u8).collect();
    let dies = [0, 1, 2].map(|number| {
        let stream = die(&system, number).stream("s").unwrap();
        let buffer = stream.alloc(bytes.len() as u64).unwrap();
        stream.write(&buffer.whole(), &bytes).unwrap();
        (stream, buffer)
    });
    let contents = |at: usize| {
        let (stream, buffer) = &dies[at];
        let mut got = vec![0; bytes.len()];
        stream.read(&buffer.whole(), &mut got, SOON).unwrap();
        got
    };
    let (stream, buffer) = &dies[1];
    stream.fill(&buffer.region(5, 3).unwrap(), 0xee).unwrap();
    let (stream, buffer) = &dies[2];
    stream.write(&buffer.whole(), &vec![7; bytes.len()]).unwrap();
    let mut filled = bytes.clone();
    filled[5..8].fill(0xee);
    assert!(contents(0) == bytes && contents(1) == filled);
    assert_eq!(contents(2), vec![7; bytes.len()]);
}

#[test]
fn memory_is_accounted_in_program_order() {
    let system = system(Mode::TimingOnly, 1);
    let device = die(&system, 0);
    let stream = device.stream("s").unwrap();
    let half = device.properties().memory_bytes / 2 + 1;
    let first = stream.alloc(half).unwrap();
    let refused = stream.alloc(half).unwrap_err();
    assert!(
        matches!(refused, Error::OutOfMemory { requested, .. } if requested >= half),
        "{refused}"
    );
    // The command holds the memory; dropping the handle frees it in stream order all the same.
    stream.fill(&first.whole(), 0).unwrap();
    drop(first);
    let second = stream.alloc(half).unwrap();
    let info = device.memory_info().unwrap();
    assert!(info.used >= half && info.used < info.capacity && info.peak == info.used);
    drop(second);
    assert_eq!(device.memory_info().unwrap().used, 0);
}

#[test]
fn a_failure_poisons_its_stream_and_flows_to_whoever_waits() {
    let system = system(Mode::Full, 2);
    let device = die(&system, 0);
    let rule = "op=add,label=second,action=fail:bad parity".parse().unwrap();
    device.set_faults(Some(Arc::new(FaultPlan::new([rule])))).unwrap();
    let (a, b) = (device.stream("a").unwrap(), device.stream("b").unwrap());
    let x = floats(&*a, &[1.0]);
    for label in ["first", "second", "third"] {
        a.submit(&add(&x, &x, &x).label(label))
            .or_else(|e| e.origin().map(|_| ()).ok_or(e))
            .unwrap();
    }
    b.wait(&a.point()).unwrap();
    let error = b.synchronize(SOON).unwrap_err();
    let origin = error.origin().expect("an error that came along names its origin");
    assert_eq!((origin.op, origin.label.as_str(), origin.sequence), ("add", "second", 3));
    assert_eq!(&*origin.stream_label, "a");
    assert!(error.to_string().contains("bad parity"), "{error}");
    let later = a.submit(&add(&x, &x, &x).label("later")).unwrap_err();
    assert_eq!(later.origin().unwrap().label.as_str(), "second", "the first failure stays");
    let c = device.stream("c").unwrap();
    c.fill(&c.alloc(4).unwrap().whole(), 1).unwrap();
    c.synchronize(SOON).expect("other streams go on");
}

#[test]
fn a_hang_times_out_and_says_what_hangs() {
    let system = system(Mode::Full, 2);
    let device = die(&system, 0);
    let rule = "op=fill,action=hang".parse().unwrap();
    device.set_faults(Some(Arc::new(FaultPlan::new([rule])))).unwrap();
    let (a, b) = (device.stream("a").unwrap(), device.stream("b").unwrap());
    a.fill(&a.alloc(4).unwrap().whole(), 1).unwrap();
    b.wait(&a.point()).unwrap();
    let error = b.synchronize(Duration::from_millis(50)).unwrap_err();
    let text = error.to_string();
    let stuck = |error: &Error| match error {
        Error::Timeout { stuck: Some(stuck), .. } => {
            (stuck.stream, stuck.sequence, stuck.op, stuck.waits_for)
        }
        other => panic!("{other}"),
    };
    let a_fill = WaitedFor::Command { stream: a.id(), sequence: 1 };
    assert_eq!(stuck(&error), (b.id(), 1, "wait", Some(a_fill)));
    assert!(text.contains("waits for command 1 of stream \"a\""), "{text}");
    let error = a.synchronize(Duration::from_millis(50)).unwrap_err();
    assert_eq!(stuck(&error), (a.id(), 1, "fill", None), "nobody keeps it but itself");
    let text = error.to_string();
    assert!(text.contains("hangs by a fault rule"), "{text}");
}

#[test]
fn loss_is_a_state_of_the_die_and_spares_the_others() {
    let system = system(Mode::Full, 2);
    let (device, other) = (die(&system, 0), die(&system, 1));
    let rule = "device=0,op=fill,nth=1,action=lose".parse().unwrap();
    device.set_faults(Some(Arc::new(FaultPlan::new([rule])))).unwrap();
    let (a, b, c) =
        (device.stream("a").unwrap(), device.stream("b").unwrap(), other.stream("c").unwrap());
    let buffer = a.alloc(4).unwrap();
    a.fill(&buffer.whole(), 1).unwrap();
    a.fill(&buffer.whole(), 2).unwrap();
    let lost = a.synchronize(SOON).unwrap_err();
    assert!(matches!(lost, Error::Lost { .. }), "{lost}");
    for error in [
        b.fill(&buffer.whole(), 3).unwrap_err(),
        b.alloc(4).unwrap_err(),
        device.memory_info().unwrap_err(),
        device.stream("d").unwrap_err(),
    ] {
        assert!(matches!(error, Error::Lost { .. }), "{error}");
    }
    drop(buffer);
    c.fill(&c.alloc(4).unwrap().whole(), 1).unwrap();
    c.synchronize(SOON).unwrap();
}

/// A program over three streams of two dies; returns when each stream's last command ended.
fn program(mode: Mode, threads: usize) -> Vec<Option<u64>> {
    let system = system(mode, threads);
    let (zero, one) = (die(&system, 0), die(&system, 1));
    let streams = [zero.stream("a").unwrap(), zero.stream("b").unwrap(), one.stream("c").unwrap()];
    let size = 1 << 16;
    let buffers: Vec<_> = streams.iter().map(|s| s.alloc(size).unwrap()).collect();
    for round in 0..40 {
        for (i, stream) in streams.iter().enumerate() {
            stream.fill(&buffers[i].whole(), round).unwrap();
            let next = (i + 1) % 3;
            // Everybody has filled before anybody copies, and the other way round.
            stream.wait(&streams[next].point()).unwrap();
        }
        streams[1].wait(&streams[2].point()).unwrap();
        streams[1].wait(&streams[0].point()).unwrap();
        streams[1].copy(&buffers[1].whole(), &buffers[0].whole()).unwrap();
        streams[0].wait(&streams[1].point()).unwrap();
        streams[2].wait(&streams[1].point()).unwrap();
    }
    for stream in &streams {
        stream.synchronize(SOON).unwrap();
    }
    streams.iter().map(|s| s.point().completed_at().map(|t| t.picos)).collect()
}

#[test]
fn simulated_time_depends_on_the_program_alone() {
    let reference = program(Mode::Full, 1);
    assert!(reference.iter().all(|t| t.is_some_and(|picos| picos > 0)), "{reference:?}");
    for (mode, threads) in
        [(Mode::Full, 2), (Mode::Full, 8), (Mode::TimingOnly, 1), (Mode::TimingOnly, 3)]
    {
        assert_eq!(program(mode, threads), reference, "{mode:?} on {threads} threads");
    }
    assert_eq!(program(Mode::FunctionalOnly, 2), [None; 3]);
}

#[test]
fn timing_only_memory_needs_no_host_memory() {
    let system = system(Mode::TimingOnly, 1);
    let stream = die(&system, 0).stream("s").unwrap();
    let huge = stream.alloc_tensor(DType::F8E4M3, &[7168, 4_000_000]).unwrap();
    stream.fill(&huge.region(), 0).unwrap();
    let mut bytes = [1; 4];
    stream.read(&huge.buffer().region(0, 4).unwrap(), &mut bytes, SOON).unwrap();
    assert_eq!(bytes, [0; 4]);
}

#[test]
fn views_outside_their_buffer_are_refused_before_anything_runs() {
    let system = system(Mode::Full, 1);
    let stream = die(&system, 0).stream("s").unwrap();
    let x = floats(&*stream, &[0.0; 4]);
    let outside = Tensor::new(x.buffer().clone(), 8, *hal::Operand::desc(&x));
    let misaligned = Tensor::new(x.buffer().clone(), 2, hal::TensorDesc::new(DType::F32, &[2]));
    for bad in [outside, misaligned] {
        let error = stream.submit(&add(&bad, &bad, &bad).into()).unwrap_err();
        assert!(error.to_string().contains("leaves"), "{error}");
    }
    assert!(stream.fill(&hal::Region { len: 17, ..x.region() }, 0).is_err());
    stream.synchronize(SOON).unwrap();
}

#[test]
fn a_machine_stops_with_work_that_will_never_run() {
    for threads in [1, 3] {
        let system = system(Mode::Full, threads);
        let (here, there) = (die(&system, 0), die(&system, 1));
        let rule = "op=fill,action=hang".parse().unwrap();
        here.set_faults(Some(Arc::new(FaultPlan::new([rule])))).unwrap();
        let (hangs, waits) = (here.stream("hangs").unwrap(), there.stream("waits").unwrap());
        let x = floats(&*hangs, &[1.0; 8]);
        hangs.fill(&x.region(), 0).unwrap();
        waits.wait(&hangs.point()).unwrap();
        // A collective whose second rank never comes.
        let id = here.communicator_id().unwrap();
        let (comm, alone) = (here.communicator(id, 0, 2).unwrap(), here.stream("alone").unwrap());
        let y = floats(&*alone, &[1.0; 8]);
        let sum =
            hal::Collective::AllReduce { send: y.clone(), recv: y, reduction: hal::Reduction::Sum };
        alone.submit_collectives(&comm, &[sum], &hal::Label::Static("alone")).unwrap();
        drop((here, there, hangs, waits, x, comm, alone));
        assert!(system.stop(SOON));
    }
}

#[test]
fn a_machine_that_somebody_holds_is_lost_when_it_is_stopped() {
    let system = system(Mode::Full, 1);
    let stream = die(&system, 0).stream("held").unwrap();
    assert!(!system.stop(Duration::from_millis(1)));
    assert!(matches!(stream.alloc(8), Err(Error::Lost { .. })));
}

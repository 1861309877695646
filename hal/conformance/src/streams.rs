//! Streams: order, waits, timelines, time.

use crate::backend::Feature;
use crate::lab::{
    BRIEFLY, Lab, SOON, Verdict, add, ensure, equal, floats, is, read, refused, timeout, upload,
    usage, values,
};
use crate::run::Case;
use hal::trace::{CommandKind, Span, TraceSink};
use hal::{
    Collective, Communicator, DType, Error, OpKind, Point, Reduction, Stream, Tensor, Validated,
};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

pub(crate) fn add_cases(all: &mut Vec<Case>) {
    let values = [Feature::Values];
    all.extend([
        Case::new("streams/identity", identity),
        Case::new("streams/order/long_chain", long_chain).needs(&values),
        Case::new("streams/order/read_sees_all", read_sees_all).needs(&values),
        Case::new("streams/order/write_takes_its_bytes_at_once", write_is_taken).needs(&values),
        Case::new("streams/order/handle_dropped_with_work", handle_dropped).needs(&values),
        Case::new("streams/wait/other_stream", |lab| ping_pong(lab, 0, 0)).needs(&values),
        Case::new("streams/wait/other_die", |lab| ping_pong(lab, 0, 1)).needs(&values).dies(2),
        Case::new("streams/wait/diamond", diamond).needs(&values),
        Case::new("streams/wait/transitive", transitive).needs(&values),
        Case::new("streams/wait/already_passed", already_passed).needs(&values),
        Case::new("streams/wait/itself", itself),
        Case::new("streams/wait/past_value", past_value).needs(&values),
        Case::new("streams/wait/host_in_between", host_in_between).needs(&values),
        Case::new("streams/wait/both_ways", both_ways).needs(&values),
        Case::new("streams/many", many).needs(&values),
        Case::new("streams/fan_out_and_in", fan).needs(&values),
        Case::new("streams/timeout/names_what_is_pending", times_out).dies(2).alone(),
        Case::new("streams/timeout/of_zero", no_time).dies(2).alone(),
        Case::new("streams/timeout/poisons_nothing", times_out_and_goes_on)
            .needs(&values)
            .dies(2)
            .alone(),
        Case::new("streams/timeout/other_streams_go_on", others_beside_a_timeout).dies(2).alone(),
        Case::new("streams/many_dies", many_dies).needs(&values).dies(8),
        Case::new("streams/from_many_threads", threads).needs(&values),
        Case::new("streams/timeline/counts_up", counts_up),
        Case::new("streams/timeline/reached_after_waiting", reached),
        Case::new("streams/timeline/outlives_the_stream", outlives),
        Case::new("streams/timeline/no_failure_while_well", well),
        Case::new("streams/hazard/unordered_write_is_refused", |lab| hazard(lab, true))
            .needs(&[Feature::Hazards]),
        Case::new("streams/hazard/unordered_read_is_refused", |lab| hazard(lab, false))
            .needs(&[Feature::Hazards]),
        Case::new("streams/hazard/unordered_write_after_read_is_refused", write_after_read)
            .needs(&[Feature::Hazards]),
        Case::new("streams/hazard/parts_that_do_not_meet_are_free", parts)
            .needs(&[Feature::Hazards]),
        Case::new("streams/hazard/the_wrapper_refuses", wrapper_hazard),
        Case::new("streams/hazard/the_wrapper_finds_unwritten_memory", wrapper_unwritten),
        Case::new("streams/clock/completion_times_ascend", completion).needs(&[Feature::Clock]),
        Case::new("streams/clock/waits_carry_time", waits_carry_time).needs(&[Feature::Clock]),
        Case::new("streams/clock/same_program_same_time", same_time)
            .needs(&[Feature::Clock])
            .alone(),
        Case::new("streams/trace/every_command_in_order", trace).needs(&[Feature::Clock]).alone(),
        Case::new("streams/trace/ends_when_taken_away", trace_ends)
            .needs(&[Feature::Clock])
            .alone(),
    ]);
}

fn identity(lab: &Lab) -> Verdict {
    let (a, b) = (lab.die(0).stream("one")?, lab.die(0).stream("two")?);
    equal("label", (a.label(), b.label()), ("one", "two"))?;
    ensure(a.id() != b.id(), || "two streams have one id".into())?;
    equal("the stream's die", a.id().device, lab.die(0).properties().id)?;
    equal("the point's stream", a.point().stream(), a.id())
}

fn bump(stream: &dyn Stream, x: &Tensor, one: &Tensor) -> Verdict {
    Ok(stream.submit(&add(x, one, x).into())?)
}

fn long_chain(lab: &Lab) -> Verdict {
    let stream = lab.stream(0)?;
    let (x, one) = (floats(&*stream, &[0.0; 33])?, floats(&*stream, &[1.0; 33])?);
    for _ in 0..2000 {
        bump(&*stream, &x, &one)?;
    }
    equal("the sum", values(&*stream, &x)?, vec![2000.0; 33])
}

fn read_sees_all(lab: &Lab) -> Verdict {
    let stream = lab.stream(0)?;
    let (x, one) = (floats(&*stream, &[0.0; 4])?, floats(&*stream, &[1.0; 4])?);
    for i in 1..100 {
        bump(&*stream, &x, &one)?;
        equal("what the read sees", values(&*stream, &x)?[0], i as f32)?;
    }
    Ok(())
}

fn write_is_taken(lab: &Lab) -> Verdict {
    let stream = lab.stream(0)?;
    let buffer = stream.alloc(1 << 16)?;
    let copy = stream.alloc(1 << 16)?;
    let mut source = vec![1; 1 << 16];
    // Work in front, so that the write cannot happen at once.
    let (x, one) = (floats(&*stream, &[0.0; 1 << 12])?, floats(&*stream, &[1.0; 1 << 12])?);
    for _ in 0..50 {
        bump(&*stream, &x, &one)?;
    }
    stream.write(&buffer.whole(), &source)?;
    source.fill(2);
    stream.copy(&copy.whole(), &buffer.whole())?;
    stream.write(&buffer.whole(), &source)?;
    ensure(read(&*stream, &copy.whole())?.iter().all(|&b| b == 1), || {
        "the write read its source after the call".into()
    })?;
    ensure(read(&*stream, &buffer.whole())?.iter().all(|&b| b == 2), || "order".into())
}

fn handle_dropped(lab: &Lab) -> Verdict {
    let (stream, other) = (lab.stream(0)?, lab.stream(0)?);
    let (x, one) = (floats(&*stream, &[0.0; 64])?, floats(&*stream, &[1.0; 64])?);
    for _ in 0..300 {
        bump(&*stream, &x, &one)?;
    }
    let point = stream.point();
    drop(stream);
    point.synchronize(SOON)?;
    equal("the sum", values(&*other, &x)?[0], 300.0)
}

fn ping_pong(lab: &Lab, a: usize, b: usize) -> Verdict {
    let (a, b) = (lab.stream(a)?, lab.stream(b)?);
    let (x, y) = (floats(&*a, &[1.0; 16])?, floats(&*b, &[0.0; 16])?);
    let half = |stream: &dyn Stream, x: &Tensor| bump(stream, x, x);
    for _ in 0..10 {
        half(&*a, &x)?;
        b.wait(&a.point())?;
        // The copy belongs to b's die, and reads a's memory.
        b.copy(&y.region(), &x.region())?;
        half(&*b, &y)?;
        a.wait(&b.point())?;
        a.copy(&x.region(), &y.region())?;
        b.wait(&a.point())?;
    }
    equal("x", values(&*a, &x)?[15], 4f32.powi(10))
}

fn diamond(lab: &Lab) -> Verdict {
    let streams = (0..4).map(|_| lab.stream(0)).collect::<Verdict<Vec<_>>>()?;
    let [top, left, right, bottom] = streams.as_slice() else { return Err("streams".into()) };
    for round in 1..20 {
        let x = floats(&**top, &[round as f32; 8])?;
        let (l, r) = (floats(&**left, &[1.0; 8])?, floats(&**right, &[2.0; 8])?);
        let out = floats(&**bottom, &[0.0; 8])?;
        left.wait(&top.point())?;
        right.wait(&top.point())?;
        left.submit(&add(&x, &l, &l).into())?;
        right.submit(&add(&x, &r, &r).into())?;
        bottom.wait(&left.point())?;
        bottom.wait(&right.point())?;
        bottom.submit(&add(&l, &r, &out).into())?;
        equal("the joined sum", values(&**bottom, &out)?[7], 2.0 * round as f32 + 3.0)?;
    }
    Ok(())
}

fn transitive(lab: &Lab) -> Verdict {
    let (a, b, c) = (lab.stream(0)?, lab.stream(0)?, lab.stream(0)?);
    let (x, one) = (floats(&*a, &[0.0; 1 << 12])?, floats(&*a, &[1.0; 1 << 12])?);
    // Work in front, so that the others really have to wait.
    let front = a.alloc(8 << 20)?;
    for i in 0..10 {
        a.fill(&front.whole(), i)?;
    }
    for _ in 0..100 {
        bump(&*a, &x, &one)?;
    }
    b.wait(&a.point())?;
    c.wait(&b.point())?;
    // Nothing but a's order through b makes this right.
    equal("x", values(&*c, &x)?[4095], 100.0)
}

fn already_passed(lab: &Lab) -> Verdict {
    let (a, b) = (lab.stream(0)?, lab.stream(0)?);
    let x = floats(&*a, &[5.0; 8])?;
    let point = a.point();
    // Long past, with more behind it.
    let other = a.alloc(64)?;
    a.fill(&other.whole(), 1)?;
    a.fill(&other.whole(), 2)?;
    a.synchronize(SOON)?;
    point.synchronize(SOON)?;
    b.wait(&point)?;
    b.wait(&point)?;
    bump(&*b, &x, &x)?;
    equal("x", values(&*b, &x)?[0], 10.0)
}

fn itself(lab: &Lab) -> Verdict {
    let stream = lab.stream(0)?;
    let buffer = stream.alloc(8)?;
    stream.fill(&buffer.whole(), 1)?;
    stream.wait(&stream.point())?;
    stream.fill(&buffer.whole(), 2)?;
    stream.synchronize(SOON)?;
    Ok(())
}

fn past_value(lab: &Lab) -> Verdict {
    let (a, b) = (lab.stream(0)?, lab.stream(0)?);
    let (x, y) = (floats(&*a, &[1.0; 8])?, floats(&*a, &[2.0; 8])?);
    let early = a.point();
    bump(&*a, &y, &y)?;
    let late = a.point();
    ensure(late.value() > early.value(), || "points do not grow".into())?;
    b.wait(&late)?;
    b.wait(&early)?;
    b.submit(&add(&x, &y, &x).into())?;
    equal("x", values(&*b, &x)?[0], 5.0)
}

fn host_in_between(lab: &Lab) -> Verdict {
    let (a, b) = (lab.stream(0)?, lab.stream(0)?);
    let x = floats(&*a, &[1.0; 8])?;
    a.synchronize(SOON)?;
    bump(&*b, &x, &x)?;
    b.synchronize(SOON)?;
    bump(&*a, &x, &x)?;
    equal("x", values(&*a, &x)?[0], 4.0)
}

fn both_ways(lab: &Lab) -> Verdict {
    // Two streams that wait for each other's past, again and again, must not lock up.
    let (a, b) = (lab.stream(0)?, lab.stream(0)?);
    let (x, y) = (floats(&*a, &[1.0; 8])?, floats(&*b, &[1.0; 8])?);
    let one = floats(&*a, &[1.0; 8])?;
    b.wait(&a.point())?;
    for _ in 0..200 {
        let (pa, pb) = (a.point(), b.point());
        a.wait(&pb)?;
        b.wait(&pa)?;
        bump(&*a, &x, &one)?;
        bump(&*b, &y, &one)?;
    }
    equal("x", values(&*a, &x)?[0], 201.0)?;
    equal("y", values(&*b, &y)?[0], 201.0)
}

fn many(lab: &Lab) -> Verdict {
    let streams = (0..64).map(|_| lab.stream(0)).collect::<Verdict<Vec<_>>>()?;
    let x = floats(&*streams[0], &[0.0; 16])?;
    let one = floats(&*streams[0], &[1.0; 16])?;
    let mut last: Point = streams[0].point();
    for round in 0..3 {
        for stream in &streams {
            stream.wait(&last)?;
            bump(&**stream, &x, &one)?;
            last = stream.point();
        }
        streams[0].wait(&last)?;
        equal("x", values(&*streams[0], &x)?[3], (64 * (round + 1)) as f32)?;
        last = streams[0].point();
    }
    Ok(())
}

fn many_dies(lab: &Lab) -> Verdict {
    let streams = (0..8).map(|die| lab.stream(die)).collect::<Verdict<Vec<_>>>()?;
    let mut x = floats(&*streams[0], &[1.0; 16])?;
    for pair in streams.windows(2) {
        let [from, to] = pair else { continue };
        let y = floats(&**to, &[0.0; 16])?;
        to.wait(&from.point())?;
        to.copy(&y.region(), &x.region())?;
        bump(&**to, &y, &y)?;
        x = y;
    }
    equal("after seven doublings", values(&*streams[7], &x)?[0], 128.0)
}

fn threads(lab: &Lab) -> Verdict {
    let stream = lab.stream(0)?;
    let (x, one) = (floats(&*stream, &[0.0; 16])?, floats(&*stream, &[1.0; 16])?);
    std::thread::scope(|scope| {
        let bump_many = || (0..100).try_for_each(|_| bump(&*stream, &x, &one));
        let all: Vec<_> = (0..4).map(|_| scope.spawn(bump_many)).collect();
        all.into_iter().try_for_each(|thread| match thread.join() {
            Ok(verdict) => verdict,
            Err(_) => Err("a submitting thread panicked".into()),
        })
    })?;
    equal("x", values(&*stream, &x)?[0], 400.0)
}

fn counts_up(lab: &Lab) -> Verdict {
    let stream = lab.stream(0)?;
    let buffer = stream.alloc(64)?;
    let mut last = stream.point().value();
    for i in 0..50 {
        stream.fill(&buffer.whole(), i)?;
        let now = stream.point().value();
        ensure(now > last, || format!("the point went from {last} to {now}"))?;
        last = now;
    }
    Ok(())
}

fn reached(lab: &Lab) -> Verdict {
    let stream = lab.stream(0)?;
    ensure(stream.point().is_reached(), || "a fresh stream has nothing to reach".into())?;
    let buffer = stream.alloc(64)?;
    let mut points = Vec::new();
    for i in 0..50 {
        stream.fill(&buffer.whole(), i)?;
        points.push(stream.point());
    }
    points[30].synchronize(SOON)?;
    ensure(points[..=30].iter().all(Point::is_reached), || "waited for, not reached".into())?;
    stream.synchronize(SOON)?;
    ensure(points.iter().all(Point::is_reached), || "all done, not all reached".into())?;
    equal("reached", points[0].timeline().reached(), points[49].value())
}

fn outlives(lab: &Lab) -> Verdict {
    let stream = lab.stream(0)?;
    let buffer = stream.alloc(64)?;
    stream.fill(&buffer.whole(), 1)?;
    let point = stream.point();
    drop(stream);
    point.synchronize(SOON)?;
    ensure(point.is_reached(), || "not reached".into())
}

fn well(lab: &Lab) -> Verdict {
    let stream = lab.stream(0)?;
    stream.fill(&stream.alloc(8)?.whole(), 1)?;
    stream.synchronize(SOON)?;
    match stream.point().timeline().failure() {
        None => Ok(()),
        Some(error) => Err(error.into()),
    }
}

fn hazard(lab: &Lab, write: bool) -> Verdict {
    let (a, b) = (lab.stream(0)?, lab.stream(0)?);
    let (x, y) = (floats(&*a, &[1.0; 8])?, floats(&*b, &[1.0; 8])?);
    let before = b.point().value();
    let op = if write { add(&y, &y, &x) } else { add(&x, &y, &y) };
    let error = refused("an access that nothing orders", b.submit(&op.clone().into()))?;
    is(&error, "Usage", usage)?;
    equal("commands submitted", b.point().value(), before)?;
    // With the order it goes, and the refusal has left no trace.
    b.wait(&a.point())?;
    b.submit(&op.into())?;
    a.wait(&b.point())?;
    bump(&*a, &x, &x)?;
    a.synchronize(SOON)?;
    Ok(())
}

fn write_after_read(lab: &Lab) -> Verdict {
    let (a, b) = (lab.stream(0)?, lab.stream(0)?);
    let (x, sum) = (floats(&*a, &[1.0; 8])?, floats(&*a, &[0.0; 8])?);
    // Everybody knows that x is written; only a knows that it is being read.
    b.wait(&a.point())?;
    a.submit(&add(&x, &x, &sum).into())?;
    let before = b.point().value();
    is(&refused("a write that nothing orders", b.fill(&x.region(), 0))?, "Usage", usage)?;
    equal("commands submitted", b.point().value(), before)?;
    // Reading beside it is no hazard.
    b.submit(&add(&x, &x, &floats(&*b, &[0.0; 8])?).into())?;
    b.wait(&a.point())?;
    b.fill(&x.region(), 0)?;
    b.synchronize(SOON)?;
    Ok(())
}

fn parts(lab: &Lab) -> Verdict {
    let (a, b) = (lab.stream(0)?, lab.stream(0)?);
    let buffer = a.alloc(100)?;
    b.wait(&a.point())?;
    a.fill(&buffer.region(0, 50)?, 1)?;
    b.fill(&buffer.region(50, 50)?, 2)?;
    is(&refused("one byte too far", b.fill(&buffer.region(49, 1)?, 3))?, "Usage", usage)?;
    a.synchronize(SOON)?;
    b.synchronize(SOON)?;
    // The host has seen both: nothing is unordered any more.
    b.fill(&buffer.whole(), 4)?;
    b.synchronize(SOON)?;
    Ok(())
}

/// A stream that waits for a rank of a group that has not come, and that rank.
struct Stuck {
    stream: Arc<dyn Stream>,
    x: Tensor,
    late: (Arc<dyn Stream>, Arc<dyn Communicator>, Tensor),
}

fn sum(stream: &dyn Stream, rank: &Arc<dyn Communicator>, x: &Tensor) -> Verdict {
    let (send, recv) = (x.clone(), x.clone());
    let batch = [Collective::AllReduce { send, recv, reduction: Reduction::Sum }];
    Ok(stream.submit_collectives(rank, &batch, &"late sum".into())?)
}

/// The one way to have a command that does not end on any backend: a rank that is missing.
fn stuck(lab: &Lab) -> Verdict<Stuck> {
    let id = lab.die(0).communicator_id()?;
    let (here, there) = (lab.die(0).communicator(id, 0, 2)?, lab.die(1).communicator(id, 1, 2)?);
    let (stream, late) = (lab.stream(0)?, lab.stream(1)?);
    let (x, y) = (floats(&*stream, &[1.0; 8])?, floats(&*late, &[2.0; 8])?);
    stream.synchronize(SOON)?;
    late.synchronize(SOON)?;
    sum(&*stream, &here, &x)?;
    Ok(Stuck { stream, x, late: (late, there, y) })
}

impl Stuck {
    /// The missing rank comes.
    fn release(&self) -> Verdict {
        let (stream, rank, y) = &self.late;
        sum(&**stream, rank, y)?;
        stream.synchronize(SOON)?;
        Ok(self.stream.synchronize(SOON)?)
    }
}

fn times_out(lab: &Lab) -> Verdict {
    let stuck = stuck(lab)?;
    match refused("waiting", stuck.stream.synchronize(BRIEFLY))? {
        Error::Timeout { waiting_for, after, pending } => {
            equal("how long was waited", after, BRIEFLY)?;
            ensure(!waiting_for.is_empty(), || "it does not say what was waited for".into())?;
            ensure(pending.contains("all_reduce") && pending.contains("late sum"), || {
                format!("it does not name the all_reduce and its label: {pending}")
            })?;
        }
        other => return Err(format!("expected Timeout, got: {other}").into()),
    }
    stuck.release()
}

fn no_time(lab: &Lab) -> Verdict {
    let stuck = stuck(lab)?;
    let error = refused("waiting for no time", stuck.stream.synchronize(Duration::ZERO))?;
    is(&error, "Timeout", timeout)?;
    stuck.release()?;
    // What is done needs no time.
    stuck.stream.synchronize(Duration::ZERO)?;
    Ok(())
}

fn times_out_and_goes_on(lab: &Lab) -> Verdict {
    let stuck = stuck(lab)?;
    bump(&*stuck.stream, &stuck.x, &stuck.x)?;
    for _ in 0..2 {
        is(&refused("waiting", stuck.stream.synchronize(BRIEFLY))?, "Timeout", timeout)?;
    }
    ensure(stuck.stream.point().timeline().failure().is_none(), || "it is poisoned".into())?;
    stuck.release()?;
    equal("twice the sum", values(&*stuck.stream, &stuck.x)?, vec![6.0; 8])
}

fn others_beside_a_timeout(lab: &Lab) -> Verdict {
    let stuck = stuck(lab)?;
    let waits = lab.stream(0)?;
    waits.wait(&stuck.stream.point())?;
    is(&refused("waiting for the waiter", waits.synchronize(BRIEFLY))?, "Timeout", timeout)?;
    let free = lab.stream(0)?;
    let buffer = free.alloc(64)?;
    free.fill(&buffer.whole(), 1)?;
    free.synchronize(SOON)?;
    stuck.release()?;
    waits.synchronize(SOON)?;
    Ok(())
}

/// One stream feeds many, and one waits for all of them.
fn fan(lab: &Lab) -> Verdict {
    let (first, last) = (lab.stream(0)?, lab.stream(0)?);
    let one = floats(&*first, &[1.0; 64])?;
    let mut parts = Vec::new();
    for i in 0..48 {
        let stream = lab.stream(0)?;
        let x = floats(&*stream, &[i as f32; 64])?;
        stream.wait(&first.point())?;
        stream.submit(&add(&x, &one, &x).into())?;
        last.wait(&stream.point())?;
        parts.push(x);
    }
    let total = floats(&*last, &[0.0; 64])?;
    for x in &parts {
        bump(&*last, &total, x)?;
    }
    equal("the sum of all", values(&*last, &total)?[63], (0..48).sum::<i32>() as f32 + 48.0)
}

fn wrapper_hazard(lab: &Lab) -> Verdict {
    let validated = Validated::wrap(lab.die(0).clone());
    let a = hal::Device::stream(&*validated, "a")?;
    let b = hal::Device::stream(&*validated, "b")?;
    let x = floats(&*a, &[1.0; 8])?;
    let error = refused("a read that nothing orders", b.submit(&add(&x, &x, &x).into()))?;
    is(&error, "Usage", usage)?;
    b.wait(&a.point())?;
    b.submit(&add(&x, &x, &x).into())?;
    b.synchronize(SOON)?;
    Ok(())
}

fn wrapper_unwritten(lab: &Lab) -> Verdict {
    let validated = Validated::wrap(lab.die(0).clone());
    let stream = hal::Device::stream(&*validated, "s")?;
    let x = stream.alloc_tensor(DType::F32, &[8])?;
    let error =
        refused("reading memory that nothing wrote", stream.submit(&add(&x, &x, &x).into()))?;
    is(&error, "Usage", usage)?;
    stream.fill(&x.region(), 0)?;
    stream.submit(&add(&x, &x, &x).into())?;
    stream.synchronize(SOON)?;
    Ok(())
}

/// When a point passed, on the device's clock.
fn at(point: &Point) -> Verdict<u64> {
    let clock = point.completed_at().ok_or("no completion time")?;
    Ok(clock.picos)
}

fn completion(lab: &Lab) -> Verdict {
    let stream = lab.stream(0)?;
    let buffer = stream.alloc(1 << 16)?;
    let mut points = Vec::new();
    for i in 0..40 {
        stream.fill(&buffer.whole(), i)?;
        points.push(stream.point());
    }
    stream.synchronize(SOON)?;
    let times = points.iter().map(at).collect::<Verdict<Vec<_>>>()?;
    ensure(times.windows(2).all(|t| t[0] < t[1]), || format!("times do not ascend: {times:?}"))?;
    let clock = points[0].completed_at().map(|t| t.clock);
    equal("the clock", clock, lab.die(0).properties().clock)?;
    stream.fill(&buffer.whole(), 0)?;
    let pending = Point::new(points[0].timeline().clone(), stream.point().value() + 10);
    ensure(pending.completed_at().is_none(), || "a command that never was has completed".into())
}

fn waits_carry_time(lab: &Lab) -> Verdict {
    let (a, b) = (lab.stream(0)?, lab.stream(0)?);
    let large = a.alloc(8 << 20)?;
    for i in 0..10 {
        a.fill(&large.whole(), i)?;
    }
    let signal = a.point();
    b.wait(&signal)?;
    let small = b.alloc(4)?;
    b.fill(&small.whole(), 1)?;
    b.synchronize(SOON)?;
    let (early, late) = (at(&signal)?, at(&b.point())?);
    ensure(late > early, || format!("the waiter was done at {late}, the signal came at {early}"))
}

/// A program over streams of one die; returns the completion times.
fn program(lab: &Lab) -> Verdict<Vec<u64>> {
    let streams = (0..3).map(|_| lab.stream(0)).collect::<Verdict<Vec<_>>>()?;
    let buffers =
        streams.iter().map(|s| Ok(s.alloc(1 << 14)?)).collect::<Verdict<Vec<hal::Buffer>>>()?;
    for round in 0..20 {
        for (stream, buffer) in streams.iter().zip(&buffers) {
            stream.fill(&buffer.whole(), round)?;
        }
        streams[1].wait(&streams[0].point())?;
        streams[1].copy(&buffers[1].whole(), &buffers[0].whole())?;
        streams[0].wait(&streams[1].point())?;
    }
    streams.iter().try_for_each(|s| s.synchronize(SOON))?;
    streams.iter().map(|s| at(&s.point())).collect()
}

fn same_time(lab: &Lab) -> Verdict {
    // Only a simulated clock promises this; the second die has not been used either.
    if lab.die(0).properties().clock != Some(hal::Clock::Simulated) {
        return Ok(());
    }
    let spans = |times: &[u64]| times.windows(2).map(|t| t[1].abs_diff(t[0])).collect::<Vec<_>>();
    let first = program(lab)?;
    let second = program(lab)?;
    equal("differences of completion times", spans(&second), spans(&first))
}

/// Keeps what it is told.
#[derive(Debug, Default)]
struct Spans(Mutex<Vec<Span>>);

impl TraceSink for Spans {
    fn record(&self, span: &Span) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).push(span.clone());
    }
}

impl Spans {
    fn taken(&self) -> Vec<Span> {
        std::mem::take(&mut *self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

fn trace(lab: &Lab) -> Verdict {
    let spans = Arc::new(Spans::default());
    let die = lab.die(0);
    let stream = lab.stream(0)?;
    let x = floats(&*stream, &[1.0; 64])?;
    stream.synchronize(SOON)?;
    die.set_trace(Some(spans.clone()))?;
    let first = stream.point().value();
    stream.fill(&x.region(), 0)?;
    stream.submit(&add(&x, &x, &x).label("traced add"))?;
    upload(&*stream, &[1, 2, 3])?;
    stream.synchronize(SOON)?;
    die.set_trace(None)?;
    let spans: Vec<Span> = spans.taken().into_iter().filter(|s| s.stream == stream.id()).collect();
    let last = stream.point().value();
    let sequences: Vec<u64> = spans.iter().map(|s| s.sequence).collect();
    ensure(sequences.windows(2).all(|s| s[0] < s[1]), || format!("out of order: {sequences:?}"))?;
    ensure(sequences.iter().all(|&s| s > first && s <= last), || format!("{sequences:?}"))?;
    let find = |kind: CommandKind| spans.iter().find(|s| s.kind == kind);
    let traced = find(CommandKind::Op(OpKind::Add)).ok_or("the add is not in the trace")?;
    equal("label", traced.label.as_str(), "traced add")?;
    ensure(find(CommandKind::Fill).is_some(), || "the fill is not in the trace".into())?;
    ensure(find(CommandKind::Write).is_some(), || "the write is not in the trace".into())?;
    for span in &spans {
        ensure(span.start <= span.end, || format!("{span:?} ends before it starts"))?;
        equal("clock", Some(span.clock), die.properties().clock)?;
    }
    let end = Point::new(stream.point().timeline().clone(), traced.sequence);
    equal("the add's end", traced.end, at(&end)?)
}

fn trace_ends(lab: &Lab) -> Verdict {
    let spans = Arc::new(Spans::default());
    let (die, stream) = (lab.die(0), lab.stream(0)?);
    let buffer = stream.alloc(64)?;
    die.set_trace(Some(spans.clone()))?;
    stream.fill(&buffer.whole(), 1)?;
    stream.synchronize(SOON)?;
    die.set_trace(None)?;
    ensure(!spans.taken().is_empty(), || "nothing was traced".into())?;
    stream.fill(&buffer.whole(), 2)?;
    stream.synchronize(SOON)?;
    equal("spans after the trace was taken away", spans.taken().len(), 0)
}

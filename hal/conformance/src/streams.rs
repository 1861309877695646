//! Streams: order, waits, timelines, time.

mod clock;
mod hazard;
mod timeout;

use crate::backend::Feature;
use crate::lab::{Lab, SOON, Verdict, add, ensure, equal, floats, read, values};
use crate::run::Case;
use crate::stuck::Stuck;
use hal::{Point, Stream, Tensor};

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
        Case::new("streams/wait/until_it_is_done", until_done).needs(&values).dies(2).alone(),
        Case::new("streams/wait/already_passed", already_passed).needs(&values),
        Case::new("streams/wait/itself", itself),
        Case::new("streams/wait/past_value", past_value).needs(&values),
        Case::new("streams/wait/host_in_between", host_in_between).needs(&values),
        Case::new("streams/wait/both_ways", both_ways).needs(&values),
        Case::new("streams/many", many).needs(&values),
        Case::new("streams/fan_out_and_in", fan).needs(&values),
        Case::new("streams/many_dies", many_dies).needs(&values).dies(8),
        Case::new("streams/from_many_threads", threads).needs(&values),
        Case::new("streams/timeline/counts_up", counts_up),
        Case::new("streams/timeline/reached_after_waiting", reached),
        Case::new("streams/timeline/outlives_the_stream", outlives),
        Case::new("streams/timeline/no_failure_while_well", well),
    ]);
    timeout::add_cases(all);
    hazard::add_cases(all);
    clock::add_cases(all);
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

/// Streams that surely wait, directly and through each other, before what they wait for is done.
fn until_done(lab: &Lab) -> Verdict {
    let stuck = Stuck::new(lab)?;
    let (near, far) = (lab.stream(0)?, lab.stream(0)?);
    near.wait(&stuck.stream.point())?;
    far.wait(&near.point())?;
    let copy = floats(&*far, &[0.0; 8])?;
    far.copy(&copy.region(), &stuck.x.region())?;
    stuck.holds_up(&*near)?;
    stuck.holds_up(&*far)?;
    stuck.release()?;
    equal("the sum", values(&*far, &copy)?, vec![3.0; 8])?;
    near.synchronize(SOON)?;
    Ok(())
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

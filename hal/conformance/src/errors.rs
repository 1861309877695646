//! Errors: the first one wins, names its command, and flows to whoever depends on it.

use crate::backend::Feature;
use crate::lab::{
    Lab, SOON, Verdict, add, ensure, equal, failed, floats, is, refused, usage, values,
};
use crate::run::Case;
use crate::stuck::Stuck;
use hal::fault::FaultPlan;
use hal::{Cause, Device, Error, Stream, Tensor, TensorDesc};
use std::sync::Arc;

pub(crate) fn add_cases(all: &mut Vec<Case>) {
    let faults = [Feature::Faults];
    let mut case = |name: &str, dies: usize, body: fn(&Lab) -> Verdict| {
        all.push(Case::new(format!("errors/{name}"), body).alone().dies(dies).needs(&faults));
    };
    case("names_its_command", 1, names_its_command);
    case("first_one_stays", 1, first_one_stays);
    case("flows_to_a_waiting_stream", 1, |lab| flows(lab, &[0, 0]));
    case("flows_to_one_that_waits_already", 2, flows_to_waiting);
    case("flows_to_a_host_that_waits_already", 2, flows_to_host);
    case("first_one_outlives_the_die", 1, outlives_die);
    case("flows_through_a_chain", 1, |lab| flows(lab, &[0, 0, 0, 0]));
    case("flows_to_another_die", 2, |lab| flows(lab, &[0, 1]));
    case("flows_through_dies_and_back", 3, |lab| flows(lab, &[0, 1, 2, 0]));
    case("wait_before_the_failure_is_clean", 1, wait_before);
    case("other_streams_go_on", 1, others_go_on);
    case("timeline_stops_before_the_failure", 1, timeline_stops);
    case("every_submission_is_refused_afterwards", 1, every_submission);
    case("memory_of_a_poisoned_stream_can_be_read_elsewhere", 1, memory_survives);
    case("memory_comes_back_after_a_failure", 1, memory_back);
    case("failure_is_asked_without_waiting", 1, asked);
    for (name, body) in [
        ("usage/view_outside", view_outside as fn(&Lab) -> Verdict),
        ("usage/misaligned_view", misaligned),
        ("usage/poisons_nothing", poisons_nothing),
    ] {
        all.push(Case::new(format!("errors/{name}"), body).needs(&[Feature::Values]));
    }
    all.push(Case::new("errors/usage/another_systems_buffer", foreign_buffer).alone());
}

/// Installs rules on every die.
pub(crate) fn rules(lab: &Lab, rules: &[&str]) -> Verdict {
    for die in lab.dies() {
        set(&**die, rules)?;
    }
    Ok(())
}

fn set(die: &dyn Device, rules: &[&str]) -> Verdict {
    let parsed = rules.iter().map(|rule| rule.parse().map_err(|e| format!("{e}")));
    let parsed = parsed.collect::<Result<Vec<_>, String>>()?;
    Ok(die.set_faults(Some(Arc::new(FaultPlan::new(parsed))))?)
}

/// Submits an add with this label, or gets the error of a stream that already failed.
fn submit(stream: &dyn Stream, x: &Tensor, label: &'static str) -> Verdict {
    match stream.submit(&add(x, x, x).label(label)) {
        Ok(()) => Ok(()),
        // A stream may have failed by now.
        Err(error) => is(&error, "Failed", failed),
    }
}

const FAIL: &str = "op=add,label=bad,action=fail:bad parity";

fn check_origin(error: &Error, stream: &dyn Stream, sequence: u64) -> Verdict {
    is(error, "Failed", failed)?;
    let origin = error.origin().ok_or("no origin")?;
    equal("op", origin.op, "add")?;
    equal("label", origin.label.as_str(), "bad add")?;
    equal("stream", origin.stream, stream.id())?;
    equal("stream label", &*origin.stream_label, stream.label())?;
    equal("sequence", origin.sequence, sequence)?;
    ensure(matches!(&origin.cause, Cause::Injected(text) if &**text == "bad parity"), || {
        format!("cause {:?}", origin.cause)
    })
}

fn names_its_command(lab: &Lab) -> Verdict {
    rules(lab, &[FAIL])?;
    let stream = lab.stream(0)?;
    let x = floats(&*stream, &[1.0; 4])?;
    submit(&*stream, &x, "good add")?;
    submit(&*stream, &x, "bad add")?;
    let sequence = stream.point().value();
    let error = refused("waiting", stream.synchronize(SOON))?;
    check_origin(&error, &*stream, sequence)
}

fn first_one_stays(lab: &Lab) -> Verdict {
    rules(lab, &[FAIL])?;
    let stream = lab.stream(0)?;
    let x = floats(&*stream, &[1.0; 4])?;
    submit(&*stream, &x, "bad add")?;
    let sequence = stream.point().value();
    for label in ["bad later", "good", "bad last"] {
        submit(&*stream, &x, label)?;
    }
    for _ in 0..3 {
        check_origin(&refused("waiting", stream.synchronize(SOON))?, &*stream, sequence)?;
        let later = refused("submitting", stream.submit(&add(&x, &x, &x).label("bad")))?;
        check_origin(&later, &*stream, sequence)?;
    }
    Ok(())
}

fn flows(lab: &Lab, dies: &[usize]) -> Verdict {
    rules(lab, &[FAIL])?;
    let streams = dies.iter().map(|&die| lab.stream(die)).collect::<Verdict<Vec<_>>>()?;
    let x = floats(&*streams[0], &[1.0; 4])?;
    submit(&*streams[0], &x, "bad add")?;
    let sequence = streams[0].point().value();
    for pair in streams.windows(2) {
        match pair[1].wait(&pair[0].point()) {
            Ok(()) => {}
            Err(error) => is(&error, "Failed", failed)?,
        }
        // Something behind the wait, which must not run.
        if let Ok(buffer) = pair[1].alloc(16) {
            let _ = pair[1].fill(&buffer.whole(), 1);
        }
    }
    for stream in &streams {
        let error = refused("waiting", stream.synchronize(SOON))?;
        check_origin(&error, &*streams[0], sequence)?;
    }
    Ok(())
}

/// A command that will fail once a stuck one in front of it is released.
fn fails_late(lab: &Lab) -> Verdict<(Stuck, u64)> {
    let stuck = Stuck::new(lab)?;
    stuck.stream.submit(&add(&stuck.x, &stuck.x, &stuck.x).label("bad add"))?;
    let sequence = stuck.stream.point().value();
    Ok((stuck, sequence))
}

fn flows_to_waiting(lab: &Lab) -> Verdict {
    rules(lab, &[FAIL])?;
    let waiters = (0..4).map(|_| lab.stream(0)).collect::<Verdict<Vec<_>>>()?;
    let (bad, sequence) = fails_late(lab)?;
    for stream in &waiters {
        stream.wait(&bad.stream.point())?;
    }
    waiters.iter().try_for_each(|stream| bad.holds_up(&**stream))?;
    bad.release()?;
    for stream in &waiters {
        check_origin(&refused("waiting", stream.synchronize(SOON))?, &*bad.stream, sequence)?;
    }
    Ok(())
}

fn flows_to_host(lab: &Lab) -> Verdict {
    rules(lab, &[FAIL])?;
    let (bad, sequence) = fails_late(lab)?;
    let failed = bad.stream.point();
    let wait =
        || check_origin(&refused("waiting", failed.synchronize(SOON))?, &*bad.stream, sequence);
    std::thread::scope(|scope| {
        let threads = [scope.spawn(wait), scope.spawn(wait)];
        // They have long begun to wait when this has run out of time.
        bad.holds_up(&*bad.stream)?;
        bad.release()?;
        threads.into_iter().try_for_each(|thread| match thread.join() {
            Ok(verdict) => verdict,
            Err(_) => Err("a waiting thread panicked".into()),
        })
    })
}

fn outlives_die(lab: &Lab) -> Verdict {
    rules(lab, &[FAIL, "op=fill,action=lose"])?;
    let (bad, loses) = (lab.stream(0)?, lab.stream(0)?);
    let (x, y) = (floats(&*bad, &[1.0; 4])?, floats(&*loses, &[1.0; 4])?);
    submit(&*bad, &x, "bad add")?;
    let point = bad.point();
    refused("waiting", bad.synchronize(SOON))?;
    loses.fill(&y.region(), 0)?;
    refused("waiting", loses.synchronize(SOON))?;
    // What the stream failed of is still what it failed of.
    let error = point.timeline().failure().ok_or("the timeline knows of no failure")?;
    check_origin(&error, &*bad, point.value())
}

fn wait_before(lab: &Lab) -> Verdict {
    rules(lab, &[FAIL])?;
    let (a, b) = (lab.stream(0)?, lab.stream(0)?);
    let x = floats(&*a, &[1.0; 4])?;
    a.submit(&add(&x, &x, &x).label("good"))?;
    let good = a.point();
    submit(&*a, &x, "bad add")?;
    refused("waiting", a.synchronize(SOON))?;
    // What was done before the failure is done.
    good.synchronize(SOON)?;
    b.wait(&good)?;
    b.fill(&b.alloc(8)?.whole(), 1)?;
    b.synchronize(SOON)?;
    Ok(())
}

fn others_go_on(lab: &Lab) -> Verdict {
    rules(lab, &[FAIL])?;
    let (bad, good) = (lab.stream(0)?, lab.stream(0)?);
    let (x, y) = (floats(&*bad, &[1.0; 4])?, floats(&*good, &[1.0; 4])?);
    submit(&*bad, &x, "bad add")?;
    refused("waiting", bad.synchronize(SOON))?;
    for _ in 0..10 {
        good.submit(&add(&y, &y, &y).label("fine"))?;
    }
    good.synchronize(SOON)?;
    lab.stream(0)?.synchronize(SOON)?;
    Ok(())
}

fn timeline_stops(lab: &Lab) -> Verdict {
    rules(lab, &[FAIL])?;
    let stream = lab.stream(0)?;
    let x = floats(&*stream, &[1.0; 4])?;
    submit(&*stream, &x, "good")?;
    let before = stream.point();
    submit(&*stream, &x, "bad add")?;
    let after = stream.point();
    refused("waiting", stream.synchronize(SOON))?;
    equal("reached", after.timeline().reached(), before.value())?;
    ensure(before.is_reached() && !after.is_reached(), || "reached the failed command".into())
}

fn every_submission(lab: &Lab) -> Verdict {
    rules(lab, &[FAIL])?;
    let stream = lab.stream(0)?;
    let x = floats(&*stream, &[1.0; 4])?;
    submit(&*stream, &x, "bad add")?;
    refused("waiting", stream.synchronize(SOON))?;
    let region = x.region();
    let other = lab.stream(0)?;
    let buffer = other.alloc(16)?;
    other.fill(&buffer.whole(), 0)?;
    for (what, error) in [
        ("fill", refused("fill", stream.fill(&region, 1))?),
        ("write", refused("write", stream.write(&region, &[0; 16]))?),
        ("read", refused("read", stream.read(&region, &mut [0; 16], SOON))?),
        ("copy", refused("copy", stream.copy(&region, &buffer.whole()))?),
        ("wait", refused("wait", stream.wait(&other.point()))?),
        ("alloc", refused("alloc", stream.alloc(8))?),
    ] {
        ensure(failed(&error), || format!("{what}: expected Failed, got: {error}"))?;
    }
    Ok(())
}

fn memory_survives(lab: &Lab) -> Verdict {
    rules(lab, &[FAIL])?;
    let (bad, good) = (lab.stream(0)?, lab.stream(0)?);
    let (kept, x) = (floats(&*bad, &[7.0; 4])?, floats(&*bad, &[1.0; 4])?);
    let written = bad.point();
    submit(&*bad, &x, "bad add")?;
    refused("waiting", bad.synchronize(SOON))?;
    good.wait(&written)?;
    let bytes = crate::lab::read(&*good, &kept.region())?;
    equal("bytes", bytes.len(), 16)
}

fn memory_back(lab: &Lab) -> Verdict {
    rules(lab, &[FAIL])?;
    let used = lab.die(0).memory_info()?.used;
    {
        let stream = lab.stream(0)?;
        let x = floats(&*stream, &[1.0; 1 << 12])?;
        submit(&*stream, &x, "bad add")?;
        submit(&*stream, &x, "never runs")?;
        refused("waiting", stream.synchronize(SOON))?;
    }
    equal("bytes used", lab.die(0).memory_info()?.used, used)
}

fn asked(lab: &Lab) -> Verdict {
    rules(lab, &[FAIL])?;
    let stream = lab.stream(0)?;
    let x = floats(&*stream, &[1.0; 4])?;
    submit(&*stream, &x, "bad add")?;
    let point = stream.point();
    refused("waiting", point.synchronize(SOON))?;
    let error = point.timeline().failure().ok_or("the timeline knows of no failure")?;
    check_origin(&error, &*stream, point.value())
}

/// A mistake is refused, submits nothing, and the stream goes on.
fn mistake(stream: &dyn Stream, what: &str, result: hal::Result<()>, before: u64) -> Verdict {
    is(&refused(what, result)?, "Usage", usage)?;
    equal("commands submitted", stream.point().value(), before)?;
    let x = floats(stream, &[2.0])?;
    stream.submit(&add(&x, &x, &x).into())?;
    equal("a sum afterwards", values(stream, &x)?, vec![4.0])
}

fn view_outside(lab: &Lab) -> Verdict {
    let stream = lab.stream(0)?;
    let x = floats(&*stream, &[0.0; 4])?;
    for offset in [4, 16, 1 << 40, u64::MAX - 3] {
        let before = stream.point().value();
        let bad = Tensor::new(x.buffer().clone(), offset, TensorDesc::new(hal::DType::F32, &[4]));
        mistake(&*stream, "a view outside", stream.submit(&add(&bad, &bad, &bad).into()), before)?;
    }
    Ok(())
}

fn misaligned(lab: &Lab) -> Verdict {
    let stream = lab.stream(0)?;
    let x = floats(&*stream, &[0.0; 4])?;
    for offset in [1, 2, 3] {
        let before = stream.point().value();
        let bad = Tensor::new(x.buffer().clone(), offset, TensorDesc::new(hal::DType::F32, &[2]));
        mistake(&*stream, "misaligned", stream.submit(&add(&bad, &bad, &bad).into()), before)?;
    }
    Ok(())
}

fn poisons_nothing(lab: &Lab) -> Verdict {
    let stream = lab.stream(0)?;
    let x = floats(&*stream, &[1.0; 4])?;
    for _ in 0..5 {
        let y = floats(&*stream, &[1.0; 5])?;
        let result = stream.submit(&add(&x, &y, &x).into());
        refused("shapes that differ", result)?;
        stream.submit(&add(&x, &x, &x).into())?;
    }
    equal("x", values(&*stream, &x)?, vec![32.0; 4])
}

fn foreign_buffer(lab: &Lab) -> Verdict {
    // A buffer of the null device stands for any other backend's.
    let null: Arc<dyn Device> = hal::NullDevice::new(lab.die(0).properties().id, 1 << 20);
    let foreign = null.stream("elsewhere")?.alloc(16)?;
    let stream = lab.stream(0)?;
    let before = stream.point().value();
    is(&refused("a fill", stream.fill(&foreign.whole(), 1))?, "Usage", usage)?;
    let t = Tensor::new(foreign, 0, TensorDesc::new(hal::DType::F32, &[4]));
    is(&refused("an add", stream.submit(&add(&t, &t, &t).into()))?, "Usage", usage)?;
    is(&refused("a wait", stream.wait(&null.stream("s")?.point()))?, "Usage", usage)?;
    equal("commands submitted", stream.point().value(), before)
}

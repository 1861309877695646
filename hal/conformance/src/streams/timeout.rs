//! Host waits that run out of time.

use super::bump;
use crate::backend::Feature;
use crate::lab::{BRIEFLY, Lab, SOON, Verdict, ensure, equal, is, refused, timeout, values};
use crate::run::Case;
use crate::stuck::Stuck;
use hal::Error;
use hal::trace::WaitedFor;
use std::time::Duration;

pub(super) fn add_cases(all: &mut Vec<Case>) {
    let values = [Feature::Values];
    all.extend([
        Case::new("streams/timeout/names_what_is_pending", times_out).dies(2).alone(),
        Case::new("streams/timeout/of_zero", no_time).dies(2).alone(),
        Case::new("streams/timeout/poisons_nothing", times_out_and_goes_on)
            .needs(&values)
            .dies(2)
            .alone(),
        Case::new("streams/timeout/other_streams_go_on", others_beside_a_timeout).dies(2).alone(),
    ]);
}

/// The missing rank comes, and the stream ends well.
fn released(stuck: &Stuck) -> Verdict {
    stuck.release()?;
    Ok(stuck.stream.synchronize(SOON)?)
}

fn times_out(lab: &Lab) -> Verdict {
    let stuck = Stuck::new(lab)?;
    match refused("waiting", stuck.stream.synchronize(BRIEFLY))? {
        Error::Timeout { waiting_for, after, pending, stuck: told } => {
            equal("how long was waited", after, BRIEFLY)?;
            ensure(!waiting_for.is_empty(), || "it does not say what was waited for".into())?;
            ensure(pending.contains("all_reduce") && pending.contains("late sum"), || {
                format!("it does not name the all_reduce and its label: {pending}")
            })?;
            // Not every device has more than words; what it has must be right.
            if let Some(told) = told {
                let (op, label) = (told.op, told.label.as_str());
                equal("what is stuck", (op, label), ("all_reduce", "late sum"))?;
                equal("the stream", told.stream, stuck.stream.id())?;
                equal("the command", told.sequence, stuck.stream.point().value())?;
                ensure(matches!(told.waits_for, Some(WaitedFor::Ranks { .. })), || {
                    format!("it does not wait for ranks: {:?}", told.waits_for)
                })?;
            }
        }
        other => return Err(format!("expected Timeout, got: {other}").into()),
    }
    released(&stuck)
}

fn no_time(lab: &Lab) -> Verdict {
    let stuck = Stuck::new(lab)?;
    let error = refused("waiting for no time", stuck.stream.synchronize(Duration::ZERO))?;
    is(&error, "Timeout", timeout)?;
    released(&stuck)?;
    // What is done needs no time.
    stuck.stream.synchronize(Duration::ZERO)?;
    Ok(())
}

fn times_out_and_goes_on(lab: &Lab) -> Verdict {
    let stuck = Stuck::new(lab)?;
    bump(&*stuck.stream, &stuck.x, &stuck.x)?;
    for _ in 0..2 {
        is(&refused("waiting", stuck.stream.synchronize(BRIEFLY))?, "Timeout", timeout)?;
    }
    ensure(stuck.stream.point().timeline().failure().is_none(), || "it is poisoned".into())?;
    released(&stuck)?;
    equal("twice the sum", values(&*stuck.stream, &stuck.x)?, vec![6.0; 8])
}

fn others_beside_a_timeout(lab: &Lab) -> Verdict {
    let stuck = Stuck::new(lab)?;
    let waits = lab.stream(0)?;
    waits.wait(&stuck.stream.point())?;
    stuck.holds_up(&*waits)?;
    let free = lab.stream(0)?;
    let buffer = free.alloc(64)?;
    free.fill(&buffer.whole(), 1)?;
    free.synchronize(SOON)?;
    released(&stuck)?;
    waits.synchronize(SOON)?;
    Ok(())
}

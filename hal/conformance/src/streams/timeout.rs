//! Host waits that run out of time.

use super::bump;
use crate::backend::Feature;
use crate::lab::{
    BRIEFLY, Lab, SOON, Verdict, ensure, equal, floats, is, refused, timeout, values,
};
use crate::run::Case;
use hal::{Collective, Communicator, Error, Reduction, Stream, Tensor};
use std::sync::Arc;
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

//! A command that does not end until the case says so, on any backend: a collective whose other
//! rank is missing.

use crate::lab::{BRIEFLY, Lab, SOON, Verdict, floats, is, refused, timeout};
use hal::{Collective, Communicator, Reduction, Stream, Tensor};
use std::sync::Arc;

/// A stream of die 0 that is held up by a rank on die 1 that has not come.
pub(crate) struct Stuck {
    /// The stream. Its last command is an `all_reduce` with the label "late sum".
    pub(crate) stream: Arc<dyn Stream>,
    /// Eight ones, which become threes when the missing rank comes.
    pub(crate) x: Tensor,
    late: (Arc<dyn Stream>, Arc<dyn Communicator>, Tensor),
}

fn sum(stream: &dyn Stream, rank: &Arc<dyn Communicator>, x: &Tensor) -> Verdict {
    let (send, recv) = (x.clone(), x.clone());
    let batch = [Collective::AllReduce { send, recv, reduction: Reduction::Sum }];
    Ok(stream.submit_collectives(rank, &batch, &"late sum".into())?)
}

impl Stuck {
    pub(crate) fn new(lab: &Lab) -> Verdict<Stuck> {
        let id = lab.die(0).communicator_id()?;
        let here = lab.die(0).communicator(id, 0, 2)?;
        let there = lab.die(1).communicator(id, 1, 2)?;
        let (stream, late) = (lab.stream(0)?, lab.stream(1)?);
        let (x, y) = (floats(&*stream, &[1.0; 8])?, floats(&*late, &[2.0; 8])?);
        stream.synchronize(SOON)?;
        late.synchronize(SOON)?;
        sum(&*stream, &here, &x)?;
        Ok(Stuck { stream, x, late: (late, there, y) })
    }

    /// The missing rank comes.
    pub(crate) fn release(&self) -> Verdict {
        let (stream, rank, y) = &self.late;
        sum(&**stream, rank, y)
    }

    /// Makes sure that another stream waits by now, and still does.
    pub(crate) fn holds_up(&self, other: &dyn Stream) -> Verdict {
        is(&refused("waiting for the waiter", other.synchronize(BRIEFLY))?, "Timeout", timeout)
    }
}

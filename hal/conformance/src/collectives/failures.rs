//! Ranks that are missing, that give up, and that disagree.

use super::{Rank, float, join, sum_of, value};
use crate::backend::Feature;
use crate::lab::{BRIEFLY, Lab, SOON, Verdict, ensure, equal, failed, is, refused, timeout};
use crate::run::Case;
use hal::{Cause, Collective, DType, Error, PeerCounts, Reduction};
use std::sync::Arc;

pub(super) fn add_cases(all: &mut Vec<Case>) {
    let values = [Feature::Values];
    all.extend([
        Case::new("collectives/abort/releases_the_waiting", abort).alone().dies(3),
        Case::new("collectives/abort/takes_nothing_more", abort_then_submit)
            .alone()
            .dies(2)
            .needs(&values),
        Case::new("collectives/abort/first_reason_stays", abort_twice).alone().dies(2),
        Case::new("collectives/missing_rank_times_out", missing).alone().dies(3).needs(&values),
        Case::new("collectives/mismatch/send_and_receive", peers_disagree).alone().dies(2),
    ]);
    for (name, theirs) in MISMATCHES {
        let case =
            Case::new(format!("collectives/mismatch/{name}"), move |lab| mismatch(lab, *theirs));
        all.push(case.alone().dies(3));
    }
}

fn abort(lab: &Lab) -> Verdict {
    let ranks = join(lab, 3)?;
    for rank in &ranks[..2] {
        rank.submit(&[sum_of(&float(rank, 1.0)?)])?;
    }
    is(&refused("waiting", ranks[0].stream.synchronize(BRIEFLY))?, "Timeout", timeout)?;
    ranks[2].communicator.abort("gave up");
    for rank in &ranks[..2] {
        let error = refused("waiting after the abort", rank.stream.synchronize(SOON))?;
        is(&error, "Failed", failed)?;
        let cause = error.origin().map(|o| o.cause.clone());
        ensure(matches!(&cause, Some(Cause::Aborted(why)) if &**why == "gave up"), || {
            format!("cause {cause:?}")
        })?;
    }
    for rank in &ranks {
        refused("the status", rank.communicator.status())?;
    }
    Ok(())
}

fn abort_then_submit(lab: &Lab) -> Verdict {
    let ranks = join(lab, 2)?;
    ranks[0].communicator.abort("enough");
    let x = float(&ranks[1], 1.0)?;
    let result = ranks[1].submit(&[sum_of(&x)]);
    is(&refused("a batch after the abort", result)?, "Failed", failed)?;
    // The stream itself is well.
    equal("x", value(&ranks[1], &x)?, 1.0)
}

fn abort_twice(lab: &Lab) -> Verdict {
    let ranks = join(lab, 2)?;
    ranks[0].communicator.abort("first");
    ranks[1].communicator.abort("second");
    for rank in &ranks {
        let error = refused("the status", rank.communicator.status())?;
        let cause = error.origin().map(|o| o.cause.clone());
        ensure(matches!(&cause, Some(Cause::Aborted(why)) if &**why == "first"), || {
            format!("rank {}: cause {cause:?}", rank.number)
        })?;
    }
    Ok(())
}

fn peers_disagree(lab: &Lab) -> Verdict {
    for (dtype, bytes) in [(DType::F32, 20), (DType::I32, 16)] {
        let ranks = join(lab, 2)?;
        let sent = ranks[0].place(DType::F32, &[0; 16])?;
        let expected = ranks[1].place(dtype, &vec![0; bytes])?;
        ranks[0].submit(&[Collective::Send { tensor: sent, peer: 1 }])?;
        ranks[1].submit(&[Collective::Recv { tensor: expected, peer: 0 }])?;
        for rank in &ranks {
            let error = refused("a mismatch", rank.stream.synchronize(SOON))?;
            let cause = error.origin().map(|o| o.cause.clone());
            ensure(matches!(cause, Some(Cause::Mismatch(_))), || {
                format!("rank {}: expected a mismatch, got: {error}", rank.number)
            })?;
        }
    }
    Ok(())
}

fn missing(lab: &Lab) -> Verdict {
    let ranks = join(lab, 3)?;
    let x = ranks.iter().map(|r| float(r, 1.0)).collect::<Verdict<Vec<_>>>()?;
    for (rank, x) in ranks.iter().zip(&x).take(2) {
        rank.submit(&[sum_of(x)])?;
    }
    let error = refused("waiting", ranks[0].stream.synchronize(BRIEFLY))?;
    match &error {
        Error::Timeout { pending, .. } => ensure(pending.contains("all_reduce"), || {
            format!("the timeout does not name the all_reduce: {pending}")
        })?,
        other => return Err(format!("expected Timeout, got: {other}").into()),
    }
    // Late is not never.
    ranks[2].submit(&[sum_of(&x[2])])?;
    for (rank, x) in ranks.iter().zip(&x) {
        equal("the sum", value(rank, x)?, 3.0)?;
    }
    Ok(())
}

/// What the last of three ranks submits while the others sum four floats.
type Odd = fn(&Rank) -> Verdict<Vec<Collective>>;

const MISMATCHES: &[(&str, Odd)] = &[
    ("kind", |rank| {
        Ok(vec![Collective::Broadcast { tensor: rank.place(DType::F32, &[0; 16])?, root: 0 }])
    }),
    ("elements", |rank| Ok(vec![sum_of(&rank.place(DType::F32, &[0; 20])?)])),
    ("dtype", |rank| Ok(vec![sum_of(&rank.place(DType::I32, &[0; 16])?)])),
    ("reduction", |rank| {
        let t = rank.place(DType::F32, &[0; 16])?;
        Ok(vec![Collective::AllReduce { send: t.clone(), recv: t, reduction: Reduction::Max }])
    }),
    ("batch_length", |rank| {
        let (a, b) = (rank.place(DType::F32, &[0; 16])?, rank.place(DType::F32, &[0; 16])?);
        Ok(vec![sum_of(&a), sum_of(&b)])
    }),
    ("peer_counts", |rank| {
        let (send, recv) = (rank.place(DType::F32, &[0; 48])?, rank.place(DType::F32, &[0; 48])?);
        let counts = Some(Arc::new(PeerCounts { send: vec![1, 2, 1], recv: vec![1, 1, 1] }));
        Ok(vec![Collective::AllToAll { send, recv, counts }])
    }),
    ("root", |rank| {
        Ok(vec![Collective::Broadcast { tensor: rank.place(DType::F32, &[0; 16])?, root: 1 }])
    }),
];

fn mismatch(lab: &Lab, odd: Odd) -> Verdict {
    let ranks = join(lab, 3)?;
    let theirs = odd(&ranks[2])?;
    for rank in &ranks[..2] {
        let t = rank.place(DType::F32, &[0; 16])?;
        let usual = match &theirs[0] {
            // The others exchange one element with each.
            Collective::AllToAll { .. } => {
                let counts = Some(Arc::new(PeerCounts { send: vec![1; 3], recv: vec![1; 3] }));
                let recv = rank.place(DType::F32, &[0; 16])?;
                Collective::AllToAll { send: t, recv, counts }
            }
            Collective::Broadcast { root: 1, .. } => Collective::Broadcast { tensor: t, root: 0 },
            _ => sum_of(&t),
        };
        rank.submit(&[usual])?;
    }
    ranks[2].submit(&theirs)?;
    for rank in &ranks {
        let error = refused("a mismatch", rank.stream.synchronize(SOON))?;
        let cause = error.origin().map(|o| o.cause.clone());
        ensure(matches!(cause, Some(Cause::Mismatch(_))), || {
            format!("rank {}: expected a mismatch, got: {error}", rank.number)
        })?;
        refused("the status", rank.communicator.status())?;
    }
    Ok(())
}

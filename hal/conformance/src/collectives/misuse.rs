//! Joining, and batches that are refused before they are submitted.

use super::{Rank, float, join, sum_of, value};
use crate::backend::Feature;
use crate::lab::{Lab, Verdict, ensure, equal, is, refused, usage};
use crate::run::Case;
use hal::{Collective, DType, PeerCounts, Reduction};
use std::sync::Arc;

pub(super) fn add_cases(all: &mut Vec<Case>) {
    let values = [Feature::Values];
    all.extend([
        Case::new("collectives/join/rank_taken", rank_taken).dies(2),
        Case::new("collectives/join/size_differs", size_differs).dies(2),
        Case::new("collectives/join/rank_beyond_size", beyond_size),
        Case::new("collectives/join/ids_differ", ids_differ),
        Case::new("collectives/join/properties", join_properties).dies(3),
        Case::new("collectives/refused/sizes", refused_sizes).dies(2).needs(&values),
        Case::new("collectives/refused/fp8_sum", refused_dtype).dies(2).needs(&values),
        Case::new("collectives/refused/other_dies_stream", refused_stream).dies(2),
        Case::new("collectives/refused/mixed_batch", refused_mix).dies(2).needs(&values),
    ]);
}

fn rank_taken(lab: &Lab) -> Verdict {
    let id = lab.die(0).communicator_id()?;
    let _first = lab.die(0).communicator(id, 0, 2)?;
    is(&refused("a taken rank", lab.die(1).communicator(id, 0, 2))?, "Usage", usage)
}

fn size_differs(lab: &Lab) -> Verdict {
    let id = lab.die(0).communicator_id()?;
    let _first = lab.die(0).communicator(id, 0, 2)?;
    is(&refused("another size", lab.die(1).communicator(id, 1, 3))?, "Usage", usage)
}

fn beyond_size(lab: &Lab) -> Verdict {
    for (rank, size) in [(2, 2), (0, 0), (usize::MAX, 4)] {
        let id = lab.die(0).communicator_id()?;
        let error = refused("an impossible rank", lab.die(0).communicator(id, rank, size))?;
        is(&error, "Usage", usage)?;
    }
    Ok(())
}

fn ids_differ(lab: &Lab) -> Verdict {
    let (a, b) = (lab.die(0).communicator_id()?, lab.die(0).communicator_id()?);
    ensure(a != b, || "two groups have one id".into())
}

fn join_properties(lab: &Lab) -> Verdict {
    for (r, rank) in join(lab, 3)?.iter().enumerate() {
        equal("rank", rank.communicator.rank(), r)?;
        equal("size", rank.communicator.size(), 3)?;
        equal("die", rank.communicator.device(), lab.die(r).properties().id)?;
        rank.communicator.status()?;
    }
    Ok(())
}

/// A batch is refused, submits nothing, and leaves the group as it was.
pub(super) fn refuse(ranks: &[Rank], batch: &[Collective]) -> Verdict {
    let before = ranks[0].stream.point().value();
    is(&refused("the batch", ranks[0].submit(batch))?, "Usage", usage)?;
    equal("commands submitted", ranks[0].stream.point().value(), before)?;
    let x = ranks.iter().map(|r| float(r, 1.0)).collect::<Verdict<Vec<_>>>()?;
    ranks.iter().zip(&x).try_for_each(|(rank, x)| rank.submit(&[sum_of(x)]))?;
    equal("a sum afterwards", value(&ranks[0], &x[0])?, ranks.len() as f32)
}

fn refused_sizes(lab: &Lab) -> Verdict {
    let ranks = join(lab, 2)?;
    let t = |n: usize| ranks[0].place(DType::F32, &vec![0; n * 4]);
    refuse(
        &ranks,
        &[Collective::AllReduce { send: t(4)?, recv: t(5)?, reduction: Reduction::Sum }],
    )?;
    refuse(&ranks, &[Collective::AllGather { send: t(4)?, recv: t(4)? }])?;
    refuse(&ranks, &[Collective::AllToAll { send: t(3)?, recv: t(3)?, counts: None }])?;
    refuse(&ranks, &[Collective::Broadcast { tensor: t(1)?, root: 2 }])?;
    refuse(&ranks, &[Collective::Send { tensor: t(1)?, peer: 2 }])?;
    let counts = Some(Arc::new(PeerCounts { send: vec![5, 5], recv: vec![1, 1] }));
    refuse(&ranks, &[Collective::AllToAll { send: t(4)?, recv: t(4)?, counts }])
}

fn refused_dtype(lab: &Lab) -> Verdict {
    let ranks = join(lab, 2)?;
    for dtype in [DType::F8E4M3, DType::U8] {
        refuse(&ranks, &[sum_of(&ranks[0].place(dtype, &[0; 4])?)])?;
    }
    Ok(())
}

fn refused_stream(lab: &Lab) -> Verdict {
    let ranks = join(lab, 2)?;
    let x = float(&ranks[1], 1.0)?;
    let result =
        ranks[1].stream.submit_collectives(&ranks[0].communicator, &[sum_of(&x)], &"x".into());
    is(&refused("another die's stream", result)?, "Usage", usage)
}

fn refused_mix(lab: &Lab) -> Verdict {
    let ranks = join(lab, 2)?;
    let (x, y) = (float(&ranks[0], 1.0)?, float(&ranks[0], 1.0)?);
    refuse(&ranks, &[sum_of(&x), Collective::Send { tensor: y, peer: 1 }])
}

//! Expert parallelism: which tokens go where.

use super::moe::move_rows;
use super::{Arg, Args, View, counted_rows};
use hal::op::MoeDispatch;

/// Where each slot's expert lives, by token and slot: its destination and its number there.
struct Placement {
    homes: Vec<Option<(usize, i32)>>,
    per_token: usize,
}

impl Placement {
    /// Finds the experts of the first `tokens` tokens.
    fn new(op: &MoeDispatch<Arg>, tokens: usize, args: &Args<'_>) -> Result<Self, String> {
        let experts = args.read::<i32>(&op.experts);
        let replicas = op.replicas.as_ref().map(|r| args.read::<i32>(r));
        let each = op.experts_per_destination;
        let destinations = op.offsets.desc.dim(0) - 1;
        let mut homes = Vec::with_capacity(tokens * op.experts.desc.dim(1));
        for t in 0..tokens {
            for &expert in experts.row(t) {
                let Ok(logical) = u32::try_from(expert) else {
                    homes.push(None);
                    continue;
                };
                if logical >= op.total_experts {
                    let total = op.total_experts;
                    return Err(format!("expert {expert} of token {t} is not one of {total}"));
                }
                let turn = t as u64 + u64::from(op.replica_offset);
                let physical = match &replicas {
                    Some(replicas) => replica(replicas, logical as usize, turn)?,
                    None => logical,
                };
                let home = (physical / each) as usize;
                if home >= destinations {
                    return Err(format!(
                        "physical expert {physical} of token {t} is not one of {each} on each of {destinations}"
                    ));
                }
                homes.push(Some((home, (physical % each) as i32)));
            }
        }
        Ok(Placement { homes, per_token: op.experts.desc.dim(1) })
    }

    fn token(&self, t: usize) -> &[Option<(usize, i32)>] {
        &self.homes[t * self.per_token..(t + 1) * self.per_token]
    }

    /// The slots of a token that are the first with their destination.
    fn firsts(&self, t: usize) -> impl Iterator<Item = (usize, usize)> {
        let slots = self.token(t);
        slots.iter().enumerate().filter_map(|(j, home)| {
            let (home, _) = (*home)?;
            let earlier = slots[..j].iter().flatten().any(|(other, _)| *other == home);
            (!earlier).then_some((j, home))
        })
    }
}

/// The physical expert that stands for a logical one this time.
fn replica(replicas: &View<'_, i32>, logical: usize, turn: u64) -> Result<u32, String> {
    let row = replicas.row(logical);
    let present = row.iter().position(|&r| r < 0).unwrap_or(row.len());
    match present {
        0 => Err(format!("expert {logical} has no replica")),
        n => Ok(row[(turn % n as u64) as usize].unsigned_abs()),
    }
}

/// See [`MoeDispatch`].
pub(super) fn dispatch(op: &MoeDispatch<Arg>, args: &mut Args<'_>) -> Result<(), String> {
    let (tokens, per_token) = (op.experts.desc.dim(0), op.experts.desc.dim(1));
    let counted = counted_rows(op.row_offsets.as_ref(), tokens, args)?;
    let placement = Placement::new(op, counted, args)?;
    let destinations = op.offsets.desc.dim(0) - 1;
    let mut starts = vec![0usize; destinations + 1];
    for t in 0..counted {
        placement.firsts(t).for_each(|(_, home)| starts[home + 1] += 1);
    }
    // Counts become starts.
    for d in 0..destinations {
        starts[d + 1] += starts[d];
    }
    let (needed, room) = (starts[destinations], op.out.desc.dim(0));
    if needed > room {
        return Err(format!("{needed} rows to send do not fit {room}"));
    }
    let offsets = args.write::<i32>(&op.offsets);
    offsets.data.iter_mut().zip(&starts).for_each(|(to, &n)| *to = n as i32);
    let weights = args.read::<f32>(&op.weights);
    let mut rows = args.write::<i32>(&op.rows);
    let mut out_experts = args.write::<i32>(&op.out_experts);
    let mut out_weights = args.write::<f32>(&op.out_weights);
    let mut sources = vec![0usize; needed];
    (counted..tokens).for_each(|t| rows.row(t).fill(-1));
    for t in 0..counted {
        rows.row(t).fill(-1);
        for (j, home) in placement.firsts(t) {
            let row = starts[home];
            starts[home] += 1;
            sources[row] = t;
            rows.row(t)[j] = row as i32;
            let there = |slot: &Option<(usize, i32)>| match slot {
                Some((other, expert)) if *other == home => *expert,
                _ => -1,
            };
            let slots = placement.token(t).iter().map(there);
            out_experts.row(row)[..per_token].iter_mut().zip(slots).for_each(|(to, e)| *to = e);
            out_weights.row(row).copy_from_slice(weights.row(t));
        }
    }
    move_rows((&op.x, op.x_scales.as_ref()), (&op.out, op.out_scales.as_ref()), &sources, args);
    Ok(())
}

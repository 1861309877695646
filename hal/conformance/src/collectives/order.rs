//! Batches, and the order of collectives among themselves and with other commands.

use super::values::{combine, elements};
use super::{Rank, float, join, sum_of, value};
use crate::backend::Feature;
use crate::lab::{BRIEFLY, Lab, Verdict, ensure, equal, is, refused, timeout};
use crate::run::Case;
use hal::{Collective, DType, Reduction};

pub(super) fn add_cases(all: &mut Vec<Case>) {
    let values = [Feature::Values];
    all.extend([
        Case::new("collectives/batch/several_at_once", batch).dies(4).needs(&values),
        Case::new("collectives/batch/empty", empty_batch).dies(2),
        Case::new("collectives/order/two_communicators", two_communicators).dies(4).needs(&values),
        Case::new("collectives/order/with_other_commands", with_commands).dies(4).needs(&values),
        Case::new("collectives/order/ranks_submit_in_any_order", any_order).dies(4).needs(&values),
        Case::new("collectives/order/arrival_does_not_matter", arrival).dies(4).needs(&values),
        Case::new("collectives/order/one_die_per_thread", thread_per_rank).dies(8).needs(&values),
        Case::new("collectives/order/sends_meet_receives_in_order", sends_in_order)
            .dies(2)
            .needs(&values),
        Case::new("collectives/join/ranks_on_any_die", any_die).dies(4).needs(&values),
    ]);
}

fn batch(lab: &Lab) -> Verdict {
    let ranks = join(lab, 4)?;
    let mut all = Vec::new();
    for rank in &ranks {
        let x = float(rank, rank.number as f32)?;
        let y = float(rank, 10.0)?;
        let gathered = rank.place(DType::F32, &[0; 16])?;
        let before = rank.stream.point().value();
        let gather = Collective::AllGather { send: x.clone(), recv: gathered.clone() };
        rank.submit(&[sum_of(&y), gather, Collective::Broadcast { tensor: x.clone(), root: 2 }])?;
        equal("commands of a batch", rank.stream.point().value() - before, 1)?;
        all.push((x, y, gathered));
    }
    for (rank, (x, y, gathered)) in ranks.iter().zip(&all) {
        equal("the broadcast", value(rank, x)?, 2.0)?;
        equal("the sum", value(rank, y)?, 40.0)?;
        let expected: Vec<u8> = (0..4u8).flat_map(|r| f32::from(r).to_le_bytes()).collect();
        equal("the gathered", rank.take(gathered)?, expected)?;
    }
    Ok(())
}

fn empty_batch(lab: &Lab) -> Verdict {
    let ranks = join(lab, 2)?;
    let before = ranks[0].stream.point().value();
    ranks[0].submit(&[])?;
    equal("commands submitted", ranks[0].stream.point().value(), before)
}

fn two_communicators(lab: &Lab) -> Verdict {
    let (all, pairs) = (join(lab, 4)?, [join(lab, 2)?]);
    for round in 0..5 {
        let x = all.iter().map(|r| float(r, 1.0)).collect::<Verdict<Vec<_>>>()?;
        all.iter().zip(&x).try_for_each(|(rank, x)| rank.submit(&[sum_of(x)]))?;
        for (rank, (big, x)) in pairs[0].iter().zip(all.iter().zip(&x)) {
            rank.stream.wait(&big.stream.point())?;
            rank.submit(&[sum_of(x)])?;
        }
        for (rank, x) in pairs[0].iter().zip(&x) {
            equal("the sum of sums", value(rank, x)?, 8.0)?;
        }
        equal("the rank outside", value(&all[3], &x[3])?, 4.0)
            .map_err(|f| crate::lab::Finding(format!("round {round}: {f}")))?;
    }
    Ok(())
}

fn with_commands(lab: &Lab) -> Verdict {
    let ranks = join(lab, 4)?;
    let x = ranks.iter().map(|r| float(r, 1.0)).collect::<Verdict<Vec<_>>>()?;
    for _ in 0..20 {
        for (rank, x) in ranks.iter().zip(&x) {
            rank.submit(&[sum_of(x)])?;
            let halved = crate::lab::add(x, x, x);
            rank.stream.submit(&halved.into())?;
        }
        for (rank, x) in ranks.iter().zip(&x) {
            // Back to 1: copy the sign of order, not of value.
            equal("x", value(rank, x)?, 8.0)?;
            rank.stream.write(&x.region(), &1f32.to_le_bytes())?;
        }
    }
    Ok(())
}

fn any_order(lab: &Lab) -> Verdict {
    let ranks = join(lab, 4)?;
    for order in [[0, 1, 2, 3], [3, 2, 1, 0], [2, 0, 3, 1]] {
        let x = ranks.iter().map(|r| float(r, r.number as f32)).collect::<Verdict<Vec<_>>>()?;
        for r in order {
            ranks[r].submit(&[sum_of(&x[r])])?;
        }
        for (rank, x) in ranks.iter().zip(&x) {
            equal("the sum", value(rank, x)?, 6.0)?;
        }
    }
    Ok(())
}

/// Sums have the bits of ascending ranks, and parts lie in the order of ranks, whoever comes first.
fn arrival(lab: &Lab) -> Verdict {
    let ranks = join(lab, 4)?;
    let inputs: Vec<_> = (0..4).map(|r| elements(DType::F32, 33, r + 1)).collect();
    let parts: Vec<&[u8]> = inputs.iter().map(Vec::as_slice).collect();
    let total = combine(DType::F32, &parts, Reduction::Sum);
    for order in [[0, 1, 2, 3], [3, 2, 1, 0], [2, 0, 3, 1]] {
        let mut outputs = vec![None; 4];
        for r in order {
            let rank = &ranks[r];
            let send = rank.place(DType::F32, &inputs[r])?;
            let sum = rank.place(DType::F32, &vec![0; inputs[r].len()])?;
            let all = rank.place(DType::F32, &vec![0; inputs.concat().len()])?;
            rank.submit(&[
                Collective::AllReduce {
                    send: send.clone(),
                    recv: sum.clone(),
                    reduction: Reduction::Sum,
                },
                Collective::AllGather { send, recv: all.clone() },
            ])?;
            if r != order[3] {
                // Surely there before the next one.
                let error = refused("waiting alone", rank.stream.synchronize(BRIEFLY))?;
                is(&error, "Timeout", timeout)?;
            }
            outputs[r] = Some((sum, all));
        }
        for (rank, output) in ranks.iter().zip(&outputs) {
            let (sum, all) = output.as_ref().ok_or("a rank did not submit")?;
            ensure(rank.take(sum)? == total, || format!("sum of rank {}: {order:?}", rank.number))?;
            ensure(rank.take(all)? == inputs.concat(), || {
                format!("parts of rank {}: {order:?}", rank.number)
            })?;
        }
    }
    Ok(())
}

/// A rank is what it joined as, not the number of its die.
fn any_die(lab: &Lab) -> Verdict {
    let id = lab.die(0).communicator_id()?;
    let dies = [2, 0, 3, 1];
    let mut ranks = Vec::new();
    for (number, die) in dies.into_iter().enumerate() {
        let communicator = lab.die(die).communicator(id, number, 4)?;
        equal("die", communicator.device(), lab.die(die).properties().id)?;
        ranks.push(Rank { number, stream: lab.stream(die)?, communicator });
    }
    let mut outputs = Vec::new();
    for rank in &ranks {
        let send = rank.place(DType::I32, &(rank.number as i32).to_le_bytes())?;
        let recv = rank.place(DType::I32, &[0; 16])?;
        rank.submit(&[Collective::AllGather { send, recv: recv.clone() }])?;
        outputs.push(recv);
    }
    let expected: Vec<u8> = (0..4i32).flat_map(i32::to_le_bytes).collect();
    for (rank, recv) in ranks.iter().zip(&outputs) {
        equal("the gathered", rank.take(recv)?, expected.clone())?;
    }
    Ok(())
}

fn thread_per_rank(lab: &Lab) -> Verdict {
    let ranks = join(lab, 8)?;
    std::thread::scope(|scope| {
        let work = |rank: &Rank| -> Verdict {
            for round in 0..20 {
                let x = float(rank, (rank.number + round) as f32)?;
                rank.submit(&[sum_of(&x)])?;
                equal("the sum", value(rank, &x)?, (28 + 8 * round) as f32)?;
            }
            Ok(())
        };
        let threads: Vec<_> = ranks.iter().map(|rank| scope.spawn(move || work(rank))).collect();
        threads.into_iter().try_for_each(|thread| match thread.join() {
            Ok(verdict) => verdict,
            Err(_) => Err("a rank's thread panicked".into()),
        })
    })
}

/// Several sends to one peer meet its receives one by one, whoever comes first.
fn sends_in_order(lab: &Lab) -> Verdict {
    let ranks = join(lab, 2)?;
    for receive_first in [false, true] {
        let x = (0..4).map(|i| float(&ranks[0], i as f32)).collect::<Verdict<Vec<_>>>()?;
        let y = (0..4).map(|_| float(&ranks[1], -1.0)).collect::<Verdict<Vec<_>>>()?;
        let send = |i: usize| Collective::Send { tensor: x[i].clone(), peer: 1 };
        let receive = |i: usize| Collective::Recv { tensor: y[i].clone(), peer: 0 };
        // Two in one batch, and two by themselves.
        let sends = || -> Verdict {
            ranks[0].submit(&[send(0), send(1)])?;
            ranks[0].submit(&[send(2)])?;
            Ok(ranks[0].submit(&[send(3)])?)
        };
        let receives = || -> Verdict {
            ranks[1].submit(&[receive(0)])?;
            ranks[1].submit(&[receive(1), receive(2)])?;
            Ok(ranks[1].submit(&[receive(3)])?)
        };
        match receive_first {
            false => sends().and_then(|()| receives())?,
            true => receives().and_then(|()| sends())?,
        }
        for (i, y) in y.iter().enumerate() {
            equal("what was received", value(&ranks[1], y)?, i as f32)?;
        }
    }
    Ok(())
}

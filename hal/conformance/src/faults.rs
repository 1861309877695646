//! Fault rules: fail, delay, hang, lose; alone and in the middle of a collective.

use crate::backend::Feature;
use crate::errors::rules;
use crate::lab::{
    BRIEFLY, Lab, SOON, Verdict, ensure, equal, failed, floats, is, lost, refused, timeout,
};
use crate::run::Case;
use hal::{Collective, Communicator, DType, Error, Point, Reduction, Stream, Tensor, TensorDesc};
use std::sync::Arc;

pub(crate) fn add_cases(all: &mut Vec<Case>) {
    let faults = [Feature::Faults];
    let mut case = |name: &str, dies: usize, body: fn(&Lab) -> Verdict| {
        all.push(Case::new(format!("faults/{name}"), body).alone().dies(dies).needs(&faults));
    };
    case("fail/nth_of_the_die", 2, nth);
    case("fail/each_kind_of_command", 1, each_kind);
    case("fail/rules_can_be_removed", 1, removed);
    case("fail/only_on_its_die", 2, only_on_its_die);
    case("hang/times_out_and_names_the_command", 1, hang);
    case("hang/waiters_time_out_too", 1, hang_waiters);
    case("hang/read_times_out_and_leaves_the_host_alone", 1, hang_read);
    case("hang/dropping_everything_does_not_block", 1, hang_drop);
    case("lose/every_call_says_so", 1, lose);
    case("lose/other_dies_go_on", 2, lose_others);
    case("lose/waiters_are_released", 2, lose_waiters);
    case("lose/memory_can_be_dropped", 1, lose_memory);
    case("collective/rank_fails", 4, |lab| collective(lab, "fail:flaky link"));
    case("collective/die_lost_in_the_middle", 4, |lab| collective(lab, "lose"));
    case("collective/partner_of_a_send_fails", 2, |lab| partner_fails(lab, true));
    case("collective/partner_of_a_receive_fails", 2, |lab| partner_fails(lab, false));
    case("collective/rank_hangs", 4, collective_hangs);
    case("collective/stream_fails_before_it", 4, |lab| stream_fails_before(lab, false));
    case("collective/stream_has_failed_before_it", 4, |lab| stream_fails_before(lab, true));
    all.push(
        Case::new("faults/delay/lengthens_by_as_much", delay)
            .alone()
            .needs(&[Feature::Faults, Feature::Clock]),
    );
}

fn fill(stream: &dyn Stream) -> Verdict {
    let buffer = stream.alloc(64)?;
    Ok(stream.fill(&buffer.whole(), 1)?)
}

/// Submits fills, which may be refused once the stream has failed.
fn fills(stream: &dyn Stream, n: usize) -> Verdict {
    for _ in 0..n {
        if let Err(error) = stream.alloc(64).and_then(|b| stream.fill(&b.whole(), 1)) {
            return is(&error, "Failed or Lost", |e| failed(e) || lost(e));
        }
    }
    Ok(())
}

fn nth(lab: &Lab) -> Verdict {
    rules(lab, &["op=fill,nth=3,action=fail:third"])?;
    for die in [0, 1] {
        let stream = lab.stream(die)?;
        fill(&*stream)?;
        fill(&*stream)?;
        fill(&*stream)?;
        let before = stream.point();
        before.synchronize(SOON)?;
        fill(&*stream)?;
        let error = refused("waiting", stream.synchronize(SOON))?;
        let origin = error.origin().ok_or("no origin")?;
        equal("the sequence that failed", origin.sequence, before.value() + 1)?;
        // Counted per die: the other one's has not come yet. And only once.
        let again = lab.stream(die)?;
        fill(&*again)?;
        again.synchronize(SOON)?;
    }
    Ok(())
}

fn each_kind(lab: &Lab) -> Verdict {
    let source = lab.stream(0)?;
    let x = floats(&*source, &[1.0; 4])?;
    source.synchronize(SOON)?;
    let run = |kind: &str, stream: &dyn Stream| -> hal::Result<()> {
        let buffer = stream.alloc(16)?;
        match kind {
            "write" => stream.write(&buffer.whole(), &[1; 16])?,
            "fill" => stream.fill(&buffer.whole(), 1)?,
            "transfer" => stream.copy(&buffer.whole(), &x.region())?,
            "read" => stream.read(&x.region(), &mut [0; 16], SOON)?,
            "wait" => stream.wait(&source.point())?,
            _ => {
                let out = Tensor::new(buffer, 0, TensorDesc::new(DType::F32, &[4]));
                stream.submit(&crate::lab::add(&x, &x, &out).into())?;
            }
        }
        stream.synchronize(SOON)
    };
    for kind in ["write", "fill", "transfer", "read", "add"] {
        rules(lab, &[&format!("op={kind},action=fail:{kind} broke")])?;
        let stream = lab.stream(0)?;
        let error = refused(kind, run(kind, &*stream))?;
        is(&error, "Failed", failed)?;
        let origin = error.origin().ok_or("no origin")?;
        equal("the origin", origin.op, kind)?;
        for other in ["write", "fill", "transfer", "read", "add"].iter().filter(|k| **k != kind) {
            let stream = lab.stream(0)?;
            if let Err(error) = run(other, &*stream) {
                return Err(format!("a rule about {kind} broke {other}: {error}").into());
            }
        }
    }
    Ok(())
}

fn removed(lab: &Lab) -> Verdict {
    rules(lab, &["op=fill,action=fail"])?;
    let stream = lab.stream(0)?;
    fill(&*stream)?;
    refused("waiting", stream.synchronize(SOON))?;
    lab.die(0).set_faults(None)?;
    let stream = lab.stream(0)?;
    fill(&*stream)?;
    stream.synchronize(SOON)?;
    Ok(())
}

fn only_on_its_die(lab: &Lab) -> Verdict {
    rules(lab, &["device=1,op=fill,action=fail"])?;
    let (here, there) = (lab.stream(0)?, lab.stream(1)?);
    fill(&*here)?;
    fill(&*there)?;
    here.synchronize(SOON)?;
    refused("waiting", there.synchronize(SOON))?;
    Ok(())
}

fn hang(lab: &Lab) -> Verdict {
    rules(lab, &["op=fill,action=hang"])?;
    let stream = lab.stream(0)?;
    fill(&*stream)?;
    let error = refused("waiting", stream.synchronize(BRIEFLY))?;
    match &error {
        Error::Timeout { after, pending, .. } => {
            equal("how long was waited", *after, BRIEFLY)?;
            ensure(pending.contains("fill"), || format!("does not name the fill: {pending}"))?;
        }
        other => return Err(format!("expected Timeout, got: {other}").into()),
    }
    // A timeout poisons nothing.
    fill(&*stream)?;
    ensure(stream.point().timeline().failure().is_none(), || "the stream is poisoned".into())
}

fn hang_waiters(lab: &Lab) -> Verdict {
    rules(lab, &["op=fill,action=hang"])?;
    let (a, b) = (lab.stream(0)?, lab.stream(0)?);
    fill(&*a)?;
    b.wait(&a.point())?;
    let x = floats(&*b, &[1.0; 4])?;
    is(&refused("waiting", b.synchronize(BRIEFLY))?, "Timeout", timeout)?;
    drop(x);
    let other = lab.stream(0)?;
    floats(&*other, &[1.0; 4])?;
    other.synchronize(SOON)?;
    Ok(())
}

fn hang_read(lab: &Lab) -> Verdict {
    rules(lab, &["op=fill,action=hang"])?;
    let stream = lab.stream(0)?;
    let x = floats(&*stream, &[1.0; 4])?;
    stream.fill(&x.region(), 0)?;
    let mut room = vec![0x5a; 16];
    let error = refused("reading", stream.read(&x.region(), &mut room, BRIEFLY))?;
    is(&error, "Timeout", timeout)?;
    Ok(())
}

fn hang_drop(lab: &Lab) -> Verdict {
    rules(lab, &["op=fill,action=hang"])?;
    let stream = lab.stream(0)?;
    let buffer = stream.alloc(64)?;
    stream.fill(&buffer.whole(), 1)?;
    stream.fill(&buffer.whole(), 2)?;
    drop(buffer);
    drop(stream);
    lab.stream(0)?.synchronize(SOON)?;
    Ok(())
}

fn lose(lab: &Lab) -> Verdict {
    rules(lab, &["op=fill,nth=1,action=lose"])?;
    let stream = lab.stream(0)?;
    let host = lab.die(0).alloc_host(8)?;
    fills(&*stream, 3)?;
    is(&refused("waiting", stream.synchronize(SOON))?, "Lost", lost)?;
    let die = lab.die(0);
    let gone = |e: &Error| matches!(e, Error::Lost { .. });
    is(&refused("memory_info", die.memory_info())?, "Lost", gone)?;
    is(&refused("stream", die.stream("late"))?, "Lost", gone)?;
    is(&refused("alloc_host", die.alloc_host(8))?, "Lost", gone)?;
    is(&refused("communicator_id", die.communicator_id())?, "Lost", gone)?;
    is(&refused("alloc", stream.alloc(8))?, "Lost", gone)?;
    let id = die.properties().id;
    match refused("again", die.memory_info())? {
        Error::Lost { device, reason } => {
            equal("the lost die", device, id)?;
            ensure(!reason.is_empty(), || "no reason".into())?;
        }
        other => return Err(format!("expected Lost, got: {other}").into()),
    }
    drop(host);
    Ok(())
}

fn lose_others(lab: &Lab) -> Verdict {
    rules(lab, &["device=0,op=fill,action=lose"])?;
    let (gone, well) = (lab.stream(0)?, lab.stream(1)?);
    fills(&*gone, 1)?;
    is(&refused("waiting", gone.synchronize(SOON))?, "Lost", lost)?;
    fill(&*well)?;
    well.synchronize(SOON)?;
    lab.die(1).memory_info()?;
    Ok(())
}

fn lose_waiters(lab: &Lab) -> Verdict {
    rules(lab, &["device=0,op=fill,action=lose"])?;
    let (gone, waits) = (lab.stream(0)?, lab.stream(1)?);
    fills(&*gone, 1)?;
    match waits.wait(&gone.point()) {
        Ok(()) => is(&refused("waiting", waits.synchronize(SOON))?, "Lost", lost),
        Err(error) => is(&error, "Lost", lost),
    }
}

fn lose_memory(lab: &Lab) -> Verdict {
    rules(lab, &["op=fill,action=lose"])?;
    let stream = lab.stream(0)?;
    let kept = (floats(&*stream, &[1.0; 64])?, lab.die(0).alloc_host(64)?);
    fills(&*stream, 1)?;
    refused("waiting", stream.synchronize(SOON))?;
    drop(kept);
    drop(stream);
    // Dropping has not turned into an error of something else.
    is(&refused("memory_info", lab.die(0).memory_info())?, "Lost", lost)
}

struct Rank {
    stream: Arc<dyn Stream>,
    communicator: Arc<dyn Communicator>,
    x: Tensor,
}

impl Rank {
    fn submit(&self) -> hal::Result<()> {
        let (send, recv) = (self.x.clone(), self.x.clone());
        let batch = [Collective::AllReduce { send, recv, reduction: Reduction::Sum }];
        self.stream.submit_collectives(&self.communicator, &batch, &"sum".into())
    }
}

fn join(lab: &Lab, size: usize) -> Verdict<Vec<Rank>> {
    let id = lab.die(0).communicator_id()?;
    (0..size)
        .map(|r| {
            let (stream, communicator) = (lab.stream(r)?, lab.die(r).communicator(id, r, size)?);
            let desc = TensorDesc::new(DType::F32, &[1000]);
            let x = Tensor::new(stream.alloc(desc.bytes())?, 0, desc);
            stream.write(&x.region(), &vec![0; 4000])?;
            stream.synchronize(SOON)?;
            Ok(Rank { stream, communicator, x })
        })
        .collect()
}

/// Every rank gets an error, soon.
/// The failure that a communicator tells of. A status does not wait, so that it may come a moment
/// after the host has heard of the failure through a stream.
fn status_told(rank: &Rank) -> Verdict<Error> {
    let began = std::time::Instant::now();
    while rank.communicator.status().is_ok() && began.elapsed() < SOON {
        std::thread::sleep(std::time::Duration::from_millis(1));
    }
    refused("the status", rank.communicator.status())
}

fn all_released(ranks: &[Rank], kind: fn(&Error) -> bool) -> Verdict {
    for (r, rank) in ranks.iter().enumerate() {
        let error = match rank.stream.synchronize(SOON) {
            Err(error) => error,
            // This rank heard of the failure before it submitted.
            Ok(()) => status_told(rank)?,
        };
        ensure(kind(&error), || format!("rank {r}: {error}"))?;
        status_told(rank)?;
    }
    Ok(())
}

fn collective(lab: &Lab, action: &str) -> Verdict {
    let ranks = join(lab, 4)?;
    rules(lab, &[&format!("device=2,op=all_reduce,nth=1,action={action}")])?;
    for rank in &ranks {
        rank.submit()?;
    }
    ranks.iter().try_for_each(|r| r.stream.synchronize(SOON))?;
    for rank in &ranks {
        // A rank may hear of the failure before it submits.
        let _ = rank.submit();
    }
    match action {
        "lose" => all_released(&ranks, lost),
        _ => all_released(&ranks, |e| {
            e.origin().is_some_and(|o| o.op == "all_reduce" && o.stream.device.0 == 2)
        }),
    }
}

/// A rank whose peer fails before it can send or receive is released.
fn partner_fails(lab: &Lab, sends: bool) -> Verdict {
    let ranks = join(lab, 2)?;
    let send = Collective::Send { tensor: ranks[0].x.clone(), peer: 1 };
    let receive = Collective::Recv { tensor: ranks[1].x.clone(), peer: 0 };
    let (waits, fails, mine, theirs) = match sends {
        true => (&ranks[0], &ranks[1], send, receive),
        false => (&ranks[1], &ranks[0], receive, send),
    };
    let kind = theirs.kind().name();
    rules(lab, &[&format!("op={kind},action=fail:flaky link")])?;
    waits.stream.submit_collectives(&waits.communicator, &[mine], &"waits".into())?;
    is(&refused("waiting", waits.stream.synchronize(BRIEFLY))?, "Timeout", timeout)?;
    fails.stream.submit_collectives(&fails.communicator, &[theirs], &"fails".into())?;
    all_released(&ranks, |e| e.origin().is_some_and(|o| o.label.as_str() == "fails"))
}

fn collective_hangs(lab: &Lab) -> Verdict {
    let ranks = join(lab, 4)?;
    rules(lab, &["device=2,op=all_reduce,action=hang"])?;
    ranks.iter().try_for_each(Rank::submit)?;
    for rank in &ranks {
        is(&refused("waiting", rank.stream.synchronize(BRIEFLY))?, "Timeout", timeout)?;
    }
    ranks[0].communicator.abort("a rank hangs");
    for r in [0, 1, 3] {
        refused("waiting after the abort", ranks[r].stream.synchronize(SOON))?;
    }
    Ok(())
}

fn stream_fails_before(lab: &Lab, known: bool) -> Verdict {
    let ranks = join(lab, 4)?;
    rules(lab, &["device=1,op=fill,action=fail:early"])?;
    let _ = ranks[1].stream.fill(&ranks[1].x.region(), 0);
    if known {
        refused("waiting", ranks[1].stream.synchronize(SOON))?;
    }
    for rank in &ranks {
        let _ = rank.submit();
    }
    all_released(&ranks, |e| e.origin().is_some_and(|o| o.op == "fill" && o.stream.device.0 == 1))
}

fn delay(lab: &Lab) -> Verdict {
    let stream = lab.stream(0)?;
    let buffer = stream.alloc(64)?;
    let took = || -> Verdict<u64> {
        let before: Point = stream.point();
        stream.fill(&buffer.whole(), 1)?;
        stream.synchronize(SOON)?;
        let at = |p: &Point| p.completed_at().map(|t| t.picos).ok_or("no completion time");
        Ok(at(&stream.point())? - at(&before)?)
    };
    stream.fill(&buffer.whole(), 0)?;
    stream.synchronize(SOON)?;
    let usual = took()?;
    equal("the same again", took()?, usual)?;
    rules(lab, &["op=fill,nth=0,action=delay:1500"])?;
    equal("with 1500 us of delay", took()?, usual + 1_500_000_000)?;
    equal("the one after it", took()?, usual)
}

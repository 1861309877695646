//! Command lists: as if their commands were submitted one by one.

use crate::backend::Feature;
use crate::collectives::join;
use crate::errors::rules;
use crate::lab::{
    Lab, SOON, Verdict, add, ensure, equal, failed, floats, is, refused, upload, usage, values,
};
use crate::run::Case;
use hal::op::{AttentionWork, MlaDecode};
use hal::{
    Clock, Collective, Command, CommandList, DType, Entry, Error, ListAction, Op, Point, Reduction,
    Stream, Tensor, TensorDesc, WaitFor,
};
use std::sync::Arc;

pub(crate) fn add_cases(all: &mut Vec<Case>) {
    let values = [Feature::Values];
    all.extend([
        Case::new("lists/order/of_one_stream", order).needs(&values),
        Case::new("lists/order/many_launches_in_flight", in_flight).needs(&values),
        Case::new("lists/wait/both_ways", waits).needs(&values),
        Case::new("lists/refused/names_the_command", refused_in_the_middle).needs(&values),
        Case::new("lists/refused/streams_that_do_not_fit", streams_that_do_not_fit).dies(2),
        Case::new("lists/hazard/unordered_streams_are_refused", hazard).needs(&[Feature::Hazards]),
        Case::new("lists/fails/names_the_command", fails).needs(&[Feature::Faults]).alone(),
        Case::new("lists/attention_work/counts_from_the_next_launch", attention_work)
            .needs(&[Feature::Clock]),
    ]);
    for ranks in [2, 4] {
        let case =
            Case::new(format!("lists/collectives/{ranks}"), move |lab| collectives(lab, ranks));
        all.push(case.dies(ranks).needs(&values));
    }
}

fn op(stream: usize, command: impl Into<Command>) -> Entry {
    Entry { stream, action: ListAction::Op(Box::new(command.into())) }
}

fn wait(stream: usize, target: WaitFor) -> Entry {
    Entry { stream, action: ListAction::Wait(target) }
}

fn fill(stream: usize, tensor: &Tensor, byte: u8) -> Entry {
    Entry { stream, action: ListAction::Fill { region: tensor.region(), byte } }
}

fn list(entries: Vec<Entry>, streams: usize) -> Verdict<CommandList> {
    Ok(CommandList::new(entries, streams).map_err(|e| e.to_string())?)
}

fn order(lab: &Lab) -> Verdict {
    let stream = lab.stream(0)?;
    let (x, one) = (floats(&*stream, &[5.0; 33])?, floats(&*stream, &[1.0; 33])?);
    // None of these may change places with another.
    let entries = vec![
        fill(0, &x, 0),
        op(0, add(&x, &one, &x)),
        op(0, add(&x, &x, &x)),
        op(0, add(&x, &one, &x)),
    ];
    let list = list(entries, 1)?;
    let before = stream.point().value();
    for launches in 1..4 {
        lab.die(0).execute(&list, std::slice::from_ref(&stream))?;
        equal("commands counted", stream.point().value(), before + 4 * launches)?;
    }
    equal("the values", values(&*stream, &x)?, vec![3.0; 33])
}

fn in_flight(lab: &Lab) -> Verdict {
    let stream = lab.stream(0)?;
    let (x, one) = (floats(&*stream, &[0.0; 9])?, floats(&*stream, &[1.0; 9])?);
    let entries = (0..10).map(|_| op(0, add(&x, &one, &x))).collect();
    let list = list(entries, 1)?;
    for _ in 0..100 {
        lab.die(0).execute(&list, std::slice::from_ref(&stream))?;
    }
    equal("the sum", values(&*stream, &x)?, vec![1000.0; 9])
}

fn waits(lab: &Lab) -> Verdict {
    let streams = [lab.stream(0)?, lab.stream(0)?];
    let x = floats(&*streams[0], &[0.0; 5])?;
    let (y, one) = (floats(&*streams[0], &[0.0; 5])?, floats(&*streams[0], &[1.0; 5])?);
    let entries = vec![
        wait(1, WaitFor::Start),
        op(1, add(&one, &one, &y)),
        op(0, add(&x, &one, &x)),
        wait(1, WaitFor::Entry(2)),
        op(1, add(&x, &y, &y)),
        wait(0, WaitFor::Entry(4)),
        op(0, add(&y, &y, &x)),
    ];
    let list = list(entries, 2)?;
    let mut expected = 0.0;
    for _ in 0..3 {
        lab.die(0).execute(&list, &streams)?;
        expected = 2.0 * (expected + 1.0 + 2.0);
    }
    equal("the values", values(&*streams[0], &x)?, vec![expected; 5])
}

fn refused_in_the_middle(lab: &Lab) -> Verdict {
    let stream = lab.stream(0)?;
    let (x, odd) = (floats(&*stream, &[1.0; 4])?, floats(&*stream, &[1.0; 5])?);
    let entries = vec![
        op(0, add(&x, &x, &x)),
        op(0, add(&x, &odd, &x).label("the odd one")),
        op(0, add(&x, &x, &x)),
    ];
    let list = list(entries, 1)?;
    let before = stream.point().value();
    let launched = lab.die(0).execute(&list, std::slice::from_ref(&stream));
    let error = refused("an op with operands of two sizes", launched)?;
    is(&error, "Unsupported", |e| matches!(e, Error::Unsupported { .. }) || usage(e))?;
    let text = error.to_string();
    ensure(text.contains("the odd one"), || format!("{text:?} does not name the command"))?;
    equal("commands submitted", stream.point().value(), before + 1)?;
    equal("the values", values(&*stream, &x)?, vec![2.0; 4])?;
    // The stream is well, and so is what can be launched of the list.
    lab.die(0).execute(&list.prefix(1), std::slice::from_ref(&stream))?;
    equal("the values", values(&*stream, &x)?, vec![4.0; 4])
}

fn streams_that_do_not_fit(lab: &Lab) -> Verdict {
    let (a, b, other) = (lab.stream(0)?, lab.stream(0)?, lab.stream(1)?);
    let x = Tensor::new(a.alloc(16)?, 0, TensorDesc::new(DType::F32, &[4]));
    let list = list(vec![fill(0, &x, 1)], 2)?;
    let before = a.point().value();
    for (what, streams) in [
        ("one stream for two", vec![a.clone()]),
        ("three streams for two", vec![a.clone(), b, lab.stream(0)?]),
        ("one stream twice", vec![a.clone(), a.clone()]),
        ("another die's stream", vec![a.clone(), other]),
    ] {
        let error = refused(what, lab.die(0).execute(&list, &streams))?;
        is(&error, "Usage", usage)?;
    }
    equal("commands submitted", a.point().value(), before)
}

fn hazard(lab: &Lab) -> Verdict {
    let streams = [lab.stream(0)?, lab.stream(0)?];
    let x = Tensor::new(streams[0].alloc(16)?, 0, TensorDesc::new(DType::F32, &[4]));
    let before: Vec<u64> = streams.iter().map(|s| s.point().value()).collect();
    let unordered = vec![wait(1, WaitFor::Start), fill(0, &x, 1), fill(1, &x, 2)];
    let launched = lab.die(0).execute(&list(unordered, 2)?, &streams);
    let error = refused("a fill that nothing orders after the other", launched)?;
    is(&error, "Usage", usage)?;
    let after: Vec<u64> = streams.iter().map(|s| s.point().value()).collect();
    equal("commands submitted", after, vec![before[0] + 1, before[1] + 1])?;
    let ordered = vec![fill(0, &x, 1), wait(1, WaitFor::Entry(0)), fill(1, &x, 2)];
    Ok(lab.die(0).execute(&list(ordered, 2)?, &streams)?)
}

fn fails(lab: &Lab) -> Verdict {
    rules(lab, &["label=second,action=fail:bad parity"])?;
    let stream = lab.stream(0)?;
    let x = Tensor::new(stream.alloc(16)?, 0, TensorDesc::new(DType::F32, &[4]));
    let entries = vec![
        fill(0, &x, 0),
        op(0, add(&x, &x, &x).label("first")),
        op(0, add(&x, &x, &x).label("second")),
        op(0, add(&x, &x, &x).label("third")),
    ];
    let before = stream.point().value();
    // A device may be quick enough to know of the failure while it takes the third.
    let launched = lab.die(0).execute(&list(entries, 1)?, std::slice::from_ref(&stream));
    let error = match launched {
        Ok(()) => refused("waiting", stream.synchronize(SOON))?,
        Err(error) => error,
    };
    is(&error, "Failed", failed)?;
    let origin = error.origin().ok_or("no origin")?;
    equal("the label", origin.label.as_str(), "second")?;
    equal("the sequence", origin.sequence, before + 3)
}

fn attention_work(lab: &Lab) -> Verdict {
    // Elsewhere it is the values in memory that make attention slow.
    if lab.die(0).properties().clock != Some(Clock::Simulated) {
        return Ok(());
    }
    let stream = lab.stream(0)?;
    let zeros = |shape: &[usize]| -> Verdict<Tensor> {
        let desc = TensorDesc::new(DType::F32, shape);
        Ok(Tensor::new(upload(&*stream, &vec![0; desc.bytes() as usize])?, 0, desc))
    };
    let ints = |shape: &[usize], values: &[i32]| -> Verdict<Tensor> {
        let bytes: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
        Ok(Tensor::new(upload(&*stream, &bytes)?, 0, TensorDesc::new(DType::I32, shape)))
    };
    let decode: Op = MlaDecode {
        q_latent: zeros(&[1, 1, 3])?,
        q_rope: zeros(&[1, 1, 2])?,
        cache: zeros(&[1, 2, 5])?,
        block_table: ints(&[1, 1], &[0])?,
        q_starts: ints(&[2], &[0, 1])?,
        kv_lens: ints(&[1], &[1])?,
        out: zeros(&[1, 1, 3])?,
        scale: 1.0,
        work: AttentionWork::default(),
    }
    .into();
    let x = zeros(&[4])?;
    let mut list = list(vec![fill(0, &x, 0), op(0, decode)], 1)?;
    let mut took = |work: AttentionWork| -> Verdict<u64> {
        ensure(list.set_attention_work(1, work), || "entry 1 is no attention".into())?;
        lab.die(0).execute(&list, std::slice::from_ref(&stream))?;
        stream.synchronize(SOON)?;
        let end = stream.point();
        let at = |point: &Point| point.completed_at().ok_or("no completion time");
        let start = Point::new(end.timeline().clone(), end.value() - 1);
        Ok(at(&end)?.picos - at(&start)?.picos)
    };
    let (little, much) = (AttentionWork { pairs: 1, keys: 1 }, 1u64 << 40);
    let first = took(little)?;
    let more = took(AttentionWork { pairs: much, keys: much })?;
    ensure(more > 2 * first, || format!("{first} ps with little work, {more} ps with much"))?;
    // Not to the picosecond: where commands are issued one by one, the host has its part in it.
    let again = took(little)?;
    ensure(more > 2 * again, || format!("{more} ps with much work, then {again} ps with little"))?;
    ensure(!list.set_attention_work(0, little), || "a fill took attention work".into())
}

fn collectives(lab: &Lab, ranks: usize) -> Verdict {
    let all = join(lab, ranks)?;
    let mut made = Vec::new();
    for rank in &all {
        let x = floats(&*rank.stream, &[rank.number as f32 + 1.0; 7])?;
        let y = floats(&*rank.stream, &[0.0; 7])?;
        let reduction = Reduction::Sum;
        let batch = vec![Collective::AllReduce { send: x.clone(), recv: y.clone(), reduction }];
        let communicator = rank.communicator.clone();
        let label = "sum".into();
        let entries = vec![
            op(0, add(&x, &x, &x)),
            Entry { stream: 0, action: ListAction::Collectives { communicator, batch, label } },
            op(0, add(&y, &x, &y)),
        ];
        made.push((rank, list(entries, 1)?, y));
    }
    let sum: f32 = (1..=ranks).map(|n| n as f32).sum();
    for factor in [2.0, 4.0, 8.0] {
        // Rank by rank: the first one waits for the others on the device, not here.
        for (rank, list, _) in &made {
            let stream: &Arc<dyn Stream> = &rank.stream;
            lab.die(rank.number).execute(list, std::slice::from_ref(stream))?;
        }
        for (rank, _, y) in &made {
            let expected = factor * (sum + rank.number as f32 + 1.0);
            equal("the values", values(&*rank.stream, y)?, vec![expected; 7])?;
        }
    }
    Ok(())
}

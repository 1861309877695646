//! Mistakes that the validating wrapper must refuse, each with the words that name it, and correct
//! programs that it must let pass. The device below does nothing, so only the wrapper can object.

use hal::op::{Add, CacheWrite, Copy, RmsNorm};
use hal::{
    Buffer, Collective, CommandList, DType, Device, DeviceId, Entry, Error, Label, ListAction,
    NullDevice, Op, PeerCounts, Reduction, Stream, Tensor, TensorDesc, Validated, WaitFor,
};
use proptest::prelude::*;
use std::sync::Arc;
use std::time::Duration;

const SOON: Duration = Duration::from_secs(1);

fn die(id: u32) -> Arc<Validated> {
    Validated::wrap(NullDevice::new(DeviceId(id), 1 << 30))
}

/// A tensor whose bytes count as written.
fn tensor(stream: &Arc<dyn Stream>, dtype: DType, shape: &[usize]) -> Tensor {
    let tensor = stream.alloc_tensor(dtype, shape).unwrap();
    stream.fill(&tensor.region(), 0).unwrap();
    tensor
}

fn add(a: &Tensor, b: &Tensor, out: &Tensor) -> Op {
    Add { a: a.clone(), b: b.clone(), out: out.clone() }.into()
}

fn copy(x: &Tensor, out: &Tensor) -> Op {
    Copy { x: x.clone(), out: out.clone() }.into()
}

fn at(buffer: &Buffer, offset: u64, elements: usize) -> Tensor {
    Tensor::new(buffer.clone(), offset, TensorDesc::new(DType::F32, &[elements]))
}

#[test]
fn mistakes_are_refused_with_reasons() {
    let (device, other) = (die(0), die(1));
    let (s, t) = (device.stream("s").unwrap(), device.stream("t").unwrap());
    let elsewhere = other.stream("elsewhere").unwrap();
    let x = tensor(&s, DType::F32, &[8]);
    let y = tensor(&s, DType::F32, &[8]);
    let wide = tensor(&s, DType::F32, &[9]);
    let big = s.alloc(64).unwrap();
    s.fill(&big.whole(), 0).unwrap();
    let fresh = s.alloc_tensor(DType::F32, &[8]).unwrap();
    let foreign = tensor(&elsewhere, DType::F32, &[8]);
    let host = device.alloc_host(32).unwrap();
    let norm = |out: &Tensor, weight: &Tensor| -> Op {
        let x = tensor(&s, DType::F32, &[2, 4]);
        let (weight, out) = (weight.clone(), out.clone());
        RmsNorm { x, weight, residual: None, out, eps: 1e-6 }.into()
    };
    let out = tensor(&s, DType::F32, &[2, 4]);
    let cases: Vec<(&str, Op, &str)> = vec![
        ("shape", add(&x, &wide, &y), "has not the shape of"),
        ("weight", norm(&out, &tensor(&s, DType::F32, &[5])), "expected f32[4]"),
        ("bounds", copy(&at(&big, 48, 8), &y), "leave Buffer"),
        ("alignment", copy(&at(&big, 2, 8), &y), "not aligned to 4"),
        ("die", copy(&foreign, &y), "not in the memory of die 0"),
        ("host memory", copy(&at(&host, 0, 8), &y), "not in the memory of die 0"),
        ("overlap", copy(&at(&big, 0, 8), &at(&big, 16, 8)), "overlaps x"),
        ("in place", copy(&x, &x), "overlaps x"),
        ("partly in place", add(&at(&big, 0, 8), &y, &at(&big, 16, 8)), "overlaps a"),
        ("never written", copy(&fresh, &y), "which nothing wrote"),
    ];
    for (name, op, words) in cases {
        let error = s.submit(&op.label(name)).unwrap_err();
        let text = error.to_string();
        assert!(matches!(error, Error::Usage(_)), "{name}: {text}");
        assert!(text.contains(words) && text.contains("die 0"), "{name}: {text}");
        assert!(text.contains(name), "{text}");
    }
    let refused = |result: hal::Result<()>, words: &str| {
        let text = result.unwrap_err().to_string();
        assert!(text.contains(words), "{text}");
    };
    refused(t.submit(&copy(&x, &y).into()), "hazard");
    refused(s.write(&x.region(), &[0; 31]), "31 bytes do not fill");
    refused(s.fill(&hal::Region { len: 65, ..big.whole() }, 0), "leave Buffer");
    refused(s.copy(&big.region(0, 16).unwrap(), &big.region(8, 16).unwrap()), "overlaps");
    refused(s.copy(&foreign.region(), &foreign.region()), "on this die");
    refused(s.wait(&elsewhere.point()), "of another system");
    let raw = NullDevice::new(DeviceId(7), 1 << 20).stream("raw").unwrap();
    refused(s.wait(&raw.point()), "not of this system");
    let mut bytes = [0; 32];
    refused(s.read(&fresh.region(), &mut bytes, SOON), "which nothing wrote");
}

#[test]
fn collectives_are_checked_as_far_as_one_rank_can() {
    let device = die(0);
    let s = device.stream("s").unwrap();
    let ranks = device.communicator(device.communicator_id().unwrap(), 0, 2).unwrap();
    let t = |n: usize| tensor(&s, DType::F32, &[n]);
    let u8s = || tensor(&s, DType::U8, &[4]);
    let gaps = tensor(&s, DType::F32, &[2, 4]).columns(0, 2);
    let counts = Some(Arc::new(PeerCounts { send: vec![1, 9], recv: vec![1, 1] }));
    let reduction = Reduction::Sum;
    for (collective, words) in [
        (Collective::AllReduce { send: t(3), recv: t(4), reduction }, "expected 3"),
        (Collective::AllGather { send: t(3), recv: t(4) }, "expected 6"),
        (Collective::ReduceScatter { send: t(3), recv: t(4), reduction }, "expected 8"),
        (Collective::AllToAll { send: t(3), recv: t(3), counts: None }, "equal parts"),
        (Collective::AllToAll { send: t(4), recv: t(4), counts }, "add up to 10 of 4"),
        (Collective::Send { tensor: t(1), peer: 2 }, "rank 2 of 2"),
        (Collective::Broadcast { tensor: gaps, root: 0 }, "has gaps"),
        (Collective::AllReduce { send: u8s(), recv: u8s(), reduction }, "u8 cannot be reduced"),
    ] {
        let error = s.submit_collectives(&ranks, &[collective], &Label::Static("c")).unwrap_err();
        assert!(error.to_string().contains(words), "{error}");
    }
    let send = t(4);
    let good = Collective::AllReduce { send: send.clone(), recv: send, reduction };
    s.submit_collectives(&ranks, &[good], &Label::Static("c")).unwrap();
}

#[test]
fn offsets_of_an_exchange_are_checked_like_what_they_cut() {
    let device = die(0);
    let (s, other) = (device.stream("s").unwrap(), device.stream("other").unwrap());
    let ranks = device.communicator(device.communicator_id().unwrap(), 0, 2).unwrap();
    let rows = |n: usize, width: usize| tensor(&s, DType::F32, &[n, width]);
    let offsets = |n: usize| tensor(&s, DType::I32, &[n]);
    let exchange = |send: Tensor, recv: Tensor, send_offsets, recv_offsets| {
        let expected_rows = 1;
        let batch =
            [Collective::AllToAllV { send, recv, send_offsets, recv_offsets, expected_rows }];
        s.submit_collectives(&ranks, &batch, &Label::Static("c")).map_err(|e| e.to_string())
    };
    let (shared, same) = (rows(4, 2), offsets(3));
    for (result, words) in [
        (exchange(rows(4, 2), rows(4, 3), offsets(3), None), "not rows of one width"),
        (exchange(rows(4, 2), rows(4, 2), offsets(2), None), "send_offsets is i32[2]"),
        (exchange(rows(4, 2), rows(4, 2), offsets(3), Some(offsets(4))), "recv_offsets is i32[4]"),
        (exchange(shared.clone(), shared, offsets(3), None), "recv overlaps send"),
        (exchange(rows(4, 2), rows(4, 2), same.clone(), Some(same)), "overlaps send_offsets"),
    ] {
        let error = result.unwrap_err();
        assert!(error.contains(words), "{error}");
    }
    // Offsets that another stream is still writing, and such that nobody wrote.
    let written = offsets(3);
    other.wait(&s.point()).unwrap();
    other.fill(&written.region(), 0).unwrap();
    let error = exchange(rows(4, 2), rows(4, 2), written.clone(), None).unwrap_err();
    assert!(error.contains("hazard: send_offsets"), "{error}");
    let fresh = s.alloc_tensor(DType::I32, &[3]).unwrap();
    let error = exchange(rows(4, 2), rows(4, 2), fresh.clone(), None).unwrap_err();
    assert!(error.contains("which nothing wrote"), "{error}");
    s.wait(&other.point()).unwrap();
    exchange(rows(4, 2), rows(4, 2), written, Some(fresh.clone())).unwrap();
    // What was received may be read, here; elsewhere only after a wait.
    let cut = exchange(rows(4, 2), rows(4, 2), fresh.clone(), None);
    cut.unwrap();
    let error = other.fill(&fresh.region(), 0).unwrap_err().to_string();
    assert!(error.contains("hazard"), "{error}");
}

#[test]
fn correct_programs_pass_and_leaks_are_found() {
    let device = die(0);
    let (s, t) = (device.stream("s").unwrap(), device.stream("t").unwrap());
    {
        let x = tensor(&s, DType::F32, &[4, 6]);
        s.submit(&add(&x, &x, &x).into()).unwrap();
        t.wait(&s.point()).unwrap();
        let out = t.alloc_tensor(DType::F32, &[4, 2]).unwrap();
        t.submit(&copy(&x.columns(1, 2), &out).into()).unwrap();
        // A cache need not be written before it is written into.
        let cache = s.alloc_tensor(DType::F32, &[2, 4, 6]).unwrap();
        let slots = tensor(&s, DType::I32, &[4]);
        let (latent, k_rope) = (x.columns(0, 4), x.columns(4, 2));
        let write = CacheWrite { latent, k_rope, slots: slots.clone(), cache: cache.clone() };
        s.submit(&Op::from(write).into()).unwrap();
        t.synchronize(SOON).unwrap();
        s.submit(&add(&out, &out, &out).into()).expect("the host synchronised");
        assert_eq!(device.leaks().len(), 4);
        assert_eq!(device.leaks().iter().map(|l| l.bytes).sum::<u64>(), 96 + 32 + 192 + 16);
    }
    assert_eq!(device.leaks(), []);
}

proptest! {
    #[test]
    fn refuses_exactly_what_nothing_orders(
        steps in prop::collection::vec((0usize..3, 0usize..4, 0usize..4, 0usize..3, 0u8..4), 1..40)
    ) {
        let device = die(0);
        let streams: Vec<_> = (0..3).map(|i| device.stream(&i.to_string()).unwrap()).collect();
        let tensors: Vec<_> = (0..4).map(|_| tensor(&streams[0], DType::F32, &[4])).collect();
        streams[0].synchronize(SOON).unwrap();
        // Per tensor the last writer and the readers since; per stream what it knows of others.
        let mut writer = [(0usize, 0u64); 4];
        let mut readers = vec![Vec::<(usize, u64)>::new(); 4];
        let mut seen = [[streams[0].point().value(), 0, 0]; 3];
        for (s, x, y, other, kind) in steps {
            let next = streams[s].point().value() + 1;
            if kind == 0 {
                if s == other { continue; }
                streams[s].wait(&streams[other].point()).unwrap();
                let known = seen[other];
                for i in 0..3 { seen[s][i] = seen[s][i].max(known[i]); }
                seen[s][other] = seen[s][other].max(streams[other].point().value());
                continue;
            }
            if x == y { continue; }
            let ordered = |(on, at): (usize, u64)| on == s || seen[s][on] >= at;
            let expected = ordered(writer[x])
                && ordered(writer[y])
                && readers[y].iter().all(|&r| ordered(r));
            let got = streams[s].submit(&copy(&tensors[x], &tensors[y]).into());
            prop_assert_eq!(got.is_ok(), expected);
            if expected {
                readers[x].push((s, next));
                writer[y] = (s, next);
                readers[y].clear();
            }
        }
    }
}

#[test]
fn a_lists_entries_are_checked_as_if_submitted_one_by_one() {
    let device = die(0);
    let streams = [device.stream("s").unwrap(), device.stream("t").unwrap()];
    let (x, y) = (tensor(&streams[0], DType::F32, &[8]), tensor(&streams[0], DType::F32, &[8]));
    let fresh = streams[0].alloc_tensor(DType::F32, &[8]).unwrap();
    let op = |stream, op: Op, label: &'static str| Entry {
        stream,
        action: ListAction::Op(Box::new(op.label(label))),
    };
    let wait = |stream, target| Entry { stream, action: ListAction::Wait(target) };
    let start = || wait(1, WaitFor::Start);
    // What is refused, in which words, and how many commands each stream has been given by then.
    let cases: Vec<(Vec<Entry>, Option<&str>, [u64; 2])> = vec![
        (vec![op(0, copy(&x, &fresh), "a"), op(0, copy(&fresh, &y), "b")], None, [2, 0]),
        (
            vec![start(), op(1, copy(&x, &y), "a"), op(0, copy(&x, &y), "late")],
            Some("hazard"),
            [0, 2],
        ),
        (vec![op(0, copy(&x, &x), "late"), start()], Some("overlaps"), [0, 0]),
        (
            vec![
                start(),
                op(1, add(&x, &x, &y), "a"),
                wait(0, WaitFor::Entry(1)),
                op(0, copy(&x, &y), "b"),
            ],
            None,
            [2, 2],
        ),
    ];
    let given = || [0, 1].map(|i: usize| streams[i].point().value());
    for (n, (entries, refused, expected)) in cases.into_iter().enumerate() {
        // What one case left unordered is not the next one's mistake.
        streams.iter().for_each(|s| s.synchronize(SOON).unwrap());
        let before = given();
        let launched = device.execute(&CommandList::new(entries, 2).unwrap(), &streams);
        match (launched, refused) {
            (Ok(()), None) => {}
            (Err(Error::Usage(error)), Some(words)) => {
                let text = error.to_string();
                assert!(text.contains(words) && text.contains("late"), "case {n}: {text}");
            }
            (launched, _) => panic!("case {n}: {launched:?}"),
        }
        assert_eq!([0, 1].map(|i: usize| given()[i] - before[i]), expected, "case {n}");
    }
    let (a, b) = (die(0), streams[0].clone());
    let list = CommandList::new(vec![], 1).unwrap();
    let error = a.execute(&list, &[b]).unwrap_err().to_string();
    assert!(error.contains("not of this system"), "{error}");
}

//! A small program on one die, and ways to record and replay.
#![allow(dead_code, reason = "each test file uses some of it")]

use hal::op::{Add, Copy, RmsNorm};
use hal::{DType, Device, DeviceId, Op, Operand, Stream, Tensor, TensorDesc};
use replay::file::{Reader, Writer};
use replay::record::{Call, Record};
use replay::{Header, Options, Recorder, Report};
use sim::{Machine, Mode, System};
use std::collections::HashMap;
use std::io::Cursor;
use std::sync::Arc;
use std::time::Duration;

pub(crate) const SOON: Duration = Duration::from_secs(20);

pub(crate) fn system(mode: Mode) -> System {
    let machine = Machine::named("va16").unwrap();
    System::new(machine, sim::Options { mode, threads: Some(2) }).unwrap()
}

/// What a program gets: dies that are recorded.
pub(crate) struct Bench {
    pub(crate) dies: Vec<Arc<dyn Device>>,
}

/// Records what `program` does on some dies of a simulator, and gives the file.
pub(crate) fn record(
    (mode, dies, all_outputs): (Mode, u32, bool),
    prepare: impl Fn(&dyn Device),
    program: impl FnOnce(&Bench),
) -> Vec<u8> {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("run.hal");
    let header =
        Header { program: "test".into(), command: vec!["a b".into(), "c".into()], all_outputs };
    let recorder = Recorder::create(&path, &header).unwrap();
    let system = system(mode);
    let open = |die| {
        let device = system.open(DeviceId(die)).unwrap();
        prepare(&*device);
        recorder.wrap(device)
    };
    let bench = Bench { dies: (0..dies).map(open).collect() };
    program(&bench);
    drop(bench);
    let summary = recorder.finish(true).unwrap().unwrap();
    assert_eq!(recorder.finish(true).unwrap(), None);
    let bytes = std::fs::read(&path).unwrap();
    assert_eq!((summary.path, summary.bytes), (path, bytes.len() as u64));
    let files: Vec<_> = std::fs::read_dir(folder.path()).unwrap().collect();
    assert_eq!(files.len(), 1, "{files:?}");
    bytes
}

pub(crate) fn replayed(
    file: &[u8],
    system: &System,
    prepare: impl Fn(&dyn Device),
    options: &Options,
) -> Result<Report, replay::ReplayError> {
    let mut reader = Reader::new(Cursor::new(file))?;
    let mut open = |die| {
        let device = system.open(die)?;
        prepare(&*device);
        Ok(device)
    };
    replay::replay(&mut reader, &mut open, options)
}

/// A replay on a healthy simulator.
pub(crate) fn replay(file: &[u8]) -> Report {
    replayed(file, &system(Mode::Full), |_| {}, &Options::default()).unwrap()
}

/// Every record and payload of a recording, changed by `change` and written again: a recording of
/// a run that went otherwise.
pub(crate) fn rewrite(
    file: &[u8],
    mut change: impl FnMut(usize, &mut Record, Option<&mut Vec<u8>>),
) -> Vec<u8> {
    let mut reader = Reader::new(Cursor::new(file)).unwrap();
    let mut writer = Writer::new(Vec::new(), reader.header()).unwrap();
    let mut number = 0;
    while let Some(mut stored) = reader.next_record().unwrap() {
        let payload = payload_of(&mut stored.record.call).copied();
        let mut bytes = payload.map(|n| reader.payload(n).unwrap().unwrap().to_vec());
        change(number, &mut stored.record, bytes.as_mut());
        if let (Some(payload), Some(bytes)) = (payload_of(&mut stored.record.call), bytes) {
            *payload = writer.payload(&bytes).unwrap();
        }
        writer.record(&stored.record).unwrap();
        number += 1;
    }
    writer.into_inner().unwrap()
}

fn payload_of(call: &mut Call) -> Option<&mut u64> {
    match call {
        Call::Write { payload, .. } | Call::HostWrite { payload, .. } => Some(payload),
        Call::Read { payload, .. } | Call::HostRead { payload, .. } => payload.as_mut(),
        _ => None,
    }
}

pub(crate) fn records(file: &[u8]) -> Vec<Record> {
    let mut reader = Reader::new(Cursor::new(file)).unwrap();
    std::iter::from_fn(|| reader.next_record().unwrap()).map(|stored| stored.record).collect()
}

/// How often each kind of call was recorded, by the name it has in the file.
pub(crate) fn kinds(file: &[u8]) -> HashMap<String, usize> {
    let mut kinds = HashMap::new();
    for record in records(file) {
        let json = serde_json::to_value(&record.call).unwrap();
        let name = json.as_object().unwrap().keys().next().unwrap().clone();
        *kinds.entry(name).or_default() += 1;
    }
    kinds
}

pub(crate) fn floats(stream: &dyn Stream, shape: &[usize], first: f32) -> Tensor {
    let tensor = stream.alloc_tensor(DType::F32, shape).unwrap();
    let values = (0..tensor.desc().elements()).flat_map(|i| (first + i as f32).to_le_bytes());
    stream.write(&tensor.region(), &values.collect::<Vec<_>>()).unwrap();
    tensor
}

pub(crate) fn read(stream: &dyn Stream, tensor: &Tensor) -> Vec<u8> {
    let region = tensor.region();
    let mut bytes = vec![0; region.len as usize];
    stream.read(&region, &mut bytes, SOON).unwrap();
    bytes
}

/// A program with every kind of call that one die has: two streams that wait for each other, views
/// with gaps, pinned memory, and memory that is freed and had again.
pub(crate) fn small_program(bench: &Bench) {
    let die = &bench.dies[0];
    let (load, compute) = (die.stream("load").unwrap(), die.stream("compute").unwrap());
    let x = floats(&*load, &[4, 6], 1.0);
    let weight = floats(&*load, &[3], 0.5);
    compute.wait(&load.point()).unwrap();
    let normed = compute.alloc_tensor(DType::F32, &[4, 6]).unwrap();
    compute.fill(&normed.region(), 0).unwrap();
    for half in 0..2 {
        let (x, out) = (x.columns(3 * half, 3), normed.columns(3 * half, 3));
        let norm = RmsNorm { x, weight: weight.clone(), residual: None, out, eps: 1e-6 };
        compute.submit(&Op::from(norm).label(format!("norm {half}"))).unwrap();
    }
    for _ in 0..2 {
        let sum = compute.alloc_tensor(DType::F32, &[4, 6]).unwrap();
        let add = Add { a: x.clone(), b: normed.clone(), out: sum.clone() };
        compute.submit(&Op::from(add).label("sum")).unwrap();
        let pinned = die.alloc_host(96).unwrap();
        compute.copy(&pinned.whole(), &sum.region()).unwrap();
        compute.synchronize(SOON).unwrap();
        let mut bytes = vec![0; 96];
        pinned.raw().read_host(0, &mut bytes).unwrap();
        bytes.reverse();
        pinned.raw().write_host(0, &bytes).unwrap();
        compute.copy(&sum.region(), &pinned.whole()).unwrap();
        let copy = compute.alloc_tensor(DType::F32, &[4, 6]).unwrap();
        let again = Copy { x: sum.clone(), out: copy.clone() };
        compute.submit(&Op::from(again).label("again")).unwrap();
        assert_eq!(read(&*compute, &copy), bytes);
    }
    let desc = TensorDesc::new(DType::F32, &[8]);
    let part = Tensor::new(normed.buffer().clone(), 8, desc);
    read(&*compute, &part);
}

//! What a launch costs above the backend: one small op through `dyn Stream` on the null device,
//! plain and validated, against calling the backend's type directly.

use criterion::{Criterion, criterion_group, criterion_main};
use hal::op::RmsNorm;
use hal::{Command, DType, Device, DeviceId, NullDevice, Op, Stream, Validated};
use std::hint::black_box;
use std::sync::Arc;

fn command(stream: &Arc<dyn Stream>) -> Command {
    let tensor = |shape: &[usize]| {
        let tensor = stream.alloc_tensor(DType::Bf16, shape).unwrap();
        stream.fill(&tensor.region(), 0).unwrap();
        tensor
    };
    let op = RmsNorm {
        x: tensor(&[1, 256]),
        weight: tensor(&[256]),
        residual: None,
        out: tensor(&[1, 256]),
        eps: 1e-6,
    };
    Op::from(op).label("norm")
}

fn dispatch(c: &mut Criterion) {
    let device: Arc<dyn Device> = NullDevice::new(DeviceId(0), 1 << 30);
    let plain = device.stream("plain").unwrap();
    let validated = Validated::wrap(device).stream("validated").unwrap();
    let mut group = c.benchmark_group("dispatch");
    for (name, stream) in [("dyn", plain), ("validated", validated)] {
        let ready = command(&stream);
        group.bench_function(format!("{name}/submit"), |b| {
            b.iter(|| stream.submit(black_box(&ready)).unwrap());
        });
        group.bench_function(format!("{name}/clone and submit"), |b| {
            b.iter(|| stream.submit(&black_box(&ready).clone()).unwrap());
        });
    }
    group.finish();
}

criterion_group!(benches, dispatch);
criterion_main!(benches);

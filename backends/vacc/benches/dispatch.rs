//! What a launch costs above the runtime library: one small op through `dyn Stream` and the FFI, next
//! to the C function called directly with the same descriptor. The library is the fake one, which
//! does nothing: `tests/c/fake.c`.
#![expect(unsafe_code, reason = "calls C directly, for comparison")]

#[path = "../tests/common/mod.rs"]
mod common;

use criterion::{Criterion, criterion_group, criterion_main};
use hal::op::RmsNorm;
use hal::{Command, DType, Device, DeviceId, Op, Stream};
use std::hint::black_box;
use std::ptr::{null, null_mut};
use std::sync::Arc;
use vacc::sys::*;

fn command(stream: &Arc<dyn Stream>) -> Command {
    let tensor = |shape: &[usize]| stream.alloc_tensor(DType::Bf16, shape).unwrap();
    let op = RmsNorm {
        x: tensor(&[1, 256]),
        weight: tensor(&[256]),
        residual: None,
        out: tensor(&[1, 256]),
        eps: 1e-6,
    };
    Op::from(op).label("norm")
}

/// The same op as C callers write it, for buffers of their own.
struct Direct {
    stream: vacc_stream,
    descriptor: vacc_op_rms_norm,
}

impl Direct {
    fn new(api: &Api) -> Direct {
        let (mut instance, mut device, mut stream) = (null_mut(), null_mut(), null_mut());
        let mut index = 0;
        // SAFETY: results go to locals; the label has one byte.
        let statuses = unsafe {
            [
                api.vacc_instance_create(null(), &raw mut instance),
                api.vacc_device_open(instance, 0, &raw mut device),
                api.vacc_stream_create(device, c"d".as_ptr(), 1, &raw mut stream, &raw mut index),
            ]
        };
        assert_eq!(statuses, [VACC_OK as i32; 3]);
        let tensor = |rank: u32, shape, strides| {
            let mut buffer = null_mut();
            // SAFETY: the stream is alive, the result is a local.
            let status = unsafe { api.vacc_buffer_alloc(stream, 512, &raw mut buffer) };
            assert_eq!(status, VACC_OK as i32);
            vacc_tensor { buffer, offset: 0, dtype: VACC_DTYPE_BF16, rank, shape, strides }
        };
        let row = || tensor(2, [1, 256, 0, 0], [256, 1, 0, 0]);
        let descriptor = vacc_op_rms_norm {
            size: struct_size::<vacc_op_rms_norm>(),
            x: row(),
            weight: tensor(1, [256, 0, 0, 0], [1, 0, 0, 0]),
            out: row(),
            eps: 1e-6,
            ..vacc_op_rms_norm::default()
        };
        Direct { stream, descriptor }
    }

    fn launch(&self, api: &Api, label: &str) -> i32 {
        let (text, length) = (label.as_ptr().cast(), label.len() as u64);
        let descriptor = (&raw const self.descriptor).cast();
        // SAFETY: the stream is alive and nobody else's, the descriptor is that of the code.
        unsafe { api.vacc_stream_launch(self.stream, VACC_OP_RMS_NORM, descriptor, text, length) }
    }
}

fn dispatch(c: &mut Criterion) {
    let runtime = common::load(common::fake("bench", &["-O2"]));
    let system = common::system(&runtime, "").unwrap();
    let device: Arc<dyn Device> = system.open(DeviceId(0)).unwrap();
    let stream = device.stream("bench").unwrap();
    let direct = Direct::new(runtime.api());
    let ready = command(&stream);
    let mut group = c.benchmark_group("vacc dispatch");
    group.bench_function("C function", |b| {
        b.iter(|| {
            let status = black_box(&direct).launch(runtime.api(), black_box("norm"));
            assert_eq!(status, VACC_OK as i32);
        });
    });
    group.bench_function("dyn Stream::submit", |b| {
        b.iter(|| stream.submit(black_box(&ready)).unwrap());
    });
    group.bench_function("dyn Stream, clone and submit", |b| {
        b.iter(|| stream.submit(&black_box(&ready).clone()).unwrap());
    });
    group.finish();
}

criterion_group!(benches, dispatch);
criterion_main!(benches);

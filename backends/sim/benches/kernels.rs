//! The hot kernels through the device, each with the share of the host's limit that it reaches:
//! bytes of weights over measured read bandwidth for a few tokens, and multiply-adds per second
//! against the same op on one thread's best shape for many.

#![expect(
    clippy::print_stderr,
    reason = "the fraction of the limit stands beside criterion's figures"
)]

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use hal::op::{AttentionWork, BlockGrid, Linear, MlaDecode};
use hal::{Command, DType, Device, DeviceId, Op, Stream, Tensor};
use sim::{Machine, Mode, Options, System};
use std::sync::Arc;
use std::time::{Duration, Instant};

const LONG: Duration = Duration::from_secs(60);

fn stream() -> (Arc<dyn Device>, Arc<dyn Stream>) {
    let options = Options { mode: Mode::FunctionalOnly, threads: None };
    let system = System::new(Machine::named("h800").unwrap(), options).unwrap();
    let device = system.open(DeviceId(0)).unwrap();
    let stream = device.stream("bench").unwrap();
    (device, stream)
}

fn filled(stream: &Arc<dyn Stream>, dtype: DType, shape: &[usize], byte: u8) -> Tensor {
    let tensor = stream.alloc_tensor(dtype, shape).unwrap();
    stream.fill(&tensor.region(), byte).unwrap();
    tensor
}

fn linear(stream: &Arc<dyn Stream>, dtype: DType, t: usize, n: usize, k: usize) -> Command {
    let fp8 = dtype == DType::F8E4M3;
    // 0x38 is 1.0 in FP8; repeated it is a small ordinary number in the other dtypes.
    let scales = |shape: &[usize]| fp8.then(|| filled(stream, DType::F32, shape, 0x38));
    let op = Linear {
        x: filled(stream, dtype, &[t, k], 0x38),
        x_scales: scales(&[t, k / 128]),
        w: filled(stream, dtype, &[n, k], 0x38),
        w_scales: scales(&[n / 128, k / 128]),
        out: filled(stream, DType::Bf16, &[t, n], 0),
        grid: BlockGrid::default(),
    };
    Op::from(op).label("linear")
}

fn attention(stream: &Arc<dyn Stream>, keys: usize, heads: usize) -> Command {
    let pages = keys.div_ceil(64);
    let table = filled(stream, DType::I32, &[1, pages], 0);
    let numbers: Vec<u8> = (0..pages as i32).flat_map(i32::to_le_bytes).collect();
    stream.write(&table.region(), &numbers).unwrap();
    let ints = |values: &[i32]| {
        let tensor = filled(stream, DType::I32, &[values.len()], 0);
        let bytes: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
        stream.write(&tensor.region(), &bytes).unwrap();
        tensor
    };
    let op = MlaDecode {
        q_latent: filled(stream, DType::Bf16, &[1, heads, 512], 0x38),
        q_rope: filled(stream, DType::Bf16, &[1, heads, 64], 0x38),
        cache: filled(stream, DType::Bf16, &[pages, 64, 576], 0x38),
        block_table: table,
        q_starts: ints(&[0, 1]),
        kv_lens: ints(&[keys as i32]),
        out: filled(stream, DType::Bf16, &[1, heads, 512], 0),
        scale: 0.1,
        work: AttentionWork { pairs: keys as u64, keys: keys as u64 },
    };
    Op::from(op).label("attention")
}

fn once(stream: &Arc<dyn Stream>, command: &Command) {
    stream.submit(command).unwrap();
    stream.synchronize(LONG).unwrap();
}

/// Seconds of the best of a few runs, for the fraction that is printed.
fn best(stream: &Arc<dyn Stream>, command: &Command) -> f64 {
    let run = || {
        let began = Instant::now();
        once(stream, command);
        began.elapsed().as_secs_f64()
    };
    (0..5).map(|_| run()).fold(f64::INFINITY, f64::min)
}

fn kernels(c: &mut Criterion) {
    let threads = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    let bandwidth = sim::host::read_bandwidth(threads).unwrap();
    eprintln!("host: {threads} threads read {:.1} GB/s", bandwidth * 1e-9);
    let (_device, stream) = stream();
    let mut group = c.benchmark_group("linear");
    group.sample_size(10);
    for dtype in [DType::F8E4M3, DType::Bf16, DType::F32] {
        // 32 MiB of weights: beyond the caches of common hosts, like a layer's own weights.
        let (n, k) = (8192, 4096 / dtype.size());
        for t in [1, 8, 128] {
            let command = linear(&stream, dtype, t, n, k);
            let seconds = best(&stream, &command);
            let bytes = (n * k * dtype.size()) as f64;
            let macs = (t * n * k) as f64;
            eprintln!(
                "linear {dtype} {t}x{n}x{k}: {:.1} GB/s of weights = {:.0}% of the read bandwidth, {:.1} GMAC/s",
                bytes / seconds * 1e-9,
                100.0 * bytes / seconds / bandwidth,
                macs / seconds * 1e-9
            );
            group.throughput(Throughput::Bytes(bytes as u64));
            group.bench_function(BenchmarkId::new(dtype.name(), t), |b| {
                b.iter(|| once(&stream, &command))
            });
        }
    }
    group.finish();
    let mut group = c.benchmark_group("mla_decode");
    group.sample_size(10);
    for keys in [1024, 16384] {
        let command = attention(&stream, keys, 16);
        let seconds = best(&stream, &command);
        let macs = (keys * 16 * (576 + 512)) as f64;
        let bytes = (keys * 576 * 2) as f64;
        eprintln!(
            "mla_decode {keys} keys, 16 heads: {:.1} GMAC/s, cache read at {:.0}% of the read bandwidth",
            macs / seconds * 1e-9,
            100.0 * bytes / seconds / bandwidth
        );
        group.bench_function(BenchmarkId::from_parameter(keys), |b| {
            b.iter(|| once(&stream, &command))
        });
    }
    group.finish();
}

criterion_group!(benches, kernels);
criterion_main!(benches);

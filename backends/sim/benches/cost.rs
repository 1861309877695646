//! How long the time model takes to answer: an op seen before, and one that is new.

use criterion::{Criterion, criterion_group, criterion_main};
use hal::op::{BlockGrid, Linear};
use hal::{DType, Op, TensorDesc};
use sim::Machine;
use sim::cost::{CostModel, TileModel};
use std::hint::black_box;

fn gemm(m: usize, n: usize, k: usize) -> Op<TensorDesc> {
    let d = |dtype, shape: &[usize]| TensorDesc::new(dtype, shape);
    Linear {
        x: d(DType::F8E4M3, &[m, k]),
        x_scales: Some(d(DType::F32, &[m, k.div_ceil(128)])),
        w: d(DType::F8E4M3, &[n, k]),
        w_scales: Some(d(DType::F32, &[n.div_ceil(128), k.div_ceil(128)])),
        out: d(DType::Bf16, &[m, n]),
        grid: BlockGrid::default(),
    }
    .into()
}

fn bench(c: &mut Criterion) {
    for name in ["va16", "h800"] {
        let model = TileModel::new(&Machine::named(name).expect("a built-in machine"));
        let op = gemm(128, 7168, 2048);
        c.bench_function(&format!("{name}: an op seen before"), |b| {
            b.iter(|| model.op(black_box(&op), None));
        });
        c.bench_function(&format!("{name}: a new op"), |b| {
            b.iter(|| model.explain(black_box(&op), None, None));
        });
    }
}

criterion_group!(benches, bench);
criterion_main!(benches);

//! One small matrix per head: the two halves of MLA's absorbed form.

use super::number::Float;
use super::scratch::Scratch;
use super::simd::{LANES, for_vectors, kernel, vector};
use super::{Arg, Args, Context};
use hal::op::BatchedLinear;
use hal::{DType, Operand};
use half::bf16;

/// Vectors, or rows of the weight, whose sums are kept in registers together.
const TILE: usize = 4;

kernel! {
    /// `out[n] = Σ_k x[k] · w[k][n]`, each sum in ascending order of k.
    fn k_major<L, T: Float>(x: &[T], w: &[T], stride: usize, out: &mut [f32]) {
        let width = out.len();
        let mut n = 0;
        while n < width {
            // Four vectors at a time, then one, then what is left: the same sums each way.
            if n + TILE * LANES <= width {
                let mut acc = [L::splat(0.0); TILE];
                for (k, value) in x.iter().enumerate() {
                    let value = L::splat(value.widen());
                    let row = &w[k * stride + n..k * stride + n + TILE * LANES];
                    for v in 0..TILE {
                        acc[v] = acc[v].fma(value, T::load(vector(row, v * LANES)));
                    }
                }
                for v in 0..TILE {
                    out[n + v * LANES..n + (v + 1) * LANES].copy_from_slice(&acc[v].array());
                }
                n += TILE * LANES;
            } else {
                let count = LANES.min(width - n);
                let mut acc = L::splat(0.0);
                for (k, value) in x.iter().enumerate() {
                    let row = &w[k * stride + n..k * stride + n + count];
                    let row: L = if count == LANES { T::load(vector(row, 0)) } else { T::load_some(row) };
                    acc = acc.fma(L::splat(value.widen()), row);
                }
                out[n..n + count].copy_from_slice(&acc.array()[..count]);
                n += count;
            }
        }
    }
}

kernel! {
    /// `out[n] = Σ_k x[k] · w[n][k]`.
    fn n_major<L, T: Float>(x: &[T], w: &[T], stride: usize, out: &mut [f32]) {
        let columns = x.len();
        let mut n = 0;
        while n < out.len() {
            let count = if n + TILE <= out.len() { TILE } else { 1 };
            let mut acc = [L::splat(0.0); TILE];
            if count == TILE {
                for_vectors!(|i| in columns, {
                    let xv: L = T::load(vector(x, i));
                    for r in 0..TILE {
                        acc[r] = acc[r].fma(T::load(vector(w, (n + r) * stride + i)), xv);
                    }
                }, |_rest| {
                    let xv: L = T::load_some(&x[i..]);
                    for r in 0..TILE {
                        let row = &w[(n + r) * stride..(n + r) * stride + columns];
                        acc[r] = acc[r].fma(T::load_some(&row[i..]), xv);
                    }
                });
            } else {
                let row = &w[n * stride..n * stride + columns];
                for_vectors!(|i| in columns, {
                    acc[0] = acc[0].fma(T::load(vector(row, i)), T::load(vector(x, i)));
                }, |_rest| {
                    acc[0] = acc[0].fma(T::load_some(&row[i..]), T::load_some(&x[i..]));
                });
            }
            for r in 0..count {
                out[n + r] = acc[r].sum();
            }
            n += count;
        }
    }
}

fn batched_as<T: Float>(op: &BatchedLinear<Arg>, args: &mut Args<'_>, ctx: &Context) {
    let (x, w) = (args.read::<T>(&op.x), args.read::<T>(&op.w));
    let (tokens, heads, columns) = (op.x.desc.dim(0), op.x.desc.dim(1), op.x.desc.dim(2));
    let (width, stride, per_head) = (op.out.desc.dim(2), op.w.desc.stride(1), op.w.desc.stride(0));
    let mut results = Scratch::any(tokens * heads * width);
    let one = |index: usize, out: &mut [f32]| {
        let (t, h) = (index / heads, index % heads);
        let w = &w.data[h * per_head..];
        match op.k_major {
            true => k_major(ctx.isa, x.row2(t, h), w, stride, out),
            false => n_major(ctx.isa, x.row2(t, h), w, stride, out),
        }
    };
    super::for_each_chunk(ctx, &mut results, width, columns * width, one);
    let mut out = args.write::<T>(&op.out);
    for (index, row) in results.chunks_exact(width.max(1)).enumerate() {
        let to = out.row2(index / heads, index % heads);
        to.iter_mut().zip(row).for_each(|(to, &v)| *to = T::round(v));
    }
}

/// See [`BatchedLinear`].
pub(super) fn batched_linear(op: &BatchedLinear<Arg>, args: &mut Args<'_>, ctx: &Context) {
    match op.x.desc().dtype() {
        DType::F32 => batched_as::<f32>(op, args, ctx),
        _ => batched_as::<bf16>(op, args, ctx),
    }
}

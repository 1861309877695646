//! Combining what ranks send: in ascending rank order, in FP32 (or in wrapping integers), rounded
//! once. Computed once, whoever gets it.

use hal::{DType, Reduction};
use half::bf16;

/// Elements that are combined over all ranks before the next ones: few enough to stay in the
/// nearest cache.
const BLOCK: usize = 2048;

/// Combines inputs of the same length.
pub(super) fn reduce(inputs: &[&[u8]], dtype: DType, reduction: Reduction) -> Vec<u8> {
    match dtype {
        DType::F32 => floats::<f32>(inputs, reduction, |v| v, |v| v),
        DType::Bf16 => floats::<bf16>(inputs, reduction, bf16::to_f32, bf16::from_f32),
        _ => integers(inputs, reduction),
    }
}

fn floats<T: bytemuck::Pod>(
    inputs: &[&[u8]],
    reduction: Reduction,
    widen: impl Fn(T) -> f32 + Copy,
    round: impl Fn(f32) -> T,
) -> Vec<u8> {
    match reduction {
        Reduction::Sum => fold(inputs, widen, |a, b| a + b, round),
        // NaN wins, as it would in a sum.
        Reduction::Max => {
            fold(inputs, widen, |a: f32, b| if a.is_nan() || a > b { a } else { b }, round)
        }
        Reduction::Min => {
            fold(inputs, widen, |a: f32, b| if a.is_nan() || a < b { a } else { b }, round)
        }
    }
}

fn integers(inputs: &[&[u8]], reduction: Reduction) -> Vec<u8> {
    match reduction {
        Reduction::Sum => fold(inputs, |v: i32| v, i32::wrapping_add, |v| v),
        Reduction::Max => fold(inputs, |v: i32| v, i32::max, |v| v),
        Reduction::Min => fold(inputs, |v: i32| v, i32::min, |v| v),
    }
}

fn fold<T: bytemuck::Pod, A: Copy>(
    inputs: &[&[u8]],
    widen: impl Fn(T) -> A,
    combine: impl Fn(A, A) -> A,
    round: impl Fn(A) -> T,
) -> Vec<u8> {
    let inputs: Vec<&[T]> = inputs.iter().map(|input| elements(input)).collect();
    let Some((first, rest)) = inputs.split_first() else { return Vec::new() };
    let mut out = Vec::with_capacity(size_of_val(*first));
    let mut sums: Vec<A> = Vec::with_capacity(BLOCK.min(first.len()));
    for (block, chunk) in first.chunks(BLOCK).enumerate() {
        sums.clear();
        sums.extend(chunk.iter().map(|&v| widen(v)));
        let at = block * BLOCK..block * BLOCK + chunk.len();
        for input in rest {
            for (sum, &v) in sums.iter_mut().zip(&input[at.clone()]) {
                *sum = combine(*sum, widen(v));
            }
        }
        for &sum in &sums {
            out.extend_from_slice(bytemuck::bytes_of(&round(sum)));
        }
    }
    out
}

/// An empty slice need not be aligned; views with elements are.
fn elements<T: bytemuck::Pod>(bytes: &[u8]) -> &[T] {
    if bytes.is_empty() { &[] } else { bytemuck::cast_slice(bytes) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn combined<T: bytemuck::Pod>(ranks: &[Vec<T>], dtype: DType, reduction: Reduction) -> Vec<T> {
        let inputs: Vec<&[u8]> = ranks.iter().map(|v| bytemuck::cast_slice(v)).collect();
        let sums = reduce(&inputs, dtype, reduction);
        sums.chunks_exact(size_of::<T>()).map(bytemuck::pod_read_unaligned).collect()
    }

    #[test]
    fn ranks_are_added_in_order_and_rounded_once() {
        // In another order this comes out differently.
        let ranks = [1e8f32, 1.0, -1e8, 1.0].map(|v| vec![v; BLOCK + 3]);
        let expected = vec![((1e8f32 + 1.0) - 1e8) + 1.0; BLOCK + 3];
        assert_eq!(combined(&ranks, DType::F32, Reduction::Sum), expected);
        // 257.5 goes to 258; rounded on the way, the sum would stay at 256.
        let ranks = [256.0, 1.0, 0.5].map(|v| vec![bf16::from_f32(v)]);
        assert_eq!(combined(&ranks, DType::Bf16, Reduction::Sum)[0].to_f32(), 258.0);
        let ranks = [i32::MAX, 1, 7].map(|v| vec![v]);
        assert_eq!(combined(&ranks, DType::I32, Reduction::Sum), [i32::MIN + 7]);
        for reduction in [Reduction::Sum, Reduction::Max, Reduction::Min] {
            let ranks = [1.0, f32::NAN, 2.0].map(|v| vec![v]);
            assert!(combined(&ranks, DType::F32, reduction)[0].is_nan(), "{reduction:?}");
            assert_eq!(combined::<f32>(&[vec![], vec![]], DType::F32, reduction), []);
        }
    }
}

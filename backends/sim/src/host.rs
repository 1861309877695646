//! What the simulating host can do: the limits that kernels are held against.

use rayon::prelude::*;
use std::hint::black_box;
use std::time::Instant;

/// Bytes that the probe reads: far more than any cache.
const PROBED: usize = 1 << 30;

/// Bytes per second that `threads` threads read from memory, end to end: the best of a few passes
/// over 1 GiB, since whatever else runs on the host only ever slows a pass down.
///
/// # Errors
///
/// If the host refuses threads.
pub fn read_bandwidth(threads: usize) -> Result<f64, rayon::ThreadPoolBuildError> {
    let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build()?;
    let data = vec![1u64; PROBED / 8];
    let pass = || {
        let began = Instant::now();
        let sums = pool.install(|| {
            let part = data.len().div_ceil(threads);
            data.par_chunks(part).map(sum).collect::<Vec<_>>()
        });
        black_box(sums);
        PROBED as f64 / began.elapsed().as_secs_f64()
    };
    Ok((0..6).map(|_| pass()).fold(0.0, f64::max))
}

/// A sum that is limited by loads alone: several independent chains.
fn sum(part: &[u64]) -> u64 {
    let mut lanes = [0u64; 32];
    let (chunks, rest) = part.as_chunks::<32>();
    for chunk in chunks {
        for (lane, value) in lanes.iter_mut().zip(chunk) {
            *lane = lane.wrapping_add(*value);
        }
    }
    lanes.iter().chain(rest).fold(0, |sum, value| sum.wrapping_add(*value))
}

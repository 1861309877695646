//! Tiles of products: a few rows and tokens, whose sums stay in registers.

use crate::kernels::simd::{Element, LANES, for_vectors, kernel, vector};
use hal::op::BlockGrid;

/// Weight rows of a tile.
pub(super) const ROWS: usize = 4;

/// Bytes that memory moves at once.
const CACHE_LINE: usize = 64;

/// What FP8 weights are loaded too small by; see `Lanes::load_fp8`.
pub(super) const FP8_FACTOR: f32 = 256.0;

/// `N` rows of a contiguous matrix from row `first`. A loop rather than `array::from_fn`, whose
/// closure is a call per row.
#[inline(always)]
pub(super) fn rows_of<const N: usize, T>(values: &[T], columns: usize, first: usize) -> [&[T]; N] {
    let mut rows = [&[][..]; N];
    for (r, row) in rows.iter_mut().enumerate() {
        *row = &values[(first + r) * columns..(first + r + 1) * columns];
    }
    rows
}

/// Adds the products of `R` rows and `M` tokens, vector by vector, to `acc`. A macro, as the body of
/// a kernel must be: see [`kernel`].
macro_rules! add_products {
    ($acc:ident, $w:ident, $x:ident, $columns:expr, |$i:ident| $before:block) => {
        for_vectors!(|$i| in $columns, {
            $before
            let mut xs = [L::splat(0.0); M];
            for m in 0..M {
                xs[m] = L::load(vector($x[m], $i));
            }
            for r in 0..R {
                let wv: L = W::load(vector($w[r], $i));
                for m in 0..M {
                    $acc[r][m] = $acc[r][m].fma(wv, xs[m]);
                }
            }
        }, |_rest| {
            let mut xs = [L::splat(0.0); M];
            for m in 0..M {
                xs[m] = L::load_some(&$x[m][$i..]);
            }
            for r in 0..R {
                let wv: L = W::load_some(&$w[r][$i..]);
                for m in 0..M {
                    $acc[r][m] = $acc[r][m].fma(wv, xs[m]);
                }
            }
        });
    };
}

/// The sums of a tile's lanes.
macro_rules! sums {
    ($acc:ident) => {{
        let mut out = [[0.0; M]; R];
        for r in 0..R {
            for m in 0..M {
                out[r][m] = $acc[r][m].sum();
            }
        }
        out
    }};
}

kernel! {
    /// A tile of plain products. `ahead` begins with the rows of the next tile.
    fn dense_tile<L, W: Element; const R, const M>(
        w: [&[W]; R],
        x: [&[f32]; M],
        ahead: &[W],
    ) -> [[f32; M]; R] {
        let mut acc = [[L::splat(0.0); M]; R];
        let columns = x[0].len();
        add_products!(acc, w, x, columns, |i| {
            if i % (CACHE_LINE / size_of::<W>()) == 0 {
                for r in 0..R {
                    if let Some(value) = ahead.get(r * columns + i) {
                        L::prefetch(value);
                    }
                }
            }
        });
        sums!(acc)
    }
}

/// The sums of a tile of block-scaled products: each group of columns is summed by itself, then
/// scaled and added lane by lane. `ahead` begins with the rows of the next tile.
macro_rules! scaled_sums {
    ($w:expr, $w_scales:expr, $x:expr, $x_scales:expr, $grid:expr, $ahead:expr) => {{
        let (rows, w_scales): ([&[W]; R], [&[f32]; R]) = ($w, $w_scales);
        let (tokens, x_scales): ([&[f32]; M], [&[f32]; M]) = ($x, $x_scales);
        let ahead: &[W] = $ahead;
        let mut total = [[L::splat(0.0); M]; R];
        let columns = tokens[0].len();
        for group in 0..x_scales[0].len() {
            let range = $grid.group_columns(group, columns);
            // The rows of the next tile follow each other: as many of its bytes as this group has.
            let mut next = range.start * R;
            while next < range.end * R {
                if let Some(value) = ahead.get(next) {
                    L::prefetch(value);
                }
                next += CACHE_LINE / size_of::<W>();
            }
            let (mut w, mut x) = (rows, tokens);
            for r in 0..R {
                w[r] = &w[r][range.start..range.end];
            }
            for m in 0..M {
                x[m] = &x[m][range.start..range.end];
            }
            let mut acc = [[L::splat(0.0); M]; R];
            add_products!(acc, w, x, range.len(), |i| {});
            for r in 0..R {
                for m in 0..M {
                    let scale = L::splat(w_scales[r][group] * x_scales[m][group] * FP8_FACTOR);
                    total[r][m] = total[r][m].fma(acc[r][m], scale);
                }
            }
        }
        sums!(total)
    }};
}

kernel! {
    /// A tile of block-scaled products.
    fn scaled_tile<L, W: Element; const R, const M>(
        w: [&[W]; R],
        w_scales: [&[f32]; R],
        x: [&[f32]; M],
        x_scales: [&[f32]; M],
        grid: BlockGrid,
        ahead: &[W],
    ) -> [[f32; M]; R] {
        scaled_sums!(w, w_scales, x, x_scales, grid, ahead)
    }
}

kernel! {
    /// As [`scaled_rows`], for rows that are no longer than a vector. Nearly all work is in adding
    /// lanes up, which is done for a vector of rows at once; returns how many rows are done.
    fn short_rows<L, W: Element>(
        w: &[W],
        w_scale: f32,
        x: &[f32],
        x_scale: f32,
        out: &mut [f32],
    ) -> usize {
        let columns = x.len();
        let (xs, scale) = (L::load_some(x), L::splat(w_scale * x_scale * FP8_FACTOR));
        let mut n = 0;
        while n + LANES <= out.len() {
            let mut totals = [L::splat(0.0); LANES];
            for r in 0..LANES {
                let row = &w[(n + r) * columns..(n + r + 1) * columns];
                let products = L::splat(0.0).fma(W::load_some(row), xs);
                totals[r] = totals[r].fma(products, scale);
            }
            out[n..n + LANES].copy_from_slice(&L::sums(totals));
            n += LANES;
        }
        n
    }
}

kernel! {
    /// The products of one token and all rows that share their scales: what tiles would give, for
    /// rows so short that calling one for every few of them would take longer than its sums.
    fn scaled_rows<L, W: Element>(
        w: &[W],
        w_scales: &[f32],
        x: &[f32],
        x_scales: &[f32],
        grid: BlockGrid,
        out: &mut [f32],
    ) {
        const M: usize = 1;
        let columns = x.len();
        let mut n = 0;
        while n + ROWS <= out.len() {
            const R: usize = ROWS;
            let (rows, ahead) = (rows_of(w, columns, n), &w[(n + R) * columns..]);
            let sums = scaled_sums!(rows, [w_scales; R], [x], [x_scales], grid, ahead);
            for r in 0..R {
                out[n + r] = sums[r][0];
            }
            n += R;
        }
        while n < out.len() {
            const R: usize = 1;
            let rows = rows_of(w, columns, n);
            let sums = scaled_sums!(rows, [w_scales; R], [x], [x_scales], grid, &[]);
            out[n] = sums[0][0];
            n += R;
        }
    }
}

kernel! {
    /// FP8 values, of which none is a NaN, times `factor`, a power of two.
    fn decode<L>(bytes: &[u8], factor: f32, out: &mut [f32]) {
        // −0 + x is x, whichever zero that is.
        let (zero, factor) = (L::splat(-0.0), L::splat(factor * FP8_FACTOR));
        for_vectors!(|i| in bytes.len(), {
            let values = zero.fma(L::load_fp8(vector(bytes, i)), factor);
            out[i..i + LANES].copy_from_slice(&values.array());
        }, |rest| {
            let values = zero.fma(L::load_some_fp8(&bytes[i..]), factor);
            out[i..].copy_from_slice(&values.array()[..rest]);
        });
    }
}

kernel! {
    /// Whether any FP8 value is a NaN.
    fn has_nan<_L>(bytes: &[u8]) -> bool {
        let mut found = 0u8;
        for &byte in bytes {
            found |= u8::from(byte & 0x7f == 0x7f);
        }
        found != 0
    }
}

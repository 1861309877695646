//! Matrix products: `out[t, n] = Σ_k x[t, k] · w[n, k]`, plain, block-scaled and grouped.
//!
//! Weights are read once and decoded in registers; activations are widened to FP32 beforehand.
//! A tile of [`ROWS`] weight rows and up to [`TOKENS`] tokens keeps its sums in registers. Work is
//! split over weight rows only, so that no sum is ever split.

mod tiles;

use super::number::{E4M3_VALUES, Float};
use super::scratch::Scratch;
use super::simd::{Element, LANES};
use super::{Arg, Args, Context, Outcome, View, ViewMut};
use hal::DType;
use hal::op::{BlockGrid, FP8_BLOCK, GroupedLinear, Linear, Routing};
use half::bf16;
use rayon::prelude::*;
use std::ops::Range;
use tiles::{
    FP8_FACTOR, ROWS, decode, dense_tile, has_nan, rows_of, scaled_rows, scaled_tile, short_rows,
};

/// Tokens of a tile.
const TOKENS: usize = 4;

/// From this many tokens on, a tile's FP8 rows are decoded once for all of them.
const DECODE_ONCE: usize = 2 * TOKENS;

/// Weights below this many bytes are not fetched ahead.
const SMALL_WEIGHT: usize = 1 << 12;

/// Bytes of the nearest cache, on common processors.
const NEAREST_CACHE: usize = 1 << 15;

/// Activations as FP32 rows, with the scales of each group of columns.
struct Activations {
    values: Scratch,
    scales: Option<Scratch>,
    columns: usize,
    groups: usize,
}

impl Activations {
    fn read(args: &Args<'_>, x: &Arg, x_scales: Option<&Arg>, ctx: &Context) -> Self {
        let (rows, columns) = (x.desc.dim(0), x.desc.dim(1));
        let mut values = Scratch::empty();
        match x.desc.dtype() {
            DType::F32 => collect(&args.read::<f32>(x), &mut values, |v| v),
            DType::Bf16 => collect(&args.read::<bf16>(x), &mut values, Element::widen),
            _ => {
                let x = args.read::<u8>(x);
                values.resize(rows * columns, 0.0);
                for (r, values) in values.chunks_exact_mut(columns.max(1)).enumerate() {
                    let bytes = x.row(r);
                    decode(ctx.isa, bytes, 1.0, values);
                    if has_nan(ctx.isa, bytes) {
                        let all = values.iter_mut().zip(bytes);
                        all.for_each(|(v, &byte)| *v = E4M3_VALUES[usize::from(byte)]);
                    }
                }
            }
        }
        let groups = x_scales.map_or(0, |s| s.desc.dim(1));
        let scales = x_scales.map(|s| {
            let mut scales = Scratch::empty();
            collect(&args.read::<f32>(s), &mut scales, |v| v);
            scales
        });
        Activations { values, scales, columns, groups }
    }

    fn rows_from<const M: usize>(&self, t: usize) -> [&[f32]; M] {
        rows_of(&self.values, self.columns, t)
    }

    fn scales_from<const M: usize>(&self, t: usize) -> [&[f32]; M] {
        rows_of(self.scales.as_ref().map_or(&[], |scales| &scales[..]), self.groups, t)
    }
}

fn collect<T: Copy>(x: &View<'_, T>, out: &mut Vec<f32>, widen: impl Fn(T) -> f32) {
    for r in 0..x.desc.dim(0) {
        out.extend(x.row(r).iter().map(|&v| widen(v)));
    }
}

/// One weight: rows of it, and their scales.
#[derive(Clone, Copy)]
struct Weight<'a, W> {
    values: &'a [W],
    scales: &'a [f32],
    rows: usize,
    grid: BlockGrid,
}

/// Tokens that meet one weight.
struct Group<'a, W> {
    weight: Weight<'a, W>,
    tokens: Range<usize>,
}

impl<'a, W: Element> Weight<'a, W> {
    fn rows_from<const R: usize>(&self, n: usize, columns: usize) -> [&'a [W]; R] {
        rows_of(self.values, columns, n)
    }

    /// The scales of each of the rows from `n`.
    fn scales_from<const R: usize>(&self, n: usize, groups: usize) -> [&'a [f32]; R] {
        let mut rows = [&[][..]; R];
        let scales_of = |n: usize| {
            let at = self.grid.scale_row(n, self.rows) * groups;
            &self.scales[at..at + groups]
        };
        let (first, last) = (scales_of(n), scales_of(n + R - 1));
        for (r, row) in rows.iter_mut().enumerate() {
            // Most tiles lie inside one block.
            *row = if std::ptr::eq(first, last) { first } else { scales_of(n + r) };
        }
        rows
    }

    /// The scales of row `n`, and how many rows from there on have the same.
    fn scale_run(&self, n: usize, groups: usize) -> (&'a [f32], usize) {
        let per_stack = self.rows / self.grid.stacks();
        let (within, at) = (n % per_stack, self.grid.scale_row(n, self.rows) * groups);
        let in_block = FP8_BLOCK - (within + self.grid.row_offset as usize) % FP8_BLOCK;
        (&self.scales[at..at + groups], in_block.min(per_stack - within))
    }

    /// The rows from `n` on, to be fetched ahead. Short rows end before the hardware has learned
    /// to do so by itself; small weights are in the cache anyway.
    fn ahead(&self, n: usize, columns: usize) -> &'a [W] {
        let small = size_of_val(self.values) < SMALL_WEIGHT;
        if small { &[] } else { &self.values[n * columns..] }
    }
}

/// A weight element type: how a block of rows meets the tokens.
trait Product: Element {
    /// `out[r][t]` for `R` rows from `n` and all tokens of the group.
    fn block<const R: usize>(
        ctx: &Context,
        w: &Weight<'_, Self>,
        n: usize,
        x: &Activations,
        tokens: Range<usize>,
        out: &mut [f32],
    );

    /// `out[r]` for as many rows from `n` as it holds, and one token.
    fn one_token(
        ctx: &Context,
        w: &Weight<'_, Self>,
        n: usize,
        x: &Activations,
        token: usize,
        out: &mut [f32],
    ) {
        blocks(ctx, w, n, x, token..token + 1, out);
    }

    /// Makes the results of weight rows that hold a NaN NaN, where products do not by themselves:
    /// `out` is that of all `tokens` for the rows from `n` on.
    fn mark_nans(
        _ctx: &Context,
        _w: &Weight<'_, Self>,
        _n: usize,
        _columns: usize,
        _tokens: usize,
        _out: &mut [f32],
    ) {
    }
}

/// Runs `tile` over the tokens in tiles of 4, then one by one.
macro_rules! over_tokens {
    ($tokens:expr, $out:expr, $R:expr, |$m:ident, $at:ident| $tile:expr) => {{
        let count = $tokens.len();
        let mut t = 0;
        while t < count {
            if t + TOKENS <= count {
                const $m: usize = TOKENS;
                let $at = $tokens.start + t;
                let tile = $tile;
                for r in 0..$R {
                    $out[r * count + t..r * count + t + TOKENS].copy_from_slice(&tile[r]);
                }
                t += TOKENS;
            } else {
                const $m: usize = 1;
                let $at = $tokens.start + t;
                let tile = $tile;
                for r in 0..$R {
                    $out[r * count + t] = tile[r][0];
                }
                t += 1;
            }
        }
    }};
}

macro_rules! dense_product {
    ($($W:ty),+) => {$(
        impl Product for $W {
            fn block<const R: usize>(
                ctx: &Context,
                w: &Weight<'_, Self>,
                n: usize,
                x: &Activations,
                tokens: Range<usize>,
                out: &mut [f32],
            ) {
                let rows = w.rows_from::<R>(n, x.columns);
                let ahead = w.ahead(n + R, x.columns);
                over_tokens!(tokens, out, R, |M, at| {
                    let x = x.rows_from::<M>(at);
                    dense_tile::<Self, R, M>(ctx.isa, rows, x, ahead)
                });
            }
        }
    )+};
}
dense_product!(f32, bf16);

impl Product for u8 {
    fn block<const R: usize>(
        ctx: &Context,
        w: &Weight<'_, Self>,
        n: usize,
        x: &Activations,
        tokens: Range<usize>,
        out: &mut [f32],
    ) {
        let rows = w.rows_from::<R>(n, x.columns);
        let scales = w.scales_from::<R>(n, x.groups);
        let grid = w.grid;
        if tokens.len() >= DECODE_ONCE {
            let mut decoded = Scratch::any(R * x.columns);
            for (row, out) in rows.iter().zip(decoded.chunks_mut(x.columns)) {
                decode(ctx.isa, row, 1.0 / FP8_FACTOR, out);
            }
            let rows = rows_of::<R, f32>(&decoded, x.columns, 0);
            over_tokens!(tokens, out, R, |M, at| {
                let (values, x_scales) = (x.rows_from::<M>(at), x.scales_from::<M>(at));
                scaled_tile::<f32, R, M>(ctx.isa, rows, scales, values, x_scales, grid, &[])
            });
        } else {
            let ahead = w.ahead(n + R, x.columns);
            over_tokens!(tokens, out, R, |M, at| {
                let (values, x_scales) = (x.rows_from::<M>(at), x.scales_from::<M>(at));
                scaled_tile::<u8, R, M>(ctx.isa, rows, scales, values, x_scales, grid, ahead)
            });
        }
    }

    fn one_token(
        ctx: &Context,
        w: &Weight<'_, Self>,
        mut n: usize,
        x: &Activations,
        token: usize,
        mut out: &mut [f32],
    ) {
        let ([values], [x_scales]) = (x.rows_from::<1>(token), x.scales_from::<1>(token));
        while !out.is_empty() {
            let (scales, run) = w.scale_run(n, x.groups);
            let run = run.min(out.len());
            let (these, rest) = out.split_at_mut(run);
            let rows = &w.values[n * x.columns..(n + run) * x.columns];
            let short = x.columns <= LANES && x.groups == 1;
            let done = match short {
                true => short_rows(ctx.isa, rows, scales[0], values, x_scales[0], these),
                false => 0,
            };
            let (rows, these) = (&rows[done * x.columns..], &mut these[done..]);
            scaled_rows(ctx.isa, rows, scales, values, x_scales, w.grid, these);
            n += run;
            out = rest;
        }
    }

    fn mark_nans(
        ctx: &Context,
        w: &Weight<'_, Self>,
        n: usize,
        columns: usize,
        tokens: usize,
        out: &mut [f32],
    ) {
        let weights = &w.values[n * columns..][..out.len() / tokens * columns];
        if has_nan(ctx.isa, weights) {
            for (row, out) in weights.chunks_exact(columns).zip(out.chunks_exact_mut(tokens)) {
                if has_nan(ctx.isa, row) {
                    out.fill(f32::NAN);
                }
            }
        }
    }
}

/// `out[n - first][t]` for the weight's rows from `first`, as many as `out` holds.
fn rows<W: Product>(
    ctx: &Context,
    group: &Group<'_, W>,
    first: usize,
    x: &Activations,
    out: &mut [f32],
) {
    let count = group.tokens.len();
    if count == 0 {
        return;
    }
    // Rows whose weights are still near when they are looked at again.
    let near = (NEAREST_CACHE / 2 / (x.columns * size_of::<W>()).max(1)).next_multiple_of(ROWS);
    let mut n = first;
    for out in out.chunks_mut(near.max(ROWS) * count) {
        match count {
            1 => W::one_token(ctx, &group.weight, n, x, group.tokens.start, out),
            _ => blocks(ctx, &group.weight, n, x, group.tokens.clone(), out),
        }
        W::mark_nans(ctx, &group.weight, n, x.columns, count, out);
        n += out.len() / count;
    }
}

/// `out[r][t]` for as many rows from `n` as it holds, and all tokens, in tiles.
fn blocks<W: Product>(
    ctx: &Context,
    w: &Weight<'_, W>,
    mut n: usize,
    x: &Activations,
    tokens: Range<usize>,
    out: &mut [f32],
) {
    // Taller tiles for single tokens were tried and are no faster: memory sets the pace.
    let mut blocks = out.chunks_exact_mut(ROWS * tokens.len());
    for block in &mut blocks {
        W::block::<ROWS>(ctx, w, n, x, tokens.clone(), block);
        n += ROWS;
    }
    for row in blocks.into_remainder().chunks_exact_mut(tokens.len()) {
        W::block::<1>(ctx, w, n, x, tokens.clone(), row);
        n += 1;
    }
}

/// All groups; the result of group `g` is `[rows][tokens]`, one after the other.
fn products<W: Product>(ctx: &Context, groups: &[Group<'_, W>], x: &Activations) -> Scratch {
    let sizes = groups.iter().map(|g| g.weight.rows * g.tokens.len());
    let mut out = Scratch::any(sizes.clone().sum());
    let work = out.len() * x.columns;
    if work < super::PARALLEL || ctx.threads == 1 {
        let mut rest = out.as_mut_slice();
        for (group, size) in groups.iter().zip(sizes) {
            let (mine, later) = rest.split_at_mut(size);
            rows(ctx, group, 0, x, mine);
            rest = later;
        }
        return out;
    }
    // Pieces of equal work, a few per thread, each of whole blocks of rows.
    let piece = (out.len() / (ctx.threads * 8)).max(1);
    let mut pieces = Vec::new();
    let mut rest = out.as_mut_slice();
    for group in groups {
        let tokens = group.tokens.len();
        let step = (piece / tokens.max(1)).next_multiple_of(ROWS).max(ROWS);
        let mut first = 0;
        while first < group.weight.rows {
            let count = step.min(group.weight.rows - first);
            let (mine, later) = rest.split_at_mut(count * tokens);
            pieces.push((group, first, mine));
            (rest, first) = (later, first + count);
        }
    }
    pieces.into_par_iter().for_each(|(group, first, out)| rows(ctx, group, first, x, out));
    out
}

/// Writes `[rows][tokens]` results to `out[t, n]`.
fn store<T: Float, W>(groups: &[Group<'_, W>], results: &[f32], out: &mut ViewMut<'_, T>) {
    let mut rest = results;
    for Group { weight, tokens } in groups {
        let count = tokens.len();
        let (mine, later) = rest.split_at(weight.rows * count);
        rest = later;
        if count == 1 {
            let row = out.row(tokens.start);
            row.iter_mut().zip(mine).for_each(|(v, &result)| *v = T::round(result));
            continue;
        }
        for t in 0..count {
            let row = out.row(tokens.start + t);
            row.iter_mut().enumerate().for_each(|(n, v)| *v = T::round(mine[n * count + t]));
        }
    }
}

fn multiply<W: Product>(
    ctx: &Context,
    args: &mut Args<'_>,
    groups: &[Group<'_, W>],
    x: &Activations,
    out: &Arg,
) {
    let results = products(ctx, groups, x);
    match out.desc.dtype() {
        DType::F32 => store(groups, &results, &mut args.write::<f32>(out)),
        _ => store(groups, &results, &mut args.write::<bf16>(out)),
    }
}

fn linear_as<W: Product>(op: &Linear<Arg>, args: &mut Args<'_>, ctx: &Context) {
    let x = Activations::read(args, &op.x, op.x_scales.as_ref(), ctx);
    let w = args.read::<W>(&op.w);
    let scales = op.w_scales.as_ref().map_or(&[][..], |s| args.read::<f32>(s).data);
    let rows = op.w.desc.dim(0);
    let weight = Weight { values: w.data, scales, rows, grid: op.grid };
    let groups = [Group { weight, tokens: 0..op.x.desc.dim(0) }];
    multiply(ctx, args, &groups, &x, &op.out);
}

/// See [`Linear`].
pub(super) fn linear(op: &Linear<Arg>, args: &mut Args<'_>, ctx: &Context) {
    match op.w.desc.dtype() {
        DType::F32 => linear_as::<f32>(op, args, ctx),
        DType::Bf16 => linear_as::<bf16>(op, args, ctx),
        _ => linear_as::<u8>(op, args, ctx),
    }
}

fn grouped_as<W: Product>(
    op: &GroupedLinear<Arg>,
    args: &mut Args<'_>,
    ctx: &Context,
) -> Result<Outcome, String> {
    let offsets = args.read::<i32>(&op.offsets).data;
    super::cache::check_starts("offsets", offsets, op.x.desc.dim(0))?;
    let x = Activations::read(args, &op.x, op.x_scales.as_ref(), ctx);
    let w = args.read::<W>(&op.w);
    let scales = op.w_scales.as_ref().map(|s| args.read::<f32>(s).data);
    let (experts, rows, columns) = (op.w.desc.dim(0), op.w.desc.dim(1), op.w.desc.dim(2));
    let per_expert = op.grid.scale_rows(rows) * x.groups;
    let groups: Vec<Group<'_, W>> = (0..experts)
        .filter(|&e| offsets[e] < offsets[e + 1])
        .map(|e| Group {
            weight: Weight {
                values: &w.data[e * rows * columns..(e + 1) * rows * columns],
                scales: scales.map_or(&[], |s| &s[e * per_expert..(e + 1) * per_expert]),
                rows,
                grid: op.grid,
            },
            tokens: offsets[e] as usize..offsets[e + 1] as usize,
        })
        .collect();
    multiply(ctx, args, &groups, &x, &op.out);
    let routing =
        Routing { rows: offsets[experts] as u32, active_experts: (groups.len() as u32).max(1) };
    Ok(Outcome { routing: Some(routing) })
}

/// See [`GroupedLinear`].
pub(super) fn grouped_linear(
    op: &GroupedLinear<Arg>,
    args: &mut Args<'_>,
    ctx: &Context,
) -> Result<Outcome, String> {
    match op.w.desc.dtype() {
        DType::F32 => grouped_as::<f32>(op, args, ctx),
        DType::Bf16 => grouped_as::<bf16>(op, args, ctx),
        _ => grouped_as::<u8>(op, args, ctx),
    }
}

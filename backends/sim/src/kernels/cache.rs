//! Positions and pages: rotary embedding and the paged latent cache.

use super::number::Float;
use super::{Arg, Args};
use hal::DType;
use hal::op::{CacheRead, CacheWrite, Rope};
use half::bf16;

/// See [`Rope`].
pub(super) fn rope(op: &Rope<Arg>, args: &mut Args<'_>) -> Result<(), String> {
    match op.x.desc.dtype() {
        DType::F32 => rope_as::<f32>(op, args),
        _ => rope_as::<bf16>(op, args),
    }
}

fn rope_as<T: Float>(op: &Rope<Arg>, args: &mut Args<'_>) -> Result<(), String> {
    let (positions, table) = (args.read::<i32>(&op.positions).data, args.read::<f32>(&op.table));
    let limit = op.table.desc.dim(0);
    if let Some(bad) = positions.iter().find(|&&p| p < 0 || p as usize >= limit) {
        return Err(format!("position {bad} is not one of the table's {limit}"));
    }
    let mut x = args.write::<T>(&op.x);
    let (heads, d) = (op.x.desc.dim(1), op.x.desc.dim(2));
    for (t, &position) in positions.iter().enumerate() {
        let (cos, sin) = table.row(position as usize).split_at(d / 2);
        for h in 0..heads {
            for (pair, (c, s)) in x.row2(t, h).chunks_exact_mut(2).zip(cos.iter().zip(sin)) {
                let (a, b) = (pair[0].widen(), pair[1].widen());
                pair[0] = T::round(a.mul_add(*c, -(b * s)));
                pair[1] = T::round(a.mul_add(*s, b * c));
            }
        }
    }
    Ok(())
}

/// See [`CacheWrite`].
pub(super) fn write(op: &CacheWrite<Arg>, args: &mut Args<'_>) -> Result<(), String> {
    match op.cache.desc.dtype() {
        DType::F32 => write_as::<f32>(op, args),
        _ => write_as::<bf16>(op, args),
    }
}

fn write_as<T: Float>(op: &CacheWrite<Arg>, args: &mut Args<'_>) -> Result<(), String> {
    let (latent, k_rope) = (args.read::<T>(&op.latent), args.read::<T>(&op.k_rope));
    let slots = args.read::<i32>(&op.slots).data;
    let cache = args.write::<T>(&op.cache).data;
    let (rank, width) = (op.latent.desc.dim(1), op.cache.desc.dim(2));
    let limit = op.cache.desc.dim(0) * op.cache.desc.dim(1);
    for (t, &slot) in slots.iter().enumerate() {
        let Ok(slot) = usize::try_from(slot) else { continue };
        if slot >= limit {
            return Err(format!("slot {slot} (token {t}) is not one of the cache's {limit}"));
        }
        let (to_latent, to_rope) = cache[slot * width..(slot + 1) * width].split_at_mut(rank);
        to_latent.copy_from_slice(latent.row(t));
        to_rope.copy_from_slice(k_rope.row(t));
    }
    Ok(())
}

/// Sequences as `starts` cut a row of tokens: checks that they ascend from 0 to at most `limit`.
pub(crate) fn check_starts(name: &str, starts: &[i32], limit: usize) -> Result<(), String> {
    let ascending = starts.first() == Some(&0) && starts.windows(2).all(|s| s[0] <= s[1]);
    if ascending && starts.last().is_some_and(|&last| last as usize <= limit) {
        return Ok(());
    }
    Err(format!("{name} {starts:?} do not ascend from 0 to at most {limit}"))
}

/// Checks that the pages of `keys` keys are in the table and in the cache.
pub(super) fn check_pages(
    pages: &[i32],
    keys: usize,
    page_size: usize,
    cache_pages: usize,
) -> Result<(), String> {
    let needed = keys.div_ceil(page_size.max(1));
    if needed > pages.len() {
        return Err(format!("{keys} keys need {needed} pages; the table has {}", pages.len()));
    }
    match pages[..needed].iter().find(|&&p| p < 0 || p as usize >= cache_pages) {
        Some(page) => Err(format!("page {page} is not one of the cache's {cache_pages}")),
        None => Ok(()),
    }
}

/// See [`CacheRead`].
pub(super) fn read(op: &CacheRead<Arg>, args: &mut Args<'_>) -> Result<(), String> {
    match op.cache.desc.dtype() {
        DType::F32 => read_as::<f32>(op, args),
        _ => read_as::<bf16>(op, args),
    }
}

fn read_as<T: Float>(op: &CacheRead<Arg>, args: &mut Args<'_>) -> Result<(), String> {
    let cache = args.read::<T>(&op.cache).data;
    let (table, starts) = (args.read::<i32>(&op.block_table), args.read::<i32>(&op.kv_starts).data);
    let (page_size, width) = (op.cache.desc.dim(1), op.cache.desc.dim(2));
    check_starts("kv_starts", starts, op.out.desc.dim(0))?;
    let mut out = args.write::<T>(&op.out);
    for (b, pair) in starts.windows(2).enumerate() {
        let (start, keys) = (pair[0] as usize, (pair[1] - pair[0]) as usize);
        let pages = table.row(b);
        check_pages(pages, keys, page_size, op.cache.desc.dim(0))?;
        for i in 0..keys {
            let slot = pages[i / page_size] as usize * page_size + i % page_size;
            out.row(start + i).copy_from_slice(&cache[slot * width..(slot + 1) * width]);
        }
    }
    Ok(())
}

//! MLA attention as tiles: expanded over causal triangles, absorbed over split key ranges.

use super::die::DieFigures;
use super::program::{Bytes, Program, TileClass};
use hal::DType;

/// Vector operations per score: scale, maximum, exponential, sum, and turning old results.
const SCORE_OPS: f64 = 8.0;

/// Classes of equal tiles that a program keeps apart; longer sequences round several query tiles
/// to their mean.
const MOST_CLASSES: u64 = 256;

/// Absorbed attention over the latent cache.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Decode {
    pub(crate) sequences: u64,
    /// Query tokens of a sequence, times heads.
    pub(crate) rows: u64,
    /// Keys over all sequences.
    pub(crate) keys: u64,
    /// Width of a cached row, and of its part that is the value.
    pub(crate) width: u64,
    pub(crate) rank: u64,
    /// Of the queries and the products.
    pub(crate) dtype: DType,
    /// Bytes of a cached element.
    pub(crate) cache_size: u64,
    pub(crate) reads: f64,
    pub(crate) writes: f64,
}

/// The mapping in words, and the program. [`None`] without work.
pub(crate) fn decode(die: &DieFigures, a: &Decode) -> Option<(String, Program)> {
    if a.sequences == 0 || a.rows == 0 || a.keys == 0 {
        return None;
    }
    let library = &die.library;
    let rows = a.rows.next_multiple_of(die.alignment).min(library.decode_rows.max(die.alignment));
    let row_blocks = a.rows.div_ceil(rows);
    let blocks = a.sequences * a.keys.div_ceil(a.sequences).div_ceil(library.attention_keys);
    // As many parts as cores leave, fewer where combining them costs more than they save.
    let most = (die.cores / row_blocks).clamp(1, blocks);
    let parts = (1..=16u64).rev().map(|part| (most * part).div_ceil(16));
    let parts = parts.chain([a.sequences.min(most)]);
    let mut best: Option<(f64, u64, Program)> = None;
    for parts in parts {
        let program = decode_program(die, a, rows, row_blocks, blocks, parts);
        let seconds = program.seconds();
        if best.as_ref().is_none_or(|(least, ..)| seconds < *least) {
            best = Some((seconds, parts, program));
        }
    }
    let (_, parts, program) = best?;
    let text = format!(
        "tiles of {rows} query rows for {}, {} keys a step; keys of {} sequence(s) in {parts} part(s) \
         of {} step(s) on {} cores{}",
        a.rows,
        library.attention_keys,
        a.sequences,
        blocks.div_ceil(parts),
        die.cores,
        if parts > a.sequences { ", then combined" } else { "" }
    );
    Some((text, program))
}

fn decode_program(
    die: &DieFigures,
    a: &Decode,
    rows: u64,
    row_blocks: u64,
    blocks: u64,
    parts: u64,
) -> Program {
    let library = &die.library;
    let keys = library.attention_keys as f64;
    let size = a.cache_size as f64;
    // Loading a sequence's queries and draining the pipeline takes as long as a step.
    let segments = a.sequences.div_ceil(parts);
    let steps = blocks.div_ceil(parts) + segments;
    let tiles = parts * row_blocks;
    let scores = rows as f64 * keys;
    let operations = 2.0 * scores * (a.width + a.rank) as f64;
    let matrix = operations / (die.matrix(a.dtype) * library.decode_reach);
    let block = keys * a.width as f64 * size;
    let split = parts > a.sequences;
    let partials = if split { (tiles * segments * rows * a.rank * 4) as f64 } else { 0.0 };
    let all_steps = (tiles * steps) as f64;
    // Tiles of one sequence read the same keys at the same time; the cache serves all but one.
    let from_memory = if die.cache_bytes > 0.0 {
        a.reads
    } else {
        a.reads + (row_blocks - 1) as f64 * a.keys as f64 * a.width as f64 * size
    };
    let class = TileClass {
        count: tiles,
        steps,
        compute: matrix.max(SCORE_OPS * scores / die.vector).max(2.0 * die.matrix_step),
        load: Bytes { port: block, cache: block, memory: from_memory / all_steps },
        epilogue: segments as f64 * (rows * a.rank) as f64 / die.vector,
        store: if split { partials } else { a.writes } / tiles as f64,
    };
    let finish = match split {
        false => 0.0,
        true => {
            die.kernel
                + die.memory_latency
                + partials / die.stream_rates.load
                + a.writes / die.stream_rates.store
        }
    };
    Program {
        cores: die.cores,
        stages: (die.core_bytes / (block as u64).max(1)).clamp(2, library.stages),
        stores_overlap: false,
        startup: die.startup,
        rates: die.stream_rates,
        classes: vec![class],
        finish,
    }
}

/// Expanded attention, causal.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Prefill {
    /// New tokens, and keys, over all sequences.
    pub(crate) tokens: u64,
    pub(crate) keys: u64,
    /// Pairs of a query token and a key it sees.
    pub(crate) pairs: u64,
    pub(crate) heads: u64,
    /// Width of a key, and of a value.
    pub(crate) key: u64,
    pub(crate) value: u64,
    pub(crate) dtype: DType,
    pub(crate) reads: f64,
    pub(crate) writes: f64,
}

/// The mapping in words, and the program. [`None`] without work.
pub(crate) fn prefill(die: &DieFigures, a: &Prefill) -> Option<(String, Program)> {
    if a.tokens == 0 || a.heads == 0 || a.pairs == 0 {
        return None;
    }
    let library = &die.library;
    let (rows, keys) = (library.prefill_rows, library.attention_keys);
    // As many equal sequences as have this many pairs: long ones among short ones weigh more.
    let past = a.keys.saturating_sub(a.tokens);
    let one = a.tokens as f64 * past as f64 + a.tokens as f64 * (a.tokens + 1) as f64 / 2.0;
    let sequences = ((one / a.pairs as f64).round() as u64).clamp(1, a.tokens);
    let queries = a.tokens.div_ceil(sequences);
    let past = past / sequences;
    let tiles = queries.div_ceil(rows);
    let together = tiles.div_ceil(MOST_CLASSES);
    let scores = (rows * keys) as f64;
    let operations = 2.0 * scores * (a.key + a.value) as f64;
    let compute = (operations / (die.matrix(a.dtype) * library.prefill_reach))
        .max(SCORE_OPS * scores / die.vector)
        .max(2.0 * die.matrix_step);
    let step = (keys * (a.key + a.value)) as f64 * a.dtype.size() as f64;
    // The longest first: the short ones fill the gaps at the end.
    let mut classes: Vec<TileClass> = Vec::new();
    let mut last = tiles;
    while last > 0 {
        let first = last.saturating_sub(together);
        let steps = |tile: u64| (past + (tile * rows).min(queries)).div_ceil(keys);
        let sum: u64 = (first + 1..=last).map(steps).sum();
        classes.push(TileClass {
            count: sequences * a.heads * (last - first),
            steps: sum.div_ceil(last - first).max(1),
            compute,
            load: Bytes { port: step, cache: step, memory: step },
            epilogue: (rows * a.value) as f64 / die.vector,
            store: a.writes / (sequences * a.heads * tiles) as f64,
        });
        last = first;
    }
    if die.cache_bytes > 0.0 {
        // Query tiles of a head read the same keys; the cache serves all but the first.
        let all: u64 = classes.iter().map(|c| c.count * c.steps).sum();
        for class in &mut classes {
            class.load.memory = a.reads / all as f64;
        }
    }
    let program = Program {
        cores: die.cores,
        stages: (die.core_bytes / (step as u64).max(1)).clamp(2, library.stages),
        stores_overlap: library.stores_overlap,
        startup: die.startup,
        rates: die.stream_rates,
        classes,
        finish: 0.0,
    };
    let text = format!(
        "tiles of {rows} query rows, {keys} keys a step; {} tiles of {} head(s), the longest first, \
         on {} cores",
        program.tiles(),
        a.heads,
        die.cores
    );
    Some((text, program))
}

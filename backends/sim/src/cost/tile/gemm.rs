//! Matrix products as tiles: dense, grouped, one per head.

use super::die::DieFigures;
use super::program::{Bytes, Program, TileClass};
use crate::machine::TileChoice;
use hal::DType;
use std::fmt;

/// Bytes of K that a step of the main loop takes: the width of an FP8 scale group, and the width of
/// the swizzled shared-memory rows that matrix units read.
const STEP_BYTES: u64 = 128;

/// How the rows of a grouped product lie in memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Layout {
    /// One product.
    Dense,
    /// Groups one after the other, each padded to the library's group height.
    Contiguous,
    /// Each group in a place of its own, with a count; tiles beyond the count are left out.
    Masked,
}

/// One or more products of equal size.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Product {
    pub(crate) layout: Layout,
    pub(crate) groups: u64,
    /// Rows of each group.
    pub(crate) m: u64,
    pub(crate) n: u64,
    pub(crate) k: u64,
    pub(crate) dtype: DType,
    pub(crate) out_size: u64,
    /// Bytes read from memory if each operand is read once.
    pub(crate) reads: f64,
    /// Bytes of results.
    pub(crate) writes: f64,
}

/// A way to cut a product into tiles.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Mapping {
    rows: u64,
    columns: u64,
    /// Pieces of K.
    split: u64,
    tiles: u64,
    steps: u64,
    stages: u64,
    cores: u64,
    /// Cores that load an operand together.
    cluster: u64,
}

impl Mapping {
    fn waves(&self) -> u64 {
        self.tiles.div_ceil(self.cores)
    }

    fn last_wave(&self) -> u64 {
        match self.tiles % self.cores {
            0 => self.cores,
            rest => rest,
        }
    }
}

impl fmt::Display for Mapping {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Mapping { rows, columns, split, tiles, steps, stages, cores, cluster } = self;
        write!(
            f,
            "tiles of {rows}x{columns}, {steps} steps of {STEP_BYTES} B of K, {stages} stages; \
             {tiles} tiles in {} wave(s) on {cores} cores, {} in the last",
            self.waves(),
            self.last_wave()
        )?;
        if *split > 1 {
            write!(f, "; K split in {split}")?;
        }
        if *cluster > 1 {
            write!(f, "; {cluster} cores share the narrower operand")?;
        }
        Ok(())
    }
}

/// The mapping that the machine's library picks, and its program. [`None`] without work.
pub(crate) fn choose(die: &DieFigures, p: &Product) -> Option<(Mapping, Program)> {
    if p.groups == 0 || p.m == 0 || p.n == 0 || p.k == 0 {
        return None;
    }
    let library = &die.library;
    let group_rows = [library.group_rows];
    let heights = match p.layout {
        Layout::Contiguous => group_rows.as_slice(),
        Layout::Dense | Layout::Masked => library.rows.as_slice(),
    };
    let candidates = heights.iter().flat_map(|&rows| {
        library.columns.iter().flat_map(move |&columns| {
            // Powers of two: a tree of partial sums.
            let splits = std::iter::successors(Some(1), |s| Some(s * 2));
            splits
                .take_while(|&s| s <= library.split_k)
                .filter_map(move |split| mapping(die, p, rows, columns, split))
        })
    });
    match library.choice {
        TileChoice::FewestWaves => {
            let best =
                candidates.reduce(|best, new| if fewer_waves(&new, &best) { new } else { best })?;
            Some((best, program(die, p, &best)))
        }
        TileChoice::Fastest => {
            let rank = |mapping: Mapping| {
                let program = program(die, p, &mapping);
                (program.seconds(), mapping, program)
            };
            // Few waves overlap little of their loads and stores; more waves on fewer cores may.
            let fewer_cores = |m: Mapping| {
                let waves = m.waves();
                let more = if waves <= 3 { waves + 1..2 * waves + 1 } else { 0..0 };
                let more = more.filter(move |&w| w <= m.tiles);
                more.map(move |w| Mapping { cores: m.tiles.div_ceil(w), ..m })
            };
            let both = candidates.flat_map(|m| std::iter::once(m).chain(fewer_cores(m)));
            let mut ranked: Vec<_> = both.map(rank).collect();
            // Stable: of equals, the smaller tile.
            ranked.sort_by(|a, b| a.0.total_cmp(&b.0));
            // The closed form is a percent or two off for some; the best few are looked at closely.
            ranked.truncate(4);
            let closely = ranked.into_iter().map(|(_, m, program)| (program.folded(), m, program));
            let best = closely.reduce(|a, b| if b.0 < a.0 { b } else { a });
            best.map(|(_, mapping, program)| (mapping, program))
        }
    }
}

/// A mapping, where its tiles fit a core and K can be cut that often.
fn mapping(die: &DieFigures, p: &Product, rows: u64, columns: u64, split: u64) -> Option<Mapping> {
    let steps = (p.k * p.dtype.size() as u64).div_ceil(STEP_BYTES);
    let stage = (rows + columns) * STEP_BYTES;
    // Results are staged on the core before they are stored.
    let staging = rows * columns * p.out_size;
    let stages = die.core_bytes.saturating_sub(staging) / stage;
    if rows * columns > die.accumulators || stages < 2 || (split > 1 && steps / split < 4) {
        // The smallest tile is always possible: the machine file was checked.
        let smallest = split == 1
            && rows == die.library.rows[0].min(rows)
            && columns == die.library.columns[0];
        if !smallest {
            return None;
        }
    }
    let library = &die.library;
    let together = match p.layout {
        Layout::Contiguous => p.m * p.groups,
        Layout::Dense | Layout::Masked => p.m,
    };
    Some(Mapping {
        rows,
        columns,
        split,
        tiles: p.groups * p.m.div_ceil(rows) * p.n.div_ceil(columns) * split,
        steps: steps.div_ceil(split),
        stages: stages.clamp(2, library.stages),
        cores: die.cores,
        cluster: if together >= library.cluster_rows { library.cluster } else { 1 },
    })
}

/// DeepGEMM's rule (`get_best_configs`): fewest waves, then the fullest last wave; of equals, the
/// smaller tile where one side is equal, else the wider one.
fn fewer_waves(new: &Mapping, best: &Mapping) -> bool {
    let rank = |m: &Mapping| (m.waves(), std::cmp::Reverse(m.last_wave()));
    match rank(new).cmp(&rank(best)) {
        std::cmp::Ordering::Less => true,
        std::cmp::Ordering::Greater => false,
        std::cmp::Ordering::Equal => {
            let narrower = new.rows == best.rows && new.columns < best.columns;
            let lower = new.columns == best.columns && new.rows < best.rows;
            let wider = new.rows != best.rows && new.columns > best.columns;
            narrower || lower || wider
        }
    }
}

fn program(die: &DieFigures, p: &Product, m: &Mapping) -> Program {
    let (rows, columns) = (m.rows as f64, m.columns as f64);
    let step_k = (STEP_BYTES / p.dtype.size() as u64) as f64;
    let area = rows * columns;
    let matrix = 2.0 * area * step_k / die.matrix(p.dtype);
    // Partial sums wait for nobody where two groups of threads take turns.
    let promotion = match p.dtype {
        DType::F8E4M3 => die.library.promotion_ops * area / die.vector,
        _ => 0.0,
    };
    // A cluster loads the narrower operand once for all its cores.
    let shared = rows.min(columns) * (1.0 - 1.0 / m.cluster as f64);
    let tile_step = (rows + columns - shared) * STEP_BYTES as f64;
    let all_steps = (m.tiles * m.steps) as f64;
    let load =
        Bytes { port: tile_step, cache: tile_step, memory: memory_reads(die, p, m) / all_steps };
    let out = if m.split > 1 { 4.0 } else { p.out_size as f64 };
    let class = TileClass {
        count: m.tiles,
        steps: m.steps,
        compute: matrix.max(promotion).max(die.matrix_step),
        load,
        epilogue: area / die.vector,
        // Only what exists is stored.
        store: match m.split {
            1 => p.writes / m.tiles as f64,
            _ => p.writes / m.tiles as f64 * m.split as f64 * out / p.out_size as f64,
        },
    };
    let rates = die.tile_rates;
    let finish = match m.split {
        1 => 0.0,
        // The last piece of a tile adds up the others.
        split => {
            let partials = p.writes / p.out_size as f64 * 4.0 * split as f64;
            die.memory_latency + partials / die.stream_rates.load + p.writes / rates.store
        }
    };
    Program {
        cores: m.cores,
        stages: m.stages,
        stores_overlap: die.library.stores_overlap,
        startup: die.startup,
        rates,
        classes: vec![class],
        finish,
    }
}

/// Bytes read from device memory: each operand once where the cache holds the smaller one or what a
/// wave of neighbouring tiles needs, and more where tiles evict each other's operands.
fn memory_reads(die: &DieFigures, p: &Product, m: &Mapping) -> f64 {
    let k_bytes = (p.k * p.dtype.size() as u64) as f64;
    let uncached = (m.tiles / m.split) as f64 * (m.rows + m.columns) as f64 * k_bytes;
    let smaller = p.m.min(p.n) as f64 * k_bytes;
    // Half of it: the rest holds what streams through.
    if smaller <= die.cache_bytes / 2.0 {
        return p.reads;
    }
    if die.cache_bytes == 0.0 {
        return uncached.max(p.reads);
    }
    // A wave of neighbouring tiles covers a rectangle; its best shape is nearly square.
    let at_once = m.tiles.min(m.cores).div_ceil(m.split);
    let (high, wide) = (p.m.div_ceil(m.rows), p.n.div_ceil(m.columns));
    let mut least = f64::INFINITY;
    let mut up = 1;
    while up <= high.min(at_once) {
        let across = at_once.div_ceil(up).min(wide);
        let wave = (up * m.rows + across * m.columns) as f64 * k_bytes;
        let waves = p.groups * high.div_ceil(up) * wide.div_ceil(across);
        least = least.min(wave * waves as f64);
        up *= 2;
    }
    least.min(uncached).max(p.reads)
}

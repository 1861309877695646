//! Plays a [`Program`] tile by tile and step by step: the reference for the closed form.
//!
//! Each core has a load engine, a compute engine and a port. Cores take the next tile of the
//! program as soon as their load engine is free for it. A load or a store lasts as long as its
//! bytes need at the share that the cores at work leave it when it begins.
//!
//! Stores that hold up the compute engine interrupt loads. Stores that do not are drained piece by
//! piece: one with every load, and more when the port has nothing to load.

use super::program::Program;
use std::cmp::Reverse;
use std::collections::{BinaryHeap, VecDeque};

/// One core's state. Times in seconds from the first possible load.
#[derive(Debug, Default)]
struct Core {
    /// Cores that it stands for.
    weight: u64,
    /// Tiles that it may still take.
    tiles_left: u64,
    /// Tiles that the load engine has begun and the compute engine has not finished, by class.
    tiles: VecDeque<usize>,
    /// Steps of the youngest tile that are not loaded yet.
    unloaded: u64,
    /// Steps of the oldest tile that are computed.
    computed: u64,
    /// When the port has loaded all it was asked to.
    port: f64,
    /// When the port has stored all it was asked to.
    stored: f64,
    /// When the compute engine is free.
    engine: f64,
    /// When each free stage became free.
    stages: VecDeque<f64>,
    /// When each loaded step is complete.
    loaded: VecDeque<f64>,
    /// Results waiting for the port.
    results: VecDeque<Results>,
    /// When everything so far is done.
    end: f64,
}

/// A tile's results.
#[derive(Clone, Copy, Debug)]
struct Results {
    since: f64,
    /// Bytes of a piece, and pieces left.
    piece: f64,
    pieces: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, PartialOrd)]
enum Action {
    Store,
    Load,
    Compute,
}

/// A finite time that orders.
#[derive(Clone, Copy, Debug)]
struct Time(f64);

impl PartialEq for Time {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other).is_eq()
    }
}

impl Eq for Time {}

impl PartialOrd for Time {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Time {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        self.0.total_cmp(&other.0)
    }
}

/// Tiles not yet taken.
struct Queue<'p> {
    program: &'p Program,
    class: usize,
    taken: u64,
}

impl Queue<'_> {
    fn next(&mut self) -> Option<usize> {
        while self.taken == self.program.classes.get(self.class)?.count {
            (self.class, self.taken) = (self.class + 1, 0);
        }
        self.taken += 1;
        Some(self.class)
    }
}

impl Core {
    /// What it does next, and when that begins. Stores go before loads, and interrupt them.
    fn next(&self, overlap: bool) -> Option<(f64, Action)> {
        let busy = if overlap { self.port } else { self.stored };
        let store = self.results.front().map(|r| (r.since.max(busy), Action::Store));
        let load = match self.stages.front() {
            Some(&free) if self.unloaded > 0 => Some((free.max(self.port), Action::Load)),
            _ => None,
        };
        let held = !overlap && !self.results.is_empty();
        let compute = match self.loaded.front() {
            Some(&ready) if !held => Some((ready.max(self.engine), Action::Compute)),
            _ => None,
        };
        let earlier = |a: Option<(f64, Action)>, b: Option<(f64, Action)>| match (a, b) {
            (Some(a), Some(b)) => Some(if b.0 < a.0 { b } else { a }),
            (a, b) => a.or(b),
        };
        let port = match (store, load) {
            // With a load, not before it; stages that are full now will be loaded.
            _ if overlap && self.unloaded > 0 => load,
            _ => earlier(store, load),
        };
        earlier(port, compute)
    }

    /// Bytes of the next piece of results that are ready.
    fn piece(&mut self, now: f64) -> f64 {
        let Some(results) = self.results.front_mut().filter(|r| r.since <= now) else { return 0.0 };
        let piece = results.piece;
        results.pieces -= 1;
        if results.pieces == 0 {
            self.results.pop_front();
        }
        piece
    }
}

/// Seconds in all, tile by tile.
pub(crate) fn seconds(program: &Program) -> f64 {
    play(program, &[(program.cores.min(program.tiles()), 1)])
}

/// Seconds in all, of a program with one class of tiles: cores that take equally many tiles do the
/// same at the same time, so that two cores stand for all.
pub(crate) fn seconds_of_two(program: &Program) -> f64 {
    let tiles = program.tiles();
    match tiles % program.cores {
        _ if tiles < program.cores => play(program, &[(1, tiles)]),
        0 => play(program, &[(1, program.cores)]),
        rest => play(program, &[(1, rest), (1, program.cores - rest)]),
    }
}

/// Plays the program on so many cores, each of which stands for so many.
fn play(program: &Program, stand_ins: &[(u64, u64)]) -> f64 {
    let folded = stand_ins.iter().any(|&(_, weight)| weight > 1);
    let mut queue = Queue { program, class: 0, taken: 0 };
    let mut cores: Vec<Core> = Vec::new();
    let mut agenda: BinaryHeap<Reverse<(Time, usize)>> = BinaryHeap::new();
    let weights = stand_ins.iter().flat_map(|&(n, weight)| (0..n).map(move |_| weight));
    for (index, weight) in weights.enumerate() {
        // A stand-in's tiles are known beforehand, the others take the next in the queue.
        let tiles_left = match folded {
            true => {
                (program.tiles() + program.cores - 1 - index as u64 * stand_ins[0].1)
                    / program.cores
            }
            false => u64::MAX,
        };
        let Some(class) = (if folded { Some(0) } else { queue.next() }) else { break };
        let mut core = Core {
            unloaded: program.classes[class].steps,
            weight,
            tiles_left: tiles_left - 1,
            ..Core::default()
        };
        core.tiles.push_back(class);
        core.stages.extend((0..program.stages).map(|_| 0.0));
        cores.push(core);
        agenda.push(Reverse((Time(0.0), index)));
    }
    let mut active: u64 = cores.iter().map(|c| c.weight).sum();
    while let Some(Reverse((_, index))) = agenda.pop() {
        let core = &mut cores[index];
        let Some((start, action)) = core.next(program.stores_overlap) else {
            active -= core.weight;
            continue;
        };
        match action {
            Action::Load => {
                let class = &program.classes[core.tiles[core.tiles.len() - 1]];
                let piece = if program.stores_overlap { core.piece(start) } else { 0.0 };
                let end = start
                    + program.rates.load_time(&class.load, active)
                    + program.rates.store_time(piece, active);
                core.stages.pop_front();
                core.loaded.push_back(end);
                core.port = end;
                core.end = core.end.max(end);
                core.unloaded -= 1;
            }
            Action::Compute => {
                let class = &program.classes[core.tiles[0]];
                core.loaded.pop_front();
                core.engine = start + class.compute;
                core.stages.push_back(core.engine);
                core.computed += 1;
                if core.computed == class.steps {
                    core.engine += class.epilogue;
                    let pieces = if program.stores_overlap { class.steps } else { 1 };
                    let piece = class.store / pieces as f64;
                    core.results.push_back(Results { since: core.engine, piece, pieces });
                    core.computed = 0;
                    core.tiles.pop_front();
                }
                core.end = core.end.max(core.engine);
            }
            Action::Store => {
                let time = program.rates.store_time(core.piece(start), active);
                if core.port > start {
                    // The load in progress goes on afterwards.
                    core.port += time;
                    if let Some(end) = core.loaded.back_mut() {
                        *end += time;
                    }
                } else {
                    core.port = start + time;
                }
                core.stored = start + time;
                core.end = core.end.max(core.stored);
                if !program.stores_overlap {
                    core.engine = core.engine.max(core.stored);
                }
            }
        }
        if core.unloaded == 0
            && core.tiles_left > 0
            && let Some(class) = if folded { Some(0) } else { queue.next() }
        {
            core.tiles.push_back(class);
            core.unloaded = program.classes[class].steps;
            core.tiles_left -= 1;
        }
        // A core without anything to do comes back once more, to be counted out when it ends.
        let (time, _) = core.next(program.stores_overlap).unwrap_or((core.end, Action::Store));
        agenda.push(Reverse((Time(time), index)));
    }
    let end = cores.iter().map(|c| c.end).fold(0.0, f64::max);
    program.startup + end + program.finish
}

//! A kernel as tiles on cores, and its time in closed form.
//!
//! Every core runs the same loop, as persistent kernels do: a load engine fills stages of on-chip
//! memory, a compute engine empties them, and results are stored through the same port. Cores that
//! run equal tiles do so in step, so that a wave of tiles takes as long as one of them; the closed
//! form counts waves. [`super::event`] plays the same program tile by tile, and tests hold the two
//! together.

use super::event;

/// Steps of one core up to which [`Program::folded`] plays them.
const MOST_PLAYED: u64 = 256;

/// A kernel: tiles in the order in which cores take them.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Program {
    /// Cores that take part.
    pub(crate) cores: u64,
    /// Stages of loads that a core holds.
    pub(crate) stages: u64,
    /// Whether storing a tile's results leaves the compute engine free for the next tile.
    pub(crate) stores_overlap: bool,
    /// Seconds before the first load's first byte arrives.
    pub(crate) startup: f64,
    /// Shared and private bandwidths.
    pub(crate) rates: Rates,
    /// Equal tiles together, the longest first.
    pub(crate) classes: Vec<TileClass>,
    /// Seconds after the last tile: combining partial results, for example.
    pub(crate) finish: f64,
}

/// Bandwidths in bytes per second.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Rates {
    /// Device memory to cores, all cores together.
    pub(crate) load: f64,
    /// Cores to device memory, all cores together.
    pub(crate) store: f64,
    /// Shared cache to cores, all together.
    pub(crate) cache: f64,
    /// One core's port.
    pub(crate) port: f64,
}

/// Equal tiles.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct TileClass {
    /// How many.
    pub(crate) count: u64,
    /// Steps of the main loop, at least 1.
    pub(crate) steps: u64,
    /// Compute engine's seconds for a step.
    pub(crate) compute: f64,
    /// What a step loads.
    pub(crate) load: Bytes,
    /// Compute engine's seconds after the last step.
    pub(crate) epilogue: f64,
    /// Bytes of results.
    pub(crate) store: f64,
}

/// Bytes of one load, by what they pass.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(crate) struct Bytes {
    /// Through the core's port.
    pub(crate) port: f64,
    /// From the shared cache.
    pub(crate) cache: f64,
    /// From device memory.
    pub(crate) memory: f64,
}

/// What limits a tile's period.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Limit {
    Compute,
    Memory,
    Cache,
    Port,
    Startup,
}

/// Seconds of a tile.
struct Times {
    /// One load, and all of them.
    load: f64,
    loads: f64,
    /// All steps and the epilogue.
    compute: f64,
    store: f64,
    /// From a core's first load to its first results: the first load and the last step overlap
    /// with nothing.
    ready: f64,
}

impl Rates {
    /// Seconds of a load on one core while `active` cores share what is shared.
    pub(crate) fn load_time(&self, load: &Bytes, active: u64) -> f64 {
        let share = active as f64;
        (load.port / self.port)
            .max(load.cache * share / self.cache)
            .max(load.memory * share / self.load)
    }

    /// Seconds of a store.
    pub(crate) fn store_time(&self, bytes: f64, active: u64) -> f64 {
        (bytes / self.port).max(bytes * active as f64 / self.store)
    }

    fn load_limit(&self, load: &Bytes, active: u64) -> Limit {
        let time = self.load_time(load, active);
        if load.memory * active as f64 / self.load >= time {
            Limit::Memory
        } else if load.cache * active as f64 / self.cache >= time {
            Limit::Cache
        } else {
            Limit::Port
        }
    }
}

impl Program {
    /// Tiles in all.
    pub(crate) fn tiles(&self) -> u64 {
        self.classes.iter().map(|c| c.count).sum()
    }

    /// Steps in all.
    #[cfg(test)]
    pub(crate) fn steps(&self) -> u64 {
        self.classes.iter().map(|c| c.count * c.steps).sum()
    }

    /// Seconds from one tile of a class to the next on a core, while `active` cores do the same.
    fn period(&self, class: &TileClass, active: u64) -> f64 {
        let t = self.times(class, active);
        if self.stores_overlap {
            // One port, two engines.
            return t.compute.max(t.loads + t.store);
        }
        t.compute.max(t.loads + self.idle(class, &t)) + t.store
    }

    /// Seconds for which the port waits between a tile's last load and its store, all stages full:
    /// loads run ahead through the last step and the epilogue, but not through a store that has the
    /// port to itself.
    fn idle(&self, class: &TileClass, t: &Times) -> f64 {
        (class.compute + class.epilogue - self.stages as f64 * t.load).max(0.0)
    }

    fn times(&self, class: &TileClass, active: u64) -> Times {
        let load = self.rates.load_time(&class.load, active);
        let steps = class.steps as f64;
        let inner = (steps - 1.0) * load.max(class.compute);
        Times {
            load,
            loads: steps * load,
            compute: steps * class.compute + class.epilogue,
            store: self.rates.store_time(class.store, active),
            ready: load + inner + class.compute + class.epilogue,
        }
    }

    /// Seconds in all, equal tiles counted once.
    pub(crate) fn folded(&self) -> f64 {
        // Stores among few loads and few waves interleave in more ways than the closed form knows;
        // two cores that stand for all are played then.
        let few = |c: &TileClass| c.count.div_ceil(self.cores) * c.steps <= MOST_PLAYED;
        match self.classes.as_slice() {
            [class] if self.stores_overlap && class.count > self.cores && few(class) => {
                event::seconds_of_two(self)
            }
            _ => self.seconds(),
        }
    }

    /// Seconds in all, from the closed form.
    pub(crate) fn seconds(&self) -> f64 {
        let body = match self.classes.as_slice() {
            [] => return self.startup + self.finish,
            [class] => self.waves(class),
            classes => self.list(classes),
        };
        self.startup + body + self.finish
    }

    /// Equal tiles run in waves.
    fn waves(&self, class: &TileClass) -> f64 {
        let active = class.count.min(self.cores);
        let waves = class.count.div_ceil(active) as f64;
        let last = match class.count % active {
            0 => active,
            rest => rest,
        };
        let (f, l) = (self.times(class, active), self.times(class, last));
        if class.count <= self.cores {
            return f.ready + f.store;
        }
        let crowded = waves - 1.0;
        // Loads of the last wave that began before the other cores were done.
        let ahead = ((class.compute + class.epilogue) / f.load).ceil().min(self.stages as f64);
        let early = (f.load - l.load) * ahead;
        if !self.stores_overlap {
            // All but the first tile follow another.
            let last = l.compute.max(l.loads + self.idle(class, &l) + early) + l.store;
            return f.ready + f.store + (crowded - 1.0) * self.period(class, active) + last;
        }
        // Each tile's results are stored with the loads of the next one. The longest of three paths:
        // compute all the way; the port all the way; the port, then the last tile's compute.
        let compute = f.load + waves * l.compute + l.store;
        // The port idles once all stages are full before the first results.
        let head = (f.ready - (class.steps + self.stages) as f64 * f.load).max(0.0);
        let before = head + crowded * f.loads + (crowded - 1.0) * f.store;
        let tail = (class.compute + class.epilogue - l.store / class.steps as f64).max(0.0);
        let port = before + l.loads + early.min(l.loads) + l.store + tail + l.store;
        compute.max(port).max(before + f.load + l.compute + l.store)
    }

    /// Unequal tiles go to whichever core is free first. Cores that are free at the same time are
    /// one group.
    fn list(&self, classes: &[TileClass]) -> f64 {
        let all = self.tiles().min(self.cores);
        // Seconds at which a group is free, ascending; its cores; the class of its last tile.
        let mut groups: Vec<(f64, u64, &TileClass)> = vec![(0.0, all, &classes[0])];
        for class in classes {
            let period = self.period(class, all);
            let mut left = class.count;
            while left > 0 {
                let spread = groups[groups.len() - 1].0 - groups[0].0;
                let rounds = left / all;
                // While every core takes the same number, the picture only moves.
                if rounds > 1 && spread <= period {
                    for group in &mut groups {
                        group.0 += (rounds - 1) as f64 * period;
                    }
                    left -= (rounds - 1) * all;
                }
                let (free, cores, before) = groups.remove(0);
                let taken = cores.min(left);
                if taken < cores {
                    groups.insert(0, (free, cores - taken, before));
                }
                let end = free + period;
                let at = groups.partition_point(|&(time, ..)| time < end);
                match groups.get_mut(at) {
                    Some(group) if group.0 == end => group.1 += taken,
                    _ => groups.insert(at, (end, taken, class)),
                }
                left -= taken;
            }
        }
        // The last results of a core are stored with the bandwidth that cores already done leave.
        let mut end = 0f64;
        let mut at_work = 0;
        for (time, cores, class) in groups.into_iter().rev() {
            at_work += cores;
            let alone = self.times(class, at_work).store;
            let counted = if self.stores_overlap { 0.0 } else { self.times(class, all).store };
            end = end.max(time - counted + alone);
        }
        // All cores begin with tiles of the first class: a load before the first step, or a step
        // and the epilogue after the last load, overlap with nothing.
        let t = self.times(&classes[0], all);
        end + (t.ready - t.compute.max(t.loads))
    }

    /// What limits it, judged on the class with the most work.
    pub(crate) fn limit(&self) -> Limit {
        let work = |c: &&TileClass| (c.count * c.steps, c.steps);
        let Some(class) = self.classes.iter().max_by_key(work) else { return Limit::Startup };
        let active = self.tiles().min(self.cores);
        let (full, rest) = (class.count / self.cores, class.count % self.cores);
        let waves = (full + u64::from(rest > 0)) as f64;
        let period = self.period(class, active);
        if self.startup + self.finish > waves * period {
            return Limit::Startup;
        }
        let store = self.rates.store_time(class.store, active);
        let compute = class.steps as f64 * class.compute + class.epilogue;
        let load = class.steps as f64 * self.rates.load_time(&class.load, active);
        if compute >= load.max(store) {
            Limit::Compute
        } else if store > load {
            Limit::Memory
        } else {
            self.rates.load_limit(&class.load, active)
        }
    }
}

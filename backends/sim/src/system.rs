//! A running machine: its dies, its worker threads and what they share.

use crate::clock::SimClock;
use crate::collective::Group;
use crate::cost::{CostModel, TileModel};
use crate::device::{DieState, SimDevice};
use crate::kernels;
use crate::machine::Machine;
use crate::memory::Equals;
use crate::stream::Recipes;
use crate::workers::Workers;
use hal::hazard::StreamOrder;
use hal::{CommunicatorId, Device, DeviceId, Error, Topology};
use parking_lot::Mutex;
use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::time::Duration;

/// Whether commands compute values, take time, or both. The same commands are issued in each.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Mode {
    /// Values and time.
    #[default]
    Full,
    /// Values only.
    FunctionalOnly,
    /// Time only. Buffers have no storage, so a model of any size fits.
    TimingOnly,
}

impl Mode {
    /// Whether values are computed.
    pub const fn functional(self) -> bool {
        matches!(self, Mode::Full | Mode::FunctionalOnly)
    }

    /// Whether time is computed.
    pub const fn timed(self) -> bool {
        matches!(self, Mode::Full | Mode::TimingOnly)
    }
}

/// How to simulate.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Options {
    /// Values, time or both.
    pub mode: Mode,
    /// Worker threads; `None` for one per processor. Never changes a result.
    pub threads: Option<usize>,
}

/// A machine, running. Dropping it, its devices and their streams stops its threads.
#[derive(Clone, Debug)]
pub struct System {
    shared: Arc<Shared>,
}

/// What all dies share.
#[derive(Debug)]
pub(crate) struct Shared {
    pub(crate) machine: Machine,
    pub(crate) topology: Topology,
    pub(crate) cost: Box<dyn CostModel>,
    pub(crate) mode: Mode,
    pub(crate) kernels: kernels::Context,
    pub(crate) pool: Workers,
    pub(crate) order: StreamOrder,
    pub(crate) clock: SimClock,
    pub(crate) recipes: Recipes,
    pub(crate) equals: Equals,
    pub(crate) groups: Mutex<HashMap<CommunicatorId, Arc<Group>>>,
    pub(crate) next_communicator: AtomicU64,
    /// Numbers of sends that have met their receives.
    pub(crate) next_pair: AtomicU64,
    pub(crate) dies: Vec<DieState>,
}

/// How long to wait for workers, while other host threads give them more and more to do and a stream
/// waits for what never comes.
const SETTLE: Duration = Duration::from_secs(10);

impl Shared {
    /// Waits until workers have carried out what they can, and takes in what has been carried out. Says
    /// whether that is all there is.
    pub(crate) fn settle(&self) -> bool {
        if !self.pool.is_idle_soon(crate::stream::SPIN) {
            // What had been submitted by now is enough, if others go on submitting.
            let known: Vec<_> = self.dies.iter().flat_map(|die| die.streams()).collect();
            let known: Vec<_> = known.into_iter().map(|s| (s.submitted(), s)).collect();
            let enough = || known.iter().all(|(value, stream)| stream.has_reached(*value));
            self.pool.wait_until_idle(enough, SETTLE);
        }
        let complete = self.pool.is_idle();
        // What ranks that came last have completed for others.
        for die in &self.dies {
            die.streams().iter().for_each(|stream| self.clock.take_in(stream));
        }
        complete
    }
}

impl System {
    /// Starts a machine.
    ///
    /// # Errors
    ///
    /// [`Error::Runtime`] if the host refuses threads.
    pub fn new(machine: Machine, options: Options) -> Result<Self, Error> {
        let threads = options.threads.unwrap_or_else(|| {
            std::thread::available_parallelism().map_or(1, std::num::NonZero::get)
        });
        let pool = Workers::start(threads).map_err(|e| Error::Runtime {
            device: DeviceId(0),
            call: "starting worker threads",
            code: 0,
            text: e.to_string(),
        })?;
        let topology = machine.topology();
        let dies = (0..machine.dies())
            .map(|i| DieState::new(DeviceId(i), &machine, &topology, options.mode))
            .collect();
        let shared = Shared {
            cost: Box::new(TileModel::new(&machine)),
            topology,
            mode: options.mode,
            kernels: kernels::Context::new(threads),
            pool,
            order: StreamOrder::default(),
            clock: SimClock::new(machine.dies() as usize),
            recipes: Recipes::default(),
            equals: Equals::default(),
            groups: Mutex::default(),
            next_communicator: AtomicU64::new(1),
            next_pair: AtomicU64::new(0),
            dies,
            machine,
        };
        Ok(System { shared: Arc::new(shared) })
    }

    /// The machine.
    pub fn machine(&self) -> &Machine {
        &self.shared.machine
    }

    /// Its dies and links.
    pub fn topology(&self) -> &Topology {
        &self.shared.topology
    }

    /// Ends the machine: what is queued is dropped, what runs is waited for, and its threads have
    /// ended when this returns. For whoever must leave nothing behind, such as a library that is
    /// about to be unloaded or a process whose leaks are counted; dropping everything is enough
    /// otherwise.
    ///
    /// Answers `false` if the threads still run after `limit`, since somebody holds a device, a
    /// stream or a buffer; its dies are lost.
    pub fn stop(self, limit: Duration) -> bool {
        let threads = self.shared.pool.threads();
        // A stream that waits for one that hangs, or for a rank that never came, is held by what it
        // waits for: its failure lets go of it.
        for die in &self.shared.dies {
            die.lose("the machine was stopped".into());
        }
        drop(self.shared);
        threads.join(limit)
    }

    /// A die.
    ///
    /// # Errors
    ///
    /// [`Error::Usage`] if the machine has no such die.
    pub fn open(&self, die: DeviceId) -> Result<Arc<dyn Device>, Error> {
        let dies = self.shared.dies.len();
        if die.0 as usize >= dies {
            let name = &self.shared.machine.name;
            return Err(Error::usage(die, format!("{name} has dies 0 to {}", dies - 1)));
        }
        Ok(Arc::new(SimDevice::new(self.shared.clone(), die)))
    }
}

//! Backends by name.

use crate::cli::{Backend, Switch, SystemArgs};
use anyhow::{Context, ensure};
use hal::fault::FaultPlan;
use hal::{Device, DeviceId, Topology, Validated};
use sim::{Machine, Mode, Options};
use std::sync::Arc;

/// What runs the commands.
#[derive(Debug)]
pub(crate) enum Platform {
    /// A simulated machine.
    Sim(sim::System),
    /// A runtime library.
    Vacc(vacc::System),
}

impl Platform {
    /// Starts it, as the flags say.
    pub(crate) fn start(args: &SystemArgs) -> anyhow::Result<Platform> {
        match args.backend {
            Backend::Sim => {
                ensure!(
                    args.vacc_runtime.is_none() && args.vacc_config.is_none(),
                    "--vacc-runtime and --vacc-config are for --backend vacc"
                );
                let machine = Machine::load(args.machine.as_deref().unwrap_or("va16"))?;
                let mode = match args.timing.unwrap_or(Switch::On) {
                    Switch::On => Mode::Full,
                    Switch::Off => Mode::FunctionalOnly,
                };
                let threads = args.threads.map(usize::from);
                Ok(Platform::Sim(sim::System::new(machine, Options { mode, threads })?))
            }
            Backend::Vacc => {
                ensure!(
                    args.machine.is_none() && args.timing.is_none() && args.threads.is_none(),
                    "--machine, --timing and --threads are for --backend sim; a runtime library \
                     takes its own settings, e.g. --vacc-config \"machine=va16;timing=on;threads=2\" \
                     for the simulator's"
                );
                let runtime = vacc::loader::load(&vacc::Search {
                    flag: args.vacc_runtime.clone(),
                    variable: std::env::var_os("VACC_RUNTIME").map(Into::into),
                    loader_path: std::env::var_os("LD_LIBRARY_PATH"),
                })?;
                let options = vacc::Options {
                    visible_devices: std::env::var("VACC_VISIBLE_DEVICES").ok(),
                    config: args.vacc_config.clone(),
                };
                Ok(Platform::Vacc(vacc::System::new(Arc::new(runtime), &options)?))
            }
        }
    }

    pub(crate) fn dies(&self) -> u32 {
        match self {
            Platform::Sim(system) => system.machine().dies(),
            Platform::Vacc(system) => system.dies(),
        }
    }

    pub(crate) fn open(&self, die: DeviceId) -> hal::Result<Arc<dyn Device>> {
        match self {
            Platform::Sim(system) => system.open(die),
            Platform::Vacc(system) => system.open(die),
        }
    }

    pub(crate) fn topology(&self) -> hal::Result<Topology> {
        match self {
            Platform::Sim(system) => Ok(system.topology().clone()),
            Platform::Vacc(system) => system.topology(),
        }
    }
}

/// A machine that is running, with its first die open.
#[derive(Debug)]
pub(crate) struct Running {
    pub(crate) platform: Platform,
    validated: Option<Arc<Validated>>,
    device: Arc<dyn Device>,
}

/// Starts the machine and opens its first die.
pub(crate) fn open(args: &SystemArgs) -> anyhow::Result<Running> {
    let platform = Platform::start(args)?;
    let device = platform.open(DeviceId(0)).context("opening die 0")?;
    if !args.fault.is_empty() {
        device.set_faults(Some(Arc::new(FaultPlan::new(args.fault.clone()))))?;
    }
    let validated = args.validate.then(|| Validated::wrap(device.clone()));
    Ok(Running { platform, validated, device })
}

/// What a run's figures rest on.
#[derive(Clone, Debug)]
pub(crate) struct Provenance {
    /// Product name of the die.
    pub(crate) machine: String,
    /// Who computed and timed, in words.
    by: String,
    /// Constants of the machine file that are assumed, and how many there are; absent where there
    /// is no machine file to be seen.
    pub(crate) assumed: Option<(Vec<String>, usize)>,
}

impl Provenance {
    /// The last line of a report.
    pub(crate) fn sentence(&self, timed: bool) -> String {
        let Provenance { machine, by, assumed } = self;
        match (timed, assumed) {
            (false, _) => format!("values computed by {by}; timing off"),
            (true, Some((assumed, all))) => format!(
                "values computed and time simulated (tiles per op) from machine {machine:?}; {} of \
                 its {all} constants are assumed, not published: see `dsv3-run devices`",
                assumed.len()
            ),
            (true, None) => format!(
                "values and times by {by}, as it reports them: what they rest on is that library's \
                 to say"
            ),
        }
    }
}

impl Running {
    /// The die, through the validating wrapper if that was asked for.
    pub(crate) fn device(&self) -> Arc<dyn Device> {
        match &self.validated {
            Some(validated) => validated.clone(),
            None => self.device.clone(),
        }
    }

    /// What `--validate` found still allocated; to be asked when everything is dropped.
    pub(crate) fn leaks(&self) -> Option<usize> {
        self.validated.as_ref().map(|v| v.leaks().len())
    }

    pub(crate) fn provenance(&self) -> Provenance {
        let machine = self.device.properties().name.clone();
        match &self.platform {
            Platform::Sim(system) => {
                let constants = system.machine().constants().len();
                let assumed = Some((system.machine().assumed(), constants));
                Provenance { machine, by: "the simulator".to_string(), assumed }
            }
            Platform::Vacc(system) => {
                let runtime = system.runtime();
                let (what, path) = (system.description(), runtime.path());
                let by = format!("{what} ({path}, ABI {})", runtime.version());
                Provenance { machine, by, assumed: None }
            }
        }
    }
}

//! Backends by name.

use crate::cli::{Backend, ModelArgs, RecordingArgs, Switch, SystemArgs};
use crate::output::bytes;
use crate::trace::Tracing;
use ::replay::{Header, Recorder};
use anyhow::{Context, bail, ensure};
use hal::fault::FaultPlan;
use hal::{Device, DeviceId, Topology, Validated};
use model::config::ModelConfig;
use model::plan::PlanError;
use sim::{Machine, Mode, Options};
use std::io::Write;
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

/// A machine that is running, with the dies of an instance open.
#[derive(Debug)]
pub(crate) struct Running {
    pub(crate) platform: Platform,
    validated: Vec<Arc<Validated>>,
    devices: Vec<Arc<dyn Device>>,
    recorder: Option<Recorder>,
    /// Of `--trace`, until it is written.
    pub(crate) trace: Option<Tracing>,
}

/// Starts the machine and opens a die for each rank of the plan.
pub(crate) fn open(args: &ModelArgs, config: &ModelConfig) -> anyhow::Result<Running> {
    let ModelArgs { system, recording, parallel, trace, .. } = args;
    let trace = Tracing::prepare(trace, system)?;
    let platform = Platform::start(system)?;
    let plan = parallel.plan(config, &platform.topology()?)?;
    if plan.ranks() > platform.dies() as usize {
        bail!(PlanError::too_many_ranks(plan.options(), platform.dies() as usize));
    }
    let recorder = start_recording(recording)?;
    let faults = Arc::new(FaultPlan::new(system.fault.clone()));
    let mut devices = Vec::with_capacity(plan.ranks());
    for die in 0..plan.ranks() as u32 {
        let device = platform.open(DeviceId(die)).with_context(|| format!("opening die {die}"))?;
        if !system.fault.is_empty() {
            device.set_faults(Some(faults.clone()))?;
        }
        devices.push(match &recorder {
            Some(recorder) => recorder.wrap(device),
            None => device,
        });
    }
    let validated = match system.validate {
        true => Validated::wrap_all(devices.iter().cloned()),
        false => Vec::new(),
    };
    if let Some(trace) = &trace {
        trace.check(&devices)?;
    }
    Ok(Running { platform, validated, devices, recorder, trace })
}

fn start_recording(args: &RecordingArgs) -> anyhow::Result<Option<Recorder>> {
    let Some(path) = &args.record else { return Ok(None) };
    let header = Header {
        program: concat!("dsv3-run ", env!("CARGO_PKG_VERSION")).to_string(),
        command: std::env::args_os().map(|arg| arg.to_string_lossy().into_owned()).collect(),
        all_outputs: args.record_all,
    };
    let recorder = Recorder::create(path, &header);
    Ok(Some(recorder.with_context(|| format!("--record {}", path.display()))?))
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
    /// The dies, through the validating wrapper if that was asked for.
    pub(crate) fn devices(&self) -> Vec<Arc<dyn Device>> {
        match self.validated.is_empty() {
            true => self.devices.clone(),
            false => self.validated.iter().map(|v| v.clone() as Arc<dyn Device>).collect(),
        }
    }

    /// What `--validate` found still allocated; to be asked when everything is dropped.
    pub(crate) fn leaks(&self) -> usize {
        self.validated.iter().map(|v| v.leaks().len()).sum()
    }

    /// Completes the recording, if there is one; to be called when everything is dropped.
    pub(crate) fn finish(&self) -> anyhow::Result<()> {
        self.end_recording(true)
    }

    fn end_recording(&self, finished: bool) -> anyhow::Result<()> {
        let Some(recorder) = &self.recorder else { return Ok(()) };
        let Some(summary) = recorder.finish(finished).context("--record")? else { return Ok(()) };
        let mut text = format!(
            "recorded {} commands, {}, in {}",
            summary.commands,
            bytes(summary.bytes),
            summary.path.display()
        );
        if summary.unprobed > 0 {
            text += &format!("; {} outputs were too large to be hashed", summary.unprobed);
        }
        Ok(writeln!(std::io::stderr(), "{text}")?)
    }

    pub(crate) fn provenance(&self) -> Provenance {
        let machine = self.devices[0].properties().name.clone();
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

impl Drop for Running {
    fn drop(&mut self) {
        // A run that failed comes here without having finished: that is when a recording counts.
        if let Err(error) = self.end_recording(false) {
            eprintln!("{}: {error:#}", crate::output::paint_error("error"));
        }
    }
}

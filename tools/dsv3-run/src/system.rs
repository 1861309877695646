//! Backends by name.

use crate::cli::{Backend, Switch, SystemArgs};
use anyhow::Context;
use hal::fault::FaultPlan;
use hal::{Device, DeviceId, Validated};
use sim::{Machine, Mode, Options, System};
use std::sync::Arc;

/// A machine that is running.
#[derive(Debug)]
pub(crate) struct Running {
    pub(crate) system: System,
    validated: Option<Arc<Validated>>,
    device: Arc<dyn Device>,
}

/// Starts the machine and opens its first die.
pub(crate) fn open(args: &SystemArgs) -> anyhow::Result<Running> {
    let system = match args.backend {
        Backend::Sim => {
            let machine = Machine::load(&args.machine)?;
            let mode = match args.timing {
                Switch::On => Mode::Full,
                Switch::Off => Mode::FunctionalOnly,
            };
            System::new(machine, Options { mode, threads: args.threads.map(usize::from) })?
        }
    };
    let device = system.open(DeviceId(0)).context("opening die 0")?;
    if !args.fault.is_empty() {
        device.set_faults(Some(Arc::new(FaultPlan::new(args.fault.clone()))))?;
    }
    let validated = args.validate.then(|| Validated::wrap(device.clone()));
    Ok(Running { system, validated, device })
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
}

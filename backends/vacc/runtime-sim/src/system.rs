//! The library as a whole: instances and topology.

use crate::device::DEVICES;
use crate::error::{Outcome, Refused, fill, give, guard, put, text};
use crate::handles::Table;
use hal::DeviceId;
use sim::{Machine, Mode, Options, System};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;
use vacc::sys::*;
use vacc::wire;

/// A machine that somebody started.
#[derive(Debug)]
pub(crate) struct Instance {
    pub(crate) system: System,
    /// The die behind each ordinal.
    pub(crate) visible: Vec<DeviceId>,
    /// Open device handles.
    pub(crate) open: AtomicUsize,
}

/// How long the end of an instance waits for a command that runs: longer than any kernel.
const MOST_WAIT: Duration = Duration::from_secs(60);

pub(crate) static INSTANCES: Table<Instance> = Table::new("instance", 1);

impl Instance {
    /// A physical die's ordinal, as far as the caller sees it.
    pub(crate) fn ordinal(&self, physical: u32) -> u32 {
        let at = self.visible.iter().position(|die| die.0 == physical);
        at.map_or(u32::MAX, |ordinal| ordinal as u32)
    }

    pub(crate) fn die(&self, ordinal: u32) -> Outcome<DeviceId> {
        self.visible.get(ordinal as usize).copied().ok_or_else(|| {
            let n = self.visible.len();
            Refused::invalid(format!("there is no device {ordinal}: {n} are visible, from 0"))
        })
    }
}

/// Reads "machine=va16;timing=on;threads=2".
fn configure(config: &str) -> Outcome<System> {
    let mut machine = "va16";
    let mut options = Options::default();
    for setting in config.split(';').filter(|s| !s.trim().is_empty()) {
        let refuse =
            |problem: &str| Err(Refused::invalid(format!("setting {setting:?}: {problem}")));
        let Some((key, value)) = setting.split_once('=') else {
            return refuse("expected KEY=VALUE");
        };
        match (key.trim(), value.trim()) {
            ("machine", name) => machine = name,
            ("timing", "on") => options.mode = Mode::Full,
            ("timing", "off") => options.mode = Mode::FunctionalOnly,
            ("timing", "only") => options.mode = Mode::TimingOnly,
            ("timing", _) => return refuse("expected on, off or only"),
            ("threads", count) => match count.parse() {
                Ok(threads @ 1..=1024) => options.threads = Some(threads),
                _ => return refuse("expected 1 to 1024"),
            },
            _ => return refuse("libvaccrt knows machine, timing and threads"),
        }
    }
    let machine = Machine::load(machine).map_err(|e| Refused::invalid(e.to_string()))?;
    Ok(System::new(machine, options)?)
}

/// Reads "0,1,5".
fn visible(list: Option<&str>, dies: u32) -> Outcome<Vec<DeviceId>> {
    let Some(list) = list else { return Ok((0..dies).map(DeviceId).collect()) };
    let mut visible = Vec::new();
    for part in list.split(',').map(str::trim).filter(|part| !part.is_empty()) {
        let refuse =
            |problem: String| Refused::invalid(format!("visible devices {list:?}: {problem}"));
        let die: u32 = part.parse().map_err(|_| refuse(format!("{part:?} is no number")))?;
        if die >= dies {
            return Err(refuse(format!("the machine has devices 0 to {}", dies - 1)));
        }
        if visible.contains(&DeviceId(die)) {
            return Err(refuse(format!("{die} is named twice")));
        }
        visible.push(DeviceId(die));
    }
    Ok(visible)
}

/// See `vacc.h`.
#[expect(unsafe_code, reason = "exported")]
#[unsafe(no_mangle)]
pub(crate) extern "C" fn vacc_instance_create(
    options: *const vacc_instance_options,
    instance: *mut vacc_instance,
) -> vacc_status {
    guard(|| {
        if instance.is_null() {
            return Err(Refused::null("instance"));
        }
        let (mut list, mut config) = (None, "");
        if !options.is_null() {
            // SAFETY: not null; the header obliges callers to pass what its size field says.
            let options = unsafe { read_struct(options) }?;
            if !options.visible_devices.is_null() {
                let length = options.visible_devices_length;
                list = Some(text(options.visible_devices, length, "visible_devices")?);
            }
            if !options.config.is_null() {
                config = text(options.config, options.config_length, "config")?;
            }
        }
        let system = configure(config)?;
        let visible = visible(list, system.machine().dies())?;
        let created = Instance { system, visible, open: AtomicUsize::new(0) };
        give(instance, "instance", INSTANCES.add(Arc::new(created))?)
    })
}

/// See `vacc.h`.
#[expect(unsafe_code, reason = "exported")]
#[unsafe(no_mangle)]
pub(crate) extern "C" fn vacc_instance_destroy(instance: vacc_instance) -> vacc_status {
    guard(|| {
        let idle = |instance: &Arc<Instance>| match instance.open.load(Ordering::Acquire) {
            0 => Ok(()),
            n => Err(Refused::new(VACC_ERROR_BUSY, format!("{n} device handles are open"))),
        };
        let instance = INSTANCES.remove(instance, idle)?;
        let system = instance.system.clone();
        drop(instance);
        match system.stop(MOST_WAIT) {
            true => Ok(()),
            false => {
                let text = format!("the worker threads still run after {MOST_WAIT:?}");
                Err(Refused::new(VACC_ERROR_INTERNAL, text))
            }
        }
    })
}

/// See `vacc.h`.
#[expect(unsafe_code, reason = "exported")]
#[unsafe(no_mangle)]
pub(crate) extern "C" fn vacc_instance_get_properties(
    instance: vacc_instance,
    properties: *mut vacc_instance_properties,
) -> vacc_status {
    guard(|| {
        let instance = INSTANCES.get(instance)?;
        let mut told = vacc_instance_properties {
            size: struct_size::<vacc_instance_properties>(),
            devices: instance.visible.len() as u32,
            ..vacc_instance_properties::default()
        };
        put(&mut told.name, "libvaccrt, the simulator");
        put(&mut told.version, env!("CARGO_PKG_VERSION"));
        fill(properties, &told)
    })
}

/// See `vacc.h`.
#[expect(unsafe_code, reason = "exported")]
#[unsafe(no_mangle)]
pub(crate) extern "C" fn vacc_topology_get_link(
    instance: vacc_instance,
    from: u32,
    to: u32,
    link: *mut vacc_link,
) -> vacc_status {
    guard(|| {
        let instance = INSTANCES.get(instance)?;
        let (from, to) = (instance.die(from)?, instance.die(to)?);
        let mut told = vacc_link { size: struct_size::<vacc_link>(), ..vacc_link::default() };
        if let Some(link) = instance.system.topology().link(from, to) {
            told.kind = wire::link(link.kind);
            told.bytes_per_second = link.bytes_per_second;
            told.latency_ps = link.latency_ps;
            told.peer_copy = u32::from(link.peer_copy);
        }
        fill(link, &told)
    })
}

/// See `vacc.h`.
#[expect(unsafe_code, reason = "exported")]
#[unsafe(no_mangle)]
pub(crate) extern "C" fn vacc_device_open(
    instance: vacc_instance,
    ordinal: u32,
    device: *mut vacc_device,
) -> vacc_status {
    guard(|| {
        let instance = INSTANCES.get(instance)?;
        if device.is_null() {
            return Err(Refused::null("device"));
        }
        let die = instance.die(ordinal)?;
        let opened = crate::device::Die::open(instance, die)?;
        give(device, "device", DEVICES.add(Arc::new(opened))?)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn settings_and_devices_are_read_or_refused() {
        assert_eq!(visible(Some("3, 1,"), 4).unwrap(), [DeviceId(3), DeviceId(1)]);
        assert_eq!(visible(None, 2).unwrap(), [DeviceId(0), DeviceId(1)]);
        for bad in ["4", "1,1", "x", "-1", "1;2"] {
            assert!(visible(Some(bad), 4).is_err(), "{bad}");
        }
        assert_eq!(configure("machine=h800;timing=off;threads=1").unwrap().machine().name, "h800");
        for bad in ["speed=9", "machine", "timing=maybe", "threads=0", "machine=/nowhere"] {
            assert!(configure(bad).is_err(), "{bad}");
        }
    }
}

//! A running library: its dies and the links between them.

use crate::device::{DeviceShared, VaccDevice};
use crate::error::{Deferred, Subject, text};
use crate::loader::Runtime;
use crate::sys::*;
use crate::telemetry::Telemetry;
use crate::wire;
use hal::{Device, DeviceId, DiePlacement, Error, Link, LinkKind, Result, Topology};
use std::ptr::null_mut;
use std::sync::Arc;

/// How to start the library.
#[derive(Clone, Debug, Default)]
pub struct Options {
    /// `VACC_VISIBLE_DEVICES`: "0,1,5". They get numbers from 0 in this order. `None`: all.
    pub visible_devices: Option<String>,
    /// The library's own settings, "key=value;key=value".
    pub config: Option<String>,
}

/// A running library.
#[derive(Clone, Debug)]
pub struct System {
    instance: Arc<Instance>,
    name: String,
    version: String,
    dies: u32,
}

/// The library's handle on itself.
#[derive(Debug)]
pub(crate) struct Instance {
    pub(crate) runtime: Arc<Runtime>,
    handle: vacc_instance,
    pub(crate) deferred: Deferred,
}

// SAFETY: a handle is a name that only the library reads, and the header lets any thread use it.
#[expect(unsafe_code, reason = "handles are raw pointers")]
unsafe impl Send for Instance {}
// SAFETY: as above; nothing in here changes without a lock.
#[expect(unsafe_code, reason = "handles are raw pointers")]
unsafe impl Sync for Instance {}

impl Instance {
    fn check(&self, device: DeviceId, call: &'static str, status: i32) -> Result<()> {
        let subject = Subject { device, device_handle: null_mut(), stream: null_mut() };
        self.runtime.check(subject, call, status)
    }

    #[expect(unsafe_code, reason = "calls the library")]
    pub(crate) fn open(&self, die: DeviceId) -> Result<vacc_device> {
        self.deferred.tell()?;
        let mut handle = null_mut();
        // SAFETY: the handle is ours and alive; the result goes to a local.
        let status =
            unsafe { self.runtime.api.vacc_device_open(self.handle, die.0, &raw mut handle) };
        self.check(die, "vacc_device_open", status)?;
        Ok(handle)
    }
}

impl Drop for Instance {
    #[expect(unsafe_code, reason = "calls the library")]
    fn drop(&mut self) {
        // The first error of this system, be it one that nobody has been told.
        self.runtime.deferred.keep(self.deferred.tell());
        // SAFETY: the handle is ours, and devices, which hold this, are closed.
        let status = unsafe { self.runtime.api.vacc_instance_destroy(self.handle) };
        self.runtime.deferred.keep(self.check(DeviceId(0), "vacc_instance_destroy", status));
    }
}

impl System {
    /// Starts the library.
    ///
    /// # Errors
    ///
    /// What the library refuses: devices that do not exist, settings that it does not know. Or what
    /// went wrong when an earlier system of the library ended.
    #[expect(unsafe_code, reason = "calls the library")]
    pub fn new(runtime: Arc<Runtime>, options: &Options) -> Result<System> {
        runtime.deferred.tell()?;
        let pair = |text: &Option<String>| match text {
            Some(text) => (text.as_ptr().cast(), text.len() as u64),
            None => (std::ptr::null(), 0),
        };
        let (visible_devices, visible_devices_length) = pair(&options.visible_devices);
        let (config, config_length) = pair(&options.config);
        let wire = vacc_instance_options {
            size: struct_size::<vacc_instance_options>(),
            reserved: 0,
            visible_devices,
            visible_devices_length,
            config,
            config_length,
        };
        let mut handle = null_mut();
        // SAFETY: the struct says its size, its texts live in `options`, the result is a local.
        let status = unsafe { runtime.api.vacc_instance_create(&raw const wire, &raw mut handle) };
        let nobody = Subject { device: DeviceId(0), device_handle: null_mut(), stream: null_mut() };
        runtime.check(nobody, "vacc_instance_create", status)?;
        let instance = Arc::new(Instance { runtime, handle, deferred: Deferred::default() });
        let mut properties = vacc_instance_properties {
            size: struct_size::<vacc_instance_properties>(),
            ..vacc_instance_properties::default()
        };
        // SAFETY: the handle is alive, the struct says its size.
        let status = unsafe {
            instance.runtime.api.vacc_instance_get_properties(handle, &raw mut properties)
        };
        instance.check(DeviceId(0), "vacc_instance_get_properties", status)?;
        let (name, version) = (text(&properties.name), text(&properties.version));
        Ok(System { instance, name, version, dies: properties.devices })
    }

    /// The library.
    pub fn runtime(&self) -> &Runtime {
        &self.instance.runtime
    }

    /// What the library calls itself, with its version.
    pub fn description(&self) -> String {
        format!("{} {}", self.name, self.version)
    }

    /// Number of dies offered.
    pub fn dies(&self) -> u32 {
        self.dies
    }

    /// A die.
    ///
    /// # Errors
    ///
    /// [`Error::Usage`] if there is no such die, and what the library reports.
    pub fn open(&self, die: DeviceId) -> Result<Arc<dyn Device>> {
        Ok(Arc::new(VaccDevice::new(self.shared(die)?)))
    }

    fn shared(&self, die: DeviceId) -> Result<Arc<DeviceShared>> {
        if die.0 >= self.dies {
            let problem = match self.dies {
                0 => "the library offers no dies".to_string(),
                n => format!("{} has dies 0 to {}", self.name, n - 1),
            };
            return Err(Error::usage(die, problem));
        }
        DeviceShared::open(self.instance.clone(), die)
    }

    /// Utilisation, power, clocks and temperature of a die.
    ///
    /// # Errors
    ///
    /// [`Error::Unsupported`] where the library has no telemetry.
    pub fn telemetry(&self, die: DeviceId) -> Result<Telemetry> {
        Telemetry::read(&*self.shared(die)?)
    }

    /// Where the dies sit and what joins them. Links are asked for once per kind: see
    /// [`Topology`].
    ///
    /// # Errors
    ///
    /// What the library reports.
    pub fn topology(&self) -> Result<Topology> {
        let placements = (0..self.dies)
            .map(|die| Ok(self.shared(DeviceId(die))?.properties.placement))
            .collect::<Result<Vec<DiePlacement>>>()?;
        let places = Topology::new(placements.clone(), Vec::new());
        let mut links = Vec::new();
        for kind in [LinkKind::SameDie, LinkKind::OnCard, LinkKind::InHost, LinkKind::Network] {
            let dies = || (0..self.dies).map(DeviceId);
            let mut pairs = dies().flat_map(|a| dies().map(move |b| (a, b)));
            let pair = pairs.find(|&(a, b)| places.kind(a, b) == Some(kind));
            if let Some((a, b)) = pair {
                links.extend(self.link(a, b)?);
            }
        }
        Ok(Topology::new(placements, links))
    }

    #[expect(unsafe_code, reason = "calls the library")]
    fn link(&self, a: DeviceId, b: DeviceId) -> Result<Option<Link>> {
        let mut link = vacc_link { size: struct_size::<vacc_link>(), ..vacc_link::default() };
        let Instance { runtime, handle, .. } = &*self.instance;
        // SAFETY: the handle is alive, the struct says its size.
        let status =
            unsafe { runtime.api.vacc_topology_get_link(*handle, a.0, b.0, &raw mut link) };
        self.instance.check(a, "vacc_topology_get_link", status)?;
        Ok(wire::link_of(link.kind).map(|kind| Link {
            kind,
            bytes_per_second: link.bytes_per_second,
            latency_ps: link.latency_ps,
            peer_copy: link.peer_copy != 0,
        }))
    }
}

//! What a die says about itself while it works.

use crate::device::DeviceShared;
use crate::sys::*;
use hal::Result;

/// Readings of one moment; `None` is what the library cannot tell.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Telemetry {
    /// Utilisation of the AI cores since the last reading, 0 to 1.
    pub ai: Option<f64>,
    /// Of the vector DSPs.
    pub vector_dsp: Option<f64>,
    /// Of the video decoders.
    pub video_decode: Option<f64>,
    /// Of the video encoders.
    pub video_encode: Option<f64>,
    /// Watts.
    pub power: Option<f64>,
    /// MHz of the AI cores.
    pub ai_clock: Option<u32>,
    /// MHz of the memory.
    pub memory_clock: Option<u32>,
    /// Degrees Celsius.
    pub temperature: Option<f64>,
    /// Bytes allocated.
    pub memory_used: u64,
    /// Bytes in all.
    pub memory_capacity: u64,
}

impl Telemetry {
    #[expect(unsafe_code, reason = "calls the library")]
    pub(crate) fn read(device: &DeviceShared) -> Result<Telemetry> {
        let api = device.instance.runtime.api();
        device.needs("telemetry", &["vacc_device_get_telemetry"])?;
        let mut told =
            vacc_telemetry { size: struct_size::<vacc_telemetry>(), ..vacc_telemetry::default() };
        // SAFETY: it is exported, the handle is alive, the struct says its size.
        let status = unsafe { api.vacc_device_get_telemetry(device.handle, &raw mut told) };
        device.check("vacc_device_get_telemetry", status)?;
        let scaled =
            |value: i32, by: f64| (value != VACC_TELEMETRY_UNKNOWN).then(|| f64::from(value) * by);
        let whole = |value: i32| u32::try_from(value).ok();
        Ok(Telemetry {
            ai: scaled(told.ai_permille, 1e-3),
            vector_dsp: scaled(told.vector_dsp_permille, 1e-3),
            video_decode: scaled(told.video_decode_permille, 1e-3),
            video_encode: scaled(told.video_encode_permille, 1e-3),
            power: scaled(told.power_milliwatts, 1e-3),
            ai_clock: whole(told.ai_clock_mhz),
            memory_clock: whole(told.memory_clock_mhz),
            temperature: scaled(told.temperature_millicelsius, 1e-3),
            memory_used: told.memory_used,
            memory_capacity: told.memory_capacity,
        })
    }
}

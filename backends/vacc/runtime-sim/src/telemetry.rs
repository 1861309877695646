//! Telemetry. The simulator knows its memory, and has no power, clocks or temperature: it says so.

use crate::device::DEVICES;
use crate::error::{fill, guard};
use vacc::sys::*;

/// See `vacc.h`.
#[expect(unsafe_code, reason = "exported")]
#[unsafe(no_mangle)]
pub(crate) extern "C" fn vacc_device_get_telemetry(
    device: vacc_device,
    telemetry: *mut vacc_telemetry,
) -> vacc_status {
    guard(|| {
        let die = DEVICES.get(device)?;
        let memory = die.device.memory_info().map_err(|e| die.refused(e))?;
        let unknown = VACC_TELEMETRY_UNKNOWN;
        fill(
            telemetry,
            &vacc_telemetry {
                size: struct_size::<vacc_telemetry>(),
                ai_permille: unknown,
                vector_dsp_permille: unknown,
                video_decode_permille: unknown,
                video_encode_permille: unknown,
                power_milliwatts: unknown,
                ai_clock_mhz: unknown,
                memory_clock_mhz: unknown,
                temperature_millicelsius: unknown,
                reserved: 0,
                memory_used: memory.used,
                memory_capacity: memory.capacity,
            },
        )
    })
}

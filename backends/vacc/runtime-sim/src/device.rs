//! Devices: properties, support, faults, profiles.

use crate::error::{Outcome, Refused, blank, fill, give, guard, put, text};
use crate::handles::Table;
use crate::system::Instance;
use hal::fault::{FaultAction, FaultMatch, FaultPlan, FaultRule};
use hal::trace::{Span, TraceSink};
use hal::{Device, DeviceId, Error, Support};
use parking_lot::Mutex;
use std::collections::VecDeque;
use std::ffi::{c_char, c_void};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;
use vacc::sys::*;
use vacc::wire;

/// An open device.
#[derive(Debug)]
pub(crate) struct Die {
    pub(crate) instance: Arc<Instance>,
    pub(crate) device: Arc<dyn Device>,
    /// Streams, buffers and communicators.
    pub(crate) children: AtomicUsize,
    profile: Arc<Profile>,
}

pub(crate) static DEVICES: Table<Die> = Table::new("device", 2);

impl Die {
    pub(crate) fn open(instance: Arc<Instance>, die: DeviceId) -> Outcome<Die> {
        let device = instance.system.open(die)?;
        instance.open.fetch_add(1, Ordering::AcqRel);
        Ok(Die { instance, device, children: AtomicUsize::new(0), profile: Arc::default() })
    }

    pub(crate) fn refused(&self, error: Error) -> Refused {
        Refused::from(error).renumber(|die| self.instance.ordinal(die))
    }
}

impl Drop for Die {
    fn drop(&mut self) {
        self.instance.open.fetch_sub(1, Ordering::AcqRel);
    }
}

/// One child of a device, counted.
#[derive(Debug)]
pub(crate) struct Child(pub(crate) Arc<Die>);

impl Child {
    pub(crate) fn of(die: Arc<Die>) -> Child {
        die.children.fetch_add(1, Ordering::AcqRel);
        Child(die)
    }
}

impl Drop for Child {
    fn drop(&mut self) {
        self.0.children.fetch_sub(1, Ordering::AcqRel);
    }
}

/// See `vacc.h`.
#[expect(unsafe_code, reason = "exported")]
#[unsafe(no_mangle)]
pub(crate) extern "C" fn vacc_device_close(device: vacc_device) -> vacc_status {
    guard(|| {
        let idle = |die: &Arc<Die>| match die.children.load(Ordering::Acquire) {
            0 => Ok(()),
            n => {
                let text = format!("{n} streams, buffers or communicators are left on the device");
                Err(Refused::new(VACC_ERROR_BUSY, text))
            }
        };
        DEVICES.remove(device, idle).map(drop)
    })
}

/// See `vacc.h`.
#[expect(unsafe_code, reason = "exported")]
#[unsafe(no_mangle)]
pub(crate) extern "C" fn vacc_device_get_properties(
    device: vacc_device,
    properties: *mut vacc_device_properties,
) -> vacc_status {
    guard(|| {
        let die = DEVICES.get(device)?;
        let known = die.device.properties();
        let mut told = vacc_device_properties {
            size: struct_size::<vacc_device_properties>(),
            physical_index: known.id.0,
            host: known.placement.host,
            card: known.placement.card,
            die_on_card: known.placement.die_on_card,
            cores: known.cores,
            memory_bytes: known.memory_bytes,
            allocation_alignment: known.allocation_alignment,
            matrix_alignment: known.matrix_alignment,
            flags: if known.functional { VACC_DEVICE_FUNCTIONAL } else { 0 },
            clock: known.clock.map_or(VACC_CLOCK_NONE, wire::clock),
            ..vacc_device_properties::default()
        };
        put(&mut told.name, &known.name);
        fill(properties, &told)
    })
}

/// See `vacc.h`.
#[expect(unsafe_code, reason = "exported")]
#[unsafe(no_mangle)]
pub(crate) extern "C" fn vacc_device_get_memory_info(
    device: vacc_device,
    info: *mut vacc_memory_info,
) -> vacc_status {
    guard(|| {
        let die = DEVICES.get(device)?;
        let known = die.device.memory_info().map_err(|e| die.refused(e))?;
        let size = struct_size::<vacc_memory_info>();
        let (capacity, used, peak) = (known.capacity, known.used, known.peak);
        fill(info, &vacc_memory_info { size, reserved: 0, capacity, used, peak })
    })
}

/// See `vacc.h`.
#[expect(unsafe_code, reason = "exported")]
#[unsafe(no_mangle)]
pub(crate) extern "C" fn vacc_device_supports(
    device: vacc_device,
    op: u32,
    descriptor: *const c_void,
) -> vacc_status {
    guard(|| {
        let die = DEVICES.get(device)?;
        // SAFETY: the header obliges callers to pass the descriptor of this code.
        let op = unsafe { wire::decode(op, descriptor) }?;
        match die.device.supports(&op.desc()) {
            Support::Yes => Ok(()),
            Support::No(reason) => Err(Refused::new(VACC_ERROR_UNSUPPORTED, reason)),
        }
    })
}

/// See `vacc.h`.
#[expect(unsafe_code, reason = "exported")]
#[unsafe(no_mangle)]
pub(crate) extern "C" fn vacc_device_get_error(
    device: vacc_device,
    error: *mut vacc_error,
) -> vacc_status {
    guard(|| {
        let die = DEVICES.get(device)?;
        let told = match die.device.memory_info() {
            Ok(_) => blank(),
            Err(lost) => die.refused(lost).into_error(),
        };
        fill(error, &told)
    })
}

/// See `vacc.h`.
#[expect(unsafe_code, reason = "exported")]
#[unsafe(no_mangle)]
pub(crate) extern "C" fn vacc_device_set_faults(
    device: vacc_device,
    rules: *const vacc_fault_rule,
    count: u32,
) -> vacc_status {
    guard(|| {
        let die = DEVICES.get(device)?;
        if count == 0 {
            return die.device.set_faults(None).map_err(|e| die.refused(e));
        }
        let mut plan = Vec::new();
        for i in 0..count as usize {
            // SAFETY: the header obliges callers to pass `count` structs, each as large as the
            // first says.
            let rule = unsafe { read_element(rules, i, size_of::<vacc_fault_rule>()) }?;
            plan.push(fault_rule(&rule)?);
        }
        die.device.set_faults(Some(Arc::new(FaultPlan::new(plan)))).map_err(|e| die.refused(e))
    })
}

fn fault_rule(rule: &vacc_fault_rule) -> Outcome<FaultRule> {
    let maybe = |at: *const c_char, length, what| match at.is_null() {
        true => Ok(None),
        false => text(at, length, what).map(|t| Some(t.to_string())),
    };
    let action = match rule.action {
        VACC_FAULT_PASS => FaultAction::Pass,
        VACC_FAULT_DELAY => FaultAction::Delay(Duration::from_nanos(rule.delay_ps / 1000)),
        VACC_FAULT_FAIL => {
            let words = maybe(rule.text, rule.text_length, "text")?;
            FaultAction::Fail(words.unwrap_or_else(|| "rule".to_string()).into())
        }
        VACC_FAULT_HANG => FaultAction::Hang,
        VACC_FAULT_LOSE => FaultAction::Lose,
        other => {
            return Err(Refused::new(VACC_ERROR_UNSUPPORTED, format!("fault action {other}")));
        }
    };
    let matches = FaultMatch {
        device: None,
        command: maybe(rule.command, rule.command_length, "command")?,
        label: maybe(rule.label, rule.label_length, "label")?,
    };
    let nth = (rule.nth != u64::MAX).then_some(rule.nth);
    Ok(FaultRule { matches, nth, action })
}

/// The most records that are kept for somebody to read: some 200 MB.
const MOST_RECORDS: usize = 1 << 20;

/// What was recorded and not read yet.
#[derive(Debug, Default)]
struct Profile {
    enabled: AtomicBool,
    kept: Mutex<(VecDeque<Span>, u64)>,
}

impl TraceSink for Profile {
    fn record(&self, span: &Span) {
        let mut kept = self.kept.lock();
        if kept.0.len() < MOST_RECORDS {
            kept.0.push_back(span.clone());
        } else {
            kept.1 += 1;
        }
    }
}

/// See `vacc.h`.
#[expect(unsafe_code, reason = "exported")]
#[unsafe(no_mangle)]
pub(crate) extern "C" fn vacc_profile_enable(device: vacc_device, enable: u32) -> vacc_status {
    guard(|| {
        let die = DEVICES.get(device)?;
        let sink: Option<Arc<dyn TraceSink>> = match enable {
            0 => None,
            1 => Some(die.profile.clone()),
            other => return Err(Refused::invalid(format!("enable is {other}, not 0 or 1"))),
        };
        die.device.set_trace(sink).map_err(|e| die.refused(e))?;
        die.profile.enabled.store(enable == 1, Ordering::Relaxed);
        if enable == 1 {
            *die.profile.kept.lock() = (VecDeque::new(), 0);
        }
        Ok(())
    })
}

/// See `vacc.h`.
#[expect(unsafe_code, reason = "exported")]
#[unsafe(no_mangle)]
pub(crate) extern "C" fn vacc_profile_read(
    device: vacc_device,
    records: *mut vacc_profile_record,
    capacity: u32,
    count: *mut u32,
    lost: *mut u64,
) -> vacc_status {
    guard(|| {
        let die = DEVICES.get(device)?;
        if count.is_null() || lost.is_null() {
            return Err(Refused::null(if count.is_null() { "count" } else { "lost" }));
        }
        // SAFETY: the header obliges callers to pass records, of which the first says its size.
        let step = unsafe { claimed_size(records.cast_const(), size_of::<vacc_profile_record>()) }?;
        if die.profile.enabled.load(Ordering::Relaxed) {
            // So that everything that has completed is there.
            let sink: Arc<dyn TraceSink> = die.profile.clone();
            die.device.set_trace(Some(sink)).map_err(|e| die.refused(e))?;
        }
        let mut kept = die.profile.kept.lock();
        let n = kept.0.len().min(capacity as usize);
        for (i, span) in kept.0.drain(..n).enumerate() {
            let record = record(&span);
            // SAFETY: `n` is at most `capacity`, and each record is as large as the first says.
            unsafe { records.byte_add(i * step).write_unaligned(record) };
        }
        give(count, "count", n as u32)?;
        give(lost, "lost", std::mem::take(&mut kept.1))
    })
}

fn record(span: &Span) -> vacc_profile_record {
    let mut record = vacc_profile_record {
        size: struct_size::<vacc_profile_record>(),
        command: wire::command(span.kind),
        stream_index: span.stream.index,
        clock: wire::clock(span.clock),
        sequence: span.sequence,
        begin_ps: span.start,
        end_ps: span.end,
        operations: span.operations,
        bytes: span.bytes,
        bound: wire::bound(span.bound),
        ..vacc_profile_record::default()
    };
    put(&mut record.label, span.label.as_str());
    record
}

//! A die behind the library.

use crate::collective::VaccCommunicator;
use crate::error::{Deferred, Subject, status, text};
use crate::memory::VaccBuffer;
use crate::stream::VaccStream;
use crate::sys::*;
use crate::system::Instance;
use crate::wire;
use hal::fault::{FaultAction, FaultPlan, FaultRule};
use hal::trace::{Span, TraceSink};
use hal::{
    Buffer, CommandList, Communicator, CommunicatorId, Device, DeviceId, DeviceProperties,
    DiePlacement, Error, Label, MemoryInfo, Op, Result, Stream, StreamId, Support, TensorDesc,
};
use parking_lot::Mutex;
use std::ptr::null_mut;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// How many records of a profile are taken at once.
const RECORDS: usize = 256;

/// What everything on a die shares, and keeps open.
#[derive(Debug)]
pub(crate) struct DeviceShared {
    pub(crate) instance: Arc<Instance>,
    pub(crate) handle: vacc_device,
    pub(crate) properties: DeviceProperties,
    pub(crate) deferred: Deferred,
    tracing: AtomicBool,
    trace: Mutex<Option<Arc<dyn TraceSink>>>,
}

// SAFETY: a handle is a name that only the library reads, and the header lets any thread use it.
#[expect(unsafe_code, reason = "handles are raw pointers")]
unsafe impl Send for DeviceShared {}
// SAFETY: as above; nothing in here changes without a lock.
#[expect(unsafe_code, reason = "handles are raw pointers")]
unsafe impl Sync for DeviceShared {}

impl DeviceShared {
    #[expect(unsafe_code, reason = "calls the library")]
    pub(crate) fn open(instance: Arc<Instance>, id: DeviceId) -> Result<Arc<DeviceShared>> {
        let handle = instance.open(id)?;
        let mut told = vacc_device_properties {
            size: struct_size::<vacc_device_properties>(),
            ..vacc_device_properties::default()
        };
        // SAFETY: the handle was just opened, the struct says its size.
        let got = unsafe { instance.runtime.api.vacc_device_get_properties(handle, &raw mut told) };
        let properties = DeviceProperties {
            id,
            name: text(&told.name),
            backend: "vacc",
            placement: DiePlacement {
                host: told.host,
                card: told.card,
                die_on_card: told.die_on_card,
            },
            memory_bytes: told.memory_bytes,
            allocation_alignment: told.allocation_alignment,
            cores: told.cores,
            matrix_alignment: told.matrix_alignment,
            functional: told.flags & VACC_DEVICE_FUNCTIONAL != 0,
            // A clock that cannot be read is none.
            clock: wire::clock_of(told.clock)
                .filter(|_| instance.runtime.api.vacc_stream_get_completion.is_ok()),
        };
        // Made first, so that the handle is closed if its properties could not be read.
        let device = DeviceShared {
            instance,
            handle,
            properties,
            deferred: Deferred::default(),
            tracing: AtomicBool::new(false),
            trace: Mutex::default(),
        };
        device.check("vacc_device_get_properties", got)?;
        Ok(Arc::new(device))
    }

    pub(crate) fn id(&self) -> DeviceId {
        self.properties.id
    }

    pub(crate) fn check(&self, call: &'static str, status: i32) -> Result<()> {
        self.check_stream(null_mut(), call, status)
    }

    #[inline]
    pub(crate) fn check_stream(
        &self,
        stream: vacc_stream,
        call: &'static str,
        status: i32,
    ) -> Result<()> {
        let subject = Subject { device: self.id(), device_handle: self.handle, stream };
        self.instance.runtime.check(subject, call, status)
    }

    /// An error that the library told without a call having failed.
    pub(crate) fn told(&self, stream: vacc_stream, call: &'static str, told: &vacc_error) -> Error {
        let subject = Subject { device: self.id(), device_handle: self.handle, stream };
        self.instance.runtime.translate(subject, call, told.status, Some(told))
    }

    /// That something is not to be had, since one of these optional functions is absent.
    ///
    /// # Errors
    ///
    /// [`Error::Unsupported`], which names those that are.
    pub(crate) fn needs(&self, what: &str, functions: &[&str]) -> Result<()> {
        let runtime = &self.instance.runtime;
        let mut missing = runtime.missing_optional();
        missing.retain(|name| functions.contains(name));
        if missing.is_empty() {
            return Ok(());
        }
        let reason = format!("{} does not export {}", runtime.path(), missing.join(" and "));
        Err(Error::Unsupported { device: self.id(), op: what.to_string(), reason })
    }

    /// Gives what the library has recorded to whoever traces. Called where the host has waited.
    pub(crate) fn drain_trace(&self) {
        if self.tracing.load(Ordering::Acquire) {
            let sink = self.trace.lock();
            if let Some(sink) = &*sink {
                self.deferred.keep(self.drain_to(&**sink));
            }
        }
    }

    #[expect(unsafe_code, reason = "calls the library")]
    fn drain_to(&self, sink: &dyn TraceSink) -> Result<()> {
        let blank = vacc_profile_record {
            size: struct_size::<vacc_profile_record>(),
            ..vacc_profile_record::default()
        };
        let mut records = vec![blank; RECORDS];
        let (mut unknown, mut all_lost) = (0, 0);
        loop {
            records[0] = blank;
            let (mut count, mut lost) = (0, 0);
            // SAFETY: tracing is on only if it is exported; as many records as said, each as large
            // as the first says.
            let status = unsafe {
                self.instance.runtime.api.vacc_profile_read(
                    self.handle,
                    records.as_mut_ptr(),
                    RECORDS as u32,
                    &raw mut count,
                    &raw mut lost,
                )
            };
            self.check("vacc_profile_read", status)?;
            all_lost += lost;
            for record in records.iter().take(count as usize) {
                match self.span(record) {
                    Some(span) => sink.record(&span),
                    None => unknown += 1,
                }
            }
            if (count as usize) < RECORDS {
                break;
            }
        }
        if all_lost + unknown == 0 {
            return Ok(());
        }
        let text = format!("{all_lost} records were lost and {unknown} are of unknown commands");
        Err(Error::Runtime { device: self.id(), call: "vacc_profile_read", code: 0, text })
    }

    fn span(&self, record: &vacc_profile_record) -> Option<Span> {
        Some(Span {
            stream: StreamId { device: self.id(), index: record.stream_index },
            sequence: record.sequence,
            kind: wire::command_of(record.command)?,
            label: Label::from(text(&record.label)),
            clock: wire::clock_of(record.clock)?,
            // The ABI tells neither how long a command waited nor for what.
            ready: record.begin_ps,
            start: record.begin_ps,
            end: record.end_ps.max(record.begin_ps),
            operations: record.operations,
            bytes: record.bytes,
            bound: wire::bound_of(record.bound).unwrap_or(hal::trace::Bound::Unknown),
            waited_for: None,
        })
    }
}

impl Drop for DeviceShared {
    #[expect(unsafe_code, reason = "calls the library")]
    fn drop(&mut self) {
        self.instance.deferred.keep(self.deferred.tell());
        // SAFETY: the handle is ours, and what is on it, which holds this, is destroyed.
        let status = unsafe { self.instance.runtime.api.vacc_device_close(self.handle) };
        self.instance.deferred.keep(self.check("vacc_device_close", status));
    }
}

/// The handle through which a die is used.
#[derive(Debug)]
pub(crate) struct VaccDevice {
    shared: Arc<DeviceShared>,
}

impl VaccDevice {
    pub(crate) fn new(shared: Arc<DeviceShared>) -> Self {
        VaccDevice { shared }
    }
}

impl Device for VaccDevice {
    fn properties(&self) -> &DeviceProperties {
        &self.shared.properties
    }

    #[expect(unsafe_code, reason = "calls the library")]
    fn memory_info(&self) -> Result<MemoryInfo> {
        self.shared.deferred.tell()?;
        let mut told =
            vacc_memory_info { size: struct_size::<vacc_memory_info>(), ..Default::default() };
        let api = self.shared.instance.runtime.api();
        // SAFETY: the handle is alive, the struct says its size.
        let status = unsafe { api.vacc_device_get_memory_info(self.shared.handle, &raw mut told) };
        self.shared.check("vacc_device_get_memory_info", status)?;
        Ok(MemoryInfo {
            capacity: told.capacity,
            used: told.used.min(told.capacity),
            peak: told.peak,
        })
    }

    #[expect(unsafe_code, reason = "calls the library")]
    fn supports(&self, op: &Op<TensorDesc>) -> Support {
        let api = self.shared.instance.runtime.api();
        let asked = wire::encode(
            op,
            |desc| Ok::<_, std::convert::Infallible>(wire::tensor(desc, null_mut(), 0)),
            |code, descriptor| {
                let handle = self.shared.handle;
                // SAFETY: the handle is alive, the descriptor is that of the code.
                (code != 0).then(|| unsafe { api.vacc_device_supports(handle, code, descriptor) })
            },
        );
        let Ok(asked) = asked;
        let Some(answer) = asked else {
            return Support::No(format!("the ABI has no code for {}", op.kind().name()));
        };
        match self.shared.check("vacc_device_supports", answer) {
            Ok(()) => Support::Yes,
            Err(Error::Unsupported { reason, .. }) => Support::No(reason),
            Err(error) => Support::No(error.to_string()),
        }
    }

    fn stream(&self, label: &str) -> Result<Arc<dyn Stream>> {
        self.shared.deferred.tell()?;
        Ok(Arc::new(VaccStream::create(self.shared.clone(), label)?))
    }

    fn execute(&self, list: &CommandList, streams: &[Arc<dyn Stream>]) -> Result<()> {
        crate::list::execute(&self.shared, list, streams)
    }

    fn alloc_host(&self, bytes: u64) -> Result<Buffer> {
        self.shared.deferred.tell()?;
        VaccBuffer::alloc_host(&self.shared, bytes)
    }

    #[expect(unsafe_code, reason = "calls the library")]
    fn communicator_id(&self) -> Result<CommunicatorId> {
        self.shared.deferred.tell()?;
        let mut id = vacc_comm_id::default();
        let api = self.shared.instance.runtime.api();
        // SAFETY: the handle is alive, the result is a local.
        let status = unsafe { api.vacc_comm_create_id(self.shared.handle, &raw mut id) };
        self.shared.check("vacc_comm_create_id", status)?;
        let half = |at: usize| u64::from_le_bytes(std::array::from_fn(|i| id.bytes[at + i]));
        Ok(CommunicatorId([half(0), half(8)]))
    }

    fn communicator(
        &self,
        id: CommunicatorId,
        rank: usize,
        size: usize,
    ) -> Result<Arc<dyn Communicator>> {
        self.shared.deferred.tell()?;
        Ok(Arc::new(VaccCommunicator::join(self.shared.clone(), id, rank, size)?))
    }

    #[expect(unsafe_code, reason = "calls the library")]
    fn set_trace(&self, sink: Option<Arc<dyn TraceSink>>) -> Result<()> {
        let device = &self.shared;
        device.deferred.tell()?;
        let api = device.instance.runtime.api();
        let needed = device.needs("tracing", &["vacc_profile_enable", "vacc_profile_read"]);
        if needed.is_err() {
            return if sink.is_some() { needed } else { Ok(()) };
        }
        // The last records go to whoever asked for them.
        device.drain_trace();
        let on = u32::from(sink.is_some());
        let mut trace = device.trace.lock();
        if on == 0 && trace.is_none() {
            return Ok(());
        }
        // SAFETY: it is exported, the handle is alive.
        let status = unsafe { api.vacc_profile_enable(device.handle, on) };
        device.check("vacc_profile_enable", status)?;
        device.tracing.store(sink.is_some(), Ordering::Release);
        *trace = sink;
        drop(trace);
        device.deferred.tell()
    }

    #[expect(unsafe_code, reason = "calls the library")]
    fn set_faults(&self, faults: Option<Arc<FaultPlan>>) -> Result<()> {
        let device = &self.shared;
        device.deferred.tell()?;
        let api = device.instance.runtime.api();
        let needed = device.needs("fault injection", &["vacc_device_set_faults"]);
        if needed.is_err() {
            return if faults.is_some() { needed } else { Ok(()) };
        }
        let mine = |rule: &&FaultRule| rule.matches.device.is_none_or(|d| d == device.id());
        let rules = faults.iter().flat_map(|plan| plan.rules()).filter(mine);
        let rules = rules.map(|rule| device.fault_rule(rule)).collect::<Result<Vec<_>>>()?;
        // SAFETY: it is exported, the handle is alive; the rules' texts live in `faults`.
        let status = unsafe {
            api.vacc_device_set_faults(device.handle, rules.as_ptr(), rules.len() as u32)
        };
        device.check("vacc_device_set_faults", status)
    }
}

impl DeviceShared {
    /// A rule's fields; its texts are borrowed from it.
    fn fault_rule(&self, rule: &FaultRule) -> Result<vacc_fault_rule> {
        let pair = |text: Option<&str>| {
            text.map_or((std::ptr::null(), 0), |t| (t.as_ptr().cast(), t.len() as u64))
        };
        let (command, command_length) = pair(rule.matches.command.as_deref());
        let (label, label_length) = pair(rule.matches.label.as_deref());
        let (action, delay_ps, words) = match &rule.action {
            FaultAction::Pass => (VACC_FAULT_PASS, 0, None),
            FaultAction::Delay(by) => {
                let picos = by.as_nanos().saturating_mul(1000);
                (VACC_FAULT_DELAY, u64::try_from(picos).unwrap_or(u64::MAX), None)
            }
            FaultAction::Fail(text) => (VACC_FAULT_FAIL, 0, Some(&**text)),
            FaultAction::Hang => (VACC_FAULT_HANG, 0, None),
            FaultAction::Lose => (VACC_FAULT_LOSE, 0, None),
            other => {
                return Err(Error::Unsupported {
                    device: self.id(),
                    op: "fault injection".to_string(),
                    reason: format!("the ABI has no code for {other:?}"),
                });
            }
        };
        let (text, text_length) = pair(words);
        Ok(vacc_fault_rule {
            size: struct_size::<vacc_fault_rule>(),
            action,
            nth: rule.nth.unwrap_or(u64::MAX),
            delay_ps,
            command,
            command_length,
            label,
            label_length,
            text,
            text_length,
        })
    }

    /// Whether a status says that there is nothing to tell.
    pub(crate) fn is_nothing(status: i32) -> bool {
        status == status::NOT_READY || status == status::UNSUPPORTED
    }
}

//! Runtimes that lack functions, have grown, answer with unknown codes, or fail at each call in
//! turn: `c/fake.c` in its variants. Nothing hangs, nothing panics, no handle is lost, and every
//! error names the call.

mod common;

use common::{fake, load, system, within_a_minute};
use hal::fault::FaultPlan;
use hal::op::Add;
use hal::trace::{Span, TraceSink};
use hal::{
    Cause, Collective, DType, Device, DeviceId, Error, Label, Op, Reduction, Result, Stream,
    Support, Tensor,
};
use std::collections::BTreeSet;
use std::ffi::{CStr, c_char};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;
use vacc::{Runtime, System};

const SOON: Duration = Duration::from_secs(5);

/// A fake, as the backend sees it, and its own view of what happened.
struct Fake {
    runtime: Arc<Runtime>,
    library: libloading::Library,
}

#[expect(unsafe_code, reason = "asks the fake")]
impl Fake {
    fn new(name: &str, variant: &[&str]) -> Fake {
        let path: PathBuf = fake(name, variant);
        let runtime = load(path.clone());
        // SAFETY: the library is loaded already; this finds the same one.
        let library = unsafe { libloading::Library::new(path) }.unwrap();
        Fake { runtime, library }
    }

    fn start(&self, config: &str) -> Result<System> {
        system(&self.runtime, config)
    }

    /// Handles that were given out and not given back.
    fn live(&self) -> i64 {
        // SAFETY: `fake.c` defines it so; a C long is 64 bits where these tests run.
        unsafe {
            let live: libloading::Symbol<'_, unsafe extern "C" fn() -> std::ffi::c_long> =
                self.library.get("fake_live").unwrap();
            live()
        }
    }

    /// Counts them from here on.
    fn forget(&self) {
        // SAFETY: `fake.c` defines it so.
        unsafe {
            let forget: libloading::Symbol<'_, unsafe extern "C" fn()> =
                self.library.get("fake_forget").unwrap();
            forget();
        }
    }

    /// The function that failed since this was last asked.
    fn failed(&self) -> Option<String> {
        // SAFETY: `fake.c` defines it so; what it returns is null or static.
        unsafe {
            let failed: libloading::Symbol<'_, unsafe extern "C" fn() -> *const c_char> =
                self.library.get("fake_failed").unwrap();
            let name = failed();
            (!name.is_null()).then(|| CStr::from_ptr(name).to_str().unwrap().to_string())
        }
    }
}

#[derive(Debug)]
struct Ignore;

impl TraceSink for Ignore {
    fn record(&self, _: &Span) {}
}

fn floats(stream: &dyn Stream) -> Result<Tensor> {
    stream.alloc_tensor(DType::F32, &[4])
}

fn add(x: &Tensor) -> Op {
    Add { a: x.clone(), b: x.clone(), out: x.clone() }.into()
}

fn all_reduce(x: &Tensor) -> Collective {
    Collective::AllReduce { send: x.clone(), recv: x.clone(), reduction: Reduction::Sum }
}

/// A point's state, which has no error of its own: the next checked call tells it.
fn progress(stream: &dyn Stream, device: &dyn Device) -> Result<()> {
    let point = stream.point();
    let _ = (point.is_reached(), point.completed_at());
    point.timeline().failure().map_or(Ok(()), Err)?;
    device.memory_info().map(|_| ())
}

/// Calls every function of the ABI, each at least once.
fn session(system: System, optional: bool) -> Result<()> {
    let topology = system.topology()?;
    assert_eq!(topology.dies(), 2);
    let device = system.open(DeviceId(0))?;
    device.memory_info()?;
    if optional {
        system.telemetry(DeviceId(0))?;
        device
            .set_faults(Some(Arc::new(FaultPlan::new(["op=add,action=hang".parse().unwrap()]))))?;
        device.set_trace(Some(Arc::new(Ignore)))?;
    }
    let (a, b) = (device.stream("a")?, device.stream("b")?);
    let x = floats(&*a)?;
    let op = add(&x);
    if let Support::No(reason) = device.supports(&op.desc()) {
        return Err(Error::usage(DeviceId(0), reason));
    }
    let host = device.alloc_host(16)?;
    let mut bytes = [0; 16];
    host.raw().write_host(0, &bytes)?;
    host.raw().read_host(0, &mut bytes)?;
    a.write(&x.region(), &bytes)?;
    a.fill(&x.region(), 1)?;
    a.copy(&host.whole(), &x.region())?;
    a.submit(&op.label("layer 4 add"))?;
    a.read(&x.region(), &mut bytes, SOON)?;
    progress(&*a, &*device)?;
    b.wait(&a.point())?;
    b.synchronize(SOON)?;
    let communicator = device.communicator(device.communicator_id()?, 0, 1)?;
    b.submit_collectives(&communicator, &[all_reduce(&x)], &Label::Static("sum"))?;
    communicator.status()?;
    communicator.abort("done");
    // Where the library has no lists, its commands go one by one.
    let fill = hal::ListAction::Fill { region: x.region(), byte: 2 };
    let list = hal::CommandList::new(vec![hal::Entry { stream: 0, action: fill }], 1);
    device.execute(&list.unwrap(), std::slice::from_ref(&b))?;
    if optional {
        device.set_trace(None)?;
    }
    drop((a, b, x, host, communicator));
    // What went wrong when they were dropped.
    device.memory_info().map(|_| ())
}

/// Every function that a session calls: those of the header, but for what describes errors.
fn functions_of_a_session() -> BTreeSet<String> {
    let header = Path::new(env!("CARGO_MANIFEST_DIR")).join("include/vacc.h");
    let header = std::fs::read_to_string(header).unwrap();
    let all = header.lines().filter_map(|line| line.strip_prefix("vacc_status "));
    let all = all.filter_map(|line| Some(line.split_once('(')?.0.to_string()));
    // The second is asked only about a device that was lost and says nothing more.
    all.filter(|name| name != "vacc_last_error" && name != "vacc_device_get_error").collect()
}

/// Fails call 1, then call 2, and so on, until a session passes; returns what failed on the way.
fn each_call_fails_in_turn(fake: &Fake, code: i32) -> BTreeSet<String> {
    let mut failed_once = BTreeSet::new();
    for n in 1.. {
        assert!(n < 1000, "it never passes");
        let told = fake.start(&format!("fail_at={n};code={code}")).and_then(|s| session(s, true));
        // What came too late for the session is told to the next one.
        let told = told.and_then(|()| fake.start("").map(drop));
        let Some(failed) = fake.failed() else {
            told.unwrap();
            assert_eq!(fake.live(), 0);
            return failed_once;
        };
        // "Nothing to tell" is an answer of a completion time, not an error.
        let nothing = matches!(code, 7 | 11) && failed == "vacc_stream_get_completion";
        match told {
            Err(error) => {
                let text = error.to_string();
                assert!(text.contains(&failed), "call {n}, {failed}, code {code}: {text:?}");
            }
            Ok(()) => assert!(nothing, "call {n}: the failure of {failed} was told to nobody"),
        }
        // A library that refuses to take a handle back has it still.
        let refused = ["_destroy", "_close", "_free"].iter().any(|end| failed.ends_with(end));
        assert_eq!(fake.live(), i64::from(refused), "call {n}, {failed}, code {code}");
        fake.forget();
        failed_once.insert(failed);
        fake.start("").map(drop).unwrap();
    }
    unreachable!("the loop returns")
}

#[test]
fn each_call_that_fails_is_named_and_nothing_is_lost() {
    within_a_minute(|| {
        let fake = Fake::new("fails", &[]);
        // A mistake inside the library; one that nobody knows; and statuses that mean something.
        for code in [12, 99, -5, 1, 3, 4, 5, 6, 7, 8, 9, 10, 11] {
            let failed = each_call_fails_in_turn(&fake, code);
            assert_eq!(failed, functions_of_a_session(), "code {code}");
        }
    });
}

#[test]
fn a_library_that_says_nothing_about_its_errors_is_named_all_the_same() {
    within_a_minute(|| {
        let fake = Fake::new("mute", &["-DFAKE_MUTE"]);
        for code in [12, 99, 1, 7, 8, 9, 10] {
            each_call_fails_in_turn(&fake, code);
        }
    });
}

/// What failed in a drop is told once, by the next call that can tell.
#[test]
fn errors_of_destruction_surface_at_the_next_checked_call() {
    within_a_minute(|| {
        let fake = Fake::new("drops", &[]);
        let told = |name: &str, result: Result<()>| {
            let text = result.unwrap_err().to_string();
            assert!(text.contains(name), "{text:?} lacks {name}");
        };
        type Make = fn(&Arc<dyn Device>) -> Result<Box<dyn std::any::Any>>;
        let children: [(&str, Make); 3] = [
            ("vacc_buffer_free", |d| Ok(Box::new(d.alloc_host(8)?))),
            ("vacc_stream_destroy", |d| Ok(Box::new(d.stream("s")?))),
            ("vacc_comm_destroy", |d| Ok(Box::new(d.communicator(d.communicator_id()?, 0, 1)?))),
        ];
        for (name, make) in children {
            let system = fake.start(&format!("fail={name}")).unwrap();
            let device = system.open(DeviceId(0)).unwrap();
            drop(make(&device).unwrap());
            told(name, device.memory_info().map(drop));
            device.memory_info().unwrap();
            // Told to nobody while the die was open: whoever opens one next.
            drop(make(&device).unwrap());
            drop(device);
            told(name, system.open(DeviceId(1)).map(drop));
            system.open(DeviceId(1)).unwrap();
        }
        let system = fake.start("fail=vacc_device_close").unwrap();
        drop(system.open(DeviceId(0)).unwrap());
        told("vacc_device_close", system.open(DeviceId(0)).map(drop));
        drop(system);
        drop(fake.start("fail=vacc_instance_destroy"));
        told("vacc_instance_destroy", fake.start("").map(drop));
        fake.start("").unwrap();
    });
}

#[test]
fn without_optional_functions_the_rest_works_and_what_is_missing_is_named() {
    within_a_minute(|| {
        let fake = Fake::new("bare-bones", &["-DFAKE_WITHOUT_OPTIONAL"]);
        session(fake.start("").unwrap(), false).unwrap();
        assert_eq!(
            fake.runtime.missing_optional(),
            [
                "vacc_stream_get_completion",
                "vacc_profile_enable",
                "vacc_profile_read",
                "vacc_device_get_telemetry",
                "vacc_device_set_faults",
                "vacc_list_launch",
            ]
        );
        let system = fake.start("").unwrap();
        let device = system.open(DeviceId(0)).unwrap();
        let refused = |result: Result<()>, name: &str| match result {
            Err(Error::Unsupported { reason, .. }) => assert!(reason.contains(name), "{reason}"),
            other => panic!("{name}: {other:?}"),
        };
        let rule = "op=add,action=hang".parse().unwrap();
        refused(
            device.set_faults(Some(Arc::new(FaultPlan::new([rule])))),
            "vacc_device_set_faults",
        );
        refused(
            device.set_trace(Some(Arc::new(Ignore))),
            "vacc_profile_enable and vacc_profile_read",
        );
        refused(system.telemetry(DeviceId(0)).map(drop), "vacc_device_get_telemetry");
        // Taking away what is not there is no mistake.
        device.set_faults(None).unwrap();
        device.set_trace(None).unwrap();
        let stream = device.stream("s").unwrap();
        assert_eq!(stream.point().completed_at(), None);
        assert_eq!(device.properties().clock, None);
        drop((stream, device, system));
        // One of two that go together.
        let fake = Fake::new("no-traces", &["-DFAKE_WITHOUT_TRACES"]);
        assert_eq!(fake.runtime.missing_optional(), ["vacc_profile_read"]);
        let device = fake.start("").unwrap().open(DeviceId(0)).unwrap();
        refused(device.set_trace(Some(Arc::new(Ignore))), "does not export vacc_profile_read");
    });
}

#[test]
fn structs_that_have_grown_and_later_versions_are_read_as_far_as_known() {
    within_a_minute(|| {
        let fake = Fake::new("grown", &["-DFAKE_GROWN", "-DFAKE_MINOR=3"]);
        let system = fake.start("").unwrap();
        session(system.clone(), true).unwrap();
        let device = system.open(DeviceId(0)).unwrap();
        let properties = device.properties();
        // 64 bytes without a terminator: all of them, and not one more.
        assert_eq!(properties.name, "x".repeat(64));
        assert_eq!(properties.memory_bytes, 1 << 30);
        let memory = device.memory_info().unwrap();
        assert_eq!((memory.capacity, memory.used), (1 << 30, 7));
        assert_eq!(system.telemetry(DeviceId(0)).unwrap().ai, Some(0.25));
        assert_eq!(system.telemetry(DeviceId(0)).unwrap().power, None);
        let link = system.topology().unwrap().link(DeviceId(0), DeviceId(1)).unwrap();
        assert_eq!(link.bytes_per_second, 1e9);
    });
}

#[test]
fn unknown_codes_are_kept_as_numbers() {
    within_a_minute(|| {
        let fake = Fake::new("unknown", &["-DFAKE_UNKNOWN"]);
        let start = |code: i32| {
            let config = format!("fail=vacc_stream_fill;code={code}");
            let system = fake.start(&config).unwrap();
            let device = system.open(DeviceId(0)).unwrap();
            let stream = device.stream("s").unwrap();
            let buffer = stream.alloc(8).unwrap();
            let error = stream.fill(&buffer.whole(), 0).unwrap_err();
            (error, system, device)
        };
        for code in [13, 99, 1_000_000, -1, i32::MIN, i32::MAX] {
            match start(code).0 {
                Error::Runtime { call: "vacc_stream_fill", code: kept, text, .. } => {
                    assert_eq!(kept, i64::from(code));
                    assert!(text.contains(&code.to_string()), "{text}");
                }
                other => panic!("{other:?}"),
            }
        }
        // A failed command whose kind and cause nobody knows.
        match start(10).0 {
            Error::Failed(failure) => {
                let text = failure.to_string();
                for part in ["cause 55", "5000", "-7", "odd", "command 3"] {
                    assert!(text.contains(part), "{text:?} lacks {part:?}");
                }
                assert!(matches!(failure.cause, Cause::Runtime { code: -7, .. }));
            }
            other => panic!("{other:?}"),
        }
        let (_, system, device) = start(12);
        assert_eq!(device.properties().clock, None, "clock 77");
        let topology = system.topology().unwrap();
        assert!(topology.link(DeviceId(0), DeviceId(1)).is_none(), "link kind 99");
        // A profile with a command that nobody knows and four records lost says both.
        device.set_trace(Some(Arc::new(Ignore))).unwrap();
        let error = device.set_trace(None).unwrap_err().to_string();
        assert!(error.contains("4 records were lost and 1"), "{error}");
    });
}

//! A recorded device is as good as the device: the simulator passes the conformance suite while
//! it is recorded, and what was recorded replays.

mod common;

use common::system;
use conformance::{Backend, Feature, Outcome};
use hal::{Device, DeviceId};
use replay::record::FailedKind;
use replay::{Header, Options, Recorder};
use sim::Mode;
use std::fs::File;
use std::sync::{Arc, Mutex};
use std::time::Duration;

struct Recorded {
    folder: tempfile::TempDir,
    recorders: Mutex<Vec<Recorder>>,
}

impl Backend for Recorded {
    fn name(&self) -> String {
        "recorded".to_string()
    }

    fn dies(&self) -> usize {
        32
    }

    fn open(&self) -> hal::Result<Vec<Arc<dyn Device>>> {
        let mut recorders = self.recorders.lock().unwrap();
        let path = self.folder.path().join(recorders.len().to_string());
        let recorder = Recorder::create(&path, &Header::default()).unwrap();
        let system = system(Mode::Full);
        let open = |die| Ok(recorder.wrap(system.open(DeviceId(die))?));
        let dies = (0..32).map(open).collect();
        recorders.push(recorder);
        dies
    }

    fn features(&self) -> Vec<Feature> {
        vec![Feature::Values, Feature::Clock, Feature::Faults, Feature::Hazards]
    }
}

#[test]
fn a_recorded_simulator_passes_the_suite_and_its_recordings_replay() {
    let backend = Recorded { folder: tempfile::tempdir().unwrap(), recorders: Mutex::default() };
    let options = conformance::Options {
        filter: std::env::var("CONFORMANCE_FILTER").ok(),
        fail_fast: false,
        limit: Duration::from_secs(20),
    };
    let report = conformance::run(&backend, &options, &mut |_| {});
    let bad: Vec<String> = report.bad().map(|r| format!("{}: {}", r.name, r.reason)).collect();
    assert!(bad.is_empty(), "{} cases failed:\n{}", bad.len(), bad.join("\n"));
    assert!(report.count(Outcome::Passed) > 0);

    let mut equal = 0;
    let recorders = std::mem::take(&mut *backend.recorders.lock().unwrap());
    for recorder in &recorders {
        let summary = recorder.finish(true).unwrap().unwrap();
        let file = File::open(&summary.path).unwrap();
        let mut reader = replay::file::Reader::new(file).unwrap();
        let options = Options { timeout: Duration::from_secs(1), ..Options::default() };
        let system = system(Mode::Full);
        let report = replay::replay(&mut reader, &mut |die| system.open(die), &options)
            .unwrap_or_else(|error| panic!("{}: {error}", summary.path.display()));
        // Fault rules are not recorded: what failed or hung through them does not here.
        let faulty = report
            .failures
            .iter()
            .filter_map(|f| f.recorded.as_ref())
            .any(|failed| failed.text.contains("fault") || failed.kind == FailedKind::Timeout);
        assert!(report.is_equal() || faulty, "{}: {report:#?}", summary.path.display());
        equal += usize::from(report.is_equal());
    }
    assert!(equal > 0, "all {} recordings have faults", recorders.len());
}

//! The FFI backend passes the whole conformance suite, over the simulator behind the C ABI.

mod common;

use conformance::{Backend, Feature, Options, Outcome};
use hal::{Device, DeviceId};
use std::sync::Arc;
use std::time::Duration;
use vacc::Runtime;

struct OverTheAbi {
    runtime: Arc<Runtime>,
}

impl Backend for OverTheAbi {
    fn name(&self) -> String {
        "vacc".to_string()
    }

    fn dies(&self) -> usize {
        32
    }

    fn open(&self) -> hal::Result<Vec<Arc<dyn Device>>> {
        let system = common::system(&self.runtime, "machine=va16;threads=2")?;
        (0..32).map(|die| system.open(DeviceId(die))).collect()
    }

    fn features(&self) -> Vec<Feature> {
        vec![Feature::Values, Feature::Clock, Feature::Faults, Feature::Hazards]
    }
}

#[test]
fn the_whole_suite_passes() {
    let backend = OverTheAbi { runtime: common::load(common::simulated_runtime()) };
    let options = Options {
        filter: std::env::var("CONFORMANCE_FILTER").ok(),
        limit: Duration::from_secs(20),
        ..Options::default()
    };
    let report = conformance::run(&backend, &options, &mut |_| {});
    let bad: Vec<String> = report.bad().map(|r| format!("{}: {}", r.name, r.reason)).collect();
    assert!(bad.is_empty(), "{} cases failed:\n{}", bad.len(), bad.join("\n"));
    if options.filter.is_none() {
        assert!(report.count(Outcome::Passed) >= 300, "{}", report.count(Outcome::Passed));
        assert_eq!(report.count(Outcome::Skipped), 0, "the simulator has every feature");
    }
}

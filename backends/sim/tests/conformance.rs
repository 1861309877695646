//! The simulator passes the whole conformance suite.

mod common;

use conformance::{Backend, Feature, Options, Outcome};
use hal::{Device, DeviceId};
use sim::Mode;
use std::sync::Arc;
use std::time::Duration;

struct Simulator;

impl Backend for Simulator {
    fn name(&self) -> String {
        "sim".to_string()
    }

    fn dies(&self) -> usize {
        32
    }

    fn open(&self) -> hal::Result<Vec<Arc<dyn Device>>> {
        let system = common::system(Mode::Full, 2);
        (0..32).map(|die| system.open(DeviceId(die))).collect()
    }

    fn features(&self) -> Vec<Feature> {
        vec![Feature::Values, Feature::Clock, Feature::Faults, Feature::Hazards]
    }
}

#[test]
fn the_whole_suite_passes() {
    let options = Options {
        filter: std::env::var("CONFORMANCE_FILTER").ok(),
        fail_fast: std::env::var_os("CONFORMANCE_FAIL_FAST").is_some(),
        limit: Duration::from_secs(20),
    };
    let report = conformance::run(&Simulator, &options, &mut |_| {});
    let bad: Vec<String> = report.bad().map(|r| format!("{}: {}", r.name, r.reason)).collect();
    assert!(bad.is_empty(), "{} cases failed:\n{}", bad.len(), bad.join("\n"));
    if options.filter.is_none() {
        assert!(report.count(Outcome::Passed) >= 300, "{}", report.count(Outcome::Passed));
        assert_eq!(report.count(Outcome::Skipped), 0, "the simulator has every feature");
    }
}

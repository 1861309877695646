//! How much of the 671B model's communication hides, from the spans of simulated steps.

use hal::{Device, DeviceId};
use model::config::{ModelConfig, Preset};
use model::engine::{Engine, EngineOptions, Overlap, Wanted};
use model::plan::{ParallelOptions, ParallelPlan};
use report::SpanLog;
use report::analysis::{LayerKind, StepTime};
use sim::{Machine, Mode, Options, System};
use std::sync::Arc;

/// A prefill of 4,096 tokens on 32 dies, in time alone, and how long the engine says it took.
fn prefill(overlap: Overlap) -> (StepTime, u64) {
    let config: ModelConfig = Preset::DeepSeekV3.config();
    let first_moe_layer = config.first_k_dense_replace;
    let parallel = ParallelOptions { tensor: 32, ..ParallelOptions::default() };
    let plan = ParallelPlan::new(&config, parallel).unwrap();
    let options = Options { mode: Mode::TimingOnly, threads: Some(2) };
    let system = System::new(Machine::named("va16").unwrap(), options).unwrap();
    let devices: Vec<Arc<dyn Device>> =
        (0..32).map(|die| system.open(DeviceId(die)).unwrap()).collect();
    let options = EngineOptions {
        max_model_len: 4096,
        prefill_chunk: 4096,
        overlap,
        ..EngineOptions::default()
    };
    let mut engine = Engine::timing_only(devices, plan, config, options).unwrap();
    let log = Arc::new(SpanLog::new(&std::env::temp_dir()).unwrap());
    engine.devices().for_each(|device| device.set_trace(Some(log.clone())).unwrap());
    let mut sequence = engine.start();
    engine.prefill(&mut sequence, &[5; 4096], Wanted::Greedy).unwrap();
    let end = engine.now_picos().unwrap();
    engine.devices().for_each(|device| device.set_trace(None).unwrap());
    engine.end(sequence);
    (StepTime::of_phase(&log.close().unwrap(), 0, first_moe_layer).unwrap().unwrap(), end)
}

fn hidden(step: &StepTime) -> f64 {
    step.mean.communication.hidden_share.unwrap()
}

#[test]
fn two_micro_batches_hide_most_of_the_communication_of_prefill() {
    let ((plain, plain_end), (two, two_end)) = (prefill(Overlap::None), prefill(Overlap::TwoBatch));
    for (step, end) in [(&plain, plain_end), (&two, two_end)] {
        assert_eq!(step.end_ps, end, "the spans end when the engine says");
        assert_eq!(step.dies.len(), 32);
        let share = |layer| step.mean.by_layer[&layer] as f64 / step.mean.busy_ps as f64;
        assert!(share(LayerKind::MoeLayers) > 0.5, "{:?}", step.mean.by_layer);
        for die in &step.dies {
            assert_eq!(die.times.busy_ps + die.times.idle_ps, step.duration_ps());
        }
    }
    let text = |step: &StepTime| format!("{:?}", step.mean.communication);
    assert!(hidden(&two) > hidden(&plain));
    assert!(hidden(&plain) < 0.1, "{}", text(&plain));
    assert!(hidden(&two) > 0.5, "{}", text(&two));
    assert!(two.duration_ps() < plain.duration_ps(), "what hides makes the step shorter");
}

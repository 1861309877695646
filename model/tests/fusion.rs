//! Fused ops: fewer commands and less time, and not a bit that differs.

mod common;

use common::{dies, options, tiny_dir};
use hal::trace::{Span, TraceSink};
use model::Numerics;
use model::checkpoint::Checkpoint;
use model::engine::{Engine, EngineOptions, Overlap, Sequence, Wanted};
use model::plan::{ParallelOptions, ParallelPlan};
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

const PROMPT: [u32; 10] = [0, 1022, 267, 262, 269, 279, 272, 775, 33, 1023];

/// Commands by kind, and when the last one ended.
#[derive(Debug, Default)]
struct Commands(Mutex<(BTreeMap<&'static str, usize>, u64)>);

impl TraceSink for Commands {
    fn record(&self, span: &Span) {
        let mut seen = self.0.lock().unwrap();
        *seen.0.entry(span.kind.name()).or_default() += 1;
        seen.1 = seen.1.max(span.end);
    }
}

/// What a run gives: the bits of its logits, of prefill in pieces, of the MTP module and of decode,
/// its commands by kind, and its simulated time.
struct Run {
    bits: Vec<u32>,
    commands: BTreeMap<&'static str, usize>,
    end: u64,
}

impl Run {
    fn count(&self, kind: &str) -> usize {
        self.commands.get(kind).copied().unwrap_or(0)
    }

    fn all(&self) -> usize {
        self.commands.values().sum()
    }
}

fn run(plan: ParallelOptions, options: EngineOptions) -> Run {
    let checkpoint = Checkpoint::open(&tiny_dir()).unwrap();
    let plan = ParallelPlan::new(checkpoint.config(), plan).unwrap();
    let devices = dies(plan.ranks());
    let commands = Arc::new(Commands::default());
    for device in &devices {
        device.set_trace(Some(commands.clone())).unwrap();
    }
    let mut engine =
        Engine::load_on(devices.clone(), plan, &checkpoint, options, &mut |_| {}).unwrap();
    let (mut logits, mtp) = engine.all_logits(&PROMPT).unwrap();
    logits.extend(mtp.unwrap());
    let mut sequences: Vec<Sequence> = (0..2).map(|_| engine.start()).collect();
    for sequence in &mut sequences {
        engine.prefill(sequence, &PROMPT, Wanted::Nothing).unwrap();
    }
    for token in [5, 6] {
        let mut batch: Vec<(&mut Sequence, u32)> =
            sequences.iter_mut().enumerate().map(|(i, s)| (s, token + i as u32)).collect();
        logits.extend(engine.decode(&mut batch, Wanted::LastLogits).unwrap().logits);
    }
    sequences.into_iter().for_each(|s| engine.end(s));
    devices.iter().for_each(|device| device.set_trace(None).unwrap());
    let seen = commands.0.lock().unwrap();
    let bits = logits.iter().map(|v| v.to_bits()).collect();
    Run { bits, commands: seen.0.clone(), end: seen.1 }
}

/// With fusion, and without.
fn both(numerics: Numerics, overlap: Overlap, plan: ParallelOptions) -> [Run; 2] {
    [true, false].map(|fuse| {
        let options = EngineOptions {
            max_sequences: 4,
            prefill_chunk: 7,
            page_size: 16,
            overlap,
            fuse,
            ..options(numerics)
        };
        run(plan, options)
    })
}

#[test]
fn fp8_has_the_same_bits_in_fewer_commands() {
    let plain = ParallelOptions::default();
    let tensor = ParallelOptions { tensor: 4, ..plain };
    let experts = ParallelOptions { data: 4, expert: true, ..plain };
    let split = ParallelOptions { tensor: 2, data: 2, expert: true, ..plain };
    for (plan, overlap) in [
        (plain, Overlap::None),
        (tensor, Overlap::None),
        (tensor, Overlap::TwoBatch),
        (experts, Overlap::None),
        (split, Overlap::TwoBatch),
    ] {
        let [fused, apart] = both(Numerics::Fp8, overlap, plan);
        let name = format!("{plan:?} {overlap:?}");
        assert!(fused.bits == apart.bits, "{name}: logits differ");
        let merged = fused.count("rms_norm_quantize") + fused.count("swiglu_quantize");
        assert!(merged > 0 && apart.count("rms_norm_quantize") == 0, "{name}: {merged}");
        for (kind, others) in [
            ("rms_norm", fused.count("rms_norm_quantize")),
            ("swiglu", fused.count("swiglu_quantize")),
            ("quantize", merged),
        ] {
            assert_eq!(fused.count(kind) + others, apart.count(kind), "{name}: {kind}");
        }
        assert_eq!(fused.count("swiglu"), 0, "{name}: every SwiGLU meets an FP8 weight");
        assert_eq!(fused.all() + merged, apart.all(), "{name}: all commands");
        assert!(fused.end < apart.end, "{name}: {} and {} ps", fused.end, apart.end);
    }
}

#[test]
fn other_policies_have_nothing_to_fuse() {
    for numerics in [Numerics::Bf16, Numerics::F32] {
        let [fused, apart] = both(numerics, Overlap::None, ParallelOptions::default());
        assert!(fused.bits == apart.bits, "{numerics:?}");
        assert_eq!(fused.commands, apart.commands, "{numerics:?}");
        assert_eq!(fused.end, apart.end, "{numerics:?}");
    }
}

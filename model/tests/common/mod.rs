//! What the tests of the engine share.
#![allow(dead_code, reason = "each test file uses some of it")]

use hal::{Device, DeviceId};
use model::Numerics;
use model::checkpoint::Checkpoint;
use model::engine::{Engine, EngineOptions};
use safetensors::SafeTensors;
use sim::{Machine, Mode, Options, System};
use std::path::{Path, PathBuf};
use std::sync::Arc;

pub(crate) fn tiny_dir() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../models/tiny-dsv3")
}

pub(crate) fn system(mode: Mode, threads: usize) -> System {
    let options = Options { mode, threads: Some(threads) };
    System::new(Machine::named("va16").unwrap(), options).unwrap()
}

pub(crate) fn device(threads: usize) -> Arc<dyn Device> {
    system(Mode::Full, threads).open(DeviceId(0)).unwrap()
}

/// The first dies of one machine.
pub(crate) fn dies(count: usize) -> Vec<Arc<dyn Device>> {
    let system = system(Mode::Full, 2);
    (0..count as u32).map(|die| system.open(DeviceId(die)).unwrap()).collect()
}

pub(crate) fn options(numerics: Numerics) -> EngineOptions {
    EngineOptions { numerics, max_model_len: 512, mtp: true, ..EngineOptions::default() }
}

pub(crate) fn engine(dir: &Path, options: EngineOptions) -> Engine {
    let checkpoint = Checkpoint::open(dir).unwrap();
    Engine::load(device(2), &checkpoint, options, &mut |_| {}).unwrap()
}

/// A tensor of a fixture, as f32.
pub(crate) fn floats(file: &SafeTensors<'_>, name: &str) -> Vec<f32> {
    let data = file.tensor(name).unwrap().data().to_vec();
    data.as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b)).collect()
}

/// A tensor of token ids: I32 or I64.
pub(crate) fn ids(file: &SafeTensors<'_>, name: &str) -> Vec<u32> {
    let tensor = file.tensor(name).unwrap();
    match tensor.dtype() {
        safetensors::Dtype::I64 => {
            tensor.data().as_chunks::<8>().0.iter().map(|b| i64::from_le_bytes(*b) as u32).collect()
        }
        _ => tensor.data().as_chunks::<4>().0.iter().map(|b| u32::from_le_bytes(*b)).collect(),
    }
}

pub(crate) fn max_difference(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len());
    // A NaN on either side must not pass for agreement.
    a.iter()
        .zip(b)
        .map(|(x, y)| (x - y).abs())
        .fold(0.0, |m, d| if d > m || d.is_nan() { d } else { m })
}

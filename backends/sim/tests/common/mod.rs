//! What the tests of the simulated device share.
#![allow(dead_code, reason = "each test file uses some of it")]

use hal::{DType, Device, DeviceId, Stream, Tensor, TensorDesc};
use sim::{Machine, Mode, Options, System};
use std::sync::Arc;
use std::time::Duration;

pub(crate) const SOON: Duration = Duration::from_secs(20);

pub(crate) fn system(mode: Mode, threads: usize) -> System {
    let machine = Machine::named("va16").unwrap();
    System::new(machine, Options { mode, threads: Some(threads) }).unwrap()
}

pub(crate) fn die(system: &System, id: u32) -> Arc<dyn Device> {
    system.open(DeviceId(id)).unwrap()
}

pub(crate) fn floats(stream: &dyn Stream, values: &[f32]) -> Tensor {
    let desc = TensorDesc::new(DType::F32, &[values.len()]);
    let tensor = Tensor::new(stream.alloc(desc.bytes()).unwrap(), 0, desc);
    let bytes: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
    stream.write(&tensor.region(), &bytes).unwrap();
    tensor
}

pub(crate) fn read(stream: &dyn Stream, tensor: &Tensor) -> Vec<f32> {
    let region = tensor.region();
    let mut bytes = vec![0; region.len as usize];
    stream.read(&region, &mut bytes, SOON).unwrap();
    bytes.as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b)).collect()
}

//! Collectives on 1 to 32 ranks against a plain reference, and ranks that disagree.

mod all_to_all_v;
mod failures;
mod misuse;
mod order;
mod values;

use crate::lab::{Lab, Verdict, ensure, read};
use crate::run::Case;
use hal::{Collective, Communicator, DType, Reduction, Stream, Tensor, TensorDesc};
use std::sync::Arc;

pub(crate) fn add_cases(all: &mut Vec<Case>) {
    values::add_cases(all);
    order::add_cases(all);
    misuse::add_cases(all);
    failures::add_cases(all);
    all_to_all_v::add_cases(all);
}

/// One rank, with what it needs.
pub(crate) struct Rank {
    pub(crate) number: usize,
    pub(crate) stream: Arc<dyn Stream>,
    pub(crate) communicator: Arc<dyn Communicator>,
}

pub(crate) fn join(lab: &Lab, size: usize) -> Verdict<Vec<Rank>> {
    let id = lab.die(0).communicator_id()?;
    (0..size)
        .map(|number| {
            let communicator = lab.die(number).communicator(id, number, size)?;
            Ok(Rank { number, stream: lab.stream(number)?, communicator })
        })
        .collect()
}

/// Bytes on both sides of every tensor that nothing may touch.
const GUARD: usize = 256;

impl Rank {
    pub(crate) fn submit(&self, batch: &[Collective]) -> hal::Result<()> {
        self.stream.submit_collectives(&self.communicator, batch, &"conformance".into())
    }

    /// A tensor with these bytes, between guards.
    pub(crate) fn place(&self, dtype: DType, bytes: &[u8]) -> Verdict<Tensor> {
        let around = [&[0x77; GUARD], bytes, &[0x77; GUARD]].concat();
        let buffer = crate::lab::upload(&*self.stream, &around)?;
        let desc = TensorDesc::new(dtype, &[bytes.len() / dtype.size()]);
        Ok(Tensor::new(buffer, GUARD as u64, desc))
    }

    /// Its bytes, after making sure of the guards.
    pub(crate) fn take(&self, tensor: &Tensor) -> Verdict<Vec<u8>> {
        let all = read(&*self.stream, &tensor.buffer().whole())?;
        let (start, end) = (GUARD, all.len() - GUARD);
        let guards = all[..start].iter().chain(&all[end..]);
        ensure(guards.clone().all(|&b| b == 0x77), || {
            format!("rank {} was written outside its tensor", self.number)
        })?;
        Ok(all[start..end].to_vec())
    }
}

fn sum_of(tensor: &Tensor) -> Collective {
    Collective::AllReduce { send: tensor.clone(), recv: tensor.clone(), reduction: Reduction::Sum }
}

fn float(rank: &Rank, value: f32) -> Verdict<Tensor> {
    rank.place(DType::F32, &value.to_le_bytes())
}

fn value(rank: &Rank, tensor: &Tensor) -> Verdict<f32> {
    let bytes = rank.take(tensor)?;
    Ok(f32::from_le_bytes(std::array::from_fn(|i| bytes[i])))
}

//! What no schedule can beat.

use crate::play::{Costs, Program};
use crate::repeat::Repeated;
use hal::DType;
use hal::op::work;
use model::graph::Work;
use serde::Serialize;
use sim::Machine;

/// The least time of a step, whatever the schedule and the kernels: of all ranks, the one with the most
/// to do.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Floor {
    /// Milliseconds that a die's memory needs for the bytes of its ops, each operand once.
    pub bytes_ms: f64,
    /// Milliseconds that a die's matrix units need for its operations.
    pub operations_ms: f64,
}

impl Floor {
    /// The larger of the two.
    pub fn ms(&self) -> f64 {
        self.bytes_ms.max(self.operations_ms)
    }

    /// Of a rank's program.
    pub(crate) fn of(
        machine: &Machine,
        program: &Program,
        repeated: &[Repeated],
        costs: &Costs<'_>,
    ) -> Floor {
        let (mut bytes, mut seconds) = (0.0, 0.0);
        for (number, node) in program.graph.nodes().iter().enumerate() {
            let Work::Op(op) = &node.work else { continue };
            let layer = program.layer(number);
            let others = repeated.iter().find(|r| Some(r.layer) == layer).map_or(0, |r| r.times);
            let times = 1.0 + others as f64;
            let work = work(&program.op(op, costs), None);
            let dtype = work.matrix_dtype.unwrap_or(DType::F32);
            bytes += times * work.bytes() as f64;
            seconds += times * work.matrix_ops as f64 / machine.matrix_rate(dtype);
        }
        Floor { bytes_ms: bytes / machine.memory_rate() * 1e3, operations_ms: seconds * 1e3 }
    }

    /// The larger of each.
    pub(crate) fn max(self, other: Floor) -> Floor {
        Floor {
            bytes_ms: self.bytes_ms.max(other.bytes_ms),
            operations_ms: self.operations_ms.max(other.operations_ms),
        }
    }

    /// One after the other.
    pub(crate) fn plus(self, other: Floor) -> Floor {
        Floor {
            bytes_ms: self.bytes_ms + other.bytes_ms,
            operations_ms: self.operations_ms + other.operations_ms,
        }
    }
}

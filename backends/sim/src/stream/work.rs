//! What queued commands do when their turn comes.

use super::queue::StreamShared;
use crate::collective::Submission;
use crate::cost::{Cost, Path};
use crate::kernels::{self, Args};
use crate::memory::{self, BorrowError, Guards, Memory, SimTensor, Slot, Span};
use crate::system::Shared;
use hal::op::Access;
use hal::{Cause, Op};
use parking_lot::Mutex;
use std::sync::Arc;

/// The work of a command.
#[derive(Debug)]
pub(crate) enum Work {
    /// An op. Boxed: descriptors are large, and queues are better short.
    Op(Box<Op<SimTensor>>),
    /// A copy between buffers.
    Transfer { dst: (Arc<Memory>, u64), src: (Arc<Memory>, u64), len: u64, path: Path },
    /// A fill.
    Fill { memory: Arc<Memory>, offset: u64, len: u64, byte: u8 },
    /// Host memory to device; the bytes are empty if they were copied at once.
    Write { memory: Arc<Memory>, offset: u64, bytes: Box<[u8]>, len: u64 },
    /// Device to host memory.
    Read { memory: Arc<Memory>, offset: u64, len: u64, reply: Arc<Mutex<Vec<u8>>> },
    /// A wait for another stream; the queue carries it out.
    Wait { target: Arc<StreamShared>, value: u64 },
    /// This rank's part in a collective; the group carries it out.
    Collective(Submission),
    /// Taken out for execution.
    Nothing,
}

/// How a command went.
pub(crate) enum Outcome {
    /// Well, at this cost.
    Done(Cost),
    /// Its memory is held by another stream's command: try again.
    Busy,
    /// It failed.
    Failed(Cause),
}

/// What to do about operands that cannot be borrowed: wait, or fail.
fn data_failure(error: &BorrowError) -> Option<Cause> {
    match error {
        BorrowError::Busy => None,
        BorrowError::Overlap(a, b) => {
            Some(Cause::Data(format!("operands {a} and {b} overlap and one of them is written")))
        }
    }
}

impl Work {
    /// Carries the command out, as far as the mode asks for values, and says what it costs.
    pub(crate) fn run(&self, system: &Shared) -> Outcome {
        let cost = &system.cost;
        match self {
            Work::Op(op) => run_op(op, system),
            Work::Transfer { dst, src, len, path } => {
                if let Err(outcome) = system.values(|| transfer(dst, src, *len)) {
                    return outcome;
                }
                done(system, || cost.transfer(*len, *path, &system.topology))
            }
            Work::Fill { memory, offset, len, byte } => {
                let filled =
                    || memory.try_write(*offset, *len, |m| m.fill(*byte)).ok_or(Outcome::Busy);
                if let Err(outcome) = system.values(filled) {
                    return outcome;
                }
                done(system, || cost.fill(*len))
            }
            Work::Write { memory, offset, bytes, len } => {
                let write = || match bytes.is_empty() {
                    true => Ok(()),
                    false => memory
                        .try_write(*offset, *len, |m| m.copy_from_slice(bytes))
                        .ok_or(Outcome::Busy),
                };
                if let Err(outcome) = system.values(write) {
                    return outcome;
                }
                done(system, || cost.transfer(*len, Path::Host, &system.topology))
            }
            Work::Read { memory, offset, len, reply } => {
                let read = || {
                    memory
                        .try_read(*offset, *len, |m| *reply.lock() = m.to_vec())
                        .ok_or(Outcome::Busy)
                };
                if let Err(outcome) = system.values(read) {
                    return outcome;
                }
                done(system, || cost.transfer(*len, Path::Host, &system.topology))
            }
            Work::Wait { .. } | Work::Collective(_) | Work::Nothing => {
                unreachable!("the queue carries these out")
            }
        }
    }
}

impl Shared {
    /// Does something to values, where there are values.
    fn values(&self, f: impl FnOnce() -> Result<(), Outcome>) -> Result<(), Outcome> {
        if self.mode.functional() { f() } else { Ok(()) }
    }
}

fn done(system: &Shared, cost: impl FnOnce() -> Cost) -> Outcome {
    Outcome::Done(if system.mode.timed() { cost() } else { Cost::NOTHING })
}

fn transfer(dst: &(Arc<Memory>, u64), src: &(Arc<Memory>, u64), len: u64) -> Result<(), Outcome> {
    let spans = [
        Span { memory: &src.0, offset: src.1, len, access: Access::Read },
        Span { memory: &dst.0, offset: dst.1, len, access: Access::Write },
    ];
    let failed = |e: BorrowError| data_failure(&e).map_or(Outcome::Busy, Outcome::Failed);
    let mut guards = Guards::lock(&spans).map_err(failed)?;
    // Host and device memory of one system all have storage here.
    if let [Slot::Read(from), Slot::Write(to)] =
        guards.carve(&spans).map_err(failed)?.as_mut_slice()
    {
        to.copy_from_slice(from);
    }
    Ok(())
}

fn run_op(op: &Op<SimTensor>, system: &Shared) -> Outcome {
    let mut routing = None;
    if system.mode.functional() {
        let spans = memory::spans(op);
        let failed = |e: BorrowError| data_failure(&e).map_or(Outcome::Busy, Outcome::Failed);
        let mut guards = match Guards::lock(&spans) {
            Ok(guards) => guards,
            Err(error) => return failed(error),
        };
        let slots = match guards.carve(&spans) {
            Ok(slots) => slots,
            Err(error) => return failed(error),
        };
        match kernels::run(&memory::args(op), &mut Args::new(slots), &system.kernels) {
            Ok(outcome) => routing = outcome.routing,
            Err(problem) => return Outcome::Failed(Cause::Data(problem)),
        }
    }
    done(system, || system.cost.op(&op.desc(), routing))
}

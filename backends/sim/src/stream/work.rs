//! What queued commands do when their turn comes.

use super::prepared::Listed;
use super::queue::StreamShared;
use crate::collective::Submission;
use crate::cost::{Cost, Path};
use crate::kernels::{self, Arg, Args, fetch};
use crate::memory::{self, BorrowError, Guards, Memory, Place, SimTensor, Slot, Span, Spans};
use crate::system::Shared;
use hal::op::{Access, AttentionWork, Routing};
use hal::{Cause, Op, TensorDesc};
use parking_lot::Mutex;
use std::sync::{Arc, OnceLock};

/// The work of a command.
#[derive(Debug)]
pub(crate) enum Work {
    /// An op. Boxed: descriptors are large, and queues are better short.
    Op(Box<Op<SimTensor>>),
    /// An op or a fill of a list.
    Listed(Listed),
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
            Work::Op(op) => {
                let computed =
                    system.values(|| compute(&memory::args(op), &memory::spans(op), system));
                match computed {
                    Ok(routing) => done(system, || cost.op(&op.desc(), routing)),
                    Err(outcome) => outcome,
                }
            }
            Work::Listed(listed) => listed.run(system),
            Work::Transfer { dst, src, len, path } => {
                if let Err(outcome) = system.values(|| transfer(dst, src, *len)) {
                    return outcome;
                }
                done(system, || cost.transfer(*len, *path, &system.topology))
            }
            Work::Fill { memory, offset, len, byte } => fill(memory, *offset, *len, *byte, system),
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
    fn values<T: Default>(&self, f: impl FnOnce() -> Result<T, Outcome>) -> Result<T, Outcome> {
        if self.mode.functional() { f() } else { Ok(T::default()) }
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

/// Sets bytes.
pub(super) fn fill(memory: &Memory, offset: u64, len: u64, byte: u8, system: &Shared) -> Outcome {
    let filled = || memory.try_write(offset, len, |m| m.fill(byte)).ok_or(Outcome::Busy);
    match system.values(filled) {
        Ok(()) => done(system, || system.cost.fill(len)),
        Err(outcome) => outcome,
    }
}

/// Computes an op's values; what only these could tell about its cost.
fn compute(
    args: &Op<Arg>,
    spans: &[Span<'_>],
    system: &Shared,
) -> Result<Option<Routing>, Outcome> {
    let failed = |e: BorrowError| data_failure(&e).map_or(Outcome::Busy, Outcome::Failed);
    let mut guards = Guards::lock(spans).map_err(failed)?;
    let slots = guards.carve(spans).map_err(failed)?;
    match kernels::run(args, &mut Args::new(slots), &system.kernels) {
        Ok(outcome) => Ok(outcome.routing),
        Err(problem) => Err(Outcome::Failed(Cause::Data(problem))),
    }
}

/// An op that runs again and again: what each run needs, worked out once.
#[derive(Debug)]
pub(super) struct Ready {
    operands: Box<[Place]>,
    run: Box<Run>,
}

/// What does not say where operands lie, in the order in which it is looked at.
#[derive(Debug)]
#[repr(C)]
struct Run {
    args: Op<Arg>,
    /// Where neither values nor the launch have a say in it.
    cost: OnceLock<Cost>,
    desc: Op<TensorDesc>,
}

impl Ready {
    pub(super) fn new(op: &Op<SimTensor>) -> Self {
        let mut operands = Vec::new();
        op.visit(|_, access, t| operands.push(Place::new(t, access)));
        let run = Run { args: memory::args(op), cost: OnceLock::new(), desc: op.desc() };
        Ready { operands: operands.into(), run: Box::new(run) }
    }

    /// Asks for what [`Ready::run`] will look at.
    pub(super) fn fetch(&self) {
        fetch(&*self.operands, usize::MAX);
        // Attributes besides the operands seldom take more than one of them.
        fetch(&*self.run, (self.operands.len() + 1) * size_of::<Arg>());
        fetch(&self.run.cost, 1);
    }

    /// As [`Ready::fetch`], for the memory of the operands.
    pub(super) fn fetch_memory(&self) {
        self.operands.iter().for_each(Place::fetch);
    }

    /// Runs it, with this amount of work if it is attention.
    pub(super) fn run(&self, attention: Option<AttentionWork>, system: &Shared) -> Outcome {
        let Ready { operands, run } = self;
        let spans = || operands.iter().map(Place::span).collect::<Spans<'_>>();
        let routing = match system.values(|| compute(&run.args, &spans(), system)) {
            Ok(routing) => routing,
            Err(outcome) => return outcome,
        };
        done(system, || match (attention, routing) {
            (None, None) => *run.cost.get_or_init(|| system.cost.op(&run.desc, None)),
            (None, routing) => system.cost.op(&run.desc, routing),
            (Some(work), routing) => {
                let mut desc = run.desc.clone();
                match &mut desc {
                    Op::MlaPrefill(op) => op.work = work,
                    Op::MlaDecode(op) => op.work = work,
                    _ => {}
                }
                system.cost.op(&desc, routing)
            }
        })
    }
}

//! What queued commands do when their turn comes.

use super::queue::StreamShared;
use crate::collective::Submission;
use crate::cost::{Cost, Path};
use crate::kernels::{self, Arg, Args};
use crate::memory::{self, BorrowError, Guards, Memory, SimTensor, Slot, Slots, Span, Spanning};
use crate::system::Shared;
use hal::op::{Access, Routing};
use hal::{Cause, Op};
use parking_lot::Mutex;
use rayon::prelude::*;
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

/// Why a command was not carried out.
pub(crate) enum Halt {
    /// Its memory is held by another stream's command: try again.
    Busy,
    /// It failed.
    Failed(Cause),
}

impl From<BorrowError> for Halt {
    fn from(error: BorrowError) -> Self {
        match error {
            BorrowError::Busy => Halt::Busy,
            BorrowError::Overlap(a, b) => Halt::Failed(Cause::Data(format!(
                "operands {a} and {b} overlap and one of them is written"
            ))),
        }
    }
}

impl Work {
    /// Carries the command out, as far as the mode asks for values, and says what it costs.
    pub(crate) fn run(&self, system: &Shared) -> Result<Cost, Halt> {
        let cost = &system.cost;
        match self {
            Work::Op(op) => {
                let compute = || compute(&memory::args(op), &memory::spans(op), system);
                let routing = system.values(compute)?;
                Ok(system.time(|| cost.op(&op.desc(), routing)))
            }
            Work::Transfer { dst, src, len, path } => {
                system.values(|| transfer(dst, src, *len))?;
                Ok(system.time(|| cost.transfer(*len, *path, &system.topology)))
            }
            Work::Fill { memory, offset, len, byte } => {
                let fill = || memory.try_write(*offset, *len, |m| m.fill(*byte)).ok_or(Halt::Busy);
                system.values(fill)?;
                Ok(system.time(|| cost.fill(*len)))
            }
            Work::Write { memory, offset, bytes, len } => {
                system.values(|| match bytes.is_empty() {
                    true => Ok(()),
                    false => system.put(memory, *offset, bytes).ok_or(Halt::Busy),
                })?;
                Ok(system.time(|| cost.transfer(*len, Path::Host, &system.topology)))
            }
            Work::Read { memory, offset, len, reply } => {
                system.values(|| {
                    memory.try_read(*offset, *len, |m| *reply.lock() = m.to_vec()).ok_or(Halt::Busy)
                })?;
                Ok(system.time(|| cost.transfer(*len, Path::Host, &system.topology)))
            }
            Work::Wait { .. } | Work::Collective(_) | Work::Nothing => {
                unreachable!("the queue carries these out")
            }
        }
    }
}

impl Shared {
    /// Does something to values, where there are values.
    pub(super) fn values<T: Default>(
        &self,
        f: impl FnOnce() -> Result<T, Halt>,
    ) -> Result<T, Halt> {
        if self.mode.functional() { f() } else { Ok(T::default()) }
    }

    /// Puts bytes of the host into memory; `None` if a command holds it.
    pub(super) fn put(&self, memory: &Memory, offset: u64, bytes: &[u8]) -> Option<()> {
        let len = bytes.len() as u64;
        let whole = len == memory.size && len >= memory::WORTH_SHARING;
        if whole && self.dies.len() > 1 {
            return memory.try_replace(bytes, &self.equals, |from, to| copy(&self.pool, from, to));
        }
        memory.try_write(offset, len, |to| copy(&self.pool, bytes, to))
    }

    /// Works a cost out, where there is time.
    fn time(&self, f: impl FnOnce() -> Cost) -> Cost {
        if self.mode.timed() { f() } else { Cost::NOTHING }
    }
}

/// Copies with all threads where it is worth it.
fn copy(pool: &rayon::ThreadPool, src: &[u8], dst: &mut [u8]) {
    const PIECE: usize = 1 << 20;
    if src.len() < 4 * PIECE {
        return dst.copy_from_slice(src);
    }
    pool.install(|| {
        dst.par_chunks_mut(PIECE)
            .zip(src.par_chunks(PIECE))
            .for_each(|(dst, src)| dst.copy_from_slice(src));
    });
}

fn transfer(dst: &(Arc<Memory>, u64), src: &(Arc<Memory>, u64), len: u64) -> Result<(), Halt> {
    let spans = memory::arranged([
        Span::new(&src.0, src.1, len, Access::Read),
        Span::new(&dst.0, dst.1, len, Access::Write),
    ]);
    let (mut guards, mut slots) = (Guards::default(), Slots::new());
    guards.lock(&spans)?;
    guards.carve(&spans, &mut slots)?;
    // Host and device memory of one system all have storage here.
    if let [Slot::Read(from), Slot::Write(to)] = slots.as_mut_slice() {
        to.copy_from_slice(from);
    }
    Ok(())
}

/// Computes an op's values over arranged spans; what only these could tell about its cost.
pub(super) fn compute<S: Spanning>(
    args: &Op<Arg>,
    spans: &[S],
    system: &Shared,
) -> Result<Option<Routing>, Halt> {
    // Both are filled where they are: moving them takes as long as many a small op.
    let (mut guards, mut slots) = (Guards::default(), Args::default());
    guards.lock(spans)?;
    guards.carve(spans, slots.slots())?;
    match kernels::run(args, &mut slots, &system.kernels) {
        Ok(outcome) => Ok(outcome.routing),
        Err(problem) => Err(Halt::Failed(Cause::Data(problem))),
    }
}

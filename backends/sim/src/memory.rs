//! Device memory: zeroed, aligned host memory behind a lock, and the borrowing of an op's operands.
//!
//! Memory that several streams share could be handed to kernels as raw pointers, with the hazard
//! check as the argument that this is sound. Locks cost some 20 ns per buffer and operation, need
//! no argument and no `unsafe`, so locks it is. They never block: a stream whose operands are held
//! by another stream's command (disjoint parts of one buffer, say) is put back in the queue.

mod accesses;
mod buffers;
mod storage;

pub(crate) use accesses::{Accesses, Standing};
pub(crate) use buffers::Buffers;
pub(crate) use storage::{Equals, WORTH_SHARING};

use crate::kernels::{Arg, fetch};
use arrayvec::ArrayVec;
use hal::op::Access;
use hal::{BufferId, DeviceId, Operand, Tensor, TensorDesc};
use parking_lot::{Mutex, RwLock, RwLockReadGuard, RwLockWriteGuard};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use storage::Storage;

/// The most operands that an op has.
pub(crate) const MAX_OPERANDS: usize = 12;

/// Allocations are multiples of this many bytes, and aligned to it as far as kernels can tell.
pub(crate) const ALIGNMENT: u64 = 256;

/// The bytes of one buffer. What commands need when they run lies in one cache line, and what
/// they need when they are submitted in another.
#[derive(Debug)]
#[repr(C, align(64))]
pub(crate) struct Memory {
    /// Absent in a timing-only simulation.
    storage: Option<RwLock<Storage>>,
    /// Where the storage lies, for those who fetch ahead; 0 where that is not worth it.
    address: AtomicUsize,
    pub(crate) id: BufferId,
    pub(crate) size: u64,
    pub(crate) device: DeviceId,
    pub(crate) accesses: Mutex<Accesses>,
}

impl Memory {
    /// Memory of `size` bytes; without storage if `with_values` is false.
    pub(crate) fn new(device: DeviceId, size: u64, with_values: bool) -> Option<Self> {
        let storage = match with_values {
            true => Some(Storage::new(size)?),
            false => None,
        };
        let address = AtomicUsize::new(storage.as_ref().map_or(0, Storage::address));
        let (storage, accesses) = (storage.map(RwLock::new), Mutex::default());
        Some(Memory { id: BufferId::next(), device, size, address, accesses, storage })
    }

    /// Reads the bytes if no command holds them; `None` from `f`'s caller's view means try again.
    pub(crate) fn try_read<R>(
        &self,
        offset: u64,
        len: u64,
        f: impl FnOnce(&[u8]) -> R,
    ) -> Option<R> {
        let Some(storage) = &self.storage else { return Some(f(&[])) };
        let guard = storage.try_read()?;
        Some(f(&guard.bytes()[range(offset, len)]))
    }

    /// Writes the bytes if no command holds them.
    pub(crate) fn try_write<R>(
        &self,
        offset: u64,
        len: u64,
        f: impl FnOnce(&mut [u8]) -> R,
    ) -> Option<R> {
        let Some(storage) = &self.storage else { return Some(f(&mut [])) };
        let mut guard = storage.try_write()?;
        Some(f(&mut guard.bytes_mut()[range(offset, len)]))
    }

    /// Overwrites all bytes, which may be those of other memory with equal ones, if no command holds
    /// them.
    pub(crate) fn try_replace(
        &self,
        bytes: &[u8],
        equals: &Equals,
        copy: impl FnOnce(&[u8], &mut [u8]),
    ) -> Option<()> {
        let Some(storage) = &self.storage else { return Some(()) };
        let mut guard = storage.try_write()?;
        equals.replace(&mut guard, bytes, copy);
        // What several dies read is near already.
        self.address.store(0, Ordering::Relaxed);
        Some(())
    }
}

/// As slice indices. Nothing lies nowhere: a view without elements may begin anywhere.
fn range(offset: u64, len: u64) -> std::ops::Range<usize> {
    if len == 0 { 0..0 } else { offset as usize..(offset + len) as usize }
}

/// An operand of a queued command: like [`Tensor`], but holding the memory rather than the user's
/// handle, so that dropping the handle frees in the order in which the host said so.
#[derive(Clone, Debug)]
pub(crate) struct SimTensor {
    pub(crate) memory: Arc<Memory>,
    pub(crate) offset: u64,
    pub(crate) desc: TensorDesc,
}

impl SimTensor {
    pub(crate) fn new(tensor: &Tensor, memory: Arc<Memory>) -> Self {
        SimTensor { memory, offset: tensor.offset(), desc: *tensor.desc() }
    }
}

impl Operand for SimTensor {
    fn desc(&self) -> &TensorDesc {
        &self.desc
    }
}

/// A byte range that a command will touch.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Span<'a> {
    pub(crate) memory: &'a Memory,
    pub(crate) offset: u64,
    pub(crate) len: u64,
    pub(crate) access: Access,
    /// Which operand it is, in the order of [`hal::Op::visit`].
    operand: u8,
    /// Whether the command writes any of the buffer.
    written: bool,
}

impl<'a> Span<'a> {
    pub(crate) fn new(memory: &'a Memory, offset: u64, len: u64, access: Access) -> Self {
        Span { memory, offset, len, access, operand: 0, written: access.writes() }
    }
}

/// Something with a span.
pub(crate) trait Spanning {
    fn span(&self) -> Span<'_>;
}

impl Spanning for Span<'_> {
    #[inline(always)]
    fn span(&self) -> Span<'_> {
        *self
    }
}

/// The ranges of an op's operands, as [`arrange`] leaves them.
pub(crate) type Spans<'a> = ArrayVec<Span<'a>, MAX_OPERANDS>;

/// Puts the spans of a command, which come in the order of its operands, into the order in which they
/// are borrowed: buffer by buffer, and ascending within each.
fn arrange(spans: &mut [Span<'_>]) {
    for at in 0..spans.len() {
        let of_buffer = |s: &Span<'_>| s.memory.id == spans[at].memory.id && s.access.writes();
        let written = spans.iter().any(of_buffer);
        (spans[at].operand, spans[at].written) = (at as u8, written);
    }
    spans.sort_by_key(|s| (s.memory.id, s.offset, s.len, !s.access.writes()));
}

/// A command's spans, arranged.
pub(crate) fn arranged<'a, const N: usize>(mut spans: [Span<'a>; N]) -> [Span<'a>; N] {
    arrange(&mut spans);
    spans
}

/// A span that holds its memory.
#[derive(Clone, Debug)]
pub(crate) struct Extent {
    memory: Arc<Memory>,
    offset: u64,
    len: u64,
    access: Access,
    operand: u8,
    written: bool,
}

/// Bytes of an operand that are fetched ahead: enough for the hardware to go on by itself.
const FETCHED: u64 = 1 << 11;

impl Extent {
    /// Asks for what a command will look at first.
    pub(crate) fn fetch(&self) {
        fetch(std::ptr::from_ref(&*self.memory).addr(), size_of::<Memory>().min(128));
    }

    /// Asks for the first of the bytes that it will read, after [`Extent::fetch`].
    pub(crate) fn fetch_bytes(&self) {
        if self.access.reads() {
            let address = self.memory.address.load(Ordering::Relaxed);
            if address != 0 {
                let at = address.wrapping_add(self.offset as usize);
                fetch(at, self.len.min(FETCHED) as usize);
            }
        }
    }
}

impl Spanning for Extent {
    #[inline(always)]
    fn span(&self) -> Span<'_> {
        let Extent { memory, offset, len, access, operand, written } = self;
        let (offset, len, access, operand, written) = (*offset, *len, *access, *operand, *written);
        Span { memory, offset, len, access, operand, written }
    }
}

/// Why the operands of a command cannot be borrowed.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum BorrowError {
    /// Another command holds one of the buffers.
    Busy,
    /// Two operands overlap and one of them is written.
    Overlap(usize, usize),
}

enum Guard<'m> {
    Read(RwLockReadGuard<'m, Storage>),
    Write(RwLockWriteGuard<'m, Storage>),
}

/// The locks of a command's buffers, each buffer once.
#[derive(Default)]
pub(crate) struct Guards<'m>(ArrayVec<Guard<'m>, MAX_OPERANDS>);

/// The bytes of an op's operands.
pub(crate) type Slots<'g> = ArrayVec<Slot<'g>, MAX_OPERANDS>;

/// What comes first in arranged spans: all of one buffer.
fn one_buffer<S: Spanning>(spans: &[S]) -> usize {
    let Some(first) = spans.first() else { return 0 };
    let id = first.span().memory.id;
    spans.iter().take_while(|s| s.span().memory.id == id).count()
}

impl<'m> Guards<'m> {
    /// Locks the buffers of arranged spans, without waiting.
    pub(crate) fn lock<S: Spanning>(&mut self, spans: &'m [S]) -> Result<(), BorrowError> {
        let mut rest = spans;
        while let Some(first) = rest.first() {
            let span = first.span();
            if let Some(storage) = &span.memory.storage {
                self.0.push(match span.written {
                    true => Guard::Write(storage.try_write().ok_or(BorrowError::Busy)?),
                    false => Guard::Read(storage.try_read().ok_or(BorrowError::Busy)?),
                });
            }
            rest = &rest[one_buffer(rest)..];
        }
        Ok(())
    }

    /// Cuts the locked buffers into the spans' slices, in the order of the operands. Spans that are
    /// read may overlap each other; a span that is read and lies exactly on one that is written
    /// becomes an alias of it.
    pub(crate) fn carve<'g, S: Spanning>(
        &'g mut self,
        spans: &[S],
        slots: &mut Slots<'g>,
    ) -> Result<(), BorrowError> {
        slots.extend(spans.iter().map(|_| Slot::Taken));
        let (mut rest, mut guards) = (spans, self.0.iter_mut());
        while let Some(first) = rest.first() {
            let (of_buffer, later) = rest.split_at(one_buffer(rest));
            rest = later;
            if first.span().memory.storage.is_none() {
                continue;
            }
            match guards.next() {
                Some(Guard::Read(storage)) => {
                    let storage: &Storage = storage;
                    for span in of_buffer.iter().map(Spanning::span) {
                        let bytes = &storage.bytes()[range(span.offset, span.len)];
                        slots[usize::from(span.operand)] = Slot::Read(bytes);
                    }
                }
                Some(Guard::Write(storage)) => {
                    carve_written(storage.bytes_mut(), of_buffer, slots)?;
                }
                None => unreachable!("every buffer of the spans was locked"),
            }
        }
        Ok(())
    }
}

/// Cuts one buffer, in ascending order of the spans, so that every piece is borrowed once.
fn carve_written<'g, S: Spanning>(
    bytes: &'g mut [u8],
    spans: &[S],
    slots: &mut [Slot<'g>],
) -> Result<(), BorrowError> {
    let (mut rest, mut at) = (bytes, 0u64);
    let mut next = 0;
    while next < spans.len() {
        let first = spans[next].span();
        if first.len == 0 {
            slots[usize::from(first.operand)] = Slot::Read(&[]);
            next += 1;
            continue;
        }
        // The spans that overlap this one, directly or through each other.
        let (mut end, mut last) = (first.offset + first.len, next + 1);
        while last < spans.len() && spans[last].span().offset < end {
            end = end.max(spans[last].span().offset + spans[last].span().len);
            last += 1;
        }
        let (_, tail) = rest.split_at_mut((first.offset - at) as usize);
        let (piece, tail) = tail.split_at_mut((end - first.offset) as usize);
        (rest, at) = (tail, end);
        let group = || spans[next..last].iter().map(Spanning::span);
        match group().find(|span| span.access.writes()) {
            None => {
                let piece: &[u8] = piece;
                for span in group() {
                    let bytes = &piece[range(span.offset - first.offset, span.len)];
                    slots[usize::from(span.operand)] = Slot::Read(bytes);
                }
            }
            Some(writer) => {
                for span in group().filter(|span| span.operand != writer.operand) {
                    let same = span.offset == writer.offset && span.len == writer.len;
                    if !same || span.access.writes() {
                        let (a, b) = (usize::from(writer.operand), usize::from(span.operand));
                        return Err(BorrowError::Overlap(a.min(b), a.max(b)));
                    }
                    slots[usize::from(span.operand)] = Slot::Alias;
                }
                slots[usize::from(writer.operand)] = Slot::Write(piece);
            }
        }
        next = last;
    }
    Ok(())
}

/// One operand's bytes.
#[derive(Debug)]
pub(crate) enum Slot<'g> {
    /// Borrowed for reading.
    Read(&'g [u8]),
    /// Borrowed for writing.
    Write(&'g mut [u8]),
    /// The same bytes as an operand that is written.
    Alias,
    /// Already handed out, or without storage.
    Taken,
}

/// The spans of an op's operands, arranged.
pub(crate) fn spans(op: &hal::Op<SimTensor>) -> Spans<'_> {
    let mut spans = Spans::new();
    op.visit(|_, access, t| spans.push(Span::new(&t.memory, t.offset, t.desc.extent(), access)));
    arrange(&mut spans);
    spans
}

/// The same, for as long as they are wanted.
pub(crate) fn extents(op: &hal::Op<SimTensor>) -> impl Iterator<Item = Extent> {
    let mut tensors = ArrayVec::<&SimTensor, MAX_OPERANDS>::new();
    op.visit(|_, _, t| tensors.push(t));
    spans(op).into_iter().map(move |Span { offset, len, access, operand, written, .. }| {
        let memory = tensors[usize::from(operand)].memory.clone();
        Extent { memory, offset, len, access, operand, written }
    })
}

/// The op over argument numbers, in the same order.
pub(crate) fn args(op: &hal::Op<SimTensor>) -> hal::Op<Arg> {
    let mut index = 0;
    op.map(|t| {
        index += 1;
        Arg { index: index - 1, desc: t.desc }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn memory(size: u64) -> Memory {
        Memory::new(DeviceId(0), size, true).unwrap()
    }

    fn span(memory: &Memory, offset: u64, len: u64, access: Access) -> Span<'_> {
        Span::new(memory, offset, len, access)
    }

    #[test]
    fn disjoint_parts_of_one_buffer_are_borrowed_together() {
        let m = memory(100);
        let spans = arranged([
            span(&m, 50, 10, Access::Write),
            span(&m, 0, 20, Access::Read),
            span(&m, 10, 20, Access::Read),
            span(&m, 60, 40, Access::Update),
            span(&m, 60, 40, Access::Read),
        ]);
        let (mut guards, mut slots) = (Guards::default(), Slots::new());
        guards.lock(&spans).unwrap();
        guards.carve(&spans, &mut slots).unwrap();
        assert!(matches!(&slots[0], Slot::Write(b) if b.len() == 10));
        assert!(matches!(&slots[1], Slot::Read(b) if b.len() == 20));
        assert!(matches!(&slots[2], Slot::Read(b) if b.len() == 20));
        assert!(matches!(&slots[3], Slot::Write(b) if b.len() == 40));
        assert!(matches!(slots[4], Slot::Alias));
    }

    #[test]
    fn partial_overlap_with_a_write_is_refused() {
        let m = memory(100);
        let spans = arranged([span(&m, 0, 20, Access::Read), span(&m, 19, 4, Access::Write)]);
        let (mut guards, mut slots) = (Guards::default(), Slots::new());
        guards.lock(&spans).unwrap();
        let overlap = BorrowError::Overlap(0, 1);
        assert_eq!(guards.carve(&spans, &mut slots).unwrap_err(), overlap);
    }

    #[test]
    fn a_held_buffer_is_busy_not_blocking() {
        let m = memory(8);
        let write = [span(&m, 0, 8, Access::Write)];
        let mut held = Guards::default();
        held.lock(&write).unwrap();
        assert_eq!(Guards::default().lock(&write), Err(BorrowError::Busy));
        drop(held);
        assert_eq!(Guards::default().lock(&write), Ok(()));
    }
}

//! Device memory: zeroed, aligned host memory behind a lock, and the borrowing of an op's operands.
//!
//! Memory that several streams share could be handed to kernels as raw pointers, with the hazard
//! check as the argument that this is sound. Locks cost some 20 ns per buffer and operation, need
//! no argument and no `unsafe`, so locks it is. They never block: a stream whose operands are held
//! by another stream's command (disjoint parts of one buffer, say) is put back in the queue.

mod accesses;
mod buffers;

pub(crate) use accesses::{Accesses, Standing};
pub(crate) use buffers::Buffers;

use crate::kernels::{Arg, fetch};
use arrayvec::ArrayVec;
use bytemuck::{Pod, Zeroable};
use hal::op::Access;
use hal::{BufferId, DeviceId, Operand, Tensor, TensorDesc};
use memmap2::MmapMut;
use parking_lot::{Mutex, RwLock, RwLockReadGuard, RwLockWriteGuard};
use std::sync::Arc;

/// The most operands that an op has.
pub(crate) const MAX_OPERANDS: usize = 12;

/// Allocations are multiples of this many bytes, and aligned to it as far as kernels can tell.
pub(crate) const ALIGNMENT: u64 = 256;

/// One cache line: the unit that keeps element slices of every dtype aligned.
#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C, align(64))]
struct Line([u8; 64]);

/// The bytes of one buffer. What commands need when they run lies in one cache line, and what
/// they need when they are submitted in another.
#[derive(Debug)]
#[repr(C, align(64))]
pub(crate) struct Memory {
    /// Absent in a timing-only simulation.
    storage: Option<RwLock<Storage>>,
    /// Where the storage lies, for hints about it.
    address: usize,
    pub(crate) id: BufferId,
    pub(crate) size: u64,
    pub(crate) device: DeviceId,
    pub(crate) accesses: Mutex<Accesses>,
}

/// Zeroed bytes whose start is aligned for every dtype.
enum Storage {
    Heap(Box<[Line]>),
    /// Large buffers get pages of their own, huge ones where the system has them: weights are read
    /// end to end for every token, and with small pages address translation sets the pace.
    Mapped(MmapMut),
}

/// From this size on a buffer gets pages of its own.
const MAPPED: u64 = 4 << 20;

impl std::fmt::Debug for Storage {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} bytes", self.bytes().len())
    }
}

impl Storage {
    fn new(size: u64) -> Option<Self> {
        let bytes = usize::try_from(size).ok()?;
        if size < MAPPED {
            let lines = bytemuck::allocation::try_zeroed_slice_box(bytes.div_ceil(64)).ok()?;
            return Some(Storage::Heap(lines));
        }
        let map = MmapMut::map_anon(bytes).ok()?;
        // Advice that the system may not know, and then ignores.
        #[cfg(target_os = "linux")]
        let _ = map.advise(memmap2::Advice::HugePage);
        Some(Storage::Mapped(map))
    }

    fn bytes(&self) -> &[u8] {
        match self {
            Storage::Heap(lines) => bytemuck::cast_slice(lines),
            Storage::Mapped(map) => map,
        }
    }

    fn bytes_mut(&mut self) -> &mut [u8] {
        match self {
            Storage::Heap(lines) => bytemuck::cast_slice_mut(lines),
            Storage::Mapped(map) => map,
        }
    }
}

impl Memory {
    /// Memory of `size` bytes; without storage if `with_values` is false.
    pub(crate) fn new(device: DeviceId, size: u64, with_values: bool) -> Option<Self> {
        let storage = match with_values {
            true => Some(Storage::new(size)?),
            false => None,
        };
        let address = storage.as_ref().map_or(0, |storage| storage.bytes().as_ptr().addr());
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
#[derive(Clone, Debug)]
pub(crate) struct Span<'a> {
    pub(crate) memory: &'a Memory,
    pub(crate) offset: u64,
    pub(crate) len: u64,
    pub(crate) access: Access,
}

/// The ranges of an op's operands, in the order of [`hal::Op::visit`].
pub(crate) type Spans<'a> = ArrayVec<Span<'a>, MAX_OPERANDS>;

/// The range of an operand, and its memory.
#[derive(Clone, Debug)]
pub(crate) struct Extent {
    memory: Arc<Memory>,
    offset: u64,
    len: u64,
    access: Access,
}

/// Bytes of an operand that are fetched ahead: enough for the hardware to go on by itself.
const FETCHED: u64 = 1 << 11;

impl Extent {
    pub(crate) fn new(t: &SimTensor, access: Access) -> Self {
        Extent { memory: t.memory.clone(), offset: t.offset, len: t.desc.extent(), access }
    }

    /// Asks for what a command will look at first.
    pub(crate) fn fetch(&self) {
        fetch(std::ptr::from_ref(&*self.memory).addr(), size_of::<Memory>().min(128));
    }

    /// Asks for the first of the bytes that it will read, after [`Extent::fetch`].
    pub(crate) fn fetch_bytes(&self) {
        if self.access.reads() {
            let at = self.memory.address.wrapping_add(self.offset as usize);
            fetch(at, self.len.min(FETCHED) as usize);
        }
    }

    pub(crate) fn span(&self) -> Span<'_> {
        let Extent { memory, offset, len, access } = self;
        Span { memory, offset: *offset, len: *len, access: *access }
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
pub(crate) struct Guards<'m>(ArrayVec<(BufferId, Guard<'m>), MAX_OPERANDS>);

/// The bytes of an op's operands.
pub(crate) type Slots<'g> = ArrayVec<Slot<'g>, MAX_OPERANDS>;

impl<'m> Guards<'m> {
    /// Locks the buffers of all spans, without waiting.
    pub(crate) fn lock(spans: &[Span<'m>]) -> Result<Self, BorrowError> {
        let mut guards: ArrayVec<(BufferId, Guard<'m>), MAX_OPERANDS> = ArrayVec::new();
        for span in spans {
            if guards.iter().any(|(id, _)| *id == span.memory.id) {
                continue;
            }
            let Some(storage) = &span.memory.storage else { continue };
            let written = spans.iter().any(|s| s.memory.id == span.memory.id && s.access.writes());
            let guard = match written {
                true => Guard::Write(storage.try_write().ok_or(BorrowError::Busy)?),
                false => Guard::Read(storage.try_read().ok_or(BorrowError::Busy)?),
            };
            guards.push((span.memory.id, guard));
        }
        Ok(Guards(guards))
    }

    /// Cuts the locked buffers into the spans' slices. Spans that are read may overlap each other;
    /// a span that is read and lies exactly on one that is written becomes an alias of it.
    pub(crate) fn carve(&mut self, spans: &[Span<'_>]) -> Result<Slots<'_>, BorrowError> {
        let mut slots: Slots<'_> = spans.iter().map(|_| Slot::Taken).collect();
        for (id, guard) in &mut self.0 {
            let of_buffer = |i: &usize| spans[*i].memory.id == *id;
            match guard {
                Guard::Read(storage) => {
                    let storage: &Storage = storage;
                    for i in (0..spans.len()).filter(of_buffer) {
                        slots[i] =
                            Slot::Read(&storage.bytes()[range(spans[i].offset, spans[i].len)]);
                    }
                }
                Guard::Write(storage) => {
                    let mut order: ArrayVec<usize, MAX_OPERANDS> =
                        (0..spans.len()).filter(of_buffer).collect();
                    order.sort_by_key(|&i| {
                        (spans[i].offset, spans[i].len, !spans[i].access.writes())
                    });
                    carve_written(storage.bytes_mut(), spans, &order, &mut slots)?;
                }
            }
        }
        Ok(slots)
    }
}

/// Cuts one buffer, in ascending order of the spans, so that every piece is borrowed once.
fn carve_written<'g>(
    bytes: &'g mut [u8],
    spans: &[Span<'_>],
    order: &[usize],
    slots: &mut [Slot<'g>],
) -> Result<(), BorrowError> {
    let (mut rest, mut at) = (bytes, 0u64);
    let mut next = 0;
    while next < order.len() {
        let first = &spans[order[next]];
        if first.len == 0 {
            slots[order[next]] = Slot::Read(&[]);
            next += 1;
            continue;
        }
        // The spans that overlap this one, directly or through each other.
        let (mut end, mut last) = (first.offset + first.len, next + 1);
        while last < order.len() && spans[order[last]].offset < end {
            end = end.max(spans[order[last]].offset + spans[order[last]].len);
            last += 1;
        }
        let (_, tail) = rest.split_at_mut((first.offset - at) as usize);
        let (piece, tail) = tail.split_at_mut((end - first.offset) as usize);
        (rest, at) = (tail, end);
        let group = &order[next..last];
        match group.iter().position(|&i| spans[i].access.writes()) {
            None => {
                let piece: &[u8] = piece;
                for &i in group {
                    slots[i] =
                        Slot::Read(&piece[range(spans[i].offset - first.offset, spans[i].len)]);
                }
            }
            Some(writer) => {
                let writer = group[writer];
                for &i in group.iter().filter(|&&i| i != writer) {
                    let same = spans[i].offset == spans[writer].offset
                        && spans[i].len == spans[writer].len;
                    if !same || spans[i].access.writes() {
                        return Err(BorrowError::Overlap(writer.min(i), writer.max(i)));
                    }
                    slots[i] = Slot::Alias;
                }
                slots[writer] = Slot::Write(piece);
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

/// The spans of an op's operands.
pub(crate) fn spans(op: &hal::Op<SimTensor>) -> Spans<'_> {
    let mut spans = Spans::new();
    op.visit(|_, access, t| {
        spans.push(Span { memory: &t.memory, offset: t.offset, len: t.desc.extent(), access });
    });
    spans
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
        Span { memory, offset, len, access }
    }

    #[test]
    fn disjoint_parts_of_one_buffer_are_borrowed_together() {
        let m = memory(100);
        let spans = [
            span(&m, 50, 10, Access::Write),
            span(&m, 0, 20, Access::Read),
            span(&m, 10, 20, Access::Read),
            span(&m, 60, 40, Access::Update),
            span(&m, 60, 40, Access::Read),
        ];
        let mut guards = Guards::lock(&spans).unwrap();
        let slots = guards.carve(&spans).unwrap();
        assert!(matches!(&slots[0], Slot::Write(b) if b.len() == 10));
        assert!(matches!(&slots[1], Slot::Read(b) if b.len() == 20));
        assert!(matches!(&slots[2], Slot::Read(b) if b.len() == 20));
        assert!(matches!(&slots[3], Slot::Write(b) if b.len() == 40));
        assert!(matches!(slots[4], Slot::Alias));
    }

    #[test]
    fn partial_overlap_with_a_write_is_refused() {
        let m = memory(100);
        let spans = [span(&m, 0, 20, Access::Read), span(&m, 19, 4, Access::Write)];
        let mut guards = Guards::lock(&spans).unwrap();
        assert_eq!(guards.carve(&spans).unwrap_err(), BorrowError::Overlap(0, 1));
    }

    #[test]
    fn a_held_buffer_is_busy_not_blocking() {
        let m = memory(8);
        let write = [span(&m, 0, 8, Access::Write)];
        let held = Guards::lock(&write).unwrap();
        assert!(matches!(Guards::lock(&write), Err(BorrowError::Busy)));
        drop(held);
        assert!(Guards::lock(&write).is_ok());
    }
}

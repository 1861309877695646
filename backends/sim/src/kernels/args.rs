//! Typed views of an op's operands.

use crate::memory::{Slot, Slots};
use bytemuck::Pod;
use hal::{Operand, TensorDesc};

/// Stands for an operand in an `Op<Arg>`: which one it is, and its shape.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Arg {
    pub(crate) index: u32,
    pub(crate) desc: TensorDesc,
}

impl Operand for Arg {
    fn desc(&self) -> &TensorDesc {
        &self.desc
    }
}

/// The operands of one op, borrowed for the time of its execution.
#[derive(Debug, Default)]
pub(crate) struct Args<'g> {
    slots: Slots<'g>,
}

impl<'g> Args<'g> {
    /// Where they are put.
    pub(crate) fn slots(&mut self) -> &mut Slots<'g> {
        &mut self.slots
    }

    /// An operand that is read.
    ///
    /// # Panics
    ///
    /// If the op does not read it, or it is an alias: mistakes of a kernel, not of a caller.
    pub(crate) fn read<T: Pod>(&self, arg: &Arg) -> View<'g, T> {
        match &self.slots[arg.index as usize] {
            Slot::Read(bytes) => View { data: elements(bytes), desc: arg.desc },
            other => unreachable!("operand {} read while {other:?}", arg.index),
        }
    }

    /// An operand that is written or updated. Handed out once.
    ///
    /// # Panics
    ///
    /// If the op does not write it.
    pub(crate) fn write<T: Pod>(&mut self, arg: &Arg) -> ViewMut<'g, T> {
        match std::mem::replace(&mut self.slots[arg.index as usize], Slot::Taken) {
            Slot::Write(bytes) => ViewMut { data: elements_mut(bytes), desc: arg.desc },
            // An empty operand carves to nothing.
            Slot::Read([]) => ViewMut { data: &mut [], desc: arg.desc },
            other => unreachable!("operand {} written while {other:?}", arg.index),
        }
    }

    /// Whether `arg` is the very memory of a written operand (`a += b`).
    pub(crate) fn is_alias(&self, arg: &Arg) -> bool {
        matches!(self.slots[arg.index as usize], Slot::Alias)
    }
}

fn elements<T: Pod>(bytes: &[u8]) -> &[T] {
    // An empty slice need not be aligned.
    if bytes.is_empty() { &[] } else { bytemuck::cast_slice(bytes) }
}

fn elements_mut<T: Pod>(bytes: &mut [u8]) -> &mut [T] {
    if bytes.is_empty() { &mut [] } else { bytemuck::cast_slice_mut(bytes) }
}

/// A strided tensor that is read. Element 0 of `data` is the tensor's first element, and `data`
/// ends with its last.
#[derive(Clone, Copy, Debug)]
pub(crate) struct View<'g, T> {
    pub(crate) data: &'g [T],
    pub(crate) desc: TensorDesc,
}

impl<'g, T> View<'g, T> {
    /// Row `r` of a matrix `[R, C]`.
    pub(crate) fn row(&self, r: usize) -> &'g [T] {
        debug_assert_eq!(self.desc.rank(), 2);
        let start = r * self.desc.stride(0);
        &self.data[start..start + self.desc.dim(1)]
    }

    /// Innermost row `[i, j, ..]` of a tensor `[A, B, C]`.
    pub(crate) fn row2(&self, i: usize, j: usize) -> &'g [T] {
        debug_assert_eq!(self.desc.rank(), 3);
        let start = i * self.desc.stride(0) + j * self.desc.stride(1);
        &self.data[start..start + self.desc.dim(2)]
    }
}

/// A strided tensor that is written.
#[derive(Debug)]
pub(crate) struct ViewMut<'g, T> {
    pub(crate) data: &'g mut [T],
    pub(crate) desc: TensorDesc,
}

impl<T> ViewMut<'_, T> {
    /// Row `r` of a matrix `[R, C]`.
    pub(crate) fn row(&mut self, r: usize) -> &mut [T] {
        debug_assert_eq!(self.desc.rank(), 2);
        let start = r * self.desc.stride(0);
        &mut self.data[start..start + self.desc.dim(1)]
    }

    /// Innermost row `[i, j, ..]` of a tensor `[A, B, C]`.
    pub(crate) fn row2(&mut self, i: usize, j: usize) -> &mut [T] {
        debug_assert_eq!(self.desc.rank(), 3);
        let start = i * self.desc.stride(0) + j * self.desc.stride(1);
        &mut self.data[start..start + self.desc.dim(2)]
    }
}

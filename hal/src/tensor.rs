//! Strided views of device memory.

use crate::{Buffer, DType, Region};
use std::fmt;

/// The most dimensions a tensor has.
pub(crate) const MAX_RANK: usize = 4;

/// Shape, strides and dtype of an operand, without its memory.
///
/// Dimensions are row-major; strides count elements. The innermost dimension is contiguous
/// (stride 1): every op's inner loop relies on it. 36 bytes and `Copy`, so that an [`crate::Op`]
/// holds its operands inline and a launch allocates nothing.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct TensorDesc {
    dtype: DType,
    rank: u8,
    shape: [u32; MAX_RANK],
    strides: [u32; MAX_RANK],
}

impl TensorDesc {
    /// A contiguous row-major tensor.
    ///
    /// # Panics
    ///
    /// On no dimensions, more than four, or a stride that does not fit 32 bits: shapes come from
    /// validated configurations, so these are mistakes in code.
    #[track_caller]
    pub fn new(dtype: DType, shape: &[usize]) -> Self {
        assert!((1..=MAX_RANK).contains(&shape.len()), "rank of {shape:?} is not 1..=4");
        let mut desc = TensorDesc {
            dtype,
            rank: shape.len() as u8,
            shape: [1; MAX_RANK],
            strides: [1; MAX_RANK],
        };
        let mut stride = 1usize;
        for (axis, &dim) in shape.iter().enumerate().rev() {
            desc.shape[axis] = narrow(dim);
            desc.strides[axis] = narrow(stride);
            stride = stride.saturating_mul(dim.max(1));
        }
        desc
    }

    /// A tensor from the parts that a file or another process gives.
    ///
    /// # Errors
    ///
    /// What is wrong: not 1 to 4 dimensions, as many strides as dimensions, an innermost stride of
    /// 1, strides below which rows would overlap, or an extent beyond 64 bits.
    pub fn strided(dtype: DType, shape: &[u32], strides: &[u32]) -> Result<Self, String> {
        let say = |problem: &str| Err(format!("{dtype}{shape:?} strides {strides:?}: {problem}"));
        if !(1..=MAX_RANK).contains(&shape.len()) || strides.len() != shape.len() {
            return say("expected 1 to 4 dimensions, and a stride for each");
        }
        if strides[shape.len() - 1] != 1 {
            return say("the innermost stride is not 1");
        }
        for axis in 1..shape.len() {
            let row = u64::from(shape[axis].max(1)) * u64::from(strides[axis]);
            if shape[axis - 1] > 1 && u64::from(strides[axis - 1]) < row {
                return say("rows overlap");
            }
        }
        let extent = shape.iter().zip(strides).try_fold(1u64, |sum, (&dim, &stride)| {
            sum.checked_add(u64::from(dim.saturating_sub(1)) * u64::from(stride))
        });
        let elements = shape.iter().try_fold(1u64, |n, &dim| n.checked_mul(u64::from(dim)));
        let bytes = |n: Option<u64>| n.and_then(|n| n.checked_mul(dtype.size() as u64));
        if bytes(extent).is_none() || bytes(elements).is_none() {
            return say("its size does not fit 64 bits");
        }
        let mut desc = TensorDesc {
            dtype,
            rank: shape.len() as u8,
            shape: [1; MAX_RANK],
            strides: [1; MAX_RANK],
        };
        desc.shape[..shape.len()].copy_from_slice(shape);
        desc.strides[..shape.len()].copy_from_slice(strides);
        Ok(desc)
    }

    /// Element type.
    pub const fn dtype(&self) -> DType {
        self.dtype
    }

    /// Number of dimensions, 1 to 4.
    pub const fn rank(&self) -> usize {
        self.rank as usize
    }

    /// Size along `axis`; 1 beyond the rank.
    pub const fn dim(&self, axis: usize) -> usize {
        self.shape[axis] as usize
    }

    /// Elements between neighbours along `axis`.
    pub const fn stride(&self, axis: usize) -> usize {
        self.strides[axis] as usize
    }

    /// The dimensions.
    #[inline]
    pub fn shape(&self) -> &[u32] {
        &self.shape[..self.rank()]
    }

    /// The strides, in elements.
    #[inline]
    pub fn strides(&self) -> &[u32] {
        &self.strides[..self.rank()]
    }

    /// The innermost dimension.
    pub const fn last_dim(&self) -> usize {
        self.shape[self.rank as usize - 1] as usize
    }

    /// Product of all dimensions but the last: the rows of a row-wise op.
    #[inline]
    pub fn rows(&self) -> usize {
        self.shape[..self.rank() - 1].iter().map(|&d| d as usize).product()
    }

    /// Number of elements.
    #[inline]
    pub fn elements(&self) -> usize {
        self.shape().iter().map(|&d| d as usize).product()
    }

    /// Bytes of the elements themselves, gaps between rows not counted.
    #[inline]
    pub fn bytes(&self) -> u64 {
        self.elements() as u64 * self.dtype.size() as u64
    }

    /// Bytes from the first element to the end of the last one: what the view spans in memory.
    #[inline]
    pub fn extent(&self) -> u64 {
        if self.elements() == 0 {
            return 0;
        }
        let last: u64 =
            (0..self.rank()).map(|a| (self.dim(a) as u64 - 1) * self.stride(a) as u64).sum();
        (last + 1) * self.dtype.size() as u64
    }

    /// Whether the elements lie without gaps.
    pub fn is_contiguous(&self) -> bool {
        self.extent() == self.bytes()
    }

    /// The same elements under another shape, or `None` where the view has gaps or the number of
    /// elements differs.
    pub fn reshaped(&self, shape: &[usize]) -> Option<Self> {
        let new = TensorDesc::new(self.dtype, shape);
        (self.is_contiguous() && new.elements() == self.elements()).then_some(new)
    }

    /// Columns `start..start + len` of the innermost dimension: the byte offset and the view.
    ///
    /// # Panics
    ///
    /// If the range leaves the dimension.
    #[track_caller]
    pub fn columns(&self, start: usize, len: usize) -> (u64, Self) {
        self.narrowed(self.rank() - 1, start, len)
    }

    /// Entries `start..start + len` along `axis`: the byte offset and the view.
    ///
    /// # Panics
    ///
    /// If the range leaves the dimension.
    #[track_caller]
    pub fn narrowed(&self, axis: usize, start: usize, len: usize) -> (u64, Self) {
        assert!(
            axis < self.rank() && start + len <= self.dim(axis),
            "{start}..{} leaves dimension {axis} of {self:?}",
            start + len
        );
        let mut desc = *self;
        desc.shape[axis] = narrow(len);
        ((start * self.stride(axis) * self.dtype.size()) as u64, desc)
    }

    /// Splits the innermost dimension of size `outer * inner` in two: `[T, h·d]` to `[T, h, d]`.
    ///
    /// # Panics
    ///
    /// If the sizes do not multiply to the innermost dimension, or the rank is already four.
    #[track_caller]
    pub fn split_last(&self, outer: usize, inner: usize) -> Self {
        let last = self.rank() - 1;
        assert!(
            self.rank() < MAX_RANK && outer * inner == self.dim(last),
            "cannot split the last dimension of {self:?} into {outer} x {inner}"
        );
        let mut desc = *self;
        desc.rank += 1;
        desc.shape[last] = narrow(outer);
        desc.strides[last] = narrow(inner);
        desc.shape[last + 1] = narrow(inner);
        desc.strides[last + 1] = 1;
        desc
    }
}

#[track_caller]
fn narrow(size: usize) -> u32 {
    u32::try_from(size).expect("dimensions and strides fit 32 bits in every validated model")
}

impl fmt::Debug for TensorDesc {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}{:?}", self.dtype, self.shape())?;
        if !self.is_contiguous() {
            write!(f, " strides {:?}", &self.strides[..self.rank()])?;
        }
        Ok(())
    }
}

/// What an [`crate::Op`] can be about: anything that has a shape and a dtype.
///
/// Devices take `Op<Tensor>`, a model's graph holds `Op` over its own value ids, and cost models
/// and shape rules read `Op<TensorDesc>`; the descriptor type is the same in all three.
pub trait Operand {
    /// Shape, strides and dtype.
    fn desc(&self) -> &TensorDesc;
}

impl Operand for TensorDesc {
    fn desc(&self) -> &TensorDesc {
        self
    }
}

/// A strided view of a buffer. Cloning shares the memory.
#[derive(Clone, Debug)]
pub struct Tensor {
    buffer: Buffer,
    offset: u64,
    desc: TensorDesc,
}

impl Tensor {
    /// A view that starts `offset` bytes into `buffer`. Whether it stays inside is checked where
    /// it is used ([`crate::Validated`]), as with every other operand.
    pub fn new(buffer: Buffer, offset: u64, desc: TensorDesc) -> Self {
        Tensor { buffer, offset, desc }
    }

    /// The memory behind the view.
    pub fn buffer(&self) -> &Buffer {
        &self.buffer
    }

    /// Bytes from the buffer's start to the first element.
    pub fn offset(&self) -> u64 {
        self.offset
    }

    /// The bytes that the view spans.
    pub fn region(&self) -> Region {
        Region { buffer: self.buffer.clone(), offset: self.offset, len: self.desc.extent() }
    }

    /// See [`TensorDesc::columns`].
    ///
    /// # Panics
    ///
    /// As there.
    #[track_caller]
    pub fn columns(&self, start: usize, len: usize) -> Self {
        self.sub_view(self.desc.columns(start, len))
    }

    /// See [`TensorDesc::narrowed`].
    ///
    /// # Panics
    ///
    /// As there.
    #[track_caller]
    pub fn narrowed(&self, axis: usize, start: usize, len: usize) -> Self {
        self.sub_view(self.desc.narrowed(axis, start, len))
    }

    /// The same memory under another shape and dtype of the same or smaller extent.
    pub fn with_desc(&self, desc: TensorDesc) -> Self {
        Tensor { buffer: self.buffer.clone(), offset: self.offset, desc }
    }

    fn sub_view(&self, (offset, desc): (u64, TensorDesc)) -> Self {
        Tensor { buffer: self.buffer.clone(), offset: self.offset + offset, desc }
    }
}

impl Operand for Tensor {
    fn desc(&self) -> &TensorDesc {
        &self.desc
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn views_keep_count_of_offset_and_extent() {
        let kv = TensorDesc::new(DType::Bf16, &[5, 576]);
        let (offset, rope) = kv.columns(512, 64);
        assert_eq!((offset, rope.rows(), rope.last_dim(), rope.stride(0)), (1024, 5, 64, 576));
        assert!(!rope.is_contiguous());
        assert_eq!(rope.extent(), (4 * 576 + 64) * 2);
        assert_eq!(rope.bytes(), 5 * 64 * 2);
        let heads = TensorDesc::new(DType::F32, &[3, 8 * 24]).split_last(8, 24);
        assert_eq!((heads.shape(), heads.stride(0), heads.stride(1)), (&[3, 8, 24][..], 192, 24));
        let (offset, q_rope) = heads.columns(16, 8);
        assert_eq!((offset, q_rope.stride(1), q_rope.elements()), (64, 24, 3 * 8 * 8));
        assert_eq!(rope.reshaped(&[320]), None);
        assert_eq!(kv.reshaped(&[576, 5]).unwrap().stride(0), 5);
    }

    #[test]
    fn parts_from_outside_are_checked() {
        let kv = TensorDesc::new(DType::Bf16, &[5, 576]).columns(512, 64).1;
        assert_eq!(TensorDesc::strided(DType::Bf16, kv.shape(), kv.strides()), Ok(kv));
        for (shape, strides, words) in [
            (&[][..], &[][..], "1 to 4 dimensions"),
            (&[1; 5], &[1; 5], "1 to 4 dimensions"),
            (&[2, 3], &[3], "a stride for each"),
            (&[2, 3], &[3, 2], "innermost"),
            (&[2, 3], &[2, 1], "rows overlap"),
            (&[u32::MAX; 4], &[1 << 31, 1 << 30, u32::MAX, 1], "rows overlap"),
            (&[1, u32::MAX, 1 << 30, u32::MAX], &[1, u32::MAX, 1, 1], "overlap"),
        ] {
            let error = TensorDesc::strided(DType::F32, shape, strides).unwrap_err();
            assert!(error.contains(words), "{error}");
        }
    }

    #[test]
    fn empty_tensors_span_nothing() {
        assert_eq!(TensorDesc::new(DType::F32, &[0, 7]).extent(), 0);
    }
}

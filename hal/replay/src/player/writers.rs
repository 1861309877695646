//! Who last wrote which bytes of a buffer.

use crate::report::Wrote;
use hal::{DType, TensorDesc};
use std::ops::Range;
use std::rc::Rc;

/// The writes of one buffer that still show, oldest first.
#[derive(Debug, Default)]
pub(super) struct Writers(Vec<Write>);

#[derive(Clone, Debug)]
struct Write {
    range: Range<u64>,
    /// The view's shape, for one with gaps.
    gaps: Option<TensorDesc>,
    dtype: Option<DType>,
    by: Rc<Wrote>,
}

impl Write {
    fn covers(&self, byte: u64) -> bool {
        if !self.range.contains(&byte) {
            return false;
        }
        let Some(desc) = &self.gaps else { return true };
        let mut element = (byte - self.range.start) / desc.dtype().size() as u64;
        // Rows do not overlap, so strides descend; along one entry they mean nothing.
        for axis in (0..desc.rank()).filter(|&axis| desc.dim(axis) > 1) {
            let stride = desc.stride(axis).max(1) as u64;
            element -= (element / stride).min(desc.dim(axis) as u64 - 1) * stride;
        }
        element == 0
    }
}

impl Writers {
    /// Notes that bytes were written without a shape.
    pub(super) fn bytes(&mut self, range: Range<u64>, dtype: Option<DType>, by: Rc<Wrote>) {
        self.note(Write { range, gaps: None, dtype, by });
    }

    /// Notes that a view was written.
    pub(super) fn view(&mut self, offset: u64, desc: &TensorDesc, by: Rc<Wrote>) {
        let gaps = (!desc.is_contiguous()).then_some(*desc);
        let range = offset..offset + desc.extent();
        self.note(Write { range, gaps, dtype: Some(desc.dtype()), by });
    }

    fn note(&mut self, new: Write) {
        if new.range.is_empty() {
            return;
        }
        // What no longer shows is forgotten, so that the list stays as long as the buffer is varied.
        self.0.retain(|old| match &new.gaps {
            None => old.range.start < new.range.start || old.range.end > new.range.end,
            Some(_) => old.range != new.range || old.gaps != new.gaps,
        });
        self.0.push(new);
    }

    /// Who last wrote this byte.
    pub(super) fn of(&self, byte: u64) -> Option<&Rc<Wrote>> {
        self.0.iter().rev().find(|write| write.covers(byte)).map(|write| &write.by)
    }

    /// The dtype of these bytes, if one write made them all and they begin at one of its elements.
    pub(super) fn dtype(&self, range: &Range<u64>) -> Option<DType> {
        let meets = |w: &&Write| w.range.start < range.end && range.start < w.range.end;
        let last = self.0.iter().rev().find(meets)?;
        let dtype = last.dtype?;
        let inside = last.range.start <= range.start && range.end <= last.range.end;
        let aligned =
            (range.start - last.range.start.min(range.start)).is_multiple_of(dtype.size() as u64);
        (inside && aligned && last.gaps.is_none()).then_some(dtype)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn by(record: u64) -> Rc<Wrote> {
        Rc::new(Wrote {
            record,
            die: 0,
            stream: String::new(),
            sequence: record,
            op: "write".into(),
            label: String::new(),
            operand: String::new(),
            source: None,
        })
    }

    #[test]
    fn the_last_writer_of_each_byte_is_known() {
        let mut writers = Writers::default();
        let record = |w: &Writers, byte| w.of(byte).map(|by| by.record);
        writers.bytes(0..100, None, by(1));
        writers.view(8, &TensorDesc::new(DType::F32, &[4]), by(2));
        assert_eq!([0, 8, 23, 24].map(|b| record(&writers, b)), [1, 2, 2, 1].map(Some));
        assert_eq!(record(&writers, 100), None);
        assert_eq!(writers.dtype(&(12..20)), Some(DType::F32));
        assert_eq!([&(10..14), &(4..12), &(30..34)].map(|r| writers.dtype(r)), [None; 3]);
        // Columns 1 and 2 of a matrix of 3 rows of 5 BF16: bytes 2..6, 12..16, 22..26.
        let (offset, columns) = TensorDesc::new(DType::Bf16, &[3, 5]).columns(1, 2);
        writers.view(offset, &columns, by(3));
        let expected =
            [(1, 1), (2, 3), (5, 3), (6, 1), (11, 2), (12, 3), (15, 3), (16, 2), (25, 3)];
        for (byte, who) in expected {
            assert_eq!(record(&writers, byte), Some(who), "byte {byte}");
        }
        assert_eq!(writers.dtype(&(2..6)), None);
        writers.bytes(0..26, Some(DType::Bf16), by(4));
        assert_eq!((writers.0.len(), record(&writers, 13)), (2, Some(4)));
    }
}

//! Room for intermediate values, which each thread uses again and again: small ops are over sooner
//! than memory is found for them.

use std::cell::RefCell;
use std::ops::{Deref, DerefMut};

/// Vectors that a thread keeps.
const KEPT: usize = 8;

/// Values of a kept vector, at most: room that only a long prompt needs is given back.
const LARGEST: usize = 1 << 18;

thread_local! {
    static FREE: RefCell<Vec<Vec<f32>>> = const { RefCell::new(Vec::new()) };
}

/// A vector that goes back to its thread.
#[derive(Debug)]
pub(super) struct Scratch(Vec<f32>);

impl Scratch {
    /// An empty one.
    pub(super) fn empty() -> Self {
        let mut values = FREE.with_borrow_mut(Vec::pop).unwrap_or_default();
        values.clear();
        Scratch(values)
    }

    /// So many values, whatever they are: all will be overwritten.
    pub(super) fn any(len: usize) -> Self {
        let mut values = FREE.with_borrow_mut(Vec::pop).unwrap_or_default();
        values.resize(len, 0.0);
        Scratch(values)
    }

    /// So many zeros.
    pub(super) fn zeros(len: usize) -> Self {
        let mut scratch = Scratch::empty();
        scratch.resize(len, 0.0);
        scratch
    }
}

impl Deref for Scratch {
    type Target = Vec<f32>;

    fn deref(&self) -> &Vec<f32> {
        &self.0
    }
}

impl DerefMut for Scratch {
    fn deref_mut(&mut self) -> &mut Vec<f32> {
        &mut self.0
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let values = std::mem::take(&mut self.0);
        if values.capacity() <= LARGEST {
            // Not while the thread ends, when there is no list any more.
            let _ = FREE.try_with(|free| {
                let mut free = free.borrow_mut();
                if free.len() < KEPT {
                    free.push(values);
                }
            });
        }
    }
}

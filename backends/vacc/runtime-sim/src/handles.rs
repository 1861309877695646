//! Handles: names that can be checked, in the shape of pointers.
//!
//! A handle is an index and a generation. Using one that was never given out, or was given back,
//! is an error and touches no memory. Each kind has a table of its own and a tag in its names, so
//! that a stream is never taken for a buffer.

use crate::error::{Outcome, Refused};
use parking_lot::RwLock;
use std::sync::Arc;
use vacc::sys::VACC_ERROR_BAD_HANDLE;

/// All handles of one kind.
#[derive(Debug)]
pub(crate) struct Table<T> {
    kind: &'static str,
    tag: u64,
    slots: RwLock<Slots<T>>,
}

#[derive(Debug)]
struct Slots<T> {
    slots: Vec<Slot<T>>,
    free: Vec<u32>,
}

#[derive(Debug)]
struct Slot<T> {
    generation: u32,
    value: Option<Arc<T>>,
}

/// Bits: 28 of index, 28 of generation, 7 of tag, and the lowest set, so that no handle is null or
/// looks like an aligned pointer.
const INDEX: u32 = 28;
const GENERATION: u32 = (1 << 28) - 1;

impl<T> Table<T> {
    pub(crate) const fn new(kind: &'static str, tag: u64) -> Self {
        let slots = Slots { slots: Vec::new(), free: Vec::new() };
        Table { kind, tag, slots: RwLock::new(slots) }
    }

    fn name(&self, index: u32, generation: u32) -> usize {
        (u64::from(index) << 36 | u64::from(generation) << 8 | self.tag << 1 | 1) as usize
    }

    fn bad(&self, what: &str) -> Refused {
        Refused::new(VACC_ERROR_BAD_HANDLE, format!("the {} handle is {what}", self.kind))
    }

    fn parse<H>(&self, handle: *mut H) -> Outcome<(usize, u32)> {
        let name = handle.addr() as u64;
        if name == 0 {
            return Err(self.bad("null"));
        }
        if name & 0xff != (self.tag << 1 | 1) {
            return Err(self.bad("of another kind, or from elsewhere"));
        }
        Ok(((name >> 36) as usize, (name >> 8) as u32 & GENERATION))
    }

    /// Gives out a handle.
    pub(crate) fn add<H>(&self, value: Arc<T>) -> Outcome<*mut H> {
        let mut slots = self.slots.write();
        let index = match slots.free.pop() {
            Some(index) => index,
            None => {
                let index = slots.slots.len() as u32;
                if index >= 1 << INDEX {
                    let text = format!("there are {index} {} handles already", self.kind);
                    return Err(Refused::new(vacc::sys::VACC_ERROR_OUT_OF_MEMORY, text));
                }
                slots.slots.push(Slot { generation: 1, value: None });
                index
            }
        };
        let slot = &mut slots.slots[index as usize];
        slot.value = Some(value);
        Ok(std::ptr::without_provenance_mut(self.name(index, slot.generation)))
    }

    /// What a handle names.
    pub(crate) fn get<H>(&self, handle: *mut H) -> Outcome<Arc<T>> {
        let (index, generation) = self.parse(handle)?;
        let slots = self.slots.read();
        match slots.slots.get(index) {
            Some(Slot { generation: g, value: Some(value) }) if *g == generation => {
                Ok(value.clone())
            }
            _ => Err(self.bad("stale: it was destroyed, or never made")),
        }
    }

    /// Takes a handle back, if `check` agrees.
    pub(crate) fn remove<H>(
        &self,
        handle: *mut H,
        check: impl FnOnce(&Arc<T>) -> Outcome,
    ) -> Outcome<Arc<T>> {
        let (index, generation) = self.parse(handle)?;
        let mut slots = self.slots.write();
        let stale = || self.bad("stale: it was destroyed, or never made");
        let slot = slots.slots.get_mut(index).filter(|s| s.generation == generation);
        let slot = slot.ok_or_else(stale)?;
        check(slot.value.as_ref().ok_or_else(stale)?)?;
        let value = slot.value.take().ok_or_else(stale)?;
        slot.generation = (slot.generation % GENERATION) + 1;
        slots.free.push(index as u32);
        Ok(value)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stale_and_foreign_handles_are_refused() {
        let (a, b) = (Table::<u8>::new("apple", 1), Table::<u8>::new("pear", 2));
        let first: *mut u8 = a.add(Arc::new(1)).unwrap();
        assert_eq!(*a.get(first).unwrap(), 1);
        assert!(b.get(first).is_err(), "another kind");
        assert!(a.remove(first, |_| Err(Refused::invalid("no"))).is_err());
        assert_eq!(*a.remove(first, |_| Ok(())).unwrap(), 1);
        assert!(a.remove(first, |_| Ok(())).is_err(), "twice");
        let second: *mut u8 = a.add(Arc::new(2)).unwrap();
        assert!(a.get(first).is_err(), "the slot is used again, the name is not");
        assert_eq!(*a.get(second).unwrap(), 2);
        for wild in [0usize, 1, 3, 0xdead_beef, usize::MAX] {
            let handle: *mut u8 = std::ptr::without_provenance_mut(wild);
            assert!(a.get(handle).is_err(), "{wild:#x}");
        }
    }
}

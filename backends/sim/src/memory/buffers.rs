//! Whole buffers, locked together: what the ranks of a collective work on.

use super::{BorrowError, Guard, Memory, SimTensor, range};
use hal::BufferId;

/// The locks of several buffers, each buffer once, by ascending id.
pub(crate) struct Buffers<'m>(Vec<(BufferId, Guard<'m>)>);

impl<'m> Buffers<'m> {
    /// Locks all of them or none, without waiting; a flag says which are written.
    pub(crate) fn lock(mut wanted: Vec<(&'m Memory, bool)>) -> Result<Self, BorrowError> {
        // Of several wishes for one buffer, one to write comes first.
        wanted.sort_unstable_by_key(|(memory, written)| (memory.id, !written));
        wanted.dedup_by_key(|(memory, _)| memory.id);
        let mut guards = Vec::with_capacity(wanted.len());
        for (memory, written) in wanted {
            let Some(storage) = &memory.storage else { continue };
            let guard = match written {
                true => Guard::Write(storage.try_write().ok_or(BorrowError::Busy)?),
                false => Guard::Read(storage.try_read().ok_or(BorrowError::Busy)?),
            };
            guards.push((memory.id, guard));
        }
        Ok(Buffers(guards))
    }

    /// The bytes of a view, of which the buffer is among the locked ones.
    pub(crate) fn read(&self, t: &SimTensor) -> &[u8] {
        let bytes = match self.0.binary_search_by_key(&t.memory.id, |(id, _)| *id) {
            Ok(at) => match &self.0[at].1 {
                Guard::Read(storage) => storage.bytes(),
                Guard::Write(storage) => storage.bytes(),
            },
            Err(_) => unreachable!("the buffer of {t:?} is not locked"),
        };
        &bytes[range(t.offset, t.desc.extent())]
    }

    /// The bytes of a view, of which the buffer is among those locked for writing.
    pub(crate) fn write(&mut self, t: &SimTensor) -> &mut [u8] {
        match self.0.binary_search_by_key(&t.memory.id, |(id, _)| *id) {
            Ok(at) => match &mut self.0[at].1 {
                Guard::Write(storage) => &mut storage.bytes_mut()[range(t.offset, t.desc.extent())],
                Guard::Read(_) => unreachable!("the buffer of {t:?} is locked for reading"),
            },
            Err(_) => unreachable!("the buffer of {t:?} is not locked"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use hal::{DType, DeviceId, TensorDesc};
    use std::sync::Arc;

    #[test]
    fn a_buffer_that_is_read_and_written_is_locked_once() {
        let [a, b] = [16, 32].map(|size| Arc::new(Memory::new(DeviceId(0), size, true).unwrap()));
        let view = |memory: &Arc<Memory>, offset, n| {
            let desc = TensorDesc::new(DType::U8, &[n]);
            SimTensor { memory: memory.clone(), offset, desc }
        };
        let wanted = vec![(&*b, false), (&*a, true), (&*b, true), (&*a, true)];
        let mut locked = Buffers::lock(wanted).unwrap();
        locked.write(&view(&b, 30, 2)).copy_from_slice(&[1, 2]);
        assert_eq!(locked.read(&view(&b, 29, 3)), [0, 1, 2]);
        assert_eq!(locked.read(&view(&a, 7, 0)), []);
        assert!(matches!(Buffers::lock(vec![(&*a, false)]), Err(BorrowError::Busy)));
        drop(locked);
        let shared = Buffers::lock(vec![(&*a, false)]).unwrap();
        assert!(Buffers::lock(vec![(&*a, false), (&*b, true)]).is_ok());
        assert!(matches!(Buffers::lock(vec![(&*b, true), (&*a, true)]), Err(BorrowError::Busy)));
        drop(shared);
    }
}

//! Where the bytes of device memory are.
//!
//! Many dies hold the same weights: with tensor parallelism the down-projections of MLA, the norms
//! and the router. What the host writes to whole buffers is therefore kept once for all that are
//! equal, until one of them is written in another way. A simulated machine then takes little more
//! memory than its largest die, and what its dies read is in a cache when the first of them has read
//! it.

use bytemuck::{Pod, Zeroable};
use memmap2::MmapMut;
use parking_lot::Mutex;
use std::alloc::{Layout, handle_alloc_error};
use std::collections::HashMap;
use std::hash::{DefaultHasher, Hasher};
use std::sync::{Arc, Weak};

/// One cache line: the unit that keeps element slices of every dtype aligned.
#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C, align(64))]
pub(super) struct Line([u8; 64]);

/// Zeroed bytes whose start is aligned for every dtype.
pub(super) enum Storage {
    Heap(Box<[Line]>),
    /// Large buffers get pages of their own, huge ones where the system has them: weights are read
    /// end to end for every token, and with small pages address translation sets the pace.
    Mapped(MmapMut),
    /// The same as other buffers have.
    Shared(Arc<Storage>),
}

/// From this size on a buffer gets pages of its own.
const MAPPED: u64 = 4 << 20;

/// From so many bytes on it is worth looking for equal ones.
pub(crate) const WORTH_SHARING: u64 = 16 << 10;

impl std::fmt::Debug for Storage {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} bytes", self.bytes().len())
    }
}

impl Default for Storage {
    /// No bytes.
    fn default() -> Self {
        Storage::Heap(Box::default())
    }
}

impl Storage {
    pub(super) fn new(size: u64) -> Option<Self> {
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

    pub(super) fn bytes(&self) -> &[u8] {
        match self {
            Storage::Heap(lines) => bytemuck::cast_slice(lines),
            Storage::Mapped(map) => map,
            Storage::Shared(storage) => storage.bytes(),
        }
    }

    /// The bytes, no longer shared.
    pub(super) fn bytes_mut(&mut self) -> &mut [u8] {
        if let Storage::Shared(_) = self
            && let Storage::Shared(shared) = std::mem::take(self)
        {
            *self = Arc::try_unwrap(shared).unwrap_or_else(|shared| shared.copied());
        }
        match self {
            Storage::Heap(lines) => bytemuck::cast_slice_mut(lines),
            Storage::Mapped(map) => map,
            Storage::Shared(_) => unreachable!("what is shared is not shared again"),
        }
    }

    fn copied(&self) -> Storage {
        let bytes = self.bytes();
        // In the middle of a command there is nobody who could be told that memory is out.
        let mut copy = Storage::new(bytes.len() as u64)
            .unwrap_or_else(|| handle_alloc_error(Layout::for_value(bytes)));
        copy.bytes_mut().copy_from_slice(bytes);
        copy
    }

    /// Where they lie.
    pub(super) fn address(&self) -> usize {
        self.bytes().as_ptr().addr()
    }
}

/// The shared storages of a system.
#[derive(Debug, Default)]
pub(crate) struct Equals(Mutex<HashMap<u64, Vec<Weak<Storage>>>>);

impl Equals {
    /// Puts these bytes into a storage of as many, with `copy` where nobody has them yet.
    pub(super) fn replace(
        &self,
        storage: &mut Storage,
        bytes: &[u8],
        copy: impl FnOnce(&[u8], &mut [u8]),
    ) {
        // Not locked while bytes are compared and copied. Two who write the same at the same time
        // may both keep a copy.
        let mark = fingerprint(bytes);
        let alike = self.0.lock().get(&mark).cloned().unwrap_or_default();
        let equal = |other: &Arc<Storage>| other.bytes().get(..bytes.len()) == Some(bytes);
        let shared = alike.iter().filter_map(Weak::upgrade).find(equal).unwrap_or_else(|| {
            copy(bytes, &mut storage.bytes_mut()[..bytes.len()]);
            let own = Arc::new(std::mem::take(storage));
            self.add(mark, &own);
            own
        });
        *storage = Storage::Shared(shared);
    }

    fn add(&self, mark: u64, storage: &Arc<Storage>) {
        let mut known = self.0.lock();
        if known.len() == known.capacity() {
            // As many that nobody has any more as there are others, at most.
            known.retain(|_, alike| alike.iter().any(|other| other.strong_count() > 0));
        }
        let alike = known.entry(mark).or_default();
        alike.retain(|other| other.strong_count() > 0);
        alike.push(Arc::downgrade(storage));
    }
}

/// Equal for equal bytes. It looks at some of them only: most weights differ everywhere, and those
/// that look equal are compared.
fn fingerprint(bytes: &[u8]) -> u64 {
    const EVERY: usize = 1 << 12;
    let mut hasher = DefaultHasher::new();
    hasher.write_usize(bytes.len());
    for part in bytes.chunks(EVERY) {
        hasher.write(&part[..part.len().min(64)]);
    }
    hasher.finish()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn filled(equals: &Equals, bytes: &[u8]) -> Storage {
        let mut storage = Storage::new(bytes.len() as u64).unwrap();
        equals.replace(&mut storage, bytes, |from, to| to.copy_from_slice(from));
        storage
    }

    #[test]
    fn equal_bytes_are_kept_once_until_they_are_written() {
        let equals = Equals::default();
        let bytes: Vec<u8> = (0..20_000).map(|i| (i % 251) as u8).collect();
        let (mut a, b) = (filled(&equals, &bytes), filled(&equals, &bytes));
        assert_eq!(a.address(), b.address());
        a.bytes_mut()[7] = 1;
        assert_ne!(a.address(), b.address());
        assert_eq!((a.bytes()[7], &b.bytes()[..20_000]), (1, &bytes[..]));
        // The last holder has it for itself again.
        let (mut b, at) = (b, a.address());
        let before = b.address();
        b.bytes_mut()[7] = 2;
        assert_eq!((b.address(), a.address()), (before, at));
    }

    #[test]
    fn bytes_that_only_look_equal_are_not_shared() {
        let equals = Equals::default();
        let mut bytes = vec![0; 20_000];
        let a = filled(&equals, &bytes);
        bytes[100] = 1;
        let b = filled(&equals, &bytes);
        assert_ne!(a.address(), b.address());
        assert_eq!((a.bytes()[100], b.bytes()[100]), (0, 1));
    }
}

//! The C ABI as bindgen sees it, and its size-first rule.

#[allow(
    missing_docs,
    missing_debug_implementations,
    non_camel_case_types,
    unsafe_code,
    clippy::all,
    clippy::undocumented_unsafe_blocks,
    clippy::missing_safety_doc,
    clippy::allow_attributes_without_reason,
    reason = "generated; include/vacc.h has the documentation"
)]
mod bindings;

pub use bindings::*;

use std::mem::MaybeUninit;

/// Why a struct that came through the ABI is refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum StructError {
    /// The pointer is null.
    #[error("the pointer to {0} is null")]
    Null(&'static str),
    /// It is smaller than in version 1.0.
    #[error("{name} of {size} bytes is smaller than the {expected} of version 1.0")]
    TooSmall {
        /// The struct.
        name: &'static str,
        /// Its `size`.
        size: usize,
        /// The size of version 1.0.
        expected: usize,
    },
    /// It is larger, and what lies beyond asks for something.
    #[error("{name} of {size} bytes has fields that this version ({known} bytes) does not know")]
    Unknown {
        /// The struct.
        name: &'static str,
        /// Its `size`.
        size: usize,
        /// The size known.
        known: usize,
    },
    /// It stands in an array whose first element has another size.
    #[error("element {index} of an array of {name} has {size} bytes, the first {first}")]
    Uneven {
        /// The struct.
        name: &'static str,
        /// Its place in the array.
        index: usize,
        /// Its `size`.
        size: usize,
        /// That of element 0.
        first: usize,
    },
}

/// The most that a struct may claim to have grown to.
const MOST: usize = 1 << 16;

fn name<T>() -> &'static str {
    std::any::type_name::<T>().rsplit("::").next().unwrap_or("a struct")
}

/// The size that a size-first struct says it has, which is at least the `least` bytes that version
/// 1.0 had.
///
/// # Errors
///
/// Null, or too small.
///
/// # Safety
///
/// Unless null, `at` is readable for four bytes. `T` is a struct of `vacc.h`, so its first field is
/// its size.
#[expect(unsafe_code, reason = "reads a caller's struct")]
pub unsafe fn claimed_size<T>(at: *const T, least: usize) -> Result<usize, StructError> {
    if at.is_null() {
        return Err(StructError::Null(name::<T>()));
    }
    // SAFETY: not null, and the caller vouches for the first four bytes.
    let size = unsafe { at.cast::<u32>().read_unaligned() } as usize;
    match size < least {
        true => Err(StructError::TooSmall { name: name::<T>(), size, expected: least }),
        false => Ok(size),
    }
}

/// Reads a size-first struct of whatever version, which has not grown since version 1.0.
///
/// # Errors
///
/// As the header says: null, too small, or larger with unknown fields in use.
///
/// # Safety
///
/// As [`read_grown`].
#[expect(unsafe_code, reason = "reads a caller's struct")]
pub unsafe fn read_struct<T: Copy>(at: *const T) -> Result<T, StructError> {
    // SAFETY: passed on.
    unsafe { read_grown(at, size_of::<T>()) }
}

/// Reads a size-first struct of whatever version, of which version 1.0 had the first `least` bytes.
/// Fields that the caller's version did not have are zero.
///
/// # Errors
///
/// As the header says: null, too small, or larger with unknown fields in use.
///
/// # Safety
///
/// Unless null, `at` is readable for four bytes, and for as many as these say. `T` is a struct of
/// `vacc.h`, so its first field is its size and every pattern of bits is a value.
#[expect(unsafe_code, reason = "reads a caller's struct")]
pub unsafe fn read_grown<T: Copy>(at: *const T, least: usize) -> Result<T, StructError> {
    let known = size_of::<T>();
    // SAFETY: the caller vouches for the first four bytes.
    let size = unsafe { claimed_size(at, least) }?;
    if size < known {
        let mut value = MaybeUninit::<T>::zeroed();
        // SAFETY: `size` bytes are readable, and fewer than `value` has; they do not overlap.
        unsafe { value.as_mut_ptr().cast::<u8>().copy_from(at.cast(), size) };
        // SAFETY: any bits are a `T`, and all were set.
        return Ok(unsafe { value.assume_init() });
    }
    // SAFETY: the caller vouches for `size` bytes, which lie within the claimed struct.
    let beyond = |i: usize| unsafe { at.cast::<u8>().add(i).read() };
    if size > MOST || (known..size).any(|i| beyond(i) != 0) {
        return Err(StructError::Unknown { name: name::<T>(), size, known });
    }
    // SAFETY: at least `known` bytes are readable, and any bits are a `T`.
    Ok(unsafe { at.read_unaligned() })
}

/// Reads element `index` of an array of size-first structs, each as large as the first says, of
/// which version 1.0 had the first `least` bytes.
///
/// # Errors
///
/// As [`read_struct`], and an element of another size than the first.
///
/// # Safety
///
/// As [`read_struct`], for each of the first `index + 1` elements.
#[expect(unsafe_code, reason = "reads a caller's array")]
pub unsafe fn read_element<T: Copy>(
    at: *const T,
    index: usize,
    least: usize,
) -> Result<T, StructError> {
    // SAFETY: the caller vouches for the first element.
    let first = unsafe { claimed_size(at, least) }?;
    // SAFETY: and for the others, which lie this far apart.
    let element = unsafe { at.byte_add(index * first) };
    // SAFETY: as above.
    let size = unsafe { claimed_size(element, least) }?;
    if size != first {
        return Err(StructError::Uneven { name: name::<T>(), index, size, first });
    }
    // SAFETY: as above.
    unsafe { read_grown(element, least) }
}

/// Fills a size-first struct of the caller's, whose `size` says how much room there is; `value`'s
/// own first field says how much is filled.
///
/// # Errors
///
/// Null, or less room than version 1.0 has.
///
/// # Safety
///
/// As [`read_struct`], and writable.
#[expect(unsafe_code, reason = "writes a caller's struct")]
pub unsafe fn write_struct<T: Copy>(at: *mut T, value: &T) -> Result<(), StructError> {
    // SAFETY: the caller vouches for the first four bytes.
    unsafe { claimed_size(at.cast_const(), size_of::<T>()) }?;
    // SAFETY: the caller vouches for the claimed size, which is at least that of a `T`.
    unsafe { at.write_unaligned(*value) };
    Ok(())
}

/// The `size` field of a struct of this type.
pub const fn struct_size<T>() -> u32 {
    size_of::<T>() as u32
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    #[expect(unsafe_code, reason = "calls what reads structs")]
    fn structs_may_grow_but_not_shrink() {
        #[repr(C)]
        #[derive(Clone, Copy)]
        struct Grown {
            known: vacc_link,
            more: u64,
        }
        let mut grown = Grown { known: vacc_link::default(), more: 0 };
        let read = |grown: &Grown| {
            // SAFETY: the struct is as large as its size field says, or larger.
            unsafe { read_struct((&raw const *grown).cast::<vacc_link>()) }
        };
        grown.known.size = struct_size::<Grown>();
        grown.known.latency_ps = 7;
        assert_eq!(read(&grown).unwrap().latency_ps, 7);
        grown.more = 1;
        assert!(matches!(read(&grown), Err(StructError::Unknown { name: "vacc_link", .. })));
        for size in [0, 4, struct_size::<vacc_link>() - 1] {
            grown.known.size = size;
            assert!(matches!(read(&grown), Err(StructError::TooSmall { .. })), "{size}");
        }
        let mut short = vacc_op_swiglu { expected_rows: 9, ..vacc_op_swiglu::default() };
        let least = std::mem::offset_of!(vacc_op_swiglu, row_offsets);
        short.size = least as u32;
        short.x.rank = 2;
        // SAFETY: the struct is larger than its size field says.
        let read = unsafe { read_grown(&raw const short, least) }.unwrap();
        assert_eq!((read.x.rank, read.expected_rows), (2, 0), "what 1.0 did not have is zero");
        short.size -= 1;
        // SAFETY: as above.
        let read = unsafe { read_grown(&raw const short, least) };
        assert!(matches!(read, Err(StructError::TooSmall { expected, .. }) if expected == least));
        // SAFETY: null is what is tested.
        let null = unsafe { read_struct::<vacc_link>(std::ptr::null()) };
        assert!(matches!(null, Err(StructError::Null("vacc_link"))));
    }
}

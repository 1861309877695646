//! Memory-mapped files: the one place of this crate that needs `unsafe`.

use std::{fs::File, io, path::Path};

use memmap2::Mmap;

/// Maps a regular file for reading; `None` for an empty one, which cannot be mapped everywhere.
///
/// The mapping is private and read-only. If another process truncates the file while it is mapped,
/// touching the lost pages ends this process with SIGBUS, as with every user of `mmap`; sizes are
/// therefore checked against the headers when a checkpoint is opened, which catches files that are
/// short already.
pub(super) fn map_file(path: &Path) -> io::Result<Option<Mmap>> {
    // Before opening: opening a named pipe would wait for a writer.
    let metadata = std::fs::metadata(path)?;
    if !metadata.is_file() {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "not a regular file"));
    }
    if metadata.len() == 0 {
        return Ok(None);
    }
    let file = File::open(path)?;
    #[expect(unsafe_code, reason = "memory-mapping a file is unsafe by nature; see above")]
    // SAFETY: the mapping is read-only and private, covers the file as it is now, and is unmapped
    // only when the returned value, which every slice of it borrows, is dropped. That nobody
    // modifies the file meanwhile cannot be enforced; `Checkpoint::open` documents it as its
    // caller's duty, as every loader that maps weights does.
    let map = unsafe { Mmap::map(&file) }?;
    Ok(Some(map))
}

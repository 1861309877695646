//! A look at an ELF file before the system's loader gets it (System V ABI, "Object Files"): the
//! loader's words for a wrong file are poor, and a file that was cut off it maps all the same and
//! crashes in.

use crate::loader::Refusal;
use std::fs::File;
use std::io::Read;
use std::os::unix::fs::FileExt;

/// What this program runs on, as ELF numbers it; both are little-endian.
const MACHINE: Option<(u16, &str)> = if cfg!(all(target_os = "linux", target_arch = "x86_64")) {
    Some((62, "x86-64"))
} else if cfg!(all(target_os = "linux", target_arch = "aarch64")) {
    Some((183, "AArch64"))
} else {
    None
};

/// Bytes of a 64-bit file's header, and of one entry of its program header table.
const HEADER: usize = 64;
const ENTRY: usize = 56;

/// Refuses what is no complete shared library for this machine.
///
/// # Errors
///
/// [`Refusal::Unreadable`], [`Refusal::NotALibrary`], [`Refusal::WrongArchitecture`],
/// [`Refusal::Truncated`].
pub(crate) fn inspect(file: &File) -> Result<(), Refusal> {
    let Some((machine, expected)) = MACHINE else { return Ok(()) };
    let mut header = Vec::with_capacity(HEADER);
    file.take(HEADER as u64).read_to_end(&mut header).map_err(Refusal::Unreadable)?;
    const SHARED_OBJECT: u16 = 3;
    if header.len() < 20 || header[..4] != *b"\x7fELF" {
        return Err(Refusal::NotALibrary);
    }
    let big_endian = header[5] == 2;
    let short = |at: usize| {
        let bytes = [header[at], header[at + 1]];
        if big_endian { u16::from_be_bytes(bytes) } else { u16::from_le_bytes(bytes) }
    };
    let (found, bits) = (short(18), if header[4] == 2 { 64 } else { 32 });
    if found != machine || bits != 64 || big_endian {
        let name = match found {
            3 => "x86".to_string(),
            40 => "Arm".to_string(),
            62 => "x86-64".to_string(),
            183 => "AArch64".to_string(),
            243 => "RISC-V".to_string(),
            other => format!("ELF machine {other}"),
        };
        let order = if big_endian { ", big-endian" } else { "" };
        let found = format!("{name} with {bits} bits{order}");
        return Err(Refusal::WrongArchitecture { found, expected });
    }
    if short(16) != SHARED_OBJECT {
        return Err(Refusal::NotALibrary);
    }
    let size = file.metadata().map_err(Refusal::Unreadable)?.len();
    let needs = extent(file, &header)?;
    if needs > size { Err(Refusal::Truncated { size, needs }) } else { Ok(()) }
}

/// The length that the header and the segments to be loaded ask of the file.
fn extent(file: &File, header: &[u8]) -> Result<u64, Refusal> {
    if header.len() < HEADER {
        return Ok(HEADER as u64);
    }
    let long = |bytes: &[u8], at: usize| u64::from_le_bytes(std::array::from_fn(|i| bytes[at + i]));
    let table = long(header, 32);
    let short = |at: usize| usize::from(u16::from_le_bytes([header[at], header[at + 1]]));
    let (step, count) = (short(54), short(56));
    if step < ENTRY || count == 0 {
        return Err(Refusal::NotALibrary);
    }
    let mut needs = table.saturating_add((step * count) as u64);
    let mut entries = vec![0; step * count];
    if file.read_exact_at(&mut entries, table).is_err() {
        return Ok(needs);
    }
    const LOAD: u32 = 1;
    for entry in entries.chunks_exact(step) {
        if u32::from_le_bytes(std::array::from_fn(|i| entry[i])) == LOAD {
            needs = needs.max(long(entry, 8).saturating_add(long(entry, 32)));
        }
    }
    Ok(needs)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    fn look(bytes: &[u8], name: &str) -> Result<(), Refusal> {
        let path = std::env::temp_dir().join(format!("vacc-elf-{}-{name}", std::process::id()));
        File::create(&path).unwrap().write_all(bytes).unwrap();
        let result = inspect(&File::open(&path).unwrap());
        std::fs::remove_file(&path).unwrap();
        result
    }

    /// A header whose one segment is the file itself, followed by zeros.
    fn elf(class: u8, order: u8, kind: u16, machine: u16) -> Vec<u8> {
        let mut file = vec![0; HEADER + ENTRY + 8];
        let mut put = |at: usize, bytes: &[u8]| file[at..at + bytes.len()].copy_from_slice(bytes);
        let half = |n: u16| if order == 2 { n.to_be_bytes() } else { n.to_le_bytes() };
        put(0, b"\x7fELF");
        put(4, &[class, order]);
        put(16, &half(kind));
        put(18, &half(machine));
        put(32, &(HEADER as u64).to_le_bytes());
        put(54, &(ENTRY as u16).to_le_bytes());
        put(56, &1u16.to_le_bytes());
        put(HEADER, &1u32.to_le_bytes());
        put(HEADER + 32, &((HEADER + ENTRY + 8) as u64).to_le_bytes());
        file
    }

    #[test]
    fn headers_tell_libraries_from_other_files() {
        let Some((ours, _)) = MACHINE else { return };
        let theirs = if ours == 62 { 183 } else { 62 };
        look(&elf(2, 1, 3, ours), "ours").unwrap();
        assert!(matches!(look(&elf(2, 1, 2, ours), "program"), Err(Refusal::NotALibrary)));
        for (i, wrong) in
            [elf(1, 1, 3, 3), elf(2, 1, 3, theirs), elf(1, 1, 3, ours), elf(2, 2, 3, ours)]
                .iter()
                .enumerate()
        {
            let refused = look(wrong, &format!("wrong{i}"));
            assert!(matches!(refused, Err(Refusal::WrongArchitecture { .. })), "{i}");
        }
        for (i, other) in [&b""[..], b"\x7fELF", b"#!/bin/sh\necho no library"].iter().enumerate() {
            assert!(matches!(look(other, &format!("other{i}")), Err(Refusal::NotALibrary)));
        }
    }

    #[test]
    fn a_file_cut_off_anywhere_is_refused() {
        let Some((ours, _)) = MACHINE else { return };
        let whole = elf(2, 1, 3, ours);
        for length in 20..whole.len() {
            let refused = look(&whole[..length], "cut");
            assert!(matches!(refused, Err(Refusal::Truncated { .. })), "{length}: {refused:?}");
        }
    }
}

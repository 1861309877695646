//! What is no usable runtime library is refused, each with its own error; what is one is taken.

mod common;

use common::{cc, fake, try_load, within_a_minute};
use std::path::{Path, PathBuf};
use vacc::Runtime;
use vacc::loader::{Refusal, Version};

/// The one refusal of a file that was named.
fn refusal(path: PathBuf) -> Refusal {
    let error = try_load(path.clone()).unwrap_err();
    let text = error.to_string();
    for part in [&*path.display().to_string(), "--vacc-runtime", "VACC_RUNTIME"] {
        assert!(text.contains(part), "{text:?} lacks {part:?}");
    }
    let [tried] = <[_; 1]>::try_from(error.tried).unwrap();
    assert!(text.contains(&tried.why.to_string()), "{text}");
    tried.why
}

fn scratch(name: &str) -> PathBuf {
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join("loading");
    std::fs::create_dir_all(&folder).unwrap();
    folder.join(name)
}

fn file(name: &str, bytes: &[u8]) -> PathBuf {
    let path = scratch(name);
    std::fs::write(&path, bytes).unwrap();
    path
}

#[test]
fn versions_of_this_major_are_taken_and_others_have_errors_of_their_own() {
    within_a_minute(|| {
        let version = |path| try_load(path).as_ref().map(Runtime::version).unwrap();
        assert_eq!(version(fake("v1.0", &["-DFAKE_MINOR=0"])), Version { major: 1, minor: 0 });
        let later = fake("v1.7", &["-DFAKE_MINOR=7"]);
        assert_eq!(version(later), Version { major: 1, minor: 7 });
        match refusal(fake("v0.9", &["-DFAKE_MAJOR=0", "-DFAKE_MINOR=9"])) {
            Refusal::TooOld(Version { major: 0, minor: 9 }) => {}
            other => panic!("{other:?}"),
        }
        match refusal(fake("v2.3", &["-DFAKE_MAJOR=2", "-DFAKE_MINOR=3"])) {
            Refusal::TooNew(version) => {
                let text = Refusal::TooNew(version).to_string();
                assert!(text.contains("2.3") && text.contains("needs 1.3"), "{text}");
            }
            other => panic!("{other:?}"),
        }
        // Its version decides even where it lacks functions: that is what the user must know.
        let old_and_bare = ["-DFAKE_MAJOR=0", "-DFAKE_WITHOUT_REQUIRED"];
        assert!(matches!(refusal(fake("bare", &old_and_bare)), Refusal::TooOld(_)));
    });
}

#[test]
fn every_missing_required_function_is_named() {
    within_a_minute(|| match refusal(fake("incomplete", &["-DFAKE_WITHOUT_REQUIRED"])) {
        Refusal::MissingRequired(missing) => {
            assert_eq!(missing, ["vacc_stream_launch", "vacc_comm_abort"]);
        }
        other => panic!("{other:?}"),
    });
}

#[test]
fn a_library_of_something_else_is_not_vacc() {
    within_a_minute(|| {
        let source = file("other.c", b"int something_else(void) { return 1; }\n");
        let other = cc(&[source], "loading/libother.so", &["-shared", "-fPIC"]);
        assert!(matches!(refusal(other), Refusal::NotVacc));
        // One that needs a library which is not there: the loader's words name it.
        let source = file("needs.c", b"int absent(void); int needs(void) { return absent(); }\n");
        let broken = cc(&[source], "loading/libneeds.so", &["-shared", "-fPIC", "-Wl,-z,now"]);
        match refusal(broken) {
            Refusal::Loader(text) => assert!(text.contains("absent"), "{text}"),
            other => panic!("{other:?}"),
        }
    });
}

#[test]
fn what_is_no_library_is_refused_before_the_loader_sees_it() {
    within_a_minute(|| {
        let text = file("text.so", b"no library at all, only words");
        assert!(matches!(refusal(text), Refusal::NotALibrary));
        assert!(matches!(refusal(file("empty.so", b"")), Refusal::NotALibrary));
        assert!(matches!(refusal(scratch("missing.so")), Refusal::Unreadable(_)));
        assert!(matches!(refusal(PathBuf::from("/dev/zero")), Refusal::NotALibrary));
        let folder = scratch("folder.so");
        std::fs::create_dir_all(&folder).unwrap();
        match refusal(folder) {
            Refusal::Unreadable(error) => {
                assert_eq!(error.kind(), std::io::ErrorKind::IsADirectory);
            }
            other => panic!("{other:?}"),
        }
        // A pipe that nobody writes into must not be waited for.
        let pipe = scratch("pipe.so");
        let _ = std::fs::remove_file(&pipe);
        let made = std::process::Command::new("mkfifo").arg(&pipe).status().unwrap();
        assert!(made.success());
        assert!(matches!(refusal(pipe), Refusal::NotALibrary));
        let program = std::env::current_exe().unwrap();
        assert!(matches!(refusal(program), Refusal::NotALibrary | Refusal::Loader(_)));
    });
}

#[test]
fn a_library_for_another_machine_or_cut_off_is_told_as_such() {
    within_a_minute(|| {
        let whole = std::fs::read(fake("patched", &[])).unwrap();
        let mut other = whole.clone();
        // e_machine: RISC-V.
        other[18..20].copy_from_slice(&243u16.to_le_bytes());
        match refusal(file("riscv.so", &other)) {
            Refusal::WrongArchitecture { found, .. } => {
                assert!(found.contains("RISC-V"), "{found}");
            }
            other => panic!("{other:?}"),
        }
        // Cut off, the loader would map it all the same, and crash reading what is not there.
        let cut = |keep: usize| match refusal(file("cut.so", &whole[..keep])) {
            Refusal::Truncated { size, needs } => {
                assert!(size == keep as u64 && needs > size, "{size} {needs}");
                needs as usize
            }
            other => panic!("{keep}: {other:?}"),
        };
        assert_eq!(cut(20), 64, "the header comes first");
        let needs = cut(4096);
        for keep in [63, 100, 1000, needs / 2, needs - 1] {
            cut(keep);
        }
        // What lies beyond is for debuggers.
        try_load(file("stripped.so", &whole[..needs])).unwrap();
    });
}

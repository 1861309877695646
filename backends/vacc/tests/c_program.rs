//! A C program drives the simulator's library through `vacc.h` alone, plainly and under valgrind.

mod common;
#[path = "common/valgrind.rs"]
mod valgrind;

use std::path::{Path, PathBuf};
use std::process::Command;

fn driver() -> PathBuf {
    let library = common::simulated_runtime();
    let sources = [common::c_source("driver.c"), common::c_source("hostile.c"), library];
    common::cc(&sources, "driver", &["-std=c99", "-pedantic", "-lpthread"])
}

fn passes(command: &mut Command) {
    // The library is linked by its path; the system's loader must be able to find it by its name.
    let folder = common::simulated_runtime().parent().unwrap().to_path_buf();
    let done = command.env("LD_LIBRARY_PATH", folder).output().unwrap();
    let told = String::from_utf8_lossy(&done.stdout);
    let errors = String::from_utf8_lossy(&done.stderr);
    assert!(done.status.success(), "{command:?}: {told}{errors}");
    let checks: u32 = told.split(' ').next().unwrap().parse().unwrap();
    assert!(checks >= 1000, "{told}");
}

#[test]
fn it_passes_plainly_and_under_valgrind() {
    common::within_a_minute(|| {
        let driver = driver();
        passes(&mut Command::new(&driver));
        if let Some(mut command) = valgrind::valgrind(&driver) {
            passes(&mut command);
        }
    });
}

#[test]
fn it_calls_every_function_of_the_header() {
    let header = Path::new(env!("CARGO_MANIFEST_DIR")).join("include/vacc.h");
    let header = std::fs::read_to_string(header).unwrap();
    let returns = ["vacc_status ", "uint32_t ", "const char *"];
    let prototypes = header.lines().filter_map(|l| returns.iter().find_map(|r| l.strip_prefix(r)));
    let functions: Vec<&str> = prototypes
        .filter_map(|l| Some(l.split_once('(')?.0))
        .filter(|f| !f.contains(' '))
        .collect();
    assert!(functions.len() > 40, "{functions:?}");
    let sources = ["driver.c", "hostile.c"]
        .map(|name| std::fs::read_to_string(common::c_source(name)).unwrap());
    let missing: Vec<_> = functions
        .iter()
        .filter(|f| !sources.iter().any(|source| source.contains(&format!("{f}("))))
        .collect();
    assert!(missing.is_empty(), "{missing:?}");
}

#[test]
fn the_header_is_also_cpp() {
    let source = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join("header.cpp");
    std::fs::write(
        &source,
        "#include \"vacc.h\"\n#include \"vacc.h\"\nint main() { return VACC_OK; }\n",
    )
    .unwrap();
    let flags = ["-std=c++17", "-pedantic", "-fsyntax-only"];
    // The front end alone: no C++ library is needed, and a machine may lack the C++ compiler.
    match Command::new("c++").arg("--version").output() {
        Ok(_) => {
            let include = concat!(env!("CARGO_MANIFEST_DIR"), "/include");
            let mut command = Command::new("c++");
            command.args(flags).args(["-Wall", "-Wextra", "-Werror", "-I", include]).arg(&source);
            let done = command.output().unwrap();
            assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
        }
        Err(error) => valgrind::not_run(&format!("the header as C++ (c++: {error})")),
    }
}

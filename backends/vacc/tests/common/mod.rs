//! What the tests of the FFI backend share.
#![allow(dead_code, reason = "each test file uses some of it")]

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::time::Duration;
use vacc::{LoadError, Options, Runtime, Search, System};

/// Runs a test's body on a thread of its own: one that hangs fails, with its panic told as its own
/// otherwise. The limit is far beyond what any of them takes.
pub(crate) fn within_a_minute(body: impl FnOnce() + Send + 'static) {
    let (done, wait) = channel();
    let body = std::thread::spawn(move || {
        body();
        let _ = done.send(());
    });
    match wait.recv_timeout(Duration::from_secs(60)) {
        Err(RecvTimeoutError::Timeout) => panic!("it hangs: a minute has passed"),
        // It has ended, or it has panicked and dropped its end.
        _ => body.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)),
    }
}

/// `libvaccrt` over the simulator, which was built as a dependency of the tests.
pub(crate) fn simulated_runtime() -> PathBuf {
    let path = std::env::current_exe().unwrap().with_file_name("libvaccrt.so");
    assert!(path.is_file(), "{} was not built", path.display());
    path
}

pub(crate) fn try_load(path: PathBuf) -> Result<Runtime, LoadError> {
    vacc::loader::load(&Search { flag: Some(path), ..Search::default() })
}

pub(crate) fn load(path: PathBuf) -> Arc<Runtime> {
    Arc::new(try_load(path).unwrap())
}

pub(crate) fn system(runtime: &Arc<Runtime>, config: &str) -> hal::Result<System> {
    let options = Options { visible_devices: None, config: Some(config.to_string()) };
    System::new(runtime.clone(), &options)
}

/// Where C sources lie.
pub(crate) fn c_source(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/c").join(name)
}

/// Compiles with the system's compiler; the result lies in Cargo's folder for tests.
pub(crate) fn cc(sources: &[PathBuf], output: &str, flags: &[&str]) -> PathBuf {
    let output = Path::new(env!("CARGO_TARGET_TMPDIR")).join(output);
    let include = Path::new(env!("CARGO_MANIFEST_DIR")).join("include");
    let mut command = Command::new("cc");
    command.args(["-Wall", "-Wextra", "-Werror", "-O1", "-g", "-I"]).arg(include);
    command.args(sources).args(flags).arg("-o").arg(&output);
    let done = command.output().expect("a C compiler, `cc`, is installed");
    let errors = String::from_utf8_lossy(&done.stderr);
    assert!(done.status.success(), "{command:?}: {errors}");
    output
}

/// The runtime that does nothing, in a variant: see `c/fake.c`. Each name is a library of its own.
pub(crate) fn fake(name: &str, variant: &[&str]) -> PathBuf {
    let flags = [&["-std=c99", "-shared", "-fPIC"], variant].concat();
    cc(&[c_source("fake.c")], &format!("libfake-{name}.so"), &flags)
}

//! What the tests of the FFI backend share.
#![allow(dead_code, reason = "each test file uses some of it")]

use std::path::PathBuf;
use std::sync::Arc;
use vacc::{Options, Runtime, Search, System};

/// `libvaccrt` over the simulator, which was built as a dependency of the tests.
pub(crate) fn simulated_runtime() -> PathBuf {
    let path = std::env::current_exe().unwrap().with_file_name("libvaccrt.so");
    assert!(path.is_file(), "{} was not built", path.display());
    path
}

pub(crate) fn load(path: PathBuf) -> Arc<Runtime> {
    let search = Search { flag: Some(path), ..Search::default() };
    Arc::new(vacc::loader::load(&search).unwrap())
}

pub(crate) fn system(runtime: &Arc<Runtime>, config: &str) -> hal::Result<System> {
    let options = Options { visible_devices: None, config: Some(config.to_string()) };
    System::new(runtime.clone(), &options)
}

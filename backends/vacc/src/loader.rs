//! Finding the runtime library, and refusing what is none.

use crate::elf;
use crate::error::Deferred;
use crate::sys::{Api, VACC_ABI_MAJOR, VACC_ABI_MINOR, missing_optional, missing_required};
use std::ffi::{CStr, OsString};
use std::fmt;
use std::path::{Path, PathBuf};

/// Names that the loader's path is searched for, in this order: that of this major version first.
pub const NAMES: [&str; 2] = ["libvaccrt.so.1", "libvaccrt.so"];

/// Where to look. The caller reads flags and the environment; this library does not.
#[derive(Clone, Debug, Default)]
pub struct Search {
    /// `--vacc-runtime`: this file and no other. Relative to the current directory, since whoever
    /// typed it is there.
    pub flag: Option<PathBuf>,
    /// `VACC_RUNTIME`: this file and no other, absolute, since it outlives directories.
    pub variable: Option<PathBuf>,
    /// `LD_LIBRARY_PATH`, whose empty and relative entries mean the current directory.
    pub loader_path: Option<OsString>,
}

/// A library that was looked at, and why it was not taken.
#[derive(Debug)]
pub struct Tried {
    /// Its path, or its name on the loader's path.
    pub what: String,
    /// What is wrong with it.
    pub why: Refusal,
}

impl fmt::Display for Tried {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.what, self.why)
    }
}

/// No usable library: everything that was tried.
#[derive(Debug)]
pub struct LoadError {
    /// In the order in which they were tried; never empty.
    pub tried: Vec<Tried>,
}

impl fmt::Display for LoadError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "no VACC runtime library was loaded")?;
        self.tried.iter().try_for_each(|tried| write!(f, "\n  {tried}"))?;
        write!(
            f,
            "\nname one with --vacc-runtime FILE or VACC_RUNTIME=FILE, or install {} on the \
             loader's path",
            NAMES[1]
        )
    }
}

impl std::error::Error for LoadError {}

/// Why a library was not taken.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Refusal {
    /// There is no such file.
    #[error("cannot be read: {0}")]
    Unreadable(std::io::Error),
    /// A variable that names a relative path.
    #[error("VACC_RUNTIME is not an absolute path")]
    Relative,
    /// It would have come from the current directory, which nobody asked for.
    #[error("would come from the current directory, through entry {0:?} of LD_LIBRARY_PATH")]
    CurrentDirectory(String),
    /// The file is no shared library.
    #[error("is not a shared library")]
    NotALibrary,
    /// It ends before the parts that its header names.
    #[error("is cut off: {size} bytes of at least {needs}")]
    Truncated {
        /// Bytes that it has.
        size: u64,
        /// Bytes that its header needs.
        needs: u64,
    },
    /// It is one for another machine.
    #[error("is built for {found}, this program for {expected}")]
    WrongArchitecture {
        /// What its header says.
        found: String,
        /// What this program is built for.
        expected: &'static str,
    },
    /// The system's loader refuses it.
    #[error("{0}")]
    Loader(String),
    /// It loads, and does not speak the ABI.
    #[error("is not a VACC runtime: it does not export vacc_abi_version")]
    NotVacc,
    /// It speaks an ABI that this program no longer does.
    #[error("speaks ABI {0}, which is too old: this program needs {expected}", expected = ours())]
    TooOld(Version),
    /// It speaks an ABI that this program does not know.
    #[error("speaks ABI {0}, which is too new: this program needs {expected}", expected = ours())]
    TooNew(Version),
    /// It lacks functions that every runtime has.
    #[error("lacks required functions: {}", .0.join(", "))]
    MissingRequired(Vec<&'static str>),
}

/// A version of the ABI.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Version {
    /// Equal to ours, or the library is refused.
    pub major: u32,
    /// Any: functions and fields are only added.
    pub minor: u32,
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.major, self.minor)
    }
}

const fn ours() -> Version {
    Version { major: VACC_ABI_MAJOR, minor: VACC_ABI_MINOR }
}

/// A library that was loaded and is complete. It stays loaded until the process ends.
pub struct Runtime {
    pub(crate) api: Api,
    path: String,
    version: Version,
    /// What went wrong when its last system ended: told to whoever starts the next.
    pub(crate) deferred: Deferred,
}

impl fmt::Debug for Runtime {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Runtime({} ABI {})", self.path, self.version)
    }
}

impl Runtime {
    /// The functions themselves, for measuring what a direct call costs.
    pub fn api(&self) -> &Api {
        &self.api
    }

    /// The path, or the name under which the loader found it.
    pub fn path(&self) -> &str {
        &self.path
    }

    /// The version of the ABI that it speaks.
    pub fn version(&self) -> Version {
        self.version
    }

    /// Optional functions that it lacks. What needs one of them answers that it is unsupported.
    pub fn missing_optional(&self) -> Vec<&'static str> {
        missing_optional(&self.api)
    }

    /// What the library calls a status.
    #[expect(unsafe_code, reason = "calls the library")]
    pub fn status_text(&self, status: i32) -> String {
        // SAFETY: required functions are there, take any number, and return static text or (from a
        // careless library) null.
        let [name, text] =
            unsafe { [self.api.vacc_status_name(status), self.api.vacc_status_text(status)] }.map(
                |at| match at.is_null() {
                    true => String::new(),
                    // SAFETY: not null, so static and zero-terminated.
                    false => unsafe { CStr::from_ptr(at) }.to_string_lossy().into_owned(),
                },
            );
        match (name.as_str(), text.as_str()) {
            ("" | "unknown", _) => format!("a status that this library does not name: {status}"),
            (_, "") => name,
            _ => format!("{text} ({name})"),
        }
    }
}

/// Finds and loads the library: what the flag names, else what the variable names, else
/// [`NAMES`] on the loader's path.
///
/// # Errors
///
/// Everything that was tried, and why each was refused.
pub fn load(search: &Search) -> Result<Runtime, LoadError> {
    let one = |what: &Path, loaded: Result<Runtime, Refusal>| {
        loaded.map_err(|why| LoadError {
            tried: vec![Tried { what: what.display().to_string(), why }],
        })
    };
    if let Some(path) = &search.flag {
        return one(path, load_file(path));
    }
    if let Some(path) = &search.variable {
        let absolute = if path.is_absolute() { load_file(path) } else { Err(Refusal::Relative) };
        return one(path, absolute);
    }
    let mut tried = Vec::new();
    for name in NAMES {
        let loaded = match in_current_directory(search, name) {
            Some(entry) => Err(Refusal::CurrentDirectory(entry)),
            None => open(name.as_ref(), name.to_string()),
        };
        match loaded {
            Ok(runtime) => return Ok(runtime),
            Err(why) => tried.push(Tried { what: name.to_string(), why }),
        }
    }
    Err(LoadError { tried })
}

/// The entry of the loader's path through which a name would be found in the current directory.
fn in_current_directory(search: &Search, name: &str) -> Option<String> {
    let entries = std::env::split_paths(search.loader_path.as_ref()?).collect::<Vec<_>>();
    let relative = entries.iter().filter(|entry| !entry.is_absolute());
    let mut found = relative.filter(|entry| entry.join(name).exists());
    found.next().map(|entry| entry.display().to_string())
}

/// Loads a file that somebody named, after a look at it.
fn load_file(path: &Path) -> Result<Runtime, Refusal> {
    let path = std::path::absolute(path).map_err(Refusal::Unreadable)?;
    // Not opened unless it is a file: a pipe would wait for somebody to write into it.
    let kind = std::fs::metadata(&path).map_err(Refusal::Unreadable)?;
    if kind.is_dir() {
        return Err(Refusal::Unreadable(std::io::ErrorKind::IsADirectory.into()));
    }
    if !kind.is_file() {
        return Err(Refusal::NotALibrary);
    }
    elf::inspect(&std::fs::File::open(&path).map_err(Refusal::Unreadable)?)?;
    open(path.as_os_str(), path.display().to_string())
}

#[expect(unsafe_code, reason = "loads a library")]
fn open(file: &std::ffi::OsStr, path: String) -> Result<Runtime, Refusal> {
    // SAFETY: loading runs the library's constructors. It is the one that the user named, or that
    // the system's loader finds under our name, and is as trusted as this program.
    let load = || unsafe { libloading::Library::new(file) };
    let library = load().map_err(|error| Refusal::Loader(loader_text(&error)))?;
    // SAFETY: only resolves symbols; the header gives their types.
    let api = unsafe { Api::from_library(library) };
    let api = api.map_err(|error| Refusal::Loader(loader_text(&error)))?;
    if api.vacc_abi_version.is_err() {
        return Err(Refusal::NotVacc);
    }
    // SAFETY: it is exported, takes nothing and cannot fail.
    let packed = unsafe { api.vacc_abi_version() };
    let version = Version { major: packed >> 16, minor: packed & 0xffff };
    match version.major {
        older if older < VACC_ABI_MAJOR => return Err(Refusal::TooOld(version)),
        newer if newer > VACC_ABI_MAJOR => return Err(Refusal::TooNew(version)),
        _ => {}
    }
    let missing = missing_required(&api);
    if !missing.is_empty() {
        return Err(Refusal::MissingRequired(missing));
    }
    // Never unloaded: see the crate's documentation. The system's loader counts, and this count is
    // not given back.
    std::mem::forget(load().map_err(|error| Refusal::Loader(loader_text(&error)))?);
    Ok(Runtime { api, path, version, deferred: Deferred::default() })
}

/// What the loader said: libloading keeps it as the source.
fn loader_text(error: &libloading::Error) -> String {
    let mut text = error.to_string();
    let mut source = std::error::Error::source(error);
    while let Some(cause) = source {
        if !text.contains(&cause.to_string()) {
            text = format!("{text}: {cause}");
        }
        source = cause.source();
    }
    text
}

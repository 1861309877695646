//! The backend for real cards: [`hal::Device`] over a VACC-style runtime library.
//!
//! The library is found at run time ([`loader`]) and speaks the C ABI of `include/vacc.h`, which is
//! this project's own and not a vendor's. An adapter over a vendor's runtime is one shared library;
//! the simulator is one too (`runtime-sim/`), so that all of this runs without a card.
//!
//! * [`System`] is a running library with its dies, [`loader::load`] what finds it.
//! * [`wire`] says how HAL values are written in the ABI, [`sys`] is the ABI itself.
//!
//! # What crosses the boundary
//!
//! Handles, which only the library understands; descriptors on the caller's stack; numbers that
//! this version may not know, which are kept as numbers and never turned into an enum. A launch
//! allocates nothing. A status that is not success becomes a [`hal::Error`] with what the library
//! tells about it.
//!
//! # Errors of destruction
//!
//! Dropping a buffer, stream or communicator cannot fail, the library's call can. Its error is
//! kept, and returned by the next call that can tell somebody: one on the same die; once the die is
//! closed, the next [`System::open`]; once the system is gone, the next [`System::new`].
//!
//! # The library is never unloaded
//!
//! Its threads may outlive the last handle by a moment, and code that they run must stay mapped.

mod collective;
mod device;
mod elf;
mod error;
mod list;
pub mod loader;
mod memory;
mod stream;
pub mod sys;
mod system;
mod telemetry;
pub mod wire;

pub use loader::{LoadError, Runtime, Search};
pub use system::{Options, System};
pub use telemetry::Telemetry;

//! The FFI backend.

//! Recording and replaying a command stream.

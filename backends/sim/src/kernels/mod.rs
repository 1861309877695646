//! What every op computes.
//!
//! A result is a function of the operands alone: the order of every sum is fixed per output
//! element, whatever the number of rows, the threads or the width of the SIMD unit.

mod args;

pub(crate) use args::{Arg, Args, View, ViewMut};

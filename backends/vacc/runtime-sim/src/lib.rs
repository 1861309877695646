//! `libvaccrt`: the C ABI of `vacc.h`, served by the simulator.
//!
//! For whoever calls it this is a runtime library like any vendor's: it is loaded, given handles,
//! misused, and must survive. So no panic crosses the boundary, no handle is a pointer, and
//! every pointer that comes in is checked for null and every struct for its size. What it cannot
//! check is what no C library can: that a pointer which is not null points to what it should.
//!
//! Settings of `vacc_instance_create`: `machine=NAME|FILE` (va16),
//! `timing=on|off|only` (on), `threads=N` (one per processor).

mod collective;
mod device;
mod error;
mod handles;
mod list;
mod memory;
mod stream;
mod system;
mod telemetry;

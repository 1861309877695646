//! libvaccrt over the simulator.

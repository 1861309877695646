//! The contract between a model's schedule and an accelerator.
//!
//! A [`Device`] is one **die**: one memory pool, one rank. Work reaches it as [`Op`] descriptors
//! submitted to [`Stream`]s, which keep order; a [`Point`] on a stream's timeline is how streams,
//! dies and the host wait for each other. A [`Communicator`] is one rank of a group; collectives
//! are commands on a stream like any other.
//!
//! # Who checks what
//!
//! **Backends trust, the wrapper checks.** A backend may assume that shapes, dtypes, alignment,
//! lifetimes and ordering are right; [`Validated`] wraps any device and rejects what is not,
//! before the backend sees it. Backends report what a caller cannot foresee: exhausted memory, an
//! op they cannot run, a lost device, a runtime's own failure.
//!
//! # When errors come
//!
//! Submitting reports what is known at submission. What fails later poisons the stream: the first
//! failure wins, it names the command (device, stream, sequence number, op, label), and it flows
//! along every dependency, so that whoever waits gets that failure and never hangs.
//!
//! # Concepts and their CUDA/NCCL counterparts
//!
//! | here | CUDA / NCCL |
//! |---|---|
//! | [`Device`] | `CUdevice` and its context |
//! | [`Stream`] | `cudaStream_t` |
//! | [`Point`] | `cudaEvent_t`, or a timeline semaphore's value |
//! | [`Buffer`] from [`Stream::alloc`] | `cudaMallocAsync` / `cudaFreeAsync` |
//! | [`Buffer`] from [`Device::alloc_host`] | `cudaMallocHost` |
//! | [`Op`] through [`Stream::submit`] | a kernel launch, or a cuBLAS/DeepGEMM/FlashMLA call |
//! | [`CommandList`] through [`Device::execute`] | a captured `cudaGraph_t` through `cudaGraphLaunch` |
//! | [`Communicator`] | `ncclComm_t` |
//! | a batch of [`Collective`]s | `ncclGroupStart` … `ncclGroupEnd` |
//! | [`Topology`] | what `nvidia-smi topo -m` prints |

mod buffer;
pub mod collective;
mod device;
mod dtype;
mod error;
pub mod fault;
pub mod hazard;
mod list;
mod null;
pub mod op;
mod stream;
mod tensor;
mod topology;
pub mod trace;
mod validated;

pub use buffer::{Buffer, BufferId, Location, RawBuffer, Region, WeakBuffer};
pub use collective::{
    Collective, CollectiveKind, Communicator, CommunicatorId, PeerCounts, Reduction,
};
pub use device::{Clock, Device, DeviceId, DeviceProperties, MemoryInfo, Support};
pub use dtype::DType;
pub use error::{Cause, Error, Failure, Result, Stuck, UsageError};
pub use list::{CommandList, Entry, ListAction, ListError, ListPoints, WaitFor};
pub use null::NullDevice;
pub use op::{Op, OpKind};
pub use stream::{Command, Label, Point, Stream, StreamId, Timeline, Timestamp};
pub use tensor::{Operand, Tensor, TensorDesc};
pub use topology::{DiePlacement, Link, LinkKind, Topology};
pub use validated::{Leak, Validated};

//! Collectives: commands that ranks of a communicator run together.

use crate::op::Access;
use crate::{DType, DeviceId, Operand, Result, Tensor};
use serde::{Deserialize, Serialize};
use std::any::Any;
use std::convert::Infallible;
use std::fmt;
use std::sync::Arc;

/// Opaque identity of a communicator, made once and given to every rank.
#[doc(alias = "ncclUniqueId")]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct CommunicatorId(pub [u64; 2]);

/// How all-reduce and reduce-scatter combine.
///
/// Ranks are combined in ascending order in FP32 and rounded once, so the result is the same bits
/// on every rank and in every run.
#[doc(alias = "ncclRedOp_t")]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Reduction {
    /// Sum.
    Sum,
    /// Largest.
    Max,
    /// Smallest.
    Min,
}

/// The kinds of collective.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum CollectiveKind {
    /// `ncclAllReduce`
    AllReduce,
    /// `ncclAllGather`
    AllGather,
    /// `ncclReduceScatter`
    ReduceScatter,
    /// `MPI_Alltoallv`
    AllToAll,
    /// `MPI_Alltoallv` with counts in device memory.
    AllToAllV,
    /// `ncclBroadcast`
    Broadcast,
    /// `ncclSend`
    Send,
    /// `ncclRecv`
    Recv,
}

impl CollectiveKind {
    /// The name used in traces and messages.
    pub const fn name(self) -> &'static str {
        match self {
            CollectiveKind::AllReduce => "all_reduce",
            CollectiveKind::AllGather => "all_gather",
            CollectiveKind::ReduceScatter => "reduce_scatter",
            CollectiveKind::AllToAll => "all_to_all",
            CollectiveKind::AllToAllV => "all_to_all_v",
            CollectiveKind::Broadcast => "broadcast",
            CollectiveKind::Send => "send",
            CollectiveKind::Recv => "recv",
        }
    }
}

/// One rank's part of a collective. Tensors are contiguous; sizes are counted in elements.
///
/// "In place" means that `send` and `recv` name the memory that the rule gives; other overlap is a
/// mistake.
///
/// Generic over the operand, as [`crate::Op`] is: devices take `Collective<Tensor>`, graphs hold
/// collectives over their own value ids.
#[derive(Clone, Debug)]
pub enum Collective<T = Tensor> {
    /// Every rank gets the combination of all `send`. In place: `send` is `recv`.
    #[doc(alias = "ncclAllReduce")]
    AllReduce {
        /// `n` elements.
        send: T,
        /// `n` elements.
        recv: T,
        /// How to combine.
        reduction: Reduction,
    },
    /// Every rank gets all `send` one after the other, by rank. In place: `send` is part `rank` of
    /// `recv`.
    #[doc(alias = "ncclAllGather")]
    AllGather {
        /// `n` elements.
        send: T,
        /// `size · n` elements.
        recv: T,
    },
    /// Rank `r` gets part `r` of the combination of all `send`. In place: `recv` is part `rank` of
    /// `send`.
    #[doc(alias = "ncclReduceScatter")]
    ReduceScatter {
        /// `size · n` elements.
        send: T,
        /// `n` elements.
        recv: T,
        /// How to combine.
        reduction: Reduction,
    },
    /// Rank `r`'s part `p` of `send` becomes rank `p`'s part `r` of `recv`. Not in place.
    #[doc(alias = "MPI_Alltoallv")]
    AllToAll {
        /// The parts for rank 0, 1, … one after the other.
        send: T,
        /// The parts from rank 0, 1, … one after the other.
        recv: T,
        /// Elements for and from each peer, zero allowed; `None` cuts both tensors in equal parts.
        counts: Option<Arc<PeerCounts>>,
    },
    /// Rows `send_offsets[p]..send_offsets[p + 1]` of `send` go to rank `p`. `recv` gets the parts
    /// from rank 0, 1, … one after the other, without gaps; its rows beyond are left as they are.
    /// Not in place.
    ///
    /// The offsets are values in device memory, read when the collective runs: what an op
    /// ([`crate::op::MoeDispatch`]) has counted goes out without the host (DeepEP's dispatch and
    /// combine; `MPI_Alltoallv` otherwise). Offsets that do not ascend from 0 to at most R, and
    /// more rows than C, are data errors; ranks whose W or dtype differ are told so.
    #[doc(alias = "MPI_Alltoallv")]
    AllToAllV {
        /// `[R, W]`, any dtype: the rows for rank 0, 1, … one after the other.
        send: T,
        /// `[C, W]`, as `send`.
        recv: T,
        /// `[size + 1]`, I32. Collectives of one batch may share it.
        send_offsets: T,
        /// `[size + 1]`, I32, written: where each rank's rows begin in `recv`; the last is the
        /// number of rows received. It serves as `send_offsets` on the way back.
        recv_offsets: Option<T>,
        /// Rows that one rank is expected to send in all, itself included: what a time model
        /// takes where no values exist.
        expected_rows: u32,
    },
    /// Every rank gets `root`'s `tensor`.
    #[doc(alias = "ncclBroadcast")]
    Broadcast {
        /// Read on the root, written on the others.
        tensor: T,
        /// The rank that sends.
        root: usize,
    },
    /// Gives `tensor` to `peer`, whose matching [`Collective::Recv`] has the same size and dtype.
    #[doc(alias = "ncclSend")]
    Send {
        /// What to send.
        tensor: T,
        /// The rank that receives.
        peer: usize,
    },
    /// Takes `tensor` from `peer`.
    #[doc(alias = "ncclRecv")]
    Recv {
        /// Where to put it.
        tensor: T,
        /// The rank that sends.
        peer: usize,
    },
}

/// Elements per peer of an all-to-all.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PeerCounts {
    /// Elements that go to each rank.
    pub send: Vec<usize>,
    /// Elements that come from each rank.
    pub recv: Vec<usize>,
}

impl<T> Collective<T> {
    /// Its kind.
    pub fn kind(&self) -> CollectiveKind {
        match self {
            Collective::AllReduce { .. } => CollectiveKind::AllReduce,
            Collective::AllGather { .. } => CollectiveKind::AllGather,
            Collective::ReduceScatter { .. } => CollectiveKind::ReduceScatter,
            Collective::AllToAll { .. } => CollectiveKind::AllToAll,
            Collective::AllToAllV { .. } => CollectiveKind::AllToAllV,
            Collective::Broadcast { .. } => CollectiveKind::Broadcast,
            Collective::Send { .. } => CollectiveKind::Send,
            Collective::Recv { .. } => CollectiveKind::Recv,
        }
    }

    /// The data that this rank sends and receives. `rank` decides for a broadcast. Not all that it
    /// touches: see [`Collective::visit`].
    pub fn tensors(&self, rank: usize) -> (Option<&T>, Option<&T>) {
        match self {
            Collective::AllReduce { send, recv, .. }
            | Collective::AllGather { send, recv }
            | Collective::ReduceScatter { send, recv, .. }
            | Collective::AllToAll { send, recv, .. }
            | Collective::AllToAllV { send, recv, .. } => (Some(send), Some(recv)),
            Collective::Broadcast { tensor, root } if *root == rank => (Some(tensor), None),
            Collective::Broadcast { tensor, .. } => (None, Some(tensor)),
            Collective::Send { tensor, .. } => (Some(tensor), None),
            Collective::Recv { tensor, .. } => (None, Some(tensor)),
        }
    }

    /// Calls `f` with the name, the access and the value of each tensor that this rank touches.
    pub fn visit<'a>(&'a self, rank: usize, mut f: impl FnMut(&'static str, Access, &'a T)) {
        let (send, recv) = self.tensors(rank);
        if let Some(send) = send {
            f("send", Access::Read, send);
        }
        if let Some(recv) = recv {
            f("recv", Access::Write, recv);
        }
        if let Collective::AllToAllV { send_offsets, recv_offsets, .. } = self {
            f("send_offsets", Access::Read, send_offsets);
            if let Some(recv_offsets) = recv_offsets {
                f("recv_offsets", Access::Write, recv_offsets);
            }
        }
    }

    /// The same collective over other operands.
    pub fn map<U>(&self, mut f: impl FnMut(&T) -> U) -> Collective<U> {
        let Ok(collective) = self.try_map(|operand| Ok::<_, Infallible>(f(operand)));
        collective
    }

    /// The same collective over other operands.
    ///
    /// # Errors
    ///
    /// The first error of `f`.
    pub fn try_map<U, E>(
        &self,
        mut f: impl FnMut(&T) -> std::result::Result<U, E>,
    ) -> std::result::Result<Collective<U>, E> {
        Ok(match self {
            Collective::AllReduce { send, recv, reduction } => {
                Collective::AllReduce { send: f(send)?, recv: f(recv)?, reduction: *reduction }
            }
            Collective::AllGather { send, recv } => {
                Collective::AllGather { send: f(send)?, recv: f(recv)? }
            }
            Collective::ReduceScatter { send, recv, reduction } => {
                Collective::ReduceScatter { send: f(send)?, recv: f(recv)?, reduction: *reduction }
            }
            Collective::AllToAll { send, recv, counts } => {
                Collective::AllToAll { send: f(send)?, recv: f(recv)?, counts: counts.clone() }
            }
            Collective::AllToAllV { send, recv, send_offsets, recv_offsets, expected_rows } => {
                Collective::AllToAllV {
                    send: f(send)?,
                    recv: f(recv)?,
                    send_offsets: f(send_offsets)?,
                    recv_offsets: recv_offsets.as_ref().map(&mut f).transpose()?,
                    expected_rows: *expected_rows,
                }
            }
            Collective::Broadcast { tensor, root } => {
                Collective::Broadcast { tensor: f(tensor)?, root: *root }
            }
            Collective::Send { tensor, peer } => {
                Collective::Send { tensor: f(tensor)?, peer: *peer }
            }
            Collective::Recv { tensor, peer } => {
                Collective::Recv { tensor: f(tensor)?, peer: *peer }
            }
        })
    }
}

impl<T: Operand> Collective<T> {
    /// Element type, taken from the first tensor.
    pub fn dtype(&self) -> DType {
        match self {
            Collective::AllReduce { send: t, .. }
            | Collective::AllGather { send: t, .. }
            | Collective::ReduceScatter { send: t, .. }
            | Collective::AllToAll { send: t, .. }
            | Collective::AllToAllV { send: t, .. }
            | Collective::Broadcast { tensor: t, .. }
            | Collective::Send { tensor: t, .. }
            | Collective::Recv { tensor: t, .. } => t.desc().dtype(),
        }
    }
}

/// Says what is wrong with one rank's batch, as far as this rank alone can know.
///
/// # Errors
///
/// The first rule of [`Collective`]'s documentation that is broken, with the values.
pub fn check(batch: &[Collective], rank: usize, size: usize) -> std::result::Result<(), String> {
    let peers =
        batch.iter().filter(|c| matches!(c, Collective::Send { .. } | Collective::Recv { .. }));
    let peers = peers.count();
    if peers != 0 && peers != batch.len() {
        return Err("a batch holds either group collectives or sends and receives".into());
    }
    batch.iter().try_for_each(|collective| check_one(collective, rank, size))
}

fn check_one(collective: &Collective, rank: usize, size: usize) -> std::result::Result<(), String> {
    let equal = |name: &str, found: usize, expected: usize| match found == expected {
        true => Ok(()),
        false => Err(format!("{name} has {found} elements, expected {expected}")),
    };
    let within = |name: &str, counts: &[usize], available: usize| {
        let sum: usize = counts.iter().sum();
        let fits = sum <= available;
        if fits { Ok(()) } else { Err(format!("{name} add up to {sum} of {available} elements")) }
    };
    let exists = |peer: usize| match peer < size {
        true => Ok(()),
        false => Err(format!("rank {peer} of {size} does not exist")),
    };
    let mut gaps = None;
    collective.visit(rank, |_, _, tensor| {
        if !tensor.desc().is_contiguous() {
            gaps = gaps.or(Some(*tensor.desc()));
        }
    });
    if let Some(desc) = gaps {
        return Err(format!("{desc:?} has gaps"));
    }
    let (send, recv) = collective.tensors(rank);
    if let (Some(send), Some(recv)) = (send, recv)
        && send.desc().dtype() != recv.desc().dtype()
    {
        return Err(format!("send is {} and recv {}", send.desc().dtype(), recv.desc().dtype()));
    }
    let count = |tensor: &Tensor| tensor.desc().elements();
    match collective {
        Collective::AllReduce { send, recv, .. } => equal("recv", count(recv), count(send))?,
        Collective::AllGather { send, recv } => equal("recv", count(recv), count(send) * size)?,
        Collective::ReduceScatter { send, recv, .. } => {
            equal("send", count(send), count(recv) * size)?
        }
        Collective::AllToAll { send, recv, counts: Some(counts) } => {
            equal("send counts", counts.send.len(), size)?;
            equal("recv counts", counts.recv.len(), size)?;
            within("send counts", &counts.send, count(send))?;
            within("recv counts", &counts.recv, count(recv))?;
        }
        Collective::AllToAll { send, recv, counts: None } => {
            equal("recv", count(recv), count(send))?;
            if !count(send).is_multiple_of(size) {
                return Err(format!("{} elements are not {size} equal parts", count(send)));
            }
        }
        Collective::AllToAllV { send, recv, send_offsets, recv_offsets, .. } => {
            let (from, to) = (send.desc(), recv.desc());
            if from.rank() != 2 || to.rank() != 2 || from.dim(1) != to.dim(1) {
                return Err(format!("send {from:?} and recv {to:?} are not rows of one width"));
            }
            let offsets =
                [("send_offsets", Some(send_offsets)), ("recv_offsets", recv_offsets.as_ref())];
            for (name, desc) in offsets.into_iter().filter_map(|(n, t)| Some((n, t?.desc()))) {
                if desc.dtype() != DType::I32 || desc.shape() != [size as u32 + 1] {
                    return Err(format!("{name} is {desc:?}, expected i32[{}]", size + 1));
                }
            }
            disjoint(collective, rank)?;
        }
        Collective::Broadcast { root, .. } => exists(*root)?,
        Collective::Send { peer, .. } | Collective::Recv { peer, .. } => exists(*peer)?,
    }
    let reduces =
        matches!(collective, Collective::AllReduce { .. } | Collective::ReduceScatter { .. });
    let dtype = collective.dtype();
    if reduces && !matches!(dtype, DType::F32 | DType::Bf16 | DType::I32) {
        return Err(format!("{dtype} cannot be reduced"));
    }
    Ok(())
}

/// Refuses a written tensor that shares bytes with another.
fn disjoint(collective: &Collective, rank: usize) -> std::result::Result<(), String> {
    let mut all = Vec::new();
    collective.visit(rank, |name, access, tensor| all.push((name, access, tensor)));
    for (i, (written, _, a)) in all.iter().enumerate().filter(|(_, t)| t.1.writes()) {
        for (j, (other, _, b)) in all.iter().enumerate() {
            let (from, to) = (a.offset().max(b.offset()), |t: &Tensor| {
                t.offset().saturating_add(t.desc().extent())
            });
            if i != j && a.buffer().id() == b.buffer().id() && from < to(a).min(to(b)) {
                return Err(format!("{written} overlaps {other}"));
            }
        }
    }
    Ok(())
}

/// One rank of a group. Batches of one communicator run in submission order, so every rank submits
/// the same batches in the same order, from one thread at a time; communicators are independent of
/// each other, but ranks that share several submit to them in the same order.
#[doc(alias = "ncclComm_t")]
pub trait Communicator: Send + Sync + fmt::Debug {
    /// For the backend to find its own type again.
    fn as_any(&self) -> &dyn Any;

    /// The id that every rank joined with.
    fn id(&self) -> CommunicatorId;

    /// This rank.
    fn rank(&self) -> usize;

    /// Number of ranks.
    fn size(&self) -> usize;

    /// The die of this rank.
    fn device(&self) -> DeviceId;

    /// Fails everything pending and everything later, on every rank. Callable from any thread, and
    /// the way out when a peer will never arrive.
    #[doc(alias = "ncclCommAbort")]
    fn abort(&self, reason: &str);

    /// What has failed so far, if anything, without waiting.
    ///
    /// # Errors
    ///
    /// The first failure of the communicator.
    #[doc(alias = "ncclCommGetAsyncError")]
    fn status(&self) -> Result<()>;
}

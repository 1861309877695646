//! HAL values as the ABI writes them, and back: dtypes, kinds of command, tensors and ops.
//!
//! Both directions stand here, from one table, so that the backend and a runtime in Rust (the
//! simulator's) cannot disagree.

use crate::sys::*;
use hal::op::*;
use hal::trace::{Bound, CommandKind};
use hal::{
    Cause, Clock, CollectiveKind, DType, LinkKind, Op, OpKind, Operand, Reduction, TensorDesc,
};
use std::ffi::c_void;

/// Why a value of the ABI has no meaning here.
#[derive(Clone, Debug, thiserror::Error)]
pub enum WireError {
    /// A struct of the wrong size.
    #[error(transparent)]
    Struct(#[from] StructError),
    /// A value that no rule of the header allows.
    #[error("{0}")]
    Invalid(String),
    /// A code that this version does not know.
    #[error("{0}")]
    Unsupported(String),
}

/// An operand as it came through the ABI.
#[derive(Clone, Copy, Debug)]
pub struct WireTensor {
    /// The memory's handle.
    pub buffer: vacc_buffer,
    /// Bytes to the first element.
    pub offset: u64,
    /// Shape, strides and dtype.
    pub desc: TensorDesc,
}

impl Operand for WireTensor {
    fn desc(&self) -> &TensorDesc {
        &self.desc
    }
}

/// A tensor's fields, for a descriptor.
#[inline]
pub fn tensor(desc: &TensorDesc, buffer: vacc_buffer, offset: u64) -> vacc_tensor {
    // Element by element: a copy of a length known only at run time is a call, six for a launch.
    let four = |of: &[u32]| std::array::from_fn(|i| of.get(i).copied().unwrap_or(0));
    vacc_tensor {
        buffer,
        offset,
        dtype: dtype(desc.dtype()),
        rank: desc.rank() as u32,
        shape: four(desc.shape()),
        strides: four(desc.strides()),
    }
}

impl TryFrom<&vacc_tensor> for WireTensor {
    type Error = WireError;

    fn try_from(t: &vacc_tensor) -> Result<Self, WireError> {
        let dtype = dtype_of(t.dtype)
            .ok_or_else(|| WireError::Invalid(format!("{} is no dtype", t.dtype)))?;
        let rank = (t.rank as usize).min(4);
        let desc = match t.rank {
            1..=4 => TensorDesc::strided(dtype, &t.shape[..rank], &t.strides[..rank]),
            other => Err(format!("a tensor has 1 to 4 dimensions, not {other}")),
        };
        Ok(WireTensor {
            buffer: t.buffer,
            offset: t.offset,
            desc: desc.map_err(WireError::Invalid)?,
        })
    }
}

/// The tensor, or `None` where the operand is absent.
///
/// # Errors
///
/// A tensor that no rule allows.
pub fn optional(t: &vacc_tensor) -> Result<Option<WireTensor>, WireError> {
    if t.dtype == VACC_DTYPE_NONE { Ok(None) } else { WireTensor::try_from(t).map(Some) }
}

macro_rules! codes {
    ($(#[$doc:meta])* $to:ident, $from:ident: $type:ty { $($value:pat => $code:ident => $back:expr,)+ }) => {
        $(#[$doc])*
        pub fn $to(value: $type) -> u32 {
            match value {
                $( $value => $code, )+
                #[allow(unreachable_patterns, reason = "some of these enums may grow")]
                _ => u32::MAX,
            }
        }

        /// The other way; `None` for a code that this version does not know.
        pub fn $from(code: u32) -> Option<$type> {
            match code {
                $( $code => Some($back), )+
                _ => None,
            }
        }
    };
}

codes! {
    /// `VACC_DTYPE_*`.
    dtype, dtype_of: DType {
        DType::F32 => VACC_DTYPE_F32 => DType::F32,
        DType::Bf16 => VACC_DTYPE_BF16 => DType::Bf16,
        DType::F8E4M3 => VACC_DTYPE_F8_E4M3 => DType::F8E4M3,
        DType::I32 => VACC_DTYPE_I32 => DType::I32,
        DType::U8 => VACC_DTYPE_U8 => DType::U8,
    }
}

codes! {
    /// `VACC_COLLECTIVE_*`.
    collective, collective_of: CollectiveKind {
        CollectiveKind::AllReduce => VACC_COLLECTIVE_ALL_REDUCE => CollectiveKind::AllReduce,
        CollectiveKind::AllGather => VACC_COLLECTIVE_ALL_GATHER => CollectiveKind::AllGather,
        CollectiveKind::ReduceScatter => VACC_COLLECTIVE_REDUCE_SCATTER => CollectiveKind::ReduceScatter,
        CollectiveKind::AllToAll => VACC_COLLECTIVE_ALL_TO_ALL => CollectiveKind::AllToAll,
        CollectiveKind::AllToAllV => VACC_COLLECTIVE_ALL_TO_ALL_V => CollectiveKind::AllToAllV,
        CollectiveKind::Broadcast => VACC_COLLECTIVE_BROADCAST => CollectiveKind::Broadcast,
        CollectiveKind::Send => VACC_COLLECTIVE_SEND => CollectiveKind::Send,
        CollectiveKind::Recv => VACC_COLLECTIVE_RECV => CollectiveKind::Recv,
    }
}

codes! {
    /// `VACC_REDUCE_*`.
    reduction, reduction_of: Reduction {
        Reduction::Sum => VACC_REDUCE_SUM => Reduction::Sum,
        Reduction::Max => VACC_REDUCE_MAX => Reduction::Max,
        Reduction::Min => VACC_REDUCE_MIN => Reduction::Min,
    }
}

codes! {
    /// `VACC_BOUND_*`.
    bound, bound_of: Bound {
        Bound::Unknown => VACC_BOUND_UNKNOWN => Bound::Unknown,
        Bound::Memory => VACC_BOUND_MEMORY => Bound::Memory,
        Bound::Matrix => VACC_BOUND_MATRIX => Bound::Matrix,
        Bound::Vector => VACC_BOUND_VECTOR => Bound::Vector,
        Bound::Link => VACC_BOUND_LINK => Bound::Link,
        Bound::Launch => VACC_BOUND_LAUNCH => Bound::Launch,
    }
}

codes! {
    /// `VACC_LINK_*`.
    link, link_of: LinkKind {
        LinkKind::SameDie => VACC_LINK_SAME_DIE => LinkKind::SameDie,
        LinkKind::OnCard => VACC_LINK_ON_CARD => LinkKind::OnCard,
        LinkKind::InHost => VACC_LINK_IN_HOST => LinkKind::InHost,
        LinkKind::Network => VACC_LINK_NETWORK => LinkKind::Network,
    }
}

codes! {
    /// `VACC_CLOCK_*`.
    clock, clock_of: Clock {
        Clock::Simulated => VACC_CLOCK_SIMULATED => Clock::Simulated,
        Clock::Device => VACC_CLOCK_DEVICE => Clock::Device,
        Clock::Host => VACC_CLOCK_HOST => Clock::Host,
    }
}

/// An op code, a collective, or `VACC_COMMAND_*`.
pub fn command(kind: CommandKind) -> u32 {
    match kind {
        CommandKind::Op(op) => op_code(op),
        CommandKind::Collective(kind) => collective(kind),
        CommandKind::Transfer => VACC_COMMAND_TRANSFER,
        CommandKind::Write => VACC_COMMAND_WRITE,
        CommandKind::Read => VACC_COMMAND_READ,
        CommandKind::Fill => VACC_COMMAND_FILL,
        CommandKind::Wait => VACC_COMMAND_WAIT,
        CommandKind::Memory => VACC_COMMAND_MEMORY,
        _ => u32::MAX,
    }
}

/// The other way; `None` for a code that this version does not know.
pub fn command_of(code: u32) -> Option<CommandKind> {
    Some(match code {
        VACC_COMMAND_TRANSFER => CommandKind::Transfer,
        VACC_COMMAND_WRITE => CommandKind::Write,
        VACC_COMMAND_READ => CommandKind::Read,
        VACC_COMMAND_FILL => CommandKind::Fill,
        VACC_COMMAND_WAIT => CommandKind::Wait,
        VACC_COMMAND_MEMORY => CommandKind::Memory,
        code => match collective_of(code) {
            Some(kind) => CommandKind::Collective(kind),
            None => CommandKind::Op(op_kind(code)?),
        },
    })
}

/// A command's name in traces and errors, from its code.
pub fn command_name(code: u32) -> &'static str {
    match code {
        VACC_COMMAND_ABORT => ABORT,
        code => command_of(code).map_or("unknown command", CommandKind::name),
    }
}

/// What the abort of a communicator is called, which no stream submitted.
const ABORT: &str = "abort";

/// A command's code, from its name.
pub fn command_named(name: &str) -> u32 {
    let ops = OpKind::ALL.iter().map(|&kind| (kind.name(), op_code(kind)));
    let others = (VACC_COLLECTIVE_ALL_REDUCE..=VACC_COMMAND_MEMORY)
        .filter_map(|code| Some((command_of(code)?.name(), code)));
    ops.chain(others)
        .chain([(ABORT, VACC_COMMAND_ABORT)])
        .find(|(known, _)| *known == name)
        .map_or(u32::MAX, |(_, code)| code)
}

/// `VACC_CAUSE_*`.
pub fn cause(cause: &Cause) -> u32 {
    match cause {
        Cause::Lost(_) => VACC_CAUSE_LOST,
        Cause::Injected(_) => VACC_CAUSE_INJECTED,
        Cause::Data(_) => VACC_CAUSE_DATA,
        Cause::Mismatch(_) => VACC_CAUSE_MISMATCH,
        Cause::Aborted(_) => VACC_CAUSE_ABORTED,
        _ => VACC_CAUSE_RUNTIME,
    }
}

/// The cause with this text; one that this version does not know keeps its number.
pub fn cause_of(code: u32, text: String, runtime_code: i64) -> Cause {
    match code {
        VACC_CAUSE_LOST => Cause::Lost(text.into()),
        VACC_CAUSE_INJECTED => Cause::Injected(text.into()),
        VACC_CAUSE_DATA => Cause::Data(text),
        VACC_CAUSE_MISMATCH => Cause::Mismatch(text),
        VACC_CAUSE_ABORTED => Cause::Aborted(text.into()),
        VACC_CAUSE_RUNTIME => Cause::Runtime { code: runtime_code, text },
        unknown => Cause::Runtime {
            code: runtime_code,
            text: format!("{text} (cause {unknown}, which is newer than this program)"),
        },
    }
}

/// An attribute of an op.
trait Attribute: Sized {
    type Wire;
    fn to_wire(&self) -> Self::Wire;
    fn from_wire(wire: Self::Wire) -> Result<Self, WireError>;
}

impl Attribute for u32 {
    type Wire = u32;
    fn to_wire(&self) -> u32 {
        *self
    }
    fn from_wire(wire: u32) -> Result<Self, WireError> {
        Ok(wire)
    }
}

impl Attribute for f32 {
    type Wire = f32;
    fn to_wire(&self) -> f32 {
        *self
    }
    fn from_wire(wire: f32) -> Result<Self, WireError> {
        Ok(wire)
    }
}

impl Attribute for bool {
    type Wire = u32;
    fn to_wire(&self) -> u32 {
        u32::from(*self)
    }
    fn from_wire(wire: u32) -> Result<Self, WireError> {
        match wire {
            0 => Ok(false),
            1 => Ok(true),
            other => Err(WireError::Invalid(format!("{other} is neither 0 nor 1"))),
        }
    }
}

impl Attribute for ScaleFormat {
    type Wire = u32;
    fn to_wire(&self) -> u32 {
        match self {
            ScaleFormat::Float => VACC_SCALE_FLOAT,
            ScaleFormat::PowerOfTwo => VACC_SCALE_POWER_OF_TWO,
        }
    }
    fn from_wire(wire: u32) -> Result<Self, WireError> {
        match wire {
            VACC_SCALE_FLOAT => Ok(ScaleFormat::Float),
            VACC_SCALE_POWER_OF_TWO => Ok(ScaleFormat::PowerOfTwo),
            other => Err(WireError::Unsupported(format!("scale format {other}"))),
        }
    }
}

impl Attribute for BlockGrid {
    type Wire = vacc_block_grid;
    fn to_wire(&self) -> vacc_block_grid {
        let BlockGrid { row_offset, column_offset, segments } = *self;
        vacc_block_grid { row_offset, column_offset, segments, reserved: 0 }
    }
    fn from_wire(wire: vacc_block_grid) -> Result<Self, WireError> {
        let vacc_block_grid { row_offset, column_offset, segments, .. } = wire;
        Ok(BlockGrid { row_offset, column_offset, segments })
    }
}

impl Attribute for Routing {
    type Wire = vacc_routing;
    fn to_wire(&self) -> vacc_routing {
        vacc_routing { rows: self.rows, active_experts: self.active_experts }
    }
    fn from_wire(wire: vacc_routing) -> Result<Self, WireError> {
        Ok(Routing { rows: wire.rows, active_experts: wire.active_experts })
    }
}

impl Attribute for AttentionWork {
    type Wire = vacc_attention_work;
    fn to_wire(&self) -> vacc_attention_work {
        vacc_attention_work { pairs: self.pairs, keys: self.keys }
    }
    fn from_wire(wire: vacc_attention_work) -> Result<Self, WireError> {
        Ok(AttentionWork { pairs: wire.pairs, keys: wire.keys })
    }
}

macro_rules! to_wire {
    (MaybeRead $operand:expr, $f:ident) => {
        $operand.as_ref().map_or_else(|| Ok(vacc_tensor::default()), &mut $f)?
    };
    (MaybeWrite $operand:expr, $f:ident) => { to_wire!(MaybeRead $operand, $f) };
    (MaybeUpdate $operand:expr, $f:ident) => { to_wire!(MaybeRead $operand, $f) };
    ($role:ident $operand:expr, $f:ident) => { $f(&$operand)? };
}

macro_rules! from_wire {
    (MaybeRead $operand:expr) => {
        optional(&$operand)?
    };
    (MaybeWrite $operand:expr) => {
        optional(&$operand)?
    };
    (MaybeUpdate $operand:expr) => {
        optional(&$operand)?
    };
    ($role:ident $operand:expr) => {
        WireTensor::try_from(&$operand)?
    };
}

macro_rules! descriptors {
    (@least $name:ident) => {
        size_of::<$name>()
    };
    (@least $name:ident $field:ident) => {
        std::mem::offset_of!($name, $field)
    };
    ($( $Op:ident = $code:ident, $name:ident $(grown from $field:ident)? {
        $($role:ident $operand:ident),+ ;
        $($attr:ident : $type:ty),*
    } )+) => {
        /// The code of a kind of op, or 0 for one that the ABI does not have.
        pub fn op_code(kind: OpKind) -> u32 {
            match kind {
                $( OpKind::$Op => $code, )+
                _ => 0,
            }
        }

        /// The kind of op with this code.
        pub fn op_kind(code: u32) -> Option<OpKind> {
            match code {
                $( $code => Some(OpKind::$Op), )+
                _ => None,
            }
        }

        /// Calls `launch` with the op's code and its descriptor, which lives on the stack: code 0
        /// and null for an op that the ABI does not have.
        ///
        /// # Errors
        ///
        /// The first error of `tensor`.
        #[inline]
        pub fn encode<T, R, E>(
            op: &Op<T>,
            mut tensor: impl FnMut(&T) -> Result<vacc_tensor, E>,
            launch: impl FnOnce(u32, *const c_void) -> R,
        ) -> Result<R, E> {
            match op {
                $( Op::$Op(op) => {
                    let descriptor = $name {
                        size: struct_size::<$name>(),
                        $( $operand: to_wire!($role op.$operand, tensor), )+
                        $( $attr: op.$attr.to_wire(), )*
                        ..$name::default()
                    };
                    Ok(launch($code, (&raw const descriptor).cast()))
                } )+
                _ => Ok(launch(0, std::ptr::null())),
            }
        }

        /// Reads the op behind a code and a descriptor.
        ///
        /// # Errors
        ///
        /// A code or value not known, a struct of the wrong size.
        ///
        /// # Safety
        ///
        /// As [`read_grown`], for the struct that belongs to the code.
        #[expect(unsafe_code, reason = "reads a caller's descriptor")]
        pub unsafe fn decode(code: u32, descriptor: *const c_void) -> Result<Op<WireTensor>, WireError> {
            match code {
                $( $code => {
                    // SAFETY: the caller vouches for the descriptor of this code.
                    let wire = unsafe {
                        read_grown::<$name>(descriptor.cast(), descriptors!(@least $name $($field)?))
                    }?;
                    Ok($Op {
                        $( $operand: from_wire!($role wire.$operand), )+
                        $( $attr: <$type>::from_wire(wire.$attr)?, )*
                    }.into())
                } )+
                other => Err(WireError::Unsupported(format!("op code {other} is not known here"))),
            }
        }
    };
}

descriptors! {
    GatherRows = VACC_OP_GATHER_ROWS, vacc_op_gather_rows {
        Read table, Read rows, Write out;
        first_row: u32, total_rows: u32
    }
    RmsNorm = VACC_OP_RMS_NORM, vacc_op_rms_norm {
        Read x, Read weight, MaybeUpdate residual, Write out;
        eps: f32
    }
    Quantize = VACC_OP_QUANTIZE, vacc_op_quantize grown from row_offsets {
        Read x, Write q, Write scales, MaybeRead row_offsets;
        column_offset: u32, scale_format: ScaleFormat, expected_rows: u32
    }
    RmsNormQuantize = VACC_OP_RMS_NORM_QUANTIZE, vacc_op_rms_norm_quantize {
        Read x, Read weight, MaybeUpdate residual, MaybeWrite out, Write q, Write scales;
        eps: f32, column_offset: u32, scale_format: ScaleFormat
    }
    Dequantize = VACC_OP_DEQUANTIZE, vacc_op_dequantize {
        Read w, Read w_scales, Write out;
        grid: BlockGrid
    }
    Linear = VACC_OP_LINEAR, vacc_op_linear {
        Read x, MaybeRead x_scales, Read w, MaybeRead w_scales, Write out;
        grid: BlockGrid
    }
    GroupedLinear = VACC_OP_GROUPED_LINEAR, vacc_op_grouped_linear {
        Read x, MaybeRead x_scales, Read w, MaybeRead w_scales, Read offsets, Write out;
        grid: BlockGrid, routing: Routing
    }
    BatchedLinear = VACC_OP_BATCHED_LINEAR, vacc_op_batched_linear {
        Read x, Read w, Write out;
        k_major: bool
    }
    Rope = VACC_OP_ROPE, vacc_op_rope {
        Update x, Read positions, Read table;

    }
    CacheWrite = VACC_OP_CACHE_WRITE, vacc_op_cache_write {
        Read latent, Read k_rope, Read slots, Update cache;

    }
    CacheRead = VACC_OP_CACHE_READ, vacc_op_cache_read {
        Read cache, Read block_table, Read kv_starts, Write out;

    }
    MlaPrefill = VACC_OP_MLA_PREFILL, vacc_op_mla_prefill {
        Read q, Read kv, Read k_rope, Read q_starts, Read kv_starts, Write out;
        scale: f32, work: AttentionWork
    }
    MlaDecode = VACC_OP_MLA_DECODE, vacc_op_mla_decode {
        Read q_latent, Read q_rope, Read cache, Read block_table, Read q_starts, Read kv_lens, Write out;
        scale: f32, work: AttentionWork
    }
    SwiGlu = VACC_OP_SWIGLU, vacc_op_swiglu grown from row_offsets {
        Read x, Write out, MaybeRead row_offsets;
        expected_rows: u32
    }
    SwiGluQuantize = VACC_OP_SWIGLU_QUANTIZE, vacc_op_swiglu_quantize {
        Read x, MaybeRead row_offsets, Write q, Write scales;
        column_offset: u32, scale_format: ScaleFormat, expected_rows: u32
    }
    Gate = VACC_OP_GATE, vacc_op_gate {
        Read logits, MaybeRead bias, Write experts, Write weights;
        groups: u32, groups_kept: u32, normalize: bool, scale: f32
    }
    MoeDispatch = VACC_OP_MOE_DISPATCH, vacc_op_moe_dispatch {
        Read x, MaybeRead x_scales, Read experts, Read weights, MaybeRead replicas, MaybeRead row_offsets,
        Write out, MaybeWrite out_scales, Write out_experts, Write out_weights, Write offsets, Write rows;
        experts_per_destination: u32, total_experts: u32, replica_offset: u32, expected_rows: u32
    }
    MoePermute = VACC_OP_MOE_PERMUTE, vacc_op_moe_permute grown from row_offsets {
        Read x, MaybeRead x_scales, Read experts, MaybeRead row_offsets,
        Write out, MaybeWrite out_scales, Write offsets, Write rows;
        first_expert: u32, total_experts: u32, expected_rows: u32
    }
    MoeCombine = VACC_OP_MOE_COMBINE, vacc_op_moe_combine grown from row_offsets {
        Read y, Read rows, MaybeRead weights, MaybeRead base, MaybeRead row_offsets, Write out;
        expected_rows: u32, expected_copies: u32
    }
    Add = VACC_OP_ADD, vacc_op_add {
        Read a, Read b, Write out;

    }
    Cast = VACC_OP_CAST, vacc_op_cast {
        Read x, Write out;

    }
    Copy = VACC_OP_COPY, vacc_op_copy {
        Read x, Write out;

    }
    ArgMax = VACC_OP_ARGMAX, vacc_op_argmax {
        Read x, Write out;
        limit: u32
    }
    TopK = VACC_OP_TOP_K, vacc_op_top_k {
        Read x, Write values, Write indices;
        limit: u32
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    #[test]
    fn every_op_and_command_has_a_code_of_its_own() {
        let codes: BTreeSet<u32> = OpKind::ALL.iter().map(|&kind| op_code(kind)).collect();
        assert_eq!(codes.len(), OpKind::ALL.len());
        assert!(!codes.contains(&0));
        for &kind in OpKind::ALL {
            assert_eq!(op_kind(op_code(kind)), Some(kind));
            assert_eq!(command_name(op_code(kind)), kind.name());
            assert_eq!(command_named(kind.name()), op_code(kind));
        }
        for code in [VACC_COLLECTIVE_RECV, VACC_COMMAND_TRANSFER, VACC_COMMAND_MEMORY] {
            assert_eq!(command_of(code).map(command), Some(code));
            assert_eq!(command_named(command_name(code)), code);
        }
        assert_eq!(command_name(9999), "unknown command");
    }

    #[test]
    #[expect(unsafe_code, reason = "reads back what it wrote")]
    fn an_op_survives_the_way_there_and_back() {
        let desc = |shape: &[usize]| TensorDesc::new(DType::Bf16, shape);
        let wide = desc(&[3, 40]).columns(8, 20).1;
        for residual in [None, Some(desc(&[3, 20]))] {
            let norm = RmsNorm { x: wide, weight: desc(&[20]), residual, out: wide, eps: 1e-6 };
            let op: Op<TensorDesc> = norm.into();
            let back = encode(
                &op,
                |t| Ok::<_, WireError>(tensor(t, std::ptr::null_mut(), 16)),
                // SAFETY: the descriptor is the one just written.
                |code, descriptor| unsafe { decode(code, descriptor) },
            );
            let back = back.unwrap().unwrap();
            assert_eq!(back.desc(), op);
            back.visit(|_, _, t| assert_eq!(t.offset, 16));
        }
    }
}

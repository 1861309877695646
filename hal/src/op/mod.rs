//! Ops: what a device computes, as data.
//!
//! Each op is a struct of operands and attributes, and [`Op`] is the enum of them. Both are generic
//! over the operand: devices take `Op<Tensor>`, graphs hold ops over their own value ids, shape
//! rules and cost models read `Op<TensorDesc>`. Adding an op means adding it to the list below; the
//! compiler then names every place that must learn it.
//!
//! Shapes are written `[rows, columns]` with T tokens, H hidden, h heads, E experts, k experts per
//! token. Unless an op says otherwise, outputs do not overlap inputs.
//!
//! # Numbers
//!
//! Products are accumulated in FP32 and rounded once, to nearest even, into the output's dtype.
//! Each output row depends on its own input rows alone and is computed in an order that does not
//! depend on how many rows there are, so batching never changes a result by a bit.

mod check;
mod exact;
mod work;

pub use check::check;
pub use work::{AttentionWork, Routing, Work, work};

use crate::{Operand, TensorDesc};
use serde::{Deserialize, Serialize};
use std::convert::Infallible;

/// Edge of an FP8 weight block, and length of an activation's quantisation group (DeepSeek-V3
/// report, section 3.3.2; `weight_block_size` in `config.json`).
pub const FP8_BLOCK: usize = 128;

/// How an op uses an operand.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Access {
    /// Reads it.
    Read,
    /// Overwrites it; the former contents do not matter.
    Write,
    /// Reads and writes it.
    Update,
}

impl Access {
    /// Whether the former contents matter.
    pub const fn reads(self) -> bool {
        matches!(self, Access::Read | Access::Update)
    }

    /// Whether the contents change.
    pub const fn writes(self) -> bool {
        matches!(self, Access::Write | Access::Update)
    }
}

/// Where a slice of a block-quantised weight sits in its grid of scales.
///
/// A rank of a tensor-parallel group may hold rows or columns that begin in the middle of a
/// 128-block (DeepSeek-V3 over 32 ranks: 64 expert columns each). It then keeps the scale of every
/// block that it touches, and says how far into the first block its slice begins.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct BlockGrid {
    /// Rows of the first block row that lie before the slice, 0..128.
    pub row_offset: u32,
    /// Columns of the first block column that lie before the slice, 0..128.
    pub column_offset: u32,
    /// The weight is this many equal stacks of rows, each with its own rows of scales that start
    /// at `row_offset` again: 2 for a gate and an up projection in one weight. 0 counts as 1.
    pub segments: u32,
}

impl BlockGrid {
    /// The number of stacks, at least 1.
    #[inline]
    pub const fn stacks(&self) -> usize {
        if self.segments == 0 { 1 } else { self.segments as usize }
    }

    /// Rows of scales for a weight of `rows` rows, all stacks together.
    #[inline]
    pub const fn scale_rows(&self, rows: usize) -> usize {
        let per_stack = rows / self.stacks() + self.row_offset as usize;
        self.stacks() * per_stack.div_ceil(FP8_BLOCK)
    }

    /// Columns of scales for a weight of `columns` columns. Activations that meet such a weight
    /// have as many groups.
    #[inline]
    pub const fn scale_columns(&self, columns: usize) -> usize {
        (columns + self.column_offset as usize).div_ceil(FP8_BLOCK)
    }

    /// The row of scales that weight row `row` of `rows` uses.
    #[inline]
    pub const fn scale_row(&self, row: usize, rows: usize) -> usize {
        if self.stacks() == 1 {
            return (row + self.row_offset as usize) / FP8_BLOCK;
        }
        let per_stack = rows / self.stacks();
        let scale_rows = self.scale_rows(rows) / self.stacks();
        (row / per_stack) * scale_rows + (row % per_stack + self.row_offset as usize) / FP8_BLOCK
    }

    /// The columns that share column `group` of the scales.
    #[inline]
    pub fn group_columns(&self, group: usize, columns: usize) -> std::ops::Range<usize> {
        let offset = self.column_offset as usize;
        (group * FP8_BLOCK).saturating_sub(offset)..((group + 1) * FP8_BLOCK - offset).min(columns)
    }
}

/// How activation scales are stored.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ScaleFormat {
    /// Any FP32 value: DeepSeek-V3.
    #[default]
    Float,
    /// Rounded up to a power of two (`scale_fmt: "ue8m0"`): DeepSeek-V3.1.
    PowerOfTwo,
}

/// An operand that is read.
pub type Read<T> = T;
/// An operand that is overwritten.
pub type Write<T> = T;
/// An operand that is read and written.
pub type Update<T> = T;
/// An operand that is read, where present.
pub type MaybeRead<T> = Option<T>;
/// An operand that is overwritten, where present.
pub type MaybeWrite<T> = Option<T>;
/// An operand that is read and written, where present.
pub type MaybeUpdate<T> = Option<T>;

macro_rules! visit_operand {
    (Read $e:expr, $name:expr, $f:ident) => {
        $f($name, Access::Read, &$e)
    };
    (Write $e:expr, $name:expr, $f:ident) => {
        $f($name, Access::Write, &$e)
    };
    (Update $e:expr, $name:expr, $f:ident) => {
        $f($name, Access::Update, &$e)
    };
    (MaybeRead $e:expr, $name:expr, $f:ident) => {
        if let Some(operand) = &$e {
            $f($name, Access::Read, operand)
        }
    };
    (MaybeUpdate $e:expr, $name:expr, $f:ident) => {
        if let Some(operand) = &$e {
            $f($name, Access::Update, operand)
        }
    };
    (MaybeWrite $e:expr, $name:expr, $f:ident) => {
        if let Some(operand) = &$e {
            $f($name, Access::Write, operand)
        }
    };
}

macro_rules! map_operand {
    (Read $e:expr, $f:ident) => {
        $f(&$e)?
    };
    (Write $e:expr, $f:ident) => {
        $f(&$e)?
    };
    (Update $e:expr, $f:ident) => {
        $f(&$e)?
    };
    (MaybeRead $e:expr, $f:ident) => {
        $e.as_ref().map(&mut *$f).transpose()?
    };
    (MaybeUpdate $e:expr, $f:ident) => {
        $e.as_ref().map(&mut *$f).transpose()?
    };
    (MaybeWrite $e:expr, $f:ident) => {
        $e.as_ref().map(&mut *$f).transpose()?
    };
}

macro_rules! ops {
    ($(
        $(#[$doc:meta])*
        $Op:ident = $name:literal {
            $( $(#[$operand_doc:meta])* $role:ident $operand:ident, )+
            $( ; $( $(#[$attr_doc:meta])* $attr:ident : $attr_type:ty, )+ )?
        }
    )+) => {
        $(
            $(#[$doc])*
            #[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
            pub struct $Op<T> {
                $( $(#[$operand_doc])* pub $operand: $role<T>, )+
                $($( $(#[$attr_doc])* pub $attr: $attr_type, )+)?
            }

            impl<T> $Op<T> {
                fn visit<'a>(&'a self, f: &mut impl FnMut(&'static str, Access, &'a T)) {
                    $( visit_operand!($role self.$operand, stringify!($operand), f); )+
                }

                fn try_map<U, E>(
                    &self,
                    f: &mut impl FnMut(&T) -> Result<U, E>,
                ) -> Result<$Op<U>, E> {
                    Ok($Op {
                        $( $operand: map_operand!($role self.$operand, f), )+
                        $($( $attr: self.$attr.clone(), )+)?
                    })
                }
            }

            impl<T> From<$Op<T>> for Op<T> {
                fn from(op: $Op<T>) -> Self {
                    Op::$Op(op)
                }
            }
        )+

        /// A computation on a device, over operands of type `T`. See the module for conventions.
        ///
        /// In files it is an object whose one key is the op's name.
        #[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
        #[non_exhaustive]
        pub enum Op<T = crate::Tensor> {
            $( $(#[$doc])* #[serde(rename = $name)] $Op($Op<T>), )+
        }

        /// The kind of an [`Op`].
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
        #[non_exhaustive]
        pub enum OpKind {
            $( $(#[$doc])* $Op, )+
        }

        impl OpKind {
            /// Every kind, in the order of declaration.
            pub const ALL: &'static [OpKind] = &[$( OpKind::$Op, )+];

            /// The name used in traces, files and messages.
            pub const fn name(self) -> &'static str {
                match self { $( OpKind::$Op => $name, )+ }
            }
        }

        impl<T> Op<T> {
            /// Its kind.
            pub const fn kind(&self) -> OpKind {
                match self { $( Op::$Op(_) => OpKind::$Op, )+ }
            }

            /// Calls `f` with the name, the access and the value of each operand present.
            #[inline]
            pub fn visit<'a>(&'a self, mut f: impl FnMut(&'static str, Access, &'a T)) {
                match self { $( Op::$Op(op) => op.visit(&mut f), )+ }
            }

            /// The same op over other operands, in the order of [`Op::visit`].
            ///
            /// # Errors
            ///
            /// The first error of `f`.
            #[inline]
            pub fn try_map<U, E>(
                &self,
                mut f: impl FnMut(&T) -> Result<U, E>,
            ) -> Result<Op<U>, E> {
                Ok(match self { $( Op::$Op(op) => Op::$Op(op.try_map(&mut f)?), )+ })
            }

            /// The same op over other operands, in the order of [`Op::visit`].
            #[inline]
            pub fn map<U>(&self, mut f: impl FnMut(&T) -> U) -> Op<U> {
                let Ok(op) = self.try_map(|operand| Ok::<_, Infallible>(f(operand)));
                op
            }
        }
    };
}

impl<T: Operand> Op<T> {
    /// The op without its memory: what shape rules, cost models and traces need.
    pub fn desc(&self) -> Op<TensorDesc> {
        self.map(|operand| *operand.desc())
    }
}

ops! {
    /// Row gather: `out[t] = table[rows[t] - first_row]`, zeros where that leaves the table.
    ///
    /// The token embedding, a rank's part of a vocabulary-parallel one, and the selection of the
    /// hidden states whose logits are needed.
    GatherRows = "gather_rows" {
        /// `[N, H]`, F32 or BF16.
        Read table,
        /// `[T]`, I32.
        Read rows,
        /// `[T, H]`, as `table`.
        Write out,
        ;
        /// Row number of `table[0]`.
        first_row: u32,
        /// Rows that exist in the whole table, of which this rank holds `N`. A row number outside
        /// is a data error.
        total_rows: u32,
    }

    /// `out = x · rsqrt(mean(x²) + eps) · weight` per row, in FP32; with `residual`, first
    /// `residual += x` (rounded to its dtype), then the norm of that sum.
    RmsNorm = "rms_norm" {
        /// `[T, H]`, F32 or BF16.
        Read x,
        /// `[H]`, as `x`.
        Read weight,
        /// `[T, H]`, as `x`.
        MaybeUpdate residual,
        /// `[T, H]`, as `x`.
        Write out,
        ;
        /// Added to the mean square.
        #[serde(with = "exact")]
        eps: f32,
    }

    /// Online quantisation of activations: per row and group of 128 columns,
    /// `scale = max(amax, 1e-4) / 448`, `q = e4m3(x / scale)` (DeepSeek-V3 report, section 3.3.2;
    /// `act_quant` of its reference kernels).
    Quantize = "quantize" {
        /// `[T, K]`, F32 or BF16.
        Read x,
        /// `[T, K]`, F8_E4M3.
        Write q,
        /// `[T, groups]`, F32.
        Write scales,
        /// `[n + 1]`, I32: rows from its last element on are left as they are. More than T is a
        /// data error.
        MaybeRead row_offsets,
        ;
        /// Columns of the first group that lie before `x`, so that groups line up with the blocks
        /// of a weight whose slice begins inside one.
        column_offset: u32,
        /// How scales are rounded.
        scale_format: ScaleFormat,
        /// Rows expected to count where `row_offsets` is present, for cost models; 0 for all.
        expected_rows: u32,
    }

    /// [`RmsNorm`], then [`Quantize`] of what it gives, bit for bit as the two would: the norm is
    /// rounded to the dtype of `x` before it is quantised. It saves the way to memory and back
    /// between them, which DeepSeek asks of hardware for (report, section 3.5.2, "online
    /// quantization") and kernels of vLLM (`rms_norm_per_block_quant`) save by the same fusion.
    RmsNormQuantize = "rms_norm_quantize" {
        /// `[T, H]`, F32 or BF16.
        Read x,
        /// `[H]`, as `x`.
        Read weight,
        /// `[T, H]`, as `x`: `residual += x` (rounded to its dtype) comes first, and the norm is
        /// that of the sum.
        MaybeUpdate residual,
        /// `[T, H]`, as `x`: the norm, where somebody needs it besides.
        MaybeWrite out,
        /// `[T, H]`, F8_E4M3.
        Write q,
        /// `[T, groups]`, F32.
        Write scales,
        ;
        /// Added to the mean square.
        #[serde(with = "exact")]
        eps: f32,
        /// As for [`Quantize`].
        column_offset: u32,
        /// How scales are rounded.
        scale_format: ScaleFormat,
    }

    /// Block dequantisation of a weight: `out = w · scale` in FP32, rounded once.
    Dequantize = "dequantize" {
        /// `[N, K]` or `[E, N, K]`, F8_E4M3.
        Read w,
        /// `[scale_rows, scale_columns]` of [`BlockGrid`], with E in front where `w` has it; F32.
        Read w_scales,
        /// As `w`, F32 or BF16.
        Write out,
        ;
        /// Where `w` sits in its scales.
        grid: BlockGrid,
    }

    /// `out = x · wᵀ`. With FP8 operands, `Σ_blocks (Σ_k x·w) · x_scale · w_scale`, the block sums
    /// scaled and added in FP32 (DeepGEMM's `fp8_gemm_nt`).
    Linear = "linear" {
        /// `[T, K]`: F32, BF16 or F8_E4M3.
        Read x,
        /// `[T, scale_columns]`, F32; present where `x` is FP8.
        MaybeRead x_scales,
        /// `[N, K]`, the dtype of `x`.
        Read w,
        /// `[scale_rows, scale_columns]`, F32; present where `w` is FP8.
        MaybeRead w_scales,
        /// `[T, N]`, F32 or BF16.
        Write out,
        ;
        /// Where an FP8 `w` sits in its scales.
        grid: BlockGrid,
    }

    /// [`Linear`] with one weight per expert: row `r` of `x` meets `w[e]` where
    /// `offsets[e] <= r < offsets[e + 1]` (DeepGEMM's grouped contiguous GEMM). Rows from
    /// `offsets[E]` on are left as they are.
    GroupedLinear = "grouped_linear" {
        /// `[R, K]`: F32, BF16 or F8_E4M3.
        Read x,
        /// `[R, scale_columns]`, F32; present where `x` is FP8.
        MaybeRead x_scales,
        /// `[E, N, K]`, the dtype of `x`.
        Read w,
        /// `[E, scale_rows, scale_columns]`, F32; present where `w` is FP8.
        MaybeRead w_scales,
        /// `[E + 1]`, I32, ascending from 0.
        Read offsets,
        /// `[R, N]`, F32 or BF16.
        Write out,
        ;
        /// Where each FP8 `w[e]` sits in its scales.
        grid: BlockGrid,
        /// How the rows came about: what a cost model may assume where no values exist.
        routing: Routing,
    }

    /// One small matrix per head: `out[t, h] = x[t, h] · w[h]ᵀ` for `w[h]` of shape `[N, K]`, or
    /// `x[t, h] · w[h]` for `[K, N]` with `k_major`. The two halves of MLA's absorbed form.
    BatchedLinear = "batched_linear" {
        /// `[T, h, K]`, F32 or BF16.
        Read x,
        /// `[h, N, K]`, or `[h, K, N]` with `k_major`; as `x`.
        Read w,
        /// `[T, h, N]`, as `x`.
        Write out,
        ;
        /// Whether `w[h]` is stored with K as its rows.
        k_major: bool,
    }

    /// Rotary embedding in place, interleaved layout: the pair `(x[2i], x[2i+1])` turns by the
    /// angle of frequency `i` at its token's position.
    Rope = "rope" {
        /// `[T, h, d]`, F32 or BF16.
        Update x,
        /// `[T]`, I32: rows of `table`.
        Read positions,
        /// `[max_position, d]`, F32: `d/2` cosines, then `d/2` sines.
        Read table,
    }

    /// Writes each token's latent and rotary key to its slot of the paged cache.
    CacheWrite = "cache_write" {
        /// `[T, r]`, F32 or BF16.
        Read latent,
        /// `[T, d]`, as `latent`.
        Read k_rope,
        /// `[T]`, I32: `page · page_size + offset`; a negative slot writes nothing.
        Read slots,
        /// `[pages, page_size, r + d]`, as `latent`.
        Update cache,
    }

    /// Gathers the cached rows of sequences, one after the other: what chunked prefill attends to.
    CacheRead = "cache_read" {
        /// `[pages, page_size, r + d]`, F32 or BF16.
        Read cache,
        /// `[B, max_pages]`, I32: the pages of each sequence in order.
        Read block_table,
        /// `[B + 1]`, I32: where each sequence begins in `out`.
        Read kv_starts,
        /// `[S, r + d]`, as `cache`.
        Write out,
    }

    /// MLA in expanded form, causal, over sequences of various lengths (FlashAttention's varlen
    /// prefill): scores `(q_nope·k_nope + q_rope·k_rope) · scale`, softmax in FP32. The queries of
    /// a sequence are its last tokens: query `i` of `q` sees the first `kv - q + i + 1` keys.
    MlaPrefill = "mla_prefill" {
        /// `[T, h, nope + d]`, F32 or BF16: nope first, rotary part last.
        Read q,
        /// `[S, h, nope + v]`, as `q`: keys first, values last.
        Read kv,
        /// `[S, d]`, as `q`: one rotary key for all heads.
        Read k_rope,
        /// `[B + 1]`, I32: where each sequence begins in `q`.
        Read q_starts,
        /// `[B + 1]`, I32: where each sequence begins in `kv`.
        Read kv_starts,
        /// `[T, h, v]`, as `q`.
        Write out,
        ;
        /// Softmax scale.
        #[serde(with = "exact")]
        scale: f32,
        /// How much there is to do.
        work: AttentionWork,
    }

    /// MLA in absorbed form over the paged latent cache (FlashMLA): multi-query attention with one
    /// key of `r + d` and the first `r` of it as value. Causal as [`MlaPrefill`].
    MlaDecode = "mla_decode" {
        /// `[T, h, r]`, F32 or BF16: queries times W_UK.
        Read q_latent,
        /// `[T, h, d]`, as `q_latent`.
        Read q_rope,
        /// `[pages, page_size, r + d]`, as `q_latent`.
        Read cache,
        /// `[B, max_pages]`, I32: the pages of each sequence in order.
        Read block_table,
        /// `[B + 1]`, I32: where each sequence begins in `q_latent`.
        Read q_starts,
        /// `[B]`, I32: keys of each sequence, its own new tokens included.
        Read kv_lens,
        /// `[T, h, r]`, as `q_latent`.
        Write out,
        ;
        /// Softmax scale; that of the expanded form, never from the latent width.
        #[serde(with = "exact")]
        scale: f32,
        /// How much there is to do.
        work: AttentionWork,
    }

    /// `out = silu(gate) · up` for `x = [gate | up]`.
    SwiGlu = "swiglu" {
        /// `[T, 2·I]`, F32 or BF16.
        Read x,
        /// `[T, I]`, as `x`.
        Write out,
        /// `[n + 1]`, I32: rows from its last element on are left as they are. More than T is a
        /// data error.
        MaybeRead row_offsets,
        ;
        /// Rows expected to count where `row_offsets` is present, for cost models; 0 for all.
        expected_rows: u32,
    }

    /// [`SwiGlu`], then [`Quantize`] of what it gives, bit for bit as the two would: the product is
    /// rounded to the dtype of `x` before it is quantised (SGLang's
    /// `silu_and_mul_masked_post_quant_fwd`, for DeepSeek-V3's experts).
    SwiGluQuantize = "swiglu_quantize" {
        /// `[T, 2·I]`, F32 or BF16: gate, then up.
        Read x,
        /// `[n + 1]`, I32: rows from its last element on are left as they are. More than T is a
        /// data error.
        MaybeRead row_offsets,
        /// `[T, I]`, F8_E4M3.
        Write q,
        /// `[T, groups]`, F32.
        Write scales,
        ;
        /// As for [`Quantize`].
        column_offset: u32,
        /// How scales are rounded.
        scale_format: ScaleFormat,
        /// Rows expected to count where `row_offsets` is present, for cost models; 0 for all.
        expected_rows: u32,
    }

    /// The router (DeepSeek-V3 report, section 2.1.2; `noaux_tc`): `s = sigmoid(logits)`; a
    /// group's score is the sum of its two largest `s + bias`; of the best `groups_kept` groups
    /// the `k` experts with the largest `s + bias` are chosen (others count as −∞; ties go to the
    /// lower index) and weighted by `s`, divided by their sum if `normalize`, times `scale`.
    /// Chosen experts come in descending order of `s + bias`.
    Gate = "gate" {
        /// `[T, E]`, F32.
        Read logits,
        /// `[E]`, F32: `e_score_correction_bias`.
        MaybeRead bias,
        /// `[T, k]`, I32.
        Write experts,
        /// `[T, k]`, F32.
        Write weights,
        ;
        /// Groups of `E / groups` neighbouring experts.
        groups: u32,
        /// Groups whose experts may be chosen.
        groups_kept: u32,
        /// Whether weights are divided by their sum (plus 1e-20).
        normalize: bool,
        /// `routed_scaling_factor`.
        #[serde(with = "exact")]
        scale: f32,
    }

    /// The sending half of expert parallelism: one row for each destination (a rank, or a node of
    /// ranks) that holds at least one of a token's experts, so that a token crosses each link once
    /// however many of its experts live behind it (DeepEP's dispatch layout; DeepSeek-V3 report,
    /// section 3.2). `offsets` are those of [`crate::Collective::AllToAllV`].
    ///
    /// Expert `e` lives on destination `e / experts_per_destination`. Rows come by destination,
    /// then by token. Rows of the outputs from `offsets[D]` on are left as they are. Two hops, to a
    /// node and then to a rank of it, are two of these.
    MoeDispatch = "moe_dispatch" {
        /// `[T, H]`: F32, BF16 or F8_E4M3.
        Read x,
        /// `[T, groups]`, F32: moves with `x`.
        MaybeRead x_scales,
        /// `[T, k]`, I32; negative: no expert.
        Read experts,
        /// `[T, k]`, F32.
        Read weights,
        /// `[total_experts, c]`, I32: the physical experts that stand for each logical one: those
        /// present first, then -1. Token `t` takes number `(t + replica_offset) mod n` of the `n`
        /// present. Absent: `experts` are physical already.
        MaybeRead replicas,
        /// `[n + 1]`, I32: only tokens before its last element are sent; `rows` of the others are
        /// -1. More than T is a data error.
        MaybeRead row_offsets,
        /// `[R, H]`, as `x`. More rows than R are a data error; `T * min(k, D)` always suffice.
        Write out,
        /// `[R, groups]`, F32.
        MaybeWrite out_scales,
        /// `[R, k]`, I32: each slot's expert, counted from the destination's first; -1 for a slot
        /// whose expert lives elsewhere.
        Write out_experts,
        /// `[R, k]`, F32: the token's weights, all of them.
        Write out_weights,
        /// `[D + 1]`, I32: where each destination's rows begin; the last is the number of rows.
        Write offsets,
        /// `[T, k]`, I32: the row for the first slot that goes to its destination; -1 for later
        /// slots of the token with the same one, and where there is no expert. [`MoeCombine`] with
        /// it, without weights, adds up what comes back.
        Write rows,
        ;
        /// Experts on each destination.
        experts_per_destination: u32,
        /// Experts in all, as `experts` numbers them. A number outside is a data error.
        total_experts: u32,
        /// Added to a token's number where a replica is chosen, so that ranks do not all choose
        /// the same.
        replica_offset: u32,
        /// Rows of `out` expected to be written, for cost models; 0 for all R.
        expected_rows: u32,
    }

    /// Sorts token copies by expert: for each expert in turn, the tokens that chose it, in order.
    /// Rows of `out` beyond the copies are left as they are.
    MoePermute = "moe_permute" {
        /// `[T, H]`: F32, BF16 or F8_E4M3.
        Read x,
        /// `[T, groups]`, F32: moves with `x`.
        MaybeRead x_scales,
        /// `[T, k]`, I32: global expert numbers; negative: no expert.
        Read experts,
        /// `[n + 1]`, I32: only tokens before its last element are copied; `rows` of the others are
        /// -1. More than T is a data error.
        MaybeRead row_offsets,
        /// `[R, H]`, as `x`; R is at least the number of copies kept, at most `T·k`.
        Write out,
        /// `[R, groups]`, F32.
        MaybeWrite out_scales,
        /// `[E + 1]`, I32: where each local expert's rows begin.
        Write offsets,
        /// `[T, k]`, I32: the row of each copy, −1 where its expert is not local.
        Write rows,
        ;
        /// The first local expert; E local experts follow from the length of `offsets`.
        first_expert: u32,
        /// Experts in all. A number beyond is a data error.
        total_experts: u32,
        /// Rows of `out` expected to be written, for cost models; 0 for all R.
        expected_rows: u32,
    }

    /// `out[t] = base[t] + Σ_j weights[t, j] · y[rows[t, j]]`, summed in FP32 in the order of `j`,
    /// the base last, and rounded once. Without weights each row counts once.
    MoeCombine = "moe_combine" {
        /// `[R, H]`, F32 or BF16.
        Read y,
        /// `[T, k]`, I32, from [`MoePermute`] or [`MoeDispatch`]; negative rows add nothing.
        Read rows,
        /// `[T, k]`, F32; absent: 1.
        MaybeRead weights,
        /// `[T, H]`, as `y`: the shared expert's output.
        MaybeRead base,
        /// `[n + 1]`, I32: output rows from its last element on are left as they are. More than T
        /// is a data error.
        MaybeRead row_offsets,
        /// `[T, H]`, as `y`.
        Write out,
        ;
        /// Output rows expected to count where `row_offsets` is present, for cost models; 0 for
        /// all.
        expected_rows: u32,
        /// Rows of `y` expected to be added in all, for cost models; 0 for k of each output row.
        expected_copies: u32,
    }

    /// `out = a + b`. `out` may be `a` or `b`.
    Add = "add" {
        /// F32 or BF16.
        Read a,
        /// As `a`.
        Read b,
        /// As `a`.
        Write out,
    }

    /// Converts between F32 and BF16, to nearest even.
    Cast = "cast" {
        /// F32 or BF16.
        Read x,
        /// F32 or BF16, the shape of `x`.
        Write out,
    }

    /// Copies a strided view to another of the same shape and dtype.
    Copy = "copy" {
        /// Any dtype.
        Read x,
        /// As `x`.
        Write out,
    }

    /// Per row, the number of the largest of the first `limit` values; ties go to the lower one.
    /// A NaN is a data error.
    ArgMax = "argmax" {
        /// `[T, V]`, F32 or BF16.
        Read x,
        /// `[T]`, I32.
        Write out,
        ;
        /// Columns that count: ids of a padded vocabulary lie beyond.
        limit: u32,
    }

    /// Per row, the `k` largest of the first `limit` values in descending order; ties go to the
    /// lower number. A NaN is a data error.
    TopK = "top_k" {
        /// `[T, V]`, F32 or BF16.
        Read x,
        /// `[T, k]`, F32.
        Write values,
        /// `[T, k]`, I32.
        Write indices,
        ;
        /// Columns that count.
        limit: u32,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn block_grid_of_a_slice_that_begins_inside_a_block() {
        // DeepSeek-V3 over 32 ranks, rank 1: rows 64..128 of an expert's gate and up.
        let grid = BlockGrid { row_offset: 64, column_offset: 0, segments: 2 };
        assert_eq!(grid.scale_rows(128), 2);
        assert_eq!((grid.scale_row(0, 128), grid.scale_row(63, 128)), (0, 0));
        assert_eq!((grid.scale_row(64, 128), grid.scale_row(127, 128)), (1, 1));
        // The dense layers: 576 columns a rank, 4.5 blocks; rank 1 begins at 4.5.
        let grid = BlockGrid { column_offset: 64, ..BlockGrid::default() };
        assert_eq!(grid.scale_columns(576), 5);
        assert_eq!(grid.group_columns(0, 576), 0..64);
        assert_eq!(grid.group_columns(4, 576), 448..576);
        let whole = BlockGrid::default();
        assert_eq!((whole.scale_rows(576), whole.group_columns(4, 576)), (5, 512..576));
    }

    #[test]
    fn every_operand_is_visited_once_and_mapped_in_place() {
        let op: Op<u8> = RmsNorm { x: 1, weight: 2, residual: Some(3), out: 4, eps: 1e-6 }.into();
        let mut seen = Vec::new();
        op.visit(|name, access, &value| seen.push((name, access, value)));
        assert_eq!(
            seen,
            [
                ("x", Access::Read, 1),
                ("weight", Access::Read, 2),
                ("residual", Access::Update, 3),
                ("out", Access::Write, 4)
            ]
        );
        let Op::RmsNorm(mapped) = op.map(|&v| v * 10) else { panic!("kind changed") };
        assert_eq!((mapped.x, mapped.residual, mapped.out), (10, Some(30), 40));
    }

    #[test]
    fn names_are_unique() {
        let mut names: Vec<_> = OpKind::ALL.iter().map(|k| k.name()).collect();
        names.sort_unstable();
        names.dedup();
        assert_eq!(names.len(), OpKind::ALL.len());
    }
}

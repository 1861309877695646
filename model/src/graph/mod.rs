//! The model as a graph: ops over values, with no mention of memory or streams.
//!
//! [`Graph`] is the data; `deepseek` writes the model down in it; `arena` gives its scratch values
//! places in one workspace.

mod arena;
mod builder;
mod deepseek;

pub use arena::{Arena, plan_arena};
pub use deepseek::{Form, StepShape, main_model, mtp_module};

use crate::weights::WeightKey;
use hal::op::Access;
use hal::{Op, Operand, TensorDesc};
use std::sync::Arc;

/// A value of a graph, by number.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ValueId(pub u32);

/// What a value is bound to when the graph runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Source {
    /// A weight.
    Weight(WeightKey),
    /// The scales of an FP8 weight.
    Scales(WeightKey),
    /// The KV cache of a layer: `[pages, page_size, latent + rope]`.
    Cache(usize),
    /// What the host sends for each step.
    Input(Input),
    /// What outlives the step.
    Output(Output),
    /// Nothing but this graph.
    Scratch,
}

/// What the host sends for each step. All I32.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Input {
    /// `[T]`: the new tokens.
    TokenIds,
    /// `[T]`: their positions.
    Positions,
    /// `[T]`: their places in the KV cache, `page · page_size + offset`.
    Slots,
    /// `[B + 1]`: where each sequence begins among the new tokens.
    QueryStarts,
    /// `[B + 1]`: where each sequence begins among all keys of the step.
    KeyStarts,
    /// `[B]`: keys of each sequence, the new tokens included.
    KeyCounts,
    /// `[B, max_pages]`: the pages of each sequence.
    BlockTable,
    /// `[L]`: the new tokens whose logits are wanted.
    LogitRows,
}

/// What outlives a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Output {
    /// `[T, H]`: hidden states after the final norm.
    Hidden,
    /// `[L, vocab]` F32: logits of the wanted tokens.
    Logits,
    /// `[L]` I32: the token with the largest logit.
    Greedy,
}

/// A value.
#[derive(Clone, Debug, PartialEq)]
pub struct Value {
    /// For dumps and messages.
    pub name: String,
    /// Shape and dtype of the whole.
    pub desc: TensorDesc,
    /// What it is bound to.
    pub source: Source,
}

/// A view of a value: the operand of a graph's op.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Slot {
    /// The value.
    pub value: ValueId,
    /// Bytes to the view's first element.
    pub offset: u64,
    desc: TensorDesc,
}

impl Operand for Slot {
    fn desc(&self) -> &TensorDesc {
        &self.desc
    }
}

impl Slot {
    /// See [`TensorDesc::columns`].
    #[must_use]
    pub fn columns(&self, start: usize, len: usize) -> Slot {
        let (offset, desc) = self.desc.columns(start, len);
        Slot { value: self.value, offset: self.offset + offset, desc }
    }

    /// See [`TensorDesc::narrowed`].
    #[must_use]
    pub fn narrowed(&self, axis: usize, start: usize, len: usize) -> Slot {
        let (offset, desc) = self.desc.narrowed(axis, start, len);
        Slot { value: self.value, offset: self.offset + offset, desc }
    }

    /// See [`TensorDesc::split_last`].
    #[must_use]
    pub fn split_last(&self, outer: usize, inner: usize) -> Slot {
        Slot { desc: self.desc.split_last(outer, inner), ..*self }
    }

    /// The same elements under another shape.
    ///
    /// # Panics
    ///
    /// If the view has gaps or the number of elements differs: a mistake in the graph.
    #[must_use]
    #[track_caller]
    pub fn reshaped(&self, shape: &[usize]) -> Slot {
        let desc = self.desc.reshaped(shape).expect("graphs reshape whole values only");
        Slot { desc, ..*self }
    }
}

/// An op of a graph.
#[derive(Clone, Debug)]
pub struct Node {
    /// What it computes.
    pub op: Op<Slot>,
    /// How traces and errors call it.
    pub label: Arc<str>,
}

/// Ops in an order in which they may run. A value is written before it is read, and where a later
/// op updates a value in place, all readers of the former contents come before it.
#[derive(Clone, Debug, Default)]
pub struct Graph {
    values: Vec<Value>,
    nodes: Vec<Node>,
}

impl Graph {
    /// The ops, in order.
    pub fn nodes(&self) -> &[Node] {
        &self.nodes
    }

    /// The values, by number.
    pub fn values(&self) -> &[Value] {
        &self.values
    }

    /// A value.
    pub fn value(&self, id: ValueId) -> &Value {
        &self.values[id.0 as usize]
    }

    /// Calls `f` with the number of each op and each of its operands.
    pub fn visit(&self, mut f: impl FnMut(usize, Access, &Slot)) {
        for (number, node) in self.nodes.iter().enumerate() {
            node.op.visit(|_, access, slot| f(number, access, slot));
        }
    }
}

//! The model as a graph: ops and collectives over values, with no mention of memory or streams.
//!
//! [`Graph`] is the data, one for each rank of a plan; `deepseek` writes the model down in it. Order,
//! streams and places in memory are the business of [`crate::schedule`].

mod builder;
mod deepseek;
mod moe;

pub use deepseek::{Form, ModelInputs, StepShape, main_model, mtp_module};

use crate::plan::Group;
use crate::weights::WeightKey;
use hal::op::Access;
use hal::{Collective, DType, Op, Operand, TensorDesc};
use std::sync::Arc;

/// A value of a graph, by number.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ValueId(pub u32);

/// A part of a step's tokens that goes through the model by itself; a step that is not split has
/// one, number 0.
pub type MicroBatch = usize;

/// What a value is bound to when the graph runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Source {
    /// A weight.
    Weight(WeightKey),
    /// The scales of an FP8 weight.
    Scales(WeightKey),
    /// The KV cache of a layer: `[pages, page_size, latent + rope]`.
    Cache(usize),
    /// What the host sends for each step and micro-batch.
    Input(MicroBatch, Input),
    /// What outlives the step.
    Output(MicroBatch, Output),
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
    /// `[L, V]` F32: logits of the wanted tokens, for this rank's part of the vocabulary.
    Logits,
    /// `[2, R, L]` I32: of each wanted token and each of the R ranks of the tensor group, the
    /// largest logit of that rank's part of the vocabulary (the bits of an F32), then which one.
    Candidates,
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
    /// A view of a value.
    pub fn new(value: ValueId, offset: u64, desc: TensorDesc) -> Self {
        Slot { value, offset, desc }
    }

    /// The same view of another value.
    #[must_use]
    pub fn of_value(&self, value: ValueId) -> Slot {
        Slot { value, ..*self }
    }

    /// The same bytes as elements of another type and shape.
    #[must_use]
    pub fn reinterpreted(&self, dtype: DType, shape: &[usize]) -> Slot {
        Slot { desc: TensorDesc::new(dtype, shape), ..*self }
    }

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

/// What a node does.
#[derive(Clone, Debug)]
#[expect(
    clippy::large_enum_variant,
    reason = "nearly all nodes are ops: a box would be an allocation each and save nothing"
)]
pub enum Work {
    /// Computes.
    Op(Op<Slot>),
    /// Communicates: one batch of collectives of this rank in a group.
    Collectives {
        /// With whom.
        group: Group,
        /// This rank's place in the group.
        rank: usize,
        /// What.
        batch: Vec<Collective<Slot>>,
    },
}

impl Work {
    /// Calls `f` with each operand and how it is used.
    pub fn visit<'a>(&'a self, mut f: impl FnMut(Access, &'a Slot)) {
        match self {
            Work::Op(op) => op.visit(|_, access, slot| f(access, slot)),
            Work::Collectives { batch, rank, .. } => {
                for collective in batch {
                    collective.visit(*rank, |_, access, slot| f(access, slot));
                }
            }
        }
    }

    /// The name of its kind, as traces have it.
    pub fn name(&self) -> &'static str {
        match self {
            Work::Op(op) => op.kind().name(),
            Work::Collectives { batch, .. } => batch.first().map_or("nothing", |c| c.kind().name()),
        }
    }
}

/// A step of a graph.
#[derive(Clone, Debug)]
pub struct Node {
    /// What it does.
    pub work: Work,
    /// How traces and errors call it.
    pub label: Arc<str>,
}

/// Nodes in an order in which they may run. A value is written before it is read, and where a later
/// node updates a value in place, all readers of the former contents come before it.
#[derive(Clone, Debug, Default)]
pub struct Graph {
    values: Vec<Value>,
    nodes: Vec<Node>,
}

impl Graph {
    /// A graph of these values and nodes.
    pub fn new(values: Vec<Value>, nodes: Vec<Node>) -> Self {
        Graph { values, nodes }
    }

    /// The nodes, in order.
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

    /// Its values and nodes.
    pub(crate) fn into_parts(self) -> (Vec<Value>, Vec<Node>) {
        (self.values, self.nodes)
    }

    /// A node, to put another one in its place.
    pub(crate) fn node_mut(&mut self, number: usize) -> &mut Node {
        &mut self.nodes[number]
    }

    /// Takes nodes out, by number.
    pub(crate) fn remove_nodes(&mut self, gone: &[bool]) {
        let mut gone = gone.iter();
        self.nodes.retain(|_| gone.next() == Some(&false));
    }

    /// Calls `f` with the number of each node and each of its operands.
    pub fn visit(&self, mut f: impl FnMut(usize, Access, &Slot)) {
        for (number, node) in self.nodes.iter().enumerate() {
            node.work.visit(|access, slot| f(number, access, slot));
        }
    }
}

//! Writing ops into a graph.

use super::{Graph, Input, MicroBatch, Node, Output, Slot, Source, Value, ValueId, Work};
use crate::numerics::Numerics;
use crate::plan::{Group, RankPlan};
use crate::weights::{Role, WeightKey, WeightPlan, WeightSpec};
use hal::op::{self, BlockGrid, Routing, ScaleFormat};
use hal::{Collective, DType, Op, Operand, Reduction, TensorDesc};
use std::collections::HashMap;
use std::fmt;

/// Activations as matrix products take them: plain, and quantised where the weight is FP8.
#[derive(Clone, Copy, Debug)]
pub(super) struct Activations {
    pub(super) plain: Slot,
    quantized: Option<(Slot, Slot)>,
}

impl Activations {
    /// Another arrangement of the same rows (permuted, say), already quantised or not.
    pub(super) fn of(plain: Slot, quantized: Option<(Slot, Slot)>) -> Self {
        Activations { plain, quantized }
    }

    /// T: tokens, or copies of them.
    pub(super) fn rows(&self) -> usize {
        self.plain.desc().dim(0)
    }

    /// The form with which a weight of this dtype is multiplied, and its scales.
    pub(super) fn operand(&self, weight: DType) -> (Slot, Option<Slot>) {
        match self.quantized {
            Some((q, scales)) if weight == DType::F8E4M3 => (q, Some(scales)),
            _ => (self.plain, None),
        }
    }
}

/// Rows of which only the device knows how many count.
#[derive(Clone, Copy, Debug)]
pub(super) struct Counted {
    /// Ascending I32; the last is the number of rows that count.
    pub(super) offsets: Slot,
    /// How many are expected.
    pub(super) expected: usize,
}

/// A graph in the making.
pub(super) struct Builder<'w> {
    values: Vec<Value>,
    nodes: Vec<Node>,
    weights: &'w WeightPlan,
    rank: &'w RankPlan,
    pub(super) numerics: Numerics,
    quantized: bool,
    scale_format: ScaleFormat,
    micro_batch: MicroBatch,
    bound: HashMap<Source, ValueId>,
    /// The label of the newest node; kept for its memory.
    label: String,
    /// Goes in front of every label: "layer 4 ".
    pub(super) scope: String,
}

impl<'w> Builder<'w> {
    pub(super) fn new(
        weights: &'w WeightPlan,
        rank: &'w RankPlan,
        numerics: Numerics,
        scale_format: ScaleFormat,
        micro_batch: MicroBatch,
    ) -> Self {
        // A little more than the layers of any plan need.
        let layers = rank.layers.len() + 1;
        Builder {
            values: Vec::with_capacity(80 * layers),
            nodes: Vec::with_capacity(40 * layers),
            weights,
            rank,
            numerics,
            quantized: weights.is_quantized(),
            scale_format,
            micro_batch,
            bound: HashMap::with_capacity(30 * layers),
            label: String::new(),
            scope: String::new(),
        }
    }

    pub(super) fn finish(self) -> Graph {
        Graph::new(self.values, self.nodes)
    }

    fn add(&mut self, name: &str, desc: TensorDesc, source: Source) -> Slot {
        let value = ValueId(self.values.len() as u32);
        self.values.push(Value { name: [&self.scope, name].concat(), desc, source });
        Slot { value, offset: 0, desc }
    }

    /// The value that is bound to a source; it gets its name when it is asked for first.
    fn bind(&mut self, name: impl fmt::Display, desc: TensorDesc, source: Source) -> Slot {
        if let Some(&value) = self.bound.get(&source) {
            return Slot { value, offset: 0, desc: self.values[value.0 as usize].desc };
        }
        let slot = self.add(&name.to_string(), desc, source);
        self.bound.insert(source, slot.value);
        slot
    }

    fn act(&self) -> DType {
        self.numerics.activations()
    }

    /// A fresh scratch value in the activation dtype.
    pub(super) fn scratch(&mut self, name: &str, shape: &[usize]) -> Slot {
        self.scratch_of(name, self.act(), shape)
    }

    pub(super) fn scratch_of(&mut self, name: &str, dtype: DType, shape: &[usize]) -> Slot {
        self.add(name, TensorDesc::new(dtype, shape), Source::Scratch)
    }

    pub(super) fn input(&mut self, input: Input, shape: &[usize]) -> Slot {
        self.bind(
            format_args!("{input:?}"),
            TensorDesc::new(DType::I32, shape),
            Source::Input(self.micro_batch, input),
        )
    }

    pub(super) fn output(&mut self, output: Output, dtype: DType, shape: &[usize]) -> Slot {
        self.bind(
            format_args!("{output:?}"),
            TensorDesc::new(dtype, shape),
            Source::Output(self.micro_batch, output),
        )
    }

    pub(super) fn cache(&mut self, layer: usize, shape: &[usize]) -> Slot {
        let desc = TensorDesc::new(self.act(), shape);
        self.bind(format_args!("cache {layer}"), desc, Source::Cache(layer))
    }

    pub(super) fn spec(&self, key: WeightKey) -> &'w WeightSpec {
        self.weights.get(key).unwrap_or_else(|| unreachable!("the plan has every weight: {key:?}"))
    }

    pub(super) fn weight(&mut self, layer: usize, role: Role) -> Slot {
        self.bind_weight(self.spec(WeightKey { layer, role }))
    }

    fn bind_weight(&mut self, spec: &WeightSpec) -> Slot {
        self.bind(format_args!("{:?}", spec.key.role), spec.desc, Source::Weight(spec.key))
    }

    fn weight_and_scales(&mut self, layer: usize, role: Role) -> (Slot, Option<Slot>, BlockGrid) {
        let spec = self.spec(WeightKey { layer, role });
        let w = self.bind_weight(spec);
        let scales = spec
            .scales
            .map(|desc| self.bind(format_args!("{role:?} scales"), desc, Source::Scales(spec.key)));
        (w, scales, spec.grid)
    }

    /// Appends an op.
    pub(super) fn push(&mut self, name: &str, op: impl Into<Op<Slot>>) {
        let op = op.into();
        debug_assert_eq!(op::check(&op.desc()), Ok(()), "{}{name}", self.scope);
        self.node(name, Work::Op(op));
    }

    fn node(&mut self, name: &str, work: Work) {
        self.label.clear();
        self.label.extend([&self.scope, name]);
        self.nodes.push(Node { work, label: self.label.as_str().into() });
    }

    /// Appends a batch of collectives, unless this rank has nobody to talk to.
    pub(super) fn collectives(&mut self, name: &str, group: Group, batch: Vec<Collective<Slot>>) {
        let Some((_, rank)) = self.rank.group(group) else { return };
        self.node(name, Work::Collectives { group, rank, batch });
    }

    /// Sums a value over the tensor group, in place.
    pub(super) fn all_reduce(&mut self, name: &str, value: Slot) {
        let sum = Collective::AllReduce { send: value, recv: value, reduction: Reduction::Sum };
        self.collectives(name, Group::Tensor, vec![sum]);
    }

    /// Sums a value over the tensor group; each rank keeps its part of the rows.
    pub(super) fn reduce_scatter(&mut self, name: &str, value: Slot) -> Slot {
        let (rows, columns) = (value.desc().dim(0), value.desc().dim(1));
        let rows = rows / self.rank.tensor.size;
        let recv = self.scratch_of(name, value.desc().dtype(), &[rows, columns]);
        let sum = Collective::ReduceScatter { send: value, recv, reduction: Reduction::Sum };
        self.collectives(name, Group::Tensor, vec![sum]);
        recv
    }

    /// All rows of values of which each rank of the tensor group has a part.
    pub(super) fn all_gather<const N: usize>(&mut self, name: &str, parts: [Slot; N]) -> [Slot; N] {
        let whole = parts.map(|part| {
            let rows = part.desc().dim(0) * self.rank.tensor.size;
            self.scratch_of(name, part.desc().dtype(), &[rows, part.desc().dim(1)])
        });
        let gather =
            |(send, recv): (&Slot, &Slot)| Collective::AllGather { send: *send, recv: *recv };
        let batch = parts.iter().zip(&whole).map(gather).collect();
        self.collectives(name, Group::Tensor, batch);
        whole
    }

    pub(super) fn norm(
        &mut self,
        name: &str,
        x: Slot,
        weight: Slot,
        residual: Option<Slot>,
        eps: f32,
    ) -> Slot {
        let out = self.scratch(name, &[x.desc().dim(0), x.desc().dim(1)]);
        self.norm_into(name, x, weight, residual, eps, out);
        out
    }

    pub(super) fn norm_into(
        &mut self,
        name: &str,
        x: Slot,
        weight: Slot,
        residual: Option<Slot>,
        eps: f32,
        out: Slot,
    ) {
        self.push(name, op::RmsNorm { x, weight, residual, out, eps });
    }

    /// Quantises activations where the policy has FP8 weights to meet them, in groups that line up
    /// with the blocks of this weight's columns.
    pub(super) fn activations(
        &mut self,
        name: &str,
        x: Slot,
        weight: (usize, Role),
    ) -> Activations {
        self.counted_activations(name, x, weight, None)
    }

    /// [`Builder::activations`] of rows of which only the device knows how many count.
    pub(super) fn counted_activations(
        &mut self,
        name: &str,
        x: Slot,
        (layer, role): (usize, Role),
        counted: Option<Counted>,
    ) -> Activations {
        if !self.quantized {
            return Activations { plain: x, quantized: None };
        }
        let grid = self.spec(WeightKey { layer, role }).grid;
        let (rows, columns) = (x.desc().dim(0), x.desc().dim(1));
        let name = format!("{name} quantise");
        let q = self.scratch_of(&name, DType::F8E4M3, &[rows, columns]);
        let scales = self.scratch_of(&name, DType::F32, &[rows, grid.scale_columns(columns)]);
        let (column_offset, scale_format) = (grid.column_offset, self.scale_format);
        let row_offsets = counted.map(|c| c.offsets);
        let expected_rows = counted.map_or(0, |c| c.expected as u32);
        self.push(
            &name,
            op::Quantize { x, row_offsets, q, scales, column_offset, scale_format, expected_rows },
        );
        Activations { plain: x, quantized: Some((q, scales)) }
    }

    /// The rows of all ranks of the tensor group, in the form in which weights meet them: FP8
    /// travels as FP8.
    pub(super) fn gather_activations(&mut self, name: &str, x: &Activations) -> Activations {
        match x.quantized {
            Some((q, scales)) => {
                let [q, scales] = self.all_gather(name, [q, scales]);
                Activations { plain: q, quantized: Some((q, scales)) }
            }
            None => {
                let [plain] = self.all_gather(name, [x.plain]);
                Activations { plain, quantized: None }
            }
        }
    }

    /// `silu(gate) · up` of gate and up side by side.
    pub(super) fn swiglu(&mut self, name: &str, both: Slot, counted: Option<Counted>) -> Slot {
        let name = format!("{name} swiglu");
        let out = self.scratch(&name, &[both.desc().dim(0), both.desc().dim(1) / 2]);
        let row_offsets = counted.map(|c| c.offsets);
        let expected_rows = counted.map_or(0, |c| c.expected as u32);
        self.push(&name, op::SwiGlu { x: both, row_offsets, out, expected_rows });
        out
    }

    /// Dtype in which a weight is held.
    pub(super) fn dtype(&self, layer: usize, role: Role) -> DType {
        self.spec(WeightKey { layer, role }).desc.dtype()
    }

    pub(super) fn linear(&mut self, name: &str, x: &Activations, layer: usize, role: Role) -> Slot {
        let rows = self.spec(WeightKey { layer, role }).desc.dim(0);
        let out = self.scratch(name, &[x.rows(), rows]);
        self.linear_into(name, x, layer, role, out);
        out
    }

    pub(super) fn linear_into(
        &mut self,
        name: &str,
        x: &Activations,
        layer: usize,
        role: Role,
        out: Slot,
    ) {
        let (w, w_scales, grid) = self.weight_and_scales(layer, role);
        let (x, x_scales) = x.operand(w.desc().dtype());
        self.push(name, op::Linear { x, x_scales, w, w_scales, out, grid });
    }

    pub(super) fn grouped_linear(
        &mut self,
        name: &str,
        x: &Activations,
        (layer, role): (usize, Role),
        offsets: Slot,
        routing: Routing,
    ) -> Slot {
        let (w, w_scales, grid) = self.weight_and_scales(layer, role);
        let out = self.scratch(name, &[x.plain.desc().dim(0), w.desc().dim(1)]);
        let (x, x_scales) = x.operand(w.desc().dtype());
        self.push(
            name,
            op::GroupedLinear { x, x_scales, w, w_scales, offsets, out, grid, routing },
        );
        out
    }
}

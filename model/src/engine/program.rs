//! A schedule bound to a rank's memory: commands that are ready to submit, again and again.

use super::rank::Rank;
use super::{EngineError, EngineOptions};
use crate::config::ModelConfig;
use crate::graph::{
    self, Form, Graph, Input, MicroBatch, ModelInputs, Output, Source, StepShape, ValueId, Work,
};
use crate::schedule::{self, COMPUTE, Event, Item, Schedule};
use hal::op::AttentionWork;
use hal::{
    Buffer, CommandList, DType, Device, Entry, Label, ListAction, ListPoints, Op, Operand, Region,
    Stream, Tensor, TensorDesc, WaitFor,
};
use std::collections::HashMap;
use std::sync::Arc;

/// What a program depends on.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) struct ProgramKey {
    pub(super) module: Module,
    /// The shape of each micro-batch.
    pub(super) shapes: Vec<StepShape>,
}

/// Which part of the model.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Module {
    Main,
    Mtp,
}

/// Commands of one step, bound to memory. Only the amount of attention work differs from one run to
/// the next; all else that changes is input.
#[derive(Debug)]
pub(super) struct Program {
    list: CommandList,
    /// Of a run that is issued command by command.
    points: ListPoints,
    /// Attention ops and the micro-batch of each.
    attention: Vec<(usize, MicroBatch)>,
    /// One buffer for everything that the host sends, so that a step starts with one transfer.
    inputs: Tensor,
    layout: Vec<(MicroBatch, Input, usize, usize)>,
    outputs: HashMap<(MicroBatch, Output), Tensor>,
    /// The workspace that the commands point into; another one means another program.
    workspace: Option<Buffer>,
}

/// Which fused ops a rank's device has.
pub(super) type Supports<'a> = &'a dyn Fn(&Op<TensorDesc>) -> bool;

/// A rank's graph of a step and its schedule. `None` where the MTP module is asked for and the
/// model has none.
pub(super) fn plan(
    inputs: ModelInputs<'_>,
    key: &ProgramKey,
    supports: Supports<'_>,
) -> Option<(Graph, Schedule)> {
    let mut graphs = Vec::with_capacity(key.shapes.len());
    for (micro_batch, &shape) in key.shapes.iter().enumerate() {
        let graph = match key.module {
            Module::Main => graph::main_model(inputs, shape, micro_batch),
            Module::Mtp => graph::mtp_module(inputs, shape)?,
        };
        // Before micro-batches are interleaved, pairs are neighbours still.
        graphs.push(schedule::fuse(graph, supports));
    }
    let graph = match <[Graph; 1]>::try_from(graphs) {
        Ok([graph]) => graph,
        Err(graphs) => schedule::interleave(graphs),
    };
    let schedule = Schedule::new(&graph);
    Some((graph, schedule))
}

impl Program {
    /// A new run of the commands, with this step's attention work per micro-batch.
    pub(super) fn begin(&mut self, work: &[AttentionWork]) {
        for &(at, micro_batch) in &self.attention {
            self.list.set_attention_work(at, work[micro_batch]);
        }
    }

    /// Launches all commands at once.
    pub(super) fn execute(
        &self,
        device: &dyn Device,
        lanes: &[Arc<dyn Stream>],
    ) -> hal::Result<()> {
        device.execute(&self.list, &lanes[..self.list.streams()])
    }

    /// Submits commands one by one from number `from` on, to the next collective or the end; where
    /// it stopped.
    pub(super) fn submit_from(
        &mut self,
        from: usize,
        lanes: &[Arc<dyn Stream>],
    ) -> hal::Result<Option<usize>> {
        for (at, entry) in self.list.entries().iter().enumerate().skip(from) {
            self.list.submit_entry(at, lanes, &mut self.points)?;
            if matches!(entry.action, ListAction::Collectives { .. }) {
                return Ok(Some(at + 1));
            }
        }
        Ok(None)
    }

    /// Sends the inputs, in the order that the graph asks for.
    pub(super) fn send(
        &mut self,
        stream: &dyn Stream,
        values: impl Fn(MicroBatch, Input) -> Vec<i32>,
    ) -> hal::Result<()> {
        let mut packed = vec![0i32; self.inputs.desc().elements()];
        for &(micro_batch, input, start, len) in &self.layout {
            let values = values(micro_batch, input);
            debug_assert_eq!(values.len(), len, "{input:?}");
            packed[start..start + len].copy_from_slice(&values);
        }
        stream.write(&self.inputs.region(), bytemuck::cast_slice(&packed))
    }

    /// Where an output lies.
    pub(super) fn output(&self, micro_batch: MicroBatch, output: Output) -> Option<&Tensor> {
        self.outputs.get(&(micro_batch, output))
    }
}

/// Binds values to memory.
struct Binder<'a> {
    rank: &'a Rank,
    schedule: &'a Schedule,
    inputs: &'a Tensor,
    layout: &'a [(MicroBatch, Input, usize, usize)],
    outputs: &'a HashMap<(MicroBatch, Output), Tensor>,
}

impl Binder<'_> {
    /// The memory of a value and where it begins there.
    fn place(&self, graph: &Graph, id: ValueId) -> Option<(Buffer, u64)> {
        let whole = |t: &Tensor| (t.buffer().clone(), t.offset());
        match graph.value(id).source {
            Source::Weight(key) => self.rank.weights.get(key).map(whole),
            Source::Scales(key) => self.rank.weights.scales(key).map(whole),
            Source::Cache(layer) => self.rank.cache.get(&layer).map(whole),
            Source::Output(batch, output) => self.outputs.get(&(batch, output)).map(whole),
            Source::Input(batch, input) => {
                let mut layout = self.layout.iter();
                let (.., start, _) = layout.find(|(b, i, ..)| (*b, *i) == (batch, input))?;
                Some((self.inputs.buffer().clone(), *start as u64 * 4))
            }
            Source::Scratch => {
                let offset = *self.schedule.arena.offsets.get(&id)?;
                Some((self.rank.workspace.clone()?, offset))
            }
        }
    }
}

impl Rank {
    /// The program for a step, from the ones made before or made now. `hidden` is where the MTP
    /// module finds the main model's hidden states.
    pub(super) fn program(
        &mut self,
        config: &ModelConfig,
        options: &EngineOptions,
        key: &ProgramKey,
        hidden: Option<&Tensor>,
    ) -> Result<Program, EngineError> {
        if hidden.is_none()
            && let Some(program) = self.programs.remove(key)
        {
            return Ok(program);
        }
        let numerics = options.numerics;
        let inputs = ModelInputs { config, numerics, rank: &self.plan, weights: &self.weight_plan };
        let supports =
            |op: &Op<TensorDesc>| options.fuse && self.device.supports(op).is_supported();
        let (graph, schedule) = plan(inputs, key, &supports).ok_or(EngineError::NoMtp)?;
        self.reserve_workspace(schedule.arena.size)?;
        self.open_lanes(schedule.lanes)?;
        let mut layout = Vec::new();
        let mut length = 0;
        let mut outputs = HashMap::new();
        let main = self.lane(COMPUTE);
        for value in graph.values() {
            match (value.source, hidden) {
                (Source::Input(batch, input), _) => {
                    layout.push((batch, input, length, value.desc.elements()));
                    length += value.desc.elements();
                }
                (Source::Output(batch, Output::Hidden), Some(hidden)) => {
                    outputs.insert((batch, Output::Hidden), hidden.clone());
                }
                (Source::Output(batch, output), _) => {
                    let buffer = main.alloc(value.desc.bytes())?;
                    outputs.insert((batch, output), Tensor::new(buffer, 0, value.desc));
                }
                _ => {}
            }
        }
        let desc = TensorDesc::new(DType::I32, &[length.max(1)]);
        let inputs = Tensor::new(main.alloc(desc.bytes())?, 0, desc);
        let binder = Binder {
            rank: self,
            schedule: &schedule,
            inputs: &inputs,
            layout: &layout,
            outputs: &outputs,
        };
        let places: Vec<_> =
            (0..graph.values().len()).map(|id| binder.place(&graph, ValueId(id as u32))).collect();
        let (entries, attention) = bind(&graph, &schedule, &places, self);
        let list = CommandList::new(entries, schedule.lanes)
            .unwrap_or_else(|error| unreachable!("schedules wait for what comes before: {error}"));
        let (points, workspace) = (ListPoints::default(), self.workspace.clone());
        Ok(Program { list, points, attention, inputs, layout, outputs, workspace })
    }

    /// Keeps a program for the next step of its shape. Prefill shapes hardly recur and are not
    /// kept, nor are programs that a larger workspace has outdated.
    pub(super) fn keep(&mut self, key: ProgramKey, program: Program) {
        let same = |a: &Option<Buffer>, b: &Option<Buffer>| {
            a.as_ref().map(Buffer::id) == b.as_ref().map(Buffer::id)
        };
        let decode = key.shapes.iter().all(|shape| shape.form == Form::Absorbed);
        if decode && same(&program.workspace, &self.workspace) {
            self.programs.insert(key, program);
        }
    }
}

/// Where a value lies: its memory, and where it begins there.
type Place = Option<(Buffer, u64)>;

/// The commands of a schedule, and which of them are attention.
fn bind(
    graph: &Graph,
    schedule: &Schedule,
    places: &[Place],
    rank: &Rank,
) -> (Vec<Entry>, Vec<(usize, MicroBatch)>) {
    let tensor = |slot: &graph::Slot| {
        let (buffer, start) = places[slot.value.0 as usize]
            .clone()
            .unwrap_or_else(|| unreachable!("every value that a node names has a place"));
        Tensor::new(buffer, start + slot.offset, *slot.desc())
    };
    let mut entries = Vec::with_capacity(schedule.items.len());
    let mut attention = Vec::new();
    // Where each node's command stands.
    let mut issued: HashMap<usize, usize> = HashMap::new();
    for item in &schedule.items {
        let (stream, action) = match *item {
            Item::Wait { lane, event } => {
                let target = match event {
                    Event::Start => WaitFor::Start,
                    Event::Node(number) => WaitFor::Entry(issued[&number]),
                };
                (lane, ListAction::Wait(target))
            }
            Item::Run { lane, node: number } => {
                issued.insert(number, entries.len());
                let node = &graph.nodes()[number];
                let label = Label::Shared(node.label.clone());
                let action = match &node.work {
                    Work::Op(op) => {
                        if let Some(batch) = attention_batch(graph, op) {
                            attention.push((entries.len(), batch));
                        }
                        ListAction::Op(Box::new(op.map(tensor).label(label)))
                    }
                    Work::Collectives { group, batch, .. } => {
                        let communicator = rank.communicators.get(group).cloned();
                        let communicator = communicator.unwrap_or_else(|| {
                            unreachable!("groups that a graph names are connected")
                        });
                        let batch = batch.iter().map(|c| c.map(tensor)).collect();
                        ListAction::Collectives { communicator, batch, label }
                    }
                };
                (lane, action)
            }
        };
        entries.push(Entry { stream, action });
    }
    (entries, attention)
}

/// The micro-batch of an attention op, told by its inputs; `None` for other ops.
fn attention_batch(graph: &Graph, op: &Op<graph::Slot>) -> Option<MicroBatch> {
    let starts = match op {
        Op::MlaPrefill(op) => op.q_starts,
        Op::MlaDecode(op) => op.q_starts,
        _ => return None,
    };
    match graph.value(starts.value).source {
        Source::Input(batch, _) => Some(batch),
        _ => Some(0),
    }
}

/// The bytes of a tensor, as the host reads them.
pub(super) fn read_tensor(
    stream: &dyn Stream,
    tensor: &Tensor,
    timeout: std::time::Duration,
) -> hal::Result<Vec<u8>> {
    let region: Region = tensor.region();
    let mut bytes = vec![0; region.len as usize];
    stream.read(&region, &mut bytes, timeout)?;
    Ok(bytes)
}

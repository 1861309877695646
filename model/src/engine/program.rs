//! A graph bound to memory: commands that are ready to submit, again and again.

use super::{Engine, EngineError, EngineOptions, PagedCache};
use crate::config::ModelConfig;
use crate::graph::{self, Arena, Form, Graph, Input, Output, Source, StepShape};
use crate::numerics::Numerics;
use crate::weights::{WeightKey, WeightSpec, Weights};
use hal::op::AttentionWork;
use hal::{Buffer, Command, DType, Op, Operand, Region, Stream, Tensor, TensorDesc};
use std::collections::HashMap;

/// What a program depends on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct ProgramKey {
    pub(super) module: Module,
    pub(super) shape: StepShape,
}

/// Which part of the model.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Module {
    Main,
    Mtp,
}

/// Commands of one step shape, bound to memory. Only the amount of attention work differs from one
/// run to the next; all else that changes is input.
#[derive(Debug)]
pub(super) struct Program {
    commands: Vec<Command>,
    attention: Vec<usize>,
    /// One buffer for everything that the host sends, so that a step starts with one transfer.
    inputs: Tensor,
    layout: Vec<(Input, usize, usize)>,
    outputs: HashMap<Output, Tensor>,
    /// The workspace that the commands point into; another one means another program.
    pub(super) workspace: Option<Buffer>,
}

fn build(
    config: &ModelConfig,
    numerics: Numerics,
    specs: &HashMap<WeightKey, WeightSpec>,
    key: ProgramKey,
) -> Option<Graph> {
    match key.module {
        Module::Main => Some(graph::main_model(config, numerics, specs, key.shape)),
        Module::Mtp => graph::mtp_module(config, numerics, specs, key.shape),
    }
}

/// Bytes of workspace and outputs of the largest prefill step: a full chunk at the end of the
/// longest context.
pub(super) fn largest_workspace(
    config: &ModelConfig,
    specs: &HashMap<WeightKey, WeightSpec>,
    options: EngineOptions,
) -> u64 {
    let tokens = options.prefill_chunk.min(options.max_model_len);
    let shape = StepShape {
        tokens,
        sequences: 1,
        logit_rows: 1,
        form: Form::Expanded { keys: options.max_model_len },
        pages: super::cache::pages(options),
        page_size: options.page_size,
        max_pages: options.max_model_len.div_ceil(options.page_size),
        vocabulary: config.vocab_size,
    };
    let graph = graph::main_model(config, options.numerics, specs, shape);
    let outputs = graph.values().iter().filter(|v| matches!(v.source, Source::Output(_)));
    graph::plan_arena(&graph).size + outputs.map(|v| v.desc.bytes()).sum::<u64>()
}

impl Program {
    /// The commands, with this step's attention work.
    pub(super) fn submit(&mut self, stream: &dyn Stream, work: AttentionWork) -> hal::Result<()> {
        for &at in &self.attention {
            match &mut self.commands[at].op {
                Op::MlaPrefill(o) => o.work = work,
                Op::MlaDecode(o) => o.work = work,
                _ => {}
            }
        }
        self.commands.iter().try_for_each(|command| stream.submit(command))
    }

    /// Sends the inputs, in the order that the graph asks for.
    pub(super) fn send(
        &self,
        stream: &dyn Stream,
        values: impl Fn(Input) -> Vec<i32>,
    ) -> hal::Result<()> {
        let mut packed = vec![0i32; self.inputs.desc().elements()];
        for &(input, start, len) in &self.layout {
            let values = values(input);
            debug_assert_eq!(values.len(), len, "{input:?}");
            packed[start..start + len].copy_from_slice(&values);
        }
        stream.write(&self.inputs.region(), bytemuck::cast_slice(&packed))
    }

    /// Where an output lies.
    pub(super) fn output(&self, output: Output) -> Option<&Tensor> {
        self.outputs.get(&output)
    }
}

/// Binds values to memory.
struct Binder<'a> {
    weights: &'a Weights,
    cache: &'a PagedCache,
    workspace: Option<&'a Buffer>,
    arena: &'a Arena,
    inputs: &'a Tensor,
    layout: &'a [(Input, usize, usize)],
    outputs: &'a HashMap<Output, Tensor>,
}

impl Binder<'_> {
    /// The memory of a value and where it begins there.
    fn place(&self, graph: &Graph, id: graph::ValueId) -> Option<(Buffer, u64)> {
        let whole = |t: &Tensor| (t.buffer().clone(), t.offset());
        match graph.value(id).source {
            Source::Weight(key) => self.weights.get(key).map(whole),
            Source::Scales(key) => self.weights.scales(key).map(whole),
            Source::Cache(layer) => Some(whole(self.cache.layer(layer))),
            Source::Output(output) => self.outputs.get(&output).map(whole),
            Source::Input(input) => {
                let (_, start, _) = self.layout.iter().find(|(i, ..)| *i == input)?;
                Some((self.inputs.buffer().clone(), *start as u64 * 4))
            }
            Source::Scratch => Some((self.workspace?.clone(), *self.arena.offsets.get(&id)?)),
        }
    }
}

impl Engine {
    /// The program for a step, from the ones made before or made now. `hidden` is where the MTP
    /// module finds the main model's hidden states.
    pub(super) fn program(
        &mut self,
        key: ProgramKey,
        hidden: Option<&Tensor>,
    ) -> Result<Program, EngineError> {
        if hidden.is_none()
            && let Some(program) = self.programs.remove(&key)
        {
            return Ok(program);
        }
        let graph = build(&self.config, self.options.numerics, &self.specs, key)
            .ok_or(EngineError::NoMtp)?;
        let arena = graph::plan_arena(&graph);
        self.reserve_workspace(arena.size)?;
        let mut layout = Vec::new();
        let mut length = 0;
        let mut outputs = HashMap::new();
        for value in graph.values() {
            match (value.source, hidden) {
                (Source::Input(input), _) => {
                    layout.push((input, length, value.desc.elements()));
                    length += value.desc.elements();
                }
                (Source::Output(Output::Hidden), Some(hidden)) => {
                    outputs.insert(Output::Hidden, hidden.clone());
                }
                (Source::Output(output), _) => {
                    let buffer = self.stream.alloc(value.desc.bytes())?;
                    outputs.insert(output, Tensor::new(buffer, 0, value.desc));
                }
                _ => {}
            }
        }
        let desc = TensorDesc::new(DType::I32, &[length.max(1)]);
        let inputs = Tensor::new(self.stream.alloc(desc.bytes())?, 0, desc);
        let binder = Binder {
            weights: &self.weights,
            cache: &self.cache,
            workspace: self.workspace.as_ref(),
            arena: &arena,
            inputs: &inputs,
            layout: &layout,
            outputs: &outputs,
        };
        let places: Vec<_> = (0..graph.values().len())
            .map(|id| binder.place(&graph, graph::ValueId(id as u32)))
            .collect();
        let mut attention = Vec::new();
        let mut commands = Vec::with_capacity(graph.nodes().len());
        for (at, node) in graph.nodes().iter().enumerate() {
            let op = node.op.map(|slot| {
                let (buffer, start) = places[slot.value.0 as usize]
                    .clone()
                    .unwrap_or_else(|| unreachable!("every value that an op names has a place"));
                Tensor::new(buffer, start + slot.offset, *slot.desc())
            });
            if matches!(op, Op::MlaPrefill(_) | Op::MlaDecode(_)) {
                attention.push(at);
            }
            commands.push(op.label(node.label.clone()));
        }
        let workspace = self.workspace.clone();
        Ok(Program { commands, attention, inputs, layout, outputs, workspace })
    }

    /// Keeps a program for the next step of its shape. Prefill shapes hardly recur and are not
    /// kept, nor are programs that a larger workspace has outdated.
    pub(super) fn keep(&mut self, key: ProgramKey, program: Program) {
        let same = |a: &Option<Buffer>, b: &Option<Buffer>| {
            a.as_ref().map(Buffer::id) == b.as_ref().map(Buffer::id)
        };
        if key.shape.form == Form::Absorbed && same(&program.workspace, &self.workspace) {
            self.programs.insert(key, program);
        }
    }

    /// Grows the workspace if it is too small. Memory of the former one is freed in stream order.
    fn reserve_workspace(&mut self, bytes: u64) -> Result<(), EngineError> {
        if self.workspace.as_ref().is_some_and(|w| w.size() >= bytes) {
            return Ok(());
        }
        self.programs.clear();
        self.workspace = None;
        self.workspace = Some(self.stream.alloc(bytes.max(1))?);
        Ok(())
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

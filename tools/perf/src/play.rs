//! A step's commands on the simulator's timeline.

use crate::batch::Module;
use crate::fold::Folded;
use crate::routing::Loads;
use crate::trace::Watch;
use hal::op::{AttentionWork, Routing};
use hal::trace::Bound;
use hal::{CollectiveKind, DeviceId, Op, Operand, TensorDesc, Topology};
use model::config::ModelConfig;
use model::engine::EngineOptions;
use model::graph::{Graph, ModelInputs, Source, StepShape, ValueId, Work, main_model, mtp_module};
use model::plan::{Group, RankPlan};
use model::schedule::{COMPUTE, Event as WaitFor, Item, Lane, Schedule, fuse, interleave};
use model::weights::{self, PlanOptions};
use sim::cost::{Cost, CostModel, Exchanged, Path, TileModel};
use sim::timeline::{Step, StreamIndex, Timeline};
use std::collections::HashMap;

/// A rank's commands.
#[derive(Debug)]
pub(crate) struct Program {
    pub(crate) rank: RankPlan,
    pub(crate) graph: Graph,
    schedule: Schedule,
    work: Vec<AttentionWork>,
    /// Bytes that the host sends before it launches.
    input_bytes: u64,
}

/// A node's run.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Run {
    /// Its number in the graph.
    pub(crate) node: usize,
    pub(crate) lane: Lane,
    /// Picoseconds from the step's beginning.
    pub(crate) start: u64,
    pub(crate) end: u64,
    pub(crate) operations: u64,
    pub(crate) bytes: u64,
    pub(crate) bound: Bound,
}

/// A step that was played.
#[derive(Debug)]
pub(crate) struct Played {
    /// Of each program, its nodes in the order of issue.
    pub(crate) runs: Vec<Vec<Run>>,
    /// When the last command of all ended.
    pub(crate) end: u64,
}

/// What costs come from.
#[derive(Clone, Copy)]
pub(crate) struct Costs<'a> {
    pub(crate) config: &'a ModelConfig,
    pub(crate) model: &'a TileModel,
    pub(crate) topology: &'a Topology,
    pub(crate) loads: &'a Loads,
    pub(crate) eager: bool,
}

impl Program {
    /// The program of a rank, or of one with fewer layers.
    pub(crate) fn new(
        config: &ModelConfig,
        options: &EngineOptions,
        rank: RankPlan,
        module: Module,
        micro_batches: &[(StepShape, AttentionWork)],
    ) -> Option<Program> {
        let planned = PlanOptions {
            numerics: options.numerics,
            mtp: module == Module::Mtp,
            positions: options.max_model_len,
        };
        let weights = weights::plan(config, &rank, planned);
        let inputs =
            ModelInputs { config, numerics: options.numerics, rank: &rank, weights: &weights };
        let mut graphs = Vec::with_capacity(micro_batches.len());
        for (number, &(shape, _)) in micro_batches.iter().enumerate() {
            let graph = match module {
                Module::Main => main_model(inputs, shape, number),
                Module::Mtp => mtp_module(inputs, shape)?,
            };
            // The simulated device has every fused op.
            graphs.push(fuse(graph, &|_| options.fuse));
        }
        let graph = match <[Graph; 1]>::try_from(graphs) {
            Ok([graph]) => graph,
            Err(graphs) => interleave(graphs),
        };
        let schedule = Schedule::new(&graph);
        let inputs = graph.values().iter().filter(|v| matches!(v.source, Source::Input(..)));
        let elements: usize = inputs.map(|v| v.desc.elements()).sum();
        let work = micro_batches.iter().map(|&(_, work)| work).collect();
        Some(Program { rank, graph, schedule, work, input_bytes: 4 * elements.max(1) as u64 })
    }

    /// An op as the device gets it: with this step's attention work, and the routing expected here.
    pub(crate) fn op(&self, op: &Op<model::graph::Slot>, costs: &Costs<'_>) -> Op<TensorDesc> {
        let mut desc = op.desc();
        let of = |value: ValueId| match self.graph.value(value).source {
            Source::Input(batch, _) => self.work.get(batch).copied().unwrap_or_default(),
            _ => self.work.first().copied().unwrap_or_default(),
        };
        match (&mut desc, op) {
            (Op::MlaPrefill(o), Op::MlaPrefill(from)) => o.work = of(from.q_starts.value),
            (Op::MlaDecode(o), Op::MlaDecode(from)) => o.work = of(from.q_starts.value),
            _ => {}
        }
        if !costs.loads.is_balanced() {
            self.skew(&mut desc, costs);
        }
        desc
    }

    /// Rows that come to a rank's experts, in proportion to its load.
    fn skew(&self, op: &mut Op<TensorDesc>, costs: &Costs<'_>) {
        let rank = self.rank.expert.rank;
        let factor = costs.loads.factor(rank);
        let scale = |rows: &mut u32| *rows = (f64::from(*rows) * factor).ceil() as u32;
        match op {
            Op::GroupedLinear(o) => {
                let k = costs.config.num_experts_per_tok;
                // All tokens of all ranks that share the experts.
                let ranks = self.rank.expert.size as f64;
                let tokens = (f64::from(o.routing.rows) * ranks / k as f64).round() as usize;
                let active_experts = costs.loads.active(rank, tokens, k);
                let mut rows = o.routing.rows;
                scale(&mut rows);
                o.routing = Routing { rows, active_experts };
            }
            Op::Quantize(o) if o.row_offsets.is_some() => scale(&mut o.expected_rows),
            Op::SwiGlu(o) if o.row_offsets.is_some() => scale(&mut o.expected_rows),
            Op::SwiGluQuantize(o) if o.row_offsets.is_some() => scale(&mut o.expected_rows),
            Op::MoePermute(o) if o.row_offsets.is_some() => scale(&mut o.expected_rows),
            Op::MoeDispatch(o) if o.row_offsets.is_some() => scale(&mut o.expected_rows),
            Op::MoeCombine(o) if o.row_offsets.is_some() => {
                scale(&mut o.expected_rows);
                scale(&mut o.expected_copies);
            }
            _ => {}
        }
    }

    /// The layer that a node belongs to; [`None`] for the embedding, the head and MTP.
    pub(crate) fn layer(&self, node: usize) -> Option<usize> {
        let rest = self.graph.nodes()[node].label.strip_prefix("layer ")?;
        rest.split(' ').next()?.parse().ok()
    }

    /// Bytes of scratch, inputs and outputs.
    pub(crate) fn workspace(&self) -> u64 {
        let host = self.graph.values().iter();
        let host = host.filter(|v| matches!(v.source, Source::Output(..) | Source::Input(..)));
        self.schedule.arena.size + host.map(|v| v.desc.bytes()).sum::<u64>()
    }

    /// Commands, waits included.
    pub(crate) fn commands(&self) -> usize {
        self.schedule.items.len()
    }
}

/// A rank's groups, as the timeline sees them.
struct Meeting {
    /// Which of the groups of the played ranks.
    number: u64,
    /// How many of the played ranks are in it.
    size: u32,
    devices: Vec<DeviceId>,
    /// The kind of each member.
    kinds: Vec<u32>,
    at: usize,
    /// Collectives so far.
    count: u64,
}

/// Plays the programs of the ranks that stand for all.
pub(crate) fn play(
    programs: &[Program],
    folded: &Folded,
    costs: &Costs<'_>,
    mut watch: Option<&mut Watch>,
) -> Played {
    let mut timeline = Timeline::new(programs.len());
    let mut numbers: HashMap<(Group, Vec<u32>), u64> = HashMap::new();
    let mut known: HashMap<(u64, CollectiveKind, u64, u64), Cost> = HashMap::new();
    let mut of_stream: Vec<(usize, Vec<Option<Run>>)> = Vec::new();
    let (issue, mut pairs) = (costs.model.host_issue(), HashMap::new());
    for (index, program) in programs.iter().enumerate() {
        let lanes = program.schedule.lanes.max(1);
        let streams: Vec<StreamIndex> = (0..lanes).map(|_| timeline.stream(index as u32)).collect();
        if let Some(watch) = &mut watch {
            (0..lanes).for_each(|lane| watch.stream(program.rank.rank, lane));
        }
        let mut runs: Vec<Vec<Option<Run>>> = vec![Vec::new(); lanes];
        let mut meetings: HashMap<Group, Meeting> = HashMap::new();
        let mut clock = issue;
        // The host sends the inputs, then launches everything at once or command by command.
        let input = costs.model.transfer(program.input_bytes, Path::Host, costs.topology);
        let step = Step::Run(input);
        if let Some(watch) = &mut watch {
            watch.command(streams[COMPUTE], None, &step, input);
        }
        timeline.push(streams[COMPUTE], clock, 0, step);
        runs[COMPUTE].push(None);
        if !costs.eager {
            clock += issue;
        }
        let mut values: HashMap<usize, (Lane, u64)> = HashMap::new();
        for item in &program.schedule.items {
            let (lane, step, run, cost) = match *item {
                Item::Wait { lane, event } => {
                    let (other, value) = match event {
                        WaitFor::Start => (COMPUTE, 1),
                        WaitFor::Node(node) => values[&node],
                    };
                    (lane, Step::Wait { stream: streams[other], value }, None, Cost::NOTHING)
                }
                Item::Run { lane, node } => {
                    let work = &program.graph.nodes()[node].work;
                    let (step, cost) = match work {
                        Work::Op(op) => {
                            let cost = costs.model.op(&program.op(op, costs), None);
                            (Step::Run(cost), cost)
                        }
                        Work::Collectives { group, rank, batch } => {
                            let meeting = meetings.entry(*group).or_insert_with(|| {
                                Meeting::of(&program.rank, *group, folded, &mut numbers)
                            });
                            let parts = batch.iter().map(|c| {
                                let mut part = Exchanged::of(&c.map(|slot| *slot.desc()), *rank);
                                part.skew(costs.loads);
                                part
                            });
                            let parts: Vec<Exchanged> = parts.collect();
                            meeting.step(&parts, batch, costs, &mut known, &mut pairs)
                        }
                    };
                    values.insert(node, (lane, runs[lane].len() as u64 + 1));
                    let Cost { operations, bytes, bound, .. } = cost;
                    let run = Run { node, lane, start: 0, end: 0, operations, bytes, bound };
                    (lane, step, Some(run), cost)
                }
            };
            if let Some(watch) = &mut watch {
                let node = run.map(|run| &program.graph.nodes()[run.node]);
                watch.command(streams[lane], node, &step, cost);
            }
            if costs.eager {
                clock += issue;
            }
            timeline.push(streams[lane], clock, 0, step);
            runs[lane].push(run);
        }
        of_stream.extend(runs.into_iter().map(|runs| (index, runs)));
    }
    timeline.play();
    let mut end = 0;
    for done in timeline.take_done() {
        end = end.max(done.end);
        if let Some(watch) = &mut watch {
            watch.done(&done);
        }
        let run = &mut of_stream[done.stream.0 as usize].1[done.value as usize - 1];
        if let Some(run) = run {
            (run.start, run.end) = (done.start, done.end);
        }
    }
    let mut runs: Vec<Vec<Run>> = programs.iter().map(|_| Vec::new()).collect();
    for (index, own) in of_stream {
        runs[index].extend(own.into_iter().flatten());
    }
    for runs in &mut runs {
        runs.sort_by_key(|run| (run.start, run.lane, run.node));
    }
    Played { runs, end }
}

/// What is known of sends and receives: how many went each way.
type Pairs = HashMap<(u32, u32), [u64; 2]>;

trait Skewed {
    fn skew(&mut self, loads: &Loads);
}

impl Skewed for Exchanged {
    /// The rank with the most load sends or receives more.
    fn skew(&mut self, loads: &Loads) {
        if self.kind == CollectiveKind::AllToAllV && !loads.is_balanced() {
            let most = loads.most();
            self.bytes = (self.bytes as f64 * most).ceil() as u64;
            self.rows = (self.rows as f64 * most).ceil() as u64;
        }
    }
}

impl Meeting {
    fn of(
        rank: &RankPlan,
        group: Group,
        folded: &Folded,
        numbers: &mut HashMap<(Group, Vec<u32>), u64>,
    ) -> Self {
        let (members, at) = rank
            .group(group)
            .unwrap_or_else(|| unreachable!("graphs name groups that a rank is in"));
        let kinds: Vec<u32> = members.iter().map(|&m| folded.of_rank[m]).collect();
        let mut present = kinds.clone();
        present.sort_unstable();
        present.dedup();
        let size = present.len() as u32;
        let next = numbers.len() as u64;
        let number = *numbers.entry((group, present)).or_insert(next);
        let devices = members.iter().map(|&m| DeviceId(m as u32)).collect();
        Meeting { number, size, devices, kinds, at, count: 0 }
    }

    fn step<T>(
        &mut self,
        parts: &[Exchanged],
        batch: &[hal::Collective<T>],
        costs: &Costs<'_>,
        known: &mut HashMap<(u64, CollectiveKind, u64, u64), Cost>,
        pairs: &mut Pairs,
    ) -> (Step, Cost) {
        let mut open = Vec::new();
        for (part, collective) in parts.iter().zip(batch) {
            let (sends, peer) = match collective {
                hal::Collective::Send { peer, .. } => (true, *peer),
                hal::Collective::Recv { peer, .. } => (false, *peer),
                _ => continue,
            };
            let (from, to) = if sends { (self.at, peer) } else { (peer, self.at) };
            let count = pairs.entry((self.kinds[from], self.kinds[to])).or_default();
            let own = &mut count[usize::from(sends)];
            *own += 1;
            let what = Exchanged { kind: CollectiveKind::Send, ..*part };
            let ends = [self.devices[from], self.devices[to]];
            let cost = costs.model.collective(&what, &ends, costs.topology);
            open.push((([0, 0], self.kinds[from], self.kinds[to], *own), cost));
        }
        if let Some(&(_, cost)) = open.first() {
            let pairs = open.into_iter().map(|(key, cost)| (key, cost.picos)).collect();
            return (Step::Pairs { pairs }, cost);
        }
        self.count += 1;
        // Batches of the model are of one kind each: their first part and their sums name them.
        let (bytes, rows) = parts.iter().fold((0, 0), |(b, r), p| (b + p.bytes, r + p.rows));
        let kind = parts.first().map_or(CollectiveKind::Broadcast, |p| p.kind);
        let model: &dyn CostModel = costs.model;
        let fresh = || model.batch(parts.iter().copied(), &self.devices, costs.topology);
        let cost = *known.entry((self.number, kind, bytes, rows)).or_insert_with(fresh);
        let key = ([0, self.number], self.count);
        (Step::Meet { key, size: self.size, cost }, cost)
    }
}

//! Schedules of random graphs against an independent check of order, and of the model's graphs.

use super::*;
use crate::config::Preset;
use crate::engine::{EngineOptions, Overlap, StepKind, preview};
use crate::graph::{Slot, Source, Value, ValueId};
use crate::plan::{ParallelOptions, ParallelPlan};
use hal::{DType, Operand, TensorDesc, op};
use proptest::prelude::*;
use std::collections::{HashMap, HashSet};
use std::ops::Range;

/// A node of a random graph: where it reads, what it writes, on which lane.
type Recipe = (Vec<(usize, usize)>, usize, usize, bool);

/// Random graphs of copies between parts of values.
fn graph(recipes: &[Recipe], values: usize) -> Graph {
    let whole = TensorDesc::new(DType::F32, &[128]);
    let cached = |v: usize| if v == 0 { Source::Cache(0) } else { Source::Scratch };
    let values: Vec<Value> = (0..values)
        .map(|v| Value { name: format!("v{v}"), desc: whole, source: cached(v) })
        .collect();
    let part = |value: usize, half: usize| {
        let desc = TensorDesc::new(DType::F32, &[64]);
        Slot::new(ValueId((value % values.len()) as u32), (half % 2) as u64 * 256, desc)
    };
    let node = |(reads, write, half, _): &Recipe| {
        let (a, b) = (part(reads[0].0, reads[0].1), part(reads[1].0, reads[1].1));
        let op = op::Add { a, b, out: part(*write, *half) };
        Node { work: Work::Op(op.into()), label: "node".into() }
    };
    let nodes = recipes.iter().map(node).collect();
    Graph::new(values, nodes)
}

/// Who is before whom, from the items alone: the closure of lane order and waits.
fn reachable(schedule: &Schedule, nodes: usize) -> Vec<HashSet<usize>> {
    let mut before: Vec<HashSet<usize>> = vec![HashSet::new(); nodes];
    let mut lane_past: HashMap<Lane, HashSet<usize>> = HashMap::new();
    for item in &schedule.items {
        match *item {
            Item::Run { lane, node } => {
                before[node] = lane_past.entry(lane).or_default().clone();
                lane_past.entry(lane).or_default().insert(node);
            }
            Item::Wait { lane, event: Event::Node(node) } => {
                let mut past = before[node].clone();
                past.insert(node);
                lane_past.entry(lane).or_default().extend(past);
            }
            Item::Wait { .. } => {}
        }
    }
    before
}

/// Pairs of accesses that conflict, in graph order; memory of the arena included.
fn conflicts(graph: &Graph, arena: &Arena) -> Vec<(usize, usize)> {
    let mut touches: Vec<(usize, Option<ValueId>, Range<u64>, bool)> = Vec::new();
    graph.visit(|node, access, slot| {
        let (place, start) = match arena.offsets.get(&slot.value) {
            Some(offset) => (None, offset + slot.offset),
            None => (Some(slot.value), slot.offset),
        };
        touches.push((node, place, start..start + slot.desc().extent(), access.writes()));
    });
    let mut pairs = Vec::new();
    for (i, a) in touches.iter().enumerate() {
        for b in &touches[i + 1..] {
            let overlap = a.1 == b.1 && a.2.start < b.2.end && b.2.start < a.2.end;
            if a.0 != b.0 && overlap && (a.3 || b.3) {
                pairs.push((a.0.min(b.0), a.0.max(b.0)));
            }
        }
    }
    pairs
}

fn without(schedule: &Schedule, item: usize) -> Schedule {
    let mut fewer = schedule.clone();
    fewer.items.remove(item);
    fewer
}

/// Every conflict is ordered, values that live at once share no bytes, and each wait is needed.
fn check(graph: &Graph, schedule: &Schedule) -> Result<(), String> {
    let nodes = graph.nodes().len();
    let before = reachable(schedule, nodes);
    for (a, b) in conflicts(graph, &schedule.arena) {
        if !before[b].contains(&a) {
            return Err(format!("nothing orders {b} after {a}:\n{}", schedule.dump(graph)));
        }
    }
    let at_end = |schedule: &Schedule| {
        // What the compute lane knows at the end, and who began without the start.
        let mut past: HashMap<Lane, (HashSet<usize>, bool)> = HashMap::new();
        past.entry(COMPUTE).or_default().1 = true;
        let mut of_node: HashMap<usize, (HashSet<usize>, bool)> = HashMap::new();
        let mut began_late = true;
        for item in &schedule.items {
            match *item {
                Item::Run { lane, node } => {
                    let lane_past = past.entry(lane).or_default();
                    began_late &= lane_past.1;
                    lane_past.0.insert(node);
                    of_node.insert(node, lane_past.clone());
                }
                Item::Wait { lane, event: Event::Node(node) } => {
                    let (nodes, start) = of_node[&node].clone();
                    let lane_past = past.entry(lane).or_default();
                    lane_past.0.extend(nodes);
                    lane_past.1 |= start;
                }
                Item::Wait { lane, event: Event::Start } => past.entry(lane).or_default().1 = true,
            }
        }
        (past[&COMPUTE].0.len() == nodes, began_late)
    };
    if at_end(schedule) != (true, true) {
        return Err(format!("start or end is not awaited:\n{}", schedule.dump(graph)));
    }
    for (number, item) in schedule.items.iter().enumerate() {
        if !matches!(item, Item::Wait { .. }) {
            continue;
        }
        let fewer = without(schedule, number);
        let before = reachable(&fewer, nodes);
        let hazard = conflicts(graph, &schedule.arena).iter().any(|(a, b)| !before[*b].contains(a));
        if !hazard && at_end(&fewer) == (true, true) {
            return Err(format!("wait {number} is not needed:\n{}", schedule.dump(graph)));
        }
    }
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, ..ProptestConfig::default() })]
    #[test]
    fn random_graphs_on_random_lanes_have_no_hazard_and_no_wait_too_many(
        recipes in prop::collection::vec(
            (prop::collection::vec((0usize..8, 0usize..2), 2), 0usize..8, 0usize..2, any::<bool>()),
            1..24,
        ),
        lanes in prop::collection::vec(0usize..4, 24),
        values in 2usize..9,
    ) {
        let graph = graph(&recipes, values);
        let schedule = Schedule::on_lanes(&graph, &lanes[..recipes.len()]);
        prop_assert_eq!(check(&graph, &schedule), Ok(()));
        prop_assert!(schedule.arena.size >= schedule.arena.lower_bound);
        // Waits name what was issued before: nothing can deadlock.
        let mut issued = HashSet::new();
        for item in &schedule.items {
            match item {
                Item::Run { node, .. } => { issued.insert(*node); }
                Item::Wait { event: Event::Node(node), .. } => prop_assert!(issued.contains(node)),
                Item::Wait { .. } => {}
            }
        }
    }
}

/// Plans that between them use every collective, and both ways to overlap.
fn plans() -> Vec<(ParallelOptions, Overlap)> {
    let base = ParallelOptions::default();
    let tp = ParallelOptions { tensor: 2, ..base };
    let ep = ParallelOptions { data: 2, expert: true, ..base };
    let both = ParallelOptions { tensor: 2, data: 2, pipeline: 2, expert: true, ..base };
    let nodes = ParallelOptions { data: 4, expert: true, ranks_per_node: Some(2), ..base };
    let mut all = vec![(base, Overlap::None)];
    for overlap in [Overlap::None, Overlap::TwoBatch] {
        all.extend([tp, ep, both, nodes].map(|plan| (plan, overlap)));
    }
    all
}

#[test]
fn the_models_schedules_have_no_hazard_and_no_wait_too_many() {
    let config = Preset::Tiny.config();
    for (options, overlap) in plans() {
        let plan = ParallelPlan::new(&config, options).unwrap();
        for step in [StepKind::Decode { sequences: 2 }, StepKind::Prefill { tokens: 6 }] {
            for rank in [0, plan.ranks() - 1] {
                let engine = EngineOptions { overlap, ..EngineOptions::default() };
                let (graph, schedule) = preview(&config, &plan, rank, engine, step);
                check(&graph, &schedule)
                    .unwrap_or_else(|e| panic!("{options:?} {overlap:?} {step:?} {rank}: {e}"));
            }
        }
    }
}

#[test]
fn the_workspace_is_within_a_tenth_of_the_lower_bound() {
    let config = Preset::DeepSeekV3.config();
    let base = ParallelOptions::default();
    for (parallel, overlap) in [
        (base, Overlap::None),
        (ParallelOptions { tensor: 32, ..base }, Overlap::None),
        (ParallelOptions { tensor: 32, ..base }, Overlap::TwoBatch),
        (ParallelOptions { data: 32, expert: true, ..base }, Overlap::None),
        (ParallelOptions { data: 32, expert: true, ..base }, Overlap::TwoBatch),
        (ParallelOptions { tensor: 4, data: 8, expert: true, ..base }, Overlap::TwoBatch),
    ] {
        let plan = ParallelPlan::new(&config, parallel).unwrap();
        for step in [StepKind::Decode { sequences: 128 }, StepKind::Prefill { tokens: 4096 }] {
            let engine = EngineOptions { overlap, ..EngineOptions::default() };
            let (_, schedule) = preview(&config, &plan, 0, engine, step);
            let Arena { size, lower_bound, .. } = schedule.arena;
            let ratio = size as f64 / lower_bound as f64;
            assert!(ratio <= 1.1, "{parallel:?} {overlap:?} {step:?}: {ratio}");
        }
    }
}

#[test]
fn collectives_leave_the_compute_lane_only_where_they_can_hide() {
    let config = Preset::Tiny.config();
    for (options, overlap) in plans() {
        let plan = ParallelPlan::new(&config, options).unwrap();
        let engine = EngineOptions { overlap, ..EngineOptions::default() };
        let step = StepKind::Decode { sequences: 2 };
        let (graph, schedule) = preview(&config, &plan, 0, engine, step);
        let lanes: HashMap<usize, Lane> = schedule
            .items
            .iter()
            .filter_map(|item| match item {
                Item::Run { lane, node } => Some((*node, *lane)),
                Item::Wait { .. } => None,
            })
            .collect();
        let communicates = |node: &Node| matches!(node.work, Work::Collectives { .. });
        let hidden = lanes.values().filter(|lane| **lane == COMMUNICATION).count();
        let all = graph.nodes().iter().filter(|node| communicates(node)).count();
        match (overlap, options.expert) {
            // One batch of a tensor-parallel model has nothing to hide behind.
            (Overlap::None, false) => assert_eq!((hidden, schedule.waits()), (0, 0), "{options:?}"),
            // The shared expert hides each first dispatch, of every mixture layer.
            (Overlap::None, true) => assert!(hidden > 0 && hidden < all, "{options:?}"),
            (Overlap::TwoBatch, _) => {
                assert!(hidden * 10 > all * 8, "{hidden} of {all} {options:?}")
            }
        }
    }
}

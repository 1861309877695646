//! Schedules as text, for golden tests and for people.

use super::{Event, Item, Lane, Schedule};
use crate::graph::{Graph, Slot, Source, ValueId, Work};
use hal::Operand;
use hal::op::Access;
use std::fmt::Write;

impl Schedule {
    /// One command a line: the lane, the node's number, its label and kind, what it reads and what
    /// it writes. Scratch values are `%number`, with their place in the workspace where they are
    /// written first; other values go by what they are bound to.
    pub fn dump(&self, graph: &Graph) -> String {
        let mut out = String::new();
        let mut shown = vec![false; graph.values().len()];
        for item in &self.items {
            // Writing to a string cannot fail.
            let _ = match *item {
                Item::Wait { lane, event: Event::Start } => {
                    writeln!(out, "{:<7} waits for the start", lane_name(lane))
                }
                Item::Wait { lane, event: Event::Node(node) } => {
                    writeln!(out, "{:<7} waits for {node}", lane_name(lane))
                }
                Item::Run { lane, node } => {
                    let line = self.node(graph, node, &mut shown);
                    writeln!(out, "{:<7} {node:>4} {line}", lane_name(lane))
                }
            };
        }
        let Schedule { arena, lanes, .. } = self;
        let _ = writeln!(
            out,
            "{lanes} lanes, {} waits, workspace {} bytes (lower bound {})",
            self.waits(),
            arena.size,
            arena.lower_bound
        );
        out
    }

    /// Waits between lanes.
    pub fn waits(&self) -> usize {
        self.items.iter().filter(|i| matches!(i, Item::Wait { .. })).count()
    }

    fn node(&self, graph: &Graph, number: usize, shown: &mut [bool]) -> String {
        let node = &graph.nodes()[number];
        let (mut reads, mut writes) = (Vec::new(), Vec::new());
        node.work.visit(|access, slot| {
            let text = self.slot(graph, slot, access, shown);
            match access {
                Access::Read => reads.push(text),
                Access::Write => writes.push(text),
                Access::Update => writes.push(format!("in place {text}")),
            }
        });
        let within = match &node.work {
            Work::Collectives { group, batch, .. } if batch.len() > 1 => {
                format!(" ×{} [{}]", batch.len(), group.name())
            }
            Work::Collectives { group, .. } => format!(" [{}]", group.name()),
            _ => String::new(),
        };
        let kind = node.work.name();
        format!("{} = {kind}{within}({}) -> {}", node.label, reads.join(", "), writes.join(", "))
    }

    fn slot(&self, graph: &Graph, slot: &Slot, access: Access, shown: &mut [bool]) -> String {
        let ValueId(number) = slot.value;
        let value = graph.value(slot.value);
        let name = match value.source {
            Source::Scratch => format!("%{number}"),
            Source::Weight(key) => format!("{:?}", key.role),
            Source::Scales(key) => format!("{:?}.scales", key.role),
            Source::Cache(layer) => format!("cache[{layer}]"),
            Source::Input(0, input) => format!("{input:?}"),
            Source::Input(batch, input) => format!("{input:?}[{batch}]"),
            Source::Output(0, output) => format!("{output:?}"),
            Source::Output(batch, output) => format!("{output:?}[{batch}]"),
        };
        let mut text = format!("{name}: {:?}", slot.desc());
        if slot.offset > 0 {
            let _ = write!(text, "+{}", slot.offset);
        }
        let first = !std::mem::replace(&mut shown[number as usize], true);
        if let (true, true, Some(offset)) =
            (first, access.writes(), self.arena.offsets.get(&slot.value))
        {
            let _ = write!(text, " @{offset}");
        }
        text
    }
}

fn lane_name(lane: Lane) -> String {
    match lane {
        super::COMPUTE => "compute".to_string(),
        super::COMMUNICATION => "comm".to_string(),
        super::NODE_COMMUNICATION => "node".to_string(),
        other => format!("lane {other}"),
    }
}

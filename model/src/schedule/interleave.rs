//! Merging the graphs of micro-batches.

use crate::graph::{Graph, Node, Slot, Source, Value, ValueId, Work};
use std::collections::HashMap;

/// One graph of several, whose collectives hide behind each other's computation: each graph in turn
/// goes on to its next collective. Weights and caches are shared.
pub fn interleave(graphs: Vec<Graph>) -> Graph {
    let mut values: Vec<Value> = Vec::new();
    let mut shared: HashMap<Source, ValueId> = HashMap::new();
    let mut parts: Vec<std::vec::IntoIter<Node>> = Vec::with_capacity(graphs.len());
    for graph in graphs {
        let mut numbers = Vec::with_capacity(graph.values().len());
        for value in graph.values() {
            let fresh = ValueId(values.len() as u32);
            let number = match value.source {
                Source::Scratch => fresh,
                source => *shared.entry(source).or_insert(fresh),
            };
            if number == fresh {
                values.push(value.clone());
            }
            numbers.push(number);
        }
        let renumbered: Vec<Node> =
            graph.nodes().iter().map(|node| renumber(node, &numbers)).collect();
        parts.push(renumbered.into_iter());
    }
    let mut nodes = Vec::new();
    while parts.iter().any(|part| part.len() > 0) {
        for part in &mut parts {
            for node in part {
                let pause = matches!(node.work, Work::Collectives { .. });
                nodes.push(node);
                if pause {
                    break;
                }
            }
        }
    }
    Graph::new(values, nodes)
}

fn renumber(node: &Node, numbers: &[ValueId]) -> Node {
    let slot = |s: &Slot| s.of_value(numbers[s.value.0 as usize]);
    let work = match &node.work {
        Work::Op(op) => Work::Op(op.map(slot)),
        Work::Collectives { group, rank, batch } => Work::Collectives {
            group: *group,
            rank: *rank,
            batch: batch.iter().map(|c| c.map(slot)).collect(),
        },
    };
    Node { work, label: node.label.clone() }
}

//! Merging the graphs of micro-batches.

use crate::graph::{Graph, Node, Slot, Source, Value, ValueId, Work};
use std::collections::HashMap;

/// One graph of several, whose collectives hide behind each other's computation: each graph in turn
/// goes on to its next collective. Weights and caches are shared.
pub fn interleave(graphs: Vec<Graph>) -> Graph {
    let count = |of: fn(&Graph) -> usize| graphs.iter().map(of).sum();
    let mut nodes: Vec<Node> = Vec::with_capacity(count(|graph| graph.nodes().len()));
    let mut values: Vec<Value> = Vec::with_capacity(count(|graph| graph.values().len()));
    // Most values are scratch.
    let mut shared: HashMap<Source, ValueId> = HashMap::with_capacity(values.capacity() / 4);
    let mut parts = Vec::with_capacity(graphs.len());
    for graph in graphs {
        let (own, nodes) = graph.into_parts();
        let mut numbers = Vec::with_capacity(own.len());
        for value in own {
            let fresh = ValueId(values.len() as u32);
            let number = match value.source {
                Source::Scratch => fresh,
                source => *shared.entry(source).or_insert(fresh),
            };
            if number == fresh {
                values.push(value);
            }
            numbers.push(number);
        }
        // The first graph's values keep their numbers, and its nodes are as they should be.
        let renumbered = numbers.iter().enumerate().any(|(at, number)| number.0 as usize != at);
        parts.push((nodes.into_iter(), renumbered.then_some(numbers)));
    }
    while parts.iter().any(|(part, _)| part.len() > 0) {
        for (part, numbers) in &mut parts {
            for node in part {
                let pause = matches!(node.work, Work::Collectives { .. });
                nodes.push(match numbers {
                    Some(numbers) => renumber(node, numbers),
                    None => node,
                });
                if pause {
                    break;
                }
            }
        }
    }
    Graph::new(values, nodes)
}

fn renumber(node: Node, numbers: &[ValueId]) -> Node {
    let slot = |s: &Slot| s.of_value(numbers[s.value.0 as usize]);
    let work = match node.work {
        Work::Op(op) => Work::Op(op.map(slot)),
        Work::Collectives { group, rank, batch } => {
            Work::Collectives { group, rank, batch: batch.iter().map(|c| c.map(slot)).collect() }
        }
    };
    Node { work, ..node }
}

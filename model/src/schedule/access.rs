//! Who touches which bytes of which value.

use crate::graph::{Graph, Source, ValueId};
use hal::Operand;
use std::ops::Range;

/// No touch.
pub(super) const NONE: u32 = u32::MAX;

/// An access to a value: the node, the bytes, and whether it writes.
#[derive(Clone, Debug)]
pub(super) struct Touch {
    pub(super) node: u32,
    pub(super) value: ValueId,
    start: u64,
    end: u64,
    pub(super) writes: bool,
}

impl Touch {
    /// Whether their order matters.
    pub(super) fn conflicts(&self, other: &Touch) -> bool {
        (self.writes || other.writes)
            && self.value == other.value
            && self.start < other.end
            && other.start < self.end
    }

    /// Whether all bytes of another touch of the same value are among this one's.
    pub(super) fn contains(&self, other: &Touch) -> bool {
        self.start <= other.start && other.end <= self.end
    }
}

/// What the nodes of a graph touch, in order.
pub(super) struct Accesses {
    touches: Vec<Touch>,
    /// Where each node's touches begin, and the end of the last one's.
    starts: Vec<u32>,
    /// Of each touch, the next one of the same value, or [`NONE`].
    next: Vec<u32>,
}

impl Accesses {
    pub(super) fn of(graph: &Graph) -> Self {
        let nodes = graph.nodes().len();
        // Most ops have three or four operands, one of them a weight.
        let mut touches: Vec<Touch> = Vec::with_capacity(4 * nodes);
        let mut next: Vec<u32> = Vec::with_capacity(4 * nodes);
        let mut starts = Vec::with_capacity(nodes + 1);
        let mut last = vec![NONE; graph.values().len()];
        // What is never written in a step needs no order.
        let constant =
            |source| matches!(source, Source::Weight(_) | Source::Scales(_) | Source::Input(..));
        let ordered: Vec<bool> = graph.values().iter().map(|v| !constant(v.source)).collect();
        for (number, node) in graph.nodes().iter().enumerate() {
            starts.push(touches.len() as u32);
            node.work.visit(|access, slot| {
                let value = slot.value.0 as usize;
                if !ordered[value] {
                    return;
                }
                let (start, extent) = (slot.offset, slot.desc().extent());
                if extent == 0 {
                    return;
                }
                let this = touches.len() as u32;
                let former = std::mem::replace(&mut last[value], this);
                if former != NONE {
                    next[former as usize] = this;
                }
                next.push(NONE);
                touches.push(Touch {
                    node: number as u32,
                    value: slot.value,
                    start,
                    end: start + extent,
                    writes: access.writes(),
                });
            });
        }
        starts.push(touches.len() as u32);
        Accesses { touches, starts, next }
    }

    /// All touches, in the order of the nodes.
    pub(super) fn all(&self) -> &[Touch] {
        &self.touches
    }

    /// The numbers of a node's touches.
    pub(super) fn of_node(&self, node: usize) -> Range<usize> {
        self.starts[node] as usize..self.starts[node + 1] as usize
    }

    /// The first later node that conflicts with a node, if there is one.
    pub(super) fn first_dependant(&self, node: usize) -> Option<usize> {
        let of_touch = |number: usize| {
            let touch = &self.touches[number];
            let mut later = self.next[number];
            while let Some(other) = self.touches.get(later as usize) {
                if other.node > touch.node && other.conflicts(touch) {
                    return Some(other.node as usize);
                }
                later = self.next[later as usize];
            }
            None
        };
        self.of_node(node).filter_map(of_touch).min()
    }
}

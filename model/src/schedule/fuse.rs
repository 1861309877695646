//! Merging neighbours that a device can run as one op: a norm or a SwiGLU, and the quantisation of
//! what it gives.

use crate::graph::{Graph, Node, Slot, Source, Work};
use hal::op::{Access, Quantize, RmsNorm, RmsNormQuantize, SwiGlu, SwiGluQuantize};
use hal::{Op, Operand, TensorDesc};

/// The same graph with fewer commands: a norm and the quantisation of what it gives become one op
/// where `supports` says that the device has it for these shapes, and so do a SwiGLU and its
/// quantisation. The fused op takes the place of the first of the two.
///
/// A pair is left alone where something between the two would see a difference, and a SwiGLU where
/// somebody else reads what it gives. The norm's output stays an output where it has other readers;
/// elsewhere its value keeps its number and nobody names it any more. `supports` is asked once for
/// each shape.
pub fn fuse(mut graph: Graph, supports: &dyn Fn(&Op<TensorDesc>) -> bool) -> Graph {
    let mut fusion = Fusion { readers: readers(&graph), answers: Vec::new(), supports };
    let mut writers: Vec<Option<usize>> = vec![None; graph.values().len()];
    // Nodes that are part of an earlier one now. They stay until all pairs are found, so that who
    // may move is still told by what stood between.
    let mut gone = vec![false; graph.nodes().len()];
    for (number, gone) in gone.iter_mut().enumerate() {
        if let Work::Op(Op::Quantize(quantize)) = &graph.nodes()[number].work
            && let Some(first) = writers[quantize.x.value.0 as usize]
            && let Some(op) = fusion.of_pair(&graph, first, number, quantize)
        {
            let node = graph.node_mut(first);
            node.label = [&node.label, " + quantise"].concat().into();
            node.work = Work::Op(op);
            *gone = true;
        }
        graph.nodes()[number].work.visit(|access, slot| {
            if access.writes() {
                writers[slot.value.0 as usize] = Some(number);
            }
        });
    }
    graph.remove_nodes(&gone);
    graph
}

/// How many operands read each value.
fn readers(graph: &Graph) -> Vec<usize> {
    let mut readers = vec![0; graph.values().len()];
    graph.visit(|_, access: Access, slot| {
        readers[slot.value.0 as usize] += usize::from(access.reads());
    });
    readers
}

struct Fusion<'a> {
    readers: Vec<usize>,
    /// What `supports` said, by shape.
    answers: Vec<(Op<TensorDesc>, bool)>,
    supports: &'a dyn Fn(&Op<TensorDesc>) -> bool,
}

impl Fusion<'_> {
    /// The op that node `first` and the quantisation at node `second` become, if they may.
    fn of_pair(
        &mut self,
        graph: &Graph,
        first: usize,
        second: usize,
        quantize: &Quantize<Slot>,
    ) -> Option<Op<Slot>> {
        // Whether the quantisation alone needs the value between the two.
        let own = self.readers[quantize.x.value.0 as usize] == 1
            && graph.value(quantize.x.value).source == Source::Scratch;
        let op = match &graph.nodes()[first].work {
            Work::Op(Op::RmsNorm(norm)) => norm_and_quantize(norm, quantize, own)?,
            Work::Op(Op::SwiGlu(swiglu)) if own => swiglu_and_quantize(swiglu, quantize)?,
            _ => return None,
        };
        let apart = !overlaps_itself(&op) && may_move(graph, first, second);
        (apart && self.is_supported(&op)).then_some(op)
    }

    fn is_supported(&mut self, op: &Op<Slot>) -> bool {
        let desc = op.desc();
        if let Some((_, answer)) = self.answers.iter().find(|(known, _)| *known == desc) {
            return *answer;
        }
        let answer = (self.supports)(&desc);
        self.answers.push((desc, answer));
        answer
    }
}

fn norm_and_quantize(
    norm: &RmsNorm<Slot>,
    quantize: &Quantize<Slot>,
    own: bool,
) -> Option<Op<Slot>> {
    // A norm has no rows to leave alone.
    if norm.out != quantize.x || quantize.row_offsets.is_some() {
        return None;
    }
    let fused = RmsNormQuantize {
        x: norm.x,
        weight: norm.weight,
        residual: norm.residual,
        out: (!own).then_some(norm.out),
        q: quantize.q,
        scales: quantize.scales,
        eps: norm.eps,
        column_offset: quantize.column_offset,
        scale_format: quantize.scale_format,
    };
    Some(fused.into())
}

fn swiglu_and_quantize(swiglu: &SwiGlu<Slot>, quantize: &Quantize<Slot>) -> Option<Op<Slot>> {
    if swiglu.out != quantize.x
        || swiglu.row_offsets != quantize.row_offsets
        || swiglu.expected_rows != quantize.expected_rows
    {
        return None;
    }
    let fused = SwiGluQuantize {
        x: swiglu.x,
        row_offsets: quantize.row_offsets,
        q: quantize.q,
        scales: quantize.scales,
        column_offset: quantize.column_offset,
        scale_format: quantize.scale_format,
        expected_rows: quantize.expected_rows,
    };
    Some(fused.into())
}

/// Whether the two views have bytes in common, by where they begin and end.
fn overlap(a: &Slot, b: &Slot) -> bool {
    a.value == b.value
        && a.offset < b.offset + b.desc().extent()
        && b.offset < a.offset + a.desc().extent()
}

/// Whether something that the op writes is another of its operands too.
fn overlaps_itself(op: &Op<Slot>) -> bool {
    let mut operands: Vec<(Access, &Slot)> = Vec::new();
    op.visit(|_, access, slot| operands.push((access, slot)));
    operands.iter().enumerate().any(|(number, (access, slot))| {
        let mut others = operands[number + 1..].iter();
        others.any(|(other, with)| (access.writes() || other.writes()) && overlap(slot, with))
    })
}

/// Whether node `second` may run right after node `first`: nothing between them writes what it
/// reads, or touches what it writes.
fn may_move(graph: &Graph, first: usize, second: usize) -> bool {
    let mut operands: Vec<(Access, &Slot)> = Vec::new();
    graph.nodes()[second].work.visit(|access, slot| operands.push((access, slot)));
    let conflicts = |node: &Node| {
        let mut conflict = false;
        node.work.visit(|other, with| {
            conflict |= operands
                .iter()
                .any(|(access, slot)| (access.writes() || other.writes()) && overlap(slot, with));
        });
        conflict
    };
    !graph.nodes()[first + 1..second].iter().any(conflicts)
}

#[cfg(test)]
mod tests;

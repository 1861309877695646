//! Costs already worked out, by what they depend on.

use super::Cost;
use arrayvec::ArrayVec;
use hal::op::Routing;
use hal::{Op, TensorDesc};
use parking_lot::RwLock;
use std::collections::HashMap;
use std::hash::{BuildHasherDefault, Hasher};

/// Everything of an op that its cost depends on: kind, routing or attention work, and the dtype and
/// shape of each operand. Ten operands of four dimensions at most.
type Key = ArrayVec<u32, 64>;

/// Keys that are kept; a run whose shapes never repeat starts over when there are more.
const MOST: usize = 1 << 16;

/// A map from ops to costs.
#[derive(Debug, Default)]
pub(super) struct Cache {
    known: RwLock<HashMap<Key, Cost, BuildHasherDefault<WordHasher>>>,
}

impl Cache {
    /// The cost of an op, worked out on first sight.
    pub(super) fn get(
        &self,
        op: &Op<TensorDesc>,
        routing: Option<Routing>,
        cost: impl FnOnce() -> Cost,
    ) -> Cost {
        let Some(key) = key(op, routing) else { return cost() };
        if let Some(known) = self.known.read().get(&key) {
            return *known;
        }
        // Two threads may both work it out; they get the same.
        let cost = cost();
        let mut known = self.known.write();
        if known.len() >= MOST {
            known.clear();
        }
        known.insert(key, cost);
        cost
    }
}

/// [`None`] for an op with more operands than a key holds.
fn key(op: &Op<TensorDesc>, routing: Option<Routing>) -> Option<Key> {
    let mut key = Key::new();
    key.push(op.kind() as u32);
    let wide = |key: &mut Key, value: u64| {
        key.push(value as u32);
        key.push((value >> 32) as u32);
    };
    match op {
        Op::GroupedLinear(o) => {
            let routing = routing.unwrap_or(o.routing);
            key.push(routing.rows);
            key.push(routing.active_experts);
        }
        Op::MlaPrefill(o) => {
            wide(&mut key, o.work.pairs);
            wide(&mut key, o.work.keys);
        }
        Op::MlaDecode(o) => {
            wide(&mut key, o.work.pairs);
            wide(&mut key, o.work.keys);
        }
        Op::Quantize(o) => key.push(o.expected_rows),
        Op::SwiGlu(o) => key.push(o.expected_rows),
        Op::MoePermute(o) => key.push(o.expected_rows),
        Op::MoeDispatch(o) => key.push(o.expected_rows),
        Op::MoeCombine(o) => key.push(o.expected_rows),
        _ => {}
    }
    let mut fits = true;
    op.visit(|_, _, desc| {
        let shape = desc.shape();
        fits &= key.remaining_capacity() > shape.len();
        if fits {
            key.push((desc.dtype() as u32) << 8 | shape.len() as u32);
            key.extend(shape.iter().copied());
        }
    });
    fits.then_some(key)
}

/// A multiplicative hash over words (as in rustc): keys are trusted and short.
#[derive(Debug, Default)]
struct WordHasher(u64);

impl Hasher for WordHasher {
    fn write(&mut self, bytes: &[u8]) {
        for chunk in bytes.chunks(8) {
            let mut word = [0; 8];
            word[..chunk.len()].copy_from_slice(chunk);
            self.write_u64(u64::from_ne_bytes(word));
        }
    }

    fn write_u64(&mut self, word: u64) {
        self.0 = (self.0.rotate_left(5) ^ word).wrapping_mul(0x517c_c1b7_2722_0a95);
    }

    fn write_usize(&mut self, word: usize) {
        self.write_u64(word as u64);
    }

    fn finish(&self) -> u64 {
        // The map takes the high bits for its own use and the low ones for the place.
        self.0.rotate_left(26)
    }
}

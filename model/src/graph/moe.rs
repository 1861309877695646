//! DeepSeekMoE (section 2.1.2 of the report): routed experts by group-limited top-k, plus shared
//! experts that every token takes, unscaled; both read the same normed input.
//!
//! Either every rank holds some columns of every expert, or experts are spread over the ranks and
//! tokens travel: dispatched in the dtype in which experts take them, combined in the activations'
//! dtype, each token once to each node and then to each rank that has an expert of it (section 3.2
//! of the report; DeepEP).

use super::Slot;
use super::builder::{Activations, Counted};
use super::deepseek::Model;
use crate::plan::{ExpertPlacement, Group};
use crate::weights::Role;
use hal::op::{self, Routing};
use hal::{Collective, DType, Operand};

/// What the router decided: `[T, k]` experts and their weights.
#[derive(Clone, Copy)]
struct Chosen {
    experts: Slot,
    weights: Slot,
}

/// One hop of a dispatch: who shares it, and what each destination holds.
struct Hop {
    group: Group,
    destinations: usize,
    experts_each: usize,
}

/// Tokens as they stand before a hop, or after it on the receiving side.
struct Travellers {
    x: Slot,
    x_scales: Option<Slot>,
    chosen: Chosen,
    /// How many there are, where the host does not know.
    counted: Option<Counted>,
}

/// What the way back needs to know of a hop.
struct Sent {
    group: Group,
    name: String,
    /// Rows received from each rank.
    recv_offsets: Slot,
    /// The row of each token's slots.
    rows: Slot,
    /// Rows that were sent at most.
    capacity: usize,
    /// How many tokens there were before the hop.
    counted: Option<Counted>,
}

impl Model<'_> {
    /// A mixture layer, on this rank's rows.
    pub(super) fn moe(&mut self, layer: usize, x: Slot) -> Slot {
        let x = self.b.activations("mlp", x, (layer, Role::ExpertsGateUp));
        let chosen = self.route(layer, &x);
        let rank = self.rank;
        match &rank.experts {
            Some(placement) => self.spread(layer, &x, chosen, placement),
            None => {
                let partial = self.columns(layer, &x, chosen);
                self.sum_columns("moe", partial)
            }
        }
    }

    fn route(&mut self, layer: usize, x: &Activations) -> Chosen {
        let c = self.c;
        let tokens = x.rows();
        let (experts, k) = (c.n_routed_experts, c.num_experts_per_tok);
        // The router's logits in FP32, so that near-ties route as in the reference.
        let logits = self.b.scratch_of("router logits", DType::F32, &[tokens, experts]);
        let plain = Activations::of(x.plain, None);
        self.b.linear_into("router", &plain, layer, Role::Router, logits);
        let chosen = Chosen {
            experts: self.b.scratch_of("chosen experts", DType::I32, &[tokens, k]),
            weights: self.b.scratch_of("expert weights", DType::F32, &[tokens, k]),
        };
        let bias = self.b.weight(layer, Role::RouterBias);
        self.b.push(
            "gate",
            op::Gate {
                logits,
                bias: Some(bias),
                experts: chosen.experts,
                weights: chosen.weights,
                groups: c.n_group as u32,
                groups_kept: c.topk_group as u32,
                normalize: c.norm_topk_prob,
                scale: c.routed_scaling_factor as f32,
            },
        );
        chosen
    }

    /// All experts, of each this rank's columns: sums over the ranks are still to be made.
    fn columns(&mut self, layer: usize, x: &Activations, chosen: Chosen) -> Slot {
        let c = self.c;
        let (experts, k) = (c.n_routed_experts, c.num_experts_per_tok);
        let tokens = x.rows();
        let (plain, scales) = x.operand(self.b.dtype(layer, Role::ExpertsGateUp));
        let tokens_in = Travellers { x: plain, x_scales: scales, chosen, counted: None };
        let routing = Routing::uniform(tokens, k, experts);
        let (y, rows) = self.experts(layer, &tokens_in, experts, tokens * k, routing);
        let base = self.shared_experts(layer, x);
        let out = self.b.scratch("moe", &[tokens, c.hidden_size]);
        let weights = Some(chosen.weights);
        let combine =
            op::MoeCombine { y, rows, weights, base, out, row_offsets: None, expected_rows: 0 };
        self.b.push("combine", combine);
        out
    }

    fn shared_experts(&mut self, layer: usize, x: &Activations) -> Option<Slot> {
        (self.c.n_shared_experts > 0)
            .then(|| self.mlp("shared expert", layer, x, Role::SharedGateUp, Role::SharedDown))
    }

    /// Experts of this rank over the tokens at hand: the outcome of each copy, and the row of each
    /// token's slots in it.
    fn experts(
        &mut self,
        layer: usize,
        tokens: &Travellers,
        experts: usize,
        copies: usize,
        routing: Routing,
    ) -> (Slot, Slot) {
        let Travellers { x, x_scales, chosen, counted } = tokens;
        let (count, k) = (chosen.experts.desc().dim(0), chosen.experts.desc().dim(1));
        let offsets = self.b.scratch_of("expert offsets", DType::I32, &[experts + 1]);
        let rows = self.b.scratch_of("expert rows", DType::I32, &[count, k]);
        let out = self.b.scratch_of("permuted", x.desc().dtype(), &[copies, x.desc().dim(1)]);
        let out_scales = x_scales
            .map(|s| self.b.scratch_of("permuted scales", DType::F32, &[copies, s.desc().dim(1)]));
        // Where the host knows how many copies there are, all rows count.
        let copied = counted.map(|_| Counted { offsets, expected: routing.rows as usize });
        self.b.push(
            "permute",
            op::MoePermute {
                x: *x,
                x_scales: *x_scales,
                experts: chosen.experts,
                row_offsets: counted.map(|c| c.offsets),
                out,
                out_scales,
                offsets,
                rows,
                first_expert: 0,
                total_experts: experts as u32,
                expected_rows: copied.map_or(0, |c| c.expected as u32),
            },
        );
        let permuted = Activations::of(out, out_scales.map(|s| (out, s)));
        let up = (layer, Role::ExpertsGateUp);
        let both = self.b.grouped_linear("experts gate_up", &permuted, up, offsets, routing);
        let inner = self.b.swiglu("experts", both, copied);
        let down = (layer, Role::ExpertsDown);
        let inner = self.b.counted_activations("experts down", inner, down, copied);
        (self.b.grouped_linear("experts down", &inner, down, offsets, routing), rows)
    }

    /// Experts on all ranks of the stage: tokens go there and come back, while the shared expert
    /// runs here.
    fn spread(
        &mut self,
        layer: usize,
        x: &Activations,
        chosen: Chosen,
        placement: &ExpertPlacement,
    ) -> Slot {
        let c = self.c;
        let (ranks, node) = (self.rank.expert.size, self.rank.node_size);
        let per_rank = placement.per_rank();
        let hops = match node == ranks {
            true => vec![Hop { group: Group::Expert, destinations: ranks, experts_each: per_rank }],
            false => vec![
                Hop {
                    group: Group::ExpertNodes,
                    destinations: ranks / node,
                    experts_each: per_rank * node,
                },
                Hop { group: Group::ExpertNode, destinations: node, experts_each: per_rank },
            ],
        };
        let (plain, scales) = x.operand(self.b.dtype(layer, Role::ExpertsGateUp));
        let mut at = Travellers { x: plain, x_scales: scales, chosen, counted: None };
        let mut sent = Vec::with_capacity(hops.len());
        let mut base = None;
        for (number, hop) in hops.iter().enumerate() {
            let name =
                if hops.len() == 1 { String::new() } else { format!(" {}", hop.group.name()) };
            let (arrived, trace) = self.dispatch(at, hop, name, placement, number == 0);
            if number == 0 {
                // Behind it the first hop hides.
                base = self.shared_experts(layer, x);
            }
            at = arrived;
            sent.push(trace);
        }
        let tokens = self.shape.expert_tokens;
        let copies = tokens * c.num_experts_per_tok.min(per_rank);
        let k = c.num_experts_per_tok;
        let routing = Routing {
            rows: (tokens * k).div_ceil(ranks) as u32,
            ..Routing::uniform(tokens * per_rank / placement.physical(), k, per_rank)
        };
        let routing = Routing { active_experts: active(tokens, k, placement), ..routing };
        let (mut y, mut rows) = self.experts(layer, &at, per_rank, copies, routing);
        let mut weights = Some(at.chosen.weights);
        let mut counted = at.counted;
        for trace in sent.into_iter().rev() {
            // What one rank, or node, has for a token, in the order of the token's slots.
            let count = rows.desc().dim(0);
            let out = self.b.scratch("partial", &[count, c.hidden_size]);
            self.b.push(
                &format!("combine{}", trace.name),
                op::MoeCombine {
                    y,
                    rows,
                    weights: weights.take(),
                    base: None,
                    out,
                    row_offsets: counted.map(|c| c.offsets),
                    expected_rows: counted.map_or(0, |c| c.expected as u32),
                },
            );
            let back = self.b.scratch("returned", &[trace.capacity, c.hidden_size]);
            let way_back = Collective::AllToAllV {
                send: out,
                recv: back,
                send_offsets: trace.recv_offsets,
                recv_offsets: None,
                expected_rows: counted.map_or(0, |c| c.expected as u32),
            };
            let name = format!("combine all-to-all{}", trace.name);
            self.b.collectives(&name, trace.group, vec![way_back]);
            (y, rows, counted) = (back, trace.rows, trace.counted);
        }
        let out = self.b.scratch("moe", &[x.rows(), c.hidden_size]);
        self.b.push(
            "combine",
            op::MoeCombine {
                y,
                rows,
                weights: None,
                base,
                out,
                row_offsets: None,
                expected_rows: 0,
            },
        );
        out
    }

    /// Sends each token once to each destination that has an expert of it.
    fn dispatch(
        &mut self,
        tokens: Travellers,
        hop: &Hop,
        name: String,
        placement: &ExpertPlacement,
        first: bool,
    ) -> (Travellers, Sent) {
        let Travellers { x, x_scales, chosen, counted } = tokens;
        let (count, k) = (chosen.experts.desc().dim(0), chosen.experts.desc().dim(1));
        let Hop { group, destinations, experts_each } = *hop;
        let capacity = count * k.min(destinations);
        let average = match counted {
            Some(counted) => counted.expected as f64,
            None => count as f64,
        };
        let met = destinations_met(k, destinations, first || counted.is_none());
        let expected = (average * met).ceil() as usize;
        let dtype = x.desc().dtype();
        // As many tokens as there are may all come here.
        let arriving = self.shape.expert_tokens;
        let mut both = |what: &str, dtype: DType, width: usize| {
            let send = self.b.scratch_of(&format!("{what} sent"), dtype, &[capacity, width]);
            (send, self.b.scratch_of(&format!("{what} received"), dtype, &[arriving, width]))
        };
        let (out, recv) = both("tokens", dtype, x.desc().dim(1));
        let scales = x_scales.map(|s| both("scales", DType::F32, s.desc().dim(1)));
        let (out_experts, recv_experts) = both("experts", DType::I32, k);
        let (out_weights, recv_weights) = both("weights", DType::F32, k);
        let mut ints = |what: &str, shape: &[usize]| self.b.scratch_of(what, DType::I32, shape);
        let send_offsets = ints("send offsets", &[destinations + 1]);
        let recv_offsets = ints("receive offsets", &[destinations + 1]);
        let rows = ints("sent rows", &[count, k]);
        let logical = first && !placement.is_identity();
        let replicas = logical.then(|| self.b.weight(0, Role::Replicas));
        let total = if logical { placement.experts() } else { experts_each * destinations };
        self.b.push(
            &format!("dispatch{name}"),
            op::MoeDispatch {
                x,
                x_scales,
                experts: chosen.experts,
                weights: chosen.weights,
                replicas,
                row_offsets: counted.map(|c| c.offsets),
                out,
                out_scales: scales.map(|(send, _)| send),
                out_experts,
                out_weights,
                offsets: send_offsets,
                rows,
                experts_per_destination: experts_each as u32,
                total_experts: total as u32,
                replica_offset: self.rank.expert.rank as u32,
                expected_rows: expected as u32,
            },
        );
        let exchange = |send: Slot, recv: Slot, offsets: Option<Slot>| Collective::AllToAllV {
            send,
            recv,
            send_offsets,
            recv_offsets: offsets,
            expected_rows: expected as u32,
        };
        let mut batch = vec![exchange(out, recv, Some(recv_offsets))];
        batch.extend(scales.map(|(send, recv)| exchange(send, recv, None)));
        batch.push(exchange(out_experts, recv_experts, None));
        batch.push(exchange(out_weights, recv_weights, None));
        self.b.collectives(&format!("dispatch all-to-all{name}"), group, batch);
        let arrived = Travellers {
            x: recv,
            x_scales: scales.map(|(_, recv)| recv),
            chosen: Chosen { experts: recv_experts, weights: recv_weights },
            // With balanced routing as many come as go.
            counted: Some(Counted { offsets: recv_offsets, expected }),
        };
        let sent = Sent { group, name, recv_offsets, rows, capacity, counted };
        (arrived, sent)
    }
}

/// How many of `destinations` a token with `k` experts meets on average, experts being equally
/// likely to be anywhere. A token that has come over a hop meets at least one.
fn destinations_met(k: usize, destinations: usize, any: bool) -> f64 {
    let d = destinations as f64;
    let met = d * (1.0 - (1.0 - 1.0 / d).powi(k as i32));
    if any { met } else { met.max(1.0) }
}

/// Experts of one rank that are expected to have tokens.
fn active(tokens: usize, k: usize, placement: &ExpertPlacement) -> u32 {
    let all = Routing::uniform(tokens, k, placement.physical()).active_experts as usize;
    (all.div_ceil(placement.ranks())).clamp(1, placement.per_rank()) as u32
}

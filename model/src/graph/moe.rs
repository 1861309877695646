//! DeepSeekMoE (section 2.1.2 of the report): routed experts by group-limited top-k, plus shared
//! experts that every token takes, unscaled; both read the same normed input.
//!
//! Either every rank holds some columns of every expert, or experts are spread over the ranks and
//! tokens travel: dispatched in the dtype in which experts take them, combined in the activations'
//! dtype, each token once to each node and then to each rank that has an expert of it (section 3.2
//! of the report; DeepEP).

use super::Slot;
use super::builder::{Activations, Counted};
use super::deepseek::{Form, Model};
use crate::config::ModelConfig;
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

/// One hop of a dispatch: who shares it, what each destination holds, and how many rows a rank is
/// expected to send.
struct Hop {
    group: Group,
    destinations: usize,
    experts_each: usize,
    expected: usize,
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
        let combine = op::MoeCombine {
            y,
            rows,
            weights,
            base,
            out,
            row_offsets: None,
            expected_rows: 0,
            expected_copies: 0,
        };
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
        let met = |destinations| destinations_met(c, placement.physical(), destinations);
        let hop = |group, destinations: usize, experts_each, copies: f64| Hop {
            group,
            destinations,
            experts_each,
            expected: (x.rows() as f64 * copies).ceil() as usize,
        };
        // Straight to each rank where latency counts, as DeepEP's low-latency kernels for decode do;
        // once to each node and on from there where bandwidth does.
        let direct = node == ranks || self.shape.form == Form::Absorbed;
        let hops = match direct {
            true => vec![hop(Group::Expert, ranks, per_rank, met(ranks))],
            false => vec![
                hop(Group::ExpertNodes, ranks / node, per_rank * node, met(ranks / node)),
                hop(Group::ExpertNode, node, per_rank, met(ranks)),
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
        let copies = self.room(tokens * c.num_experts_per_tok.min(per_rank));
        let k = c.num_experts_per_tok;
        let routing = Routing {
            rows: (tokens * k).div_ceil(ranks) as u32,
            ..Routing::uniform(tokens * per_rank / placement.physical(), k, per_rank)
        };
        let routing = Routing { active_experts: active(tokens, k, placement), ..routing };
        let (mut y, mut rows) = self.experts(layer, &at, per_rank, copies, routing);
        // Rows that the next sum adds: what each expert made, then what came back.
        let mut adds = routing.rows;
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
                    expected_copies: adds,
                },
            );
            adds = counted.map_or(0, |c| c.expected as u32);
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
                expected_copies: adds,
            },
        );
        out
    }

    /// Rows of a buffer that the worst routing would fill.
    fn room(&self, worst: usize) -> usize {
        self.shape.expert_capacity.map_or(worst, |capacity| worst.min(capacity))
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
        let Hop { group, destinations, experts_each, expected } = *hop;
        let capacity = count * k.min(destinations);
        let dtype = x.desc().dtype();
        let arriving = self.room(self.shape.expert_tokens);
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

/// How many of `destinations`, each with an equal part of the experts, a token meets on average
/// under balanced routing that keeps some groups of experts for each token (section 2.1.2 of the
/// report: node-limited routing).
fn destinations_met(c: &ModelConfig, experts: usize, destinations: usize) -> f64 {
    let (groups, kept) = (c.n_group.max(1), c.topk_group.clamp(1, c.n_group.max(1)));
    let (of_group, of_one) = (experts as f64 / groups as f64, experts as f64 / destinations as f64);
    // Groups that a destination spans: it may have several of those kept, or be part of one.
    let spans = ((of_one / of_group).round() as usize).clamp(1, groups);
    let within = (of_one / spans as f64).min(of_group);
    let k = c.num_experts_per_tok;
    let met: f64 = (0..=spans.min(kept))
        .map(|j| {
            let none = none_of(kept as f64 * of_group, j as f64 * within, k);
            chance_of(groups, kept, spans, j) * (1.0 - none)
        })
        .sum();
    (destinations as f64 * met).min(k as f64)
}

/// The probability that `k` different ones of `all` miss `some` of them.
fn none_of(all: f64, some: f64, k: usize) -> f64 {
    let miss = |i: usize| ((all - some - i as f64) / (all - i as f64).max(1.0)).clamp(0.0, 1.0);
    (0..k).map(miss).product()
}

/// The probability that of `spans` groups exactly `j` are among the `kept` of `groups`.
fn chance_of(groups: usize, kept: usize, spans: usize, j: usize) -> f64 {
    let choose = |n: usize, r: usize| -> f64 {
        if r > n { 0.0 } else { (0..r).map(|i| (n - i) as f64 / (i + 1) as f64).product() }
    };
    choose(spans, j) * choose(groups - spans, kept - j.min(kept)) / choose(groups, kept)
}

/// Experts of one rank that are expected to have tokens.
fn active(tokens: usize, k: usize, placement: &ExpertPlacement) -> u32 {
    let all = Routing::uniform(tokens, k, placement.physical()).active_experts as usize;
    (all.div_ceil(placement.ranks())).clamp(1, placement.per_rank()) as u32
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Preset;

    #[test]
    fn destinations_met_by_counting_draws() {
        // Against draws: four groups of eight, then eight of their experts, all equally likely.
        let v3 = Preset::DeepSeekV3.config();
        let mut state = 1u64;
        let mut below = |n: usize| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            (state >> 33) as usize % n
        };
        let mut draw = |n: usize, k: usize| {
            let mut all: Vec<usize> = (0..n).collect();
            (0..k).map(|_| all.swap_remove(below(all.len()))).collect::<Vec<_>>()
        };
        for destinations in [2, 4, 8, 16, 32, 64, 128] {
            let mut met = 0;
            let draws = 4000;
            for _ in 0..draws {
                let groups = draw(8, 4);
                let mut at: Vec<usize> = draw(128, 8)
                    .into_iter()
                    .map(|e| (groups[e / 32] * 32 + e % 32) / (256 / destinations))
                    .collect();
                at.sort_unstable();
                at.dedup();
                met += at.len();
            }
            let (drawn, told) =
                (met as f64 / f64::from(draws), destinations_met(&v3, 256, destinations));
            assert!(
                (drawn / told - 1.0).abs() < 0.02,
                "{destinations}: {drawn} drawn, {told} told"
            );
        }
    }
}

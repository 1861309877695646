//! DeepSeek-V3, written down once (arXiv 2412.19437; reference: deepseek-ai/DeepSeek-V3
//! `inference/model.py`).

use super::builder::{Activations, Builder};
use super::{Graph, Input, MicroBatch, Output, Slot};
use crate::config::{ModelConfig, ScaleFormat as ConfigScaleFormat};
use crate::numerics::Numerics;
use crate::plan::{Group, RankPlan};
use crate::weights::{Role, WeightPlan};
use hal::op::{self, AttentionWork, ScaleFormat};
use hal::{Collective, DType, Operand};

/// Which of MLA's two forms a step uses.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Form {
    /// Keys and values are expanded from the latents: cheap per pair, for prefill.
    Expanded {
        /// Keys of the step in all; equal to the tokens where no sequence has a past, and the
        /// cache is then not read.
        keys: usize,
    },
    /// Queries are brought into latent space: cheap per key, for decode.
    Absorbed,
}

/// Epsilon of the norms of the query and key-value latents: 1e-6 whatever `rms_norm_eps` says, as in
/// DeepSeek's reference (`RMSNorm`'s default) and in transformers. vLLM uses `rms_norm_eps`; the
/// released models have 1e-6 there too.
const LATENT_NORM_EPS: f32 = 1e-6;

/// The sizes of a step. A graph is a function of these, the configuration and the policy; all else
/// (lengths, positions, pages) is input.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct StepShape {
    /// T: new tokens, over all sequences of a tensor group. A multiple of the group's size where
    /// its ranks split tokens ([`RankPlan::splits_tokens`]).
    pub tokens: usize,
    /// B: sequences.
    pub sequences: usize,
    /// L: tokens whose logits are wanted.
    pub logit_rows: usize,
    /// Attention's form.
    pub form: Form,
    /// Pages of the KV cache.
    pub pages: usize,
    /// Tokens in a page.
    pub page_size: usize,
    /// Width of the block table.
    pub max_pages: usize,
    /// Ids that exist; logits of padded ones beyond are never chosen.
    pub vocabulary: usize,
    /// New tokens over all ranks that share experts: as many may come to one rank. Where experts
    /// are not spread, it does not matter.
    pub expert_tokens: usize,
    /// Rows for which a rank's experts have room; `None` for as many as the worst routing brings.
    /// Less saves memory, and more rows than that are an error.
    pub expert_capacity: Option<usize>,
}

/// What a graph is built from besides the sizes of the step.
#[derive(Clone, Copy, Debug)]
pub struct ModelInputs<'a> {
    /// The model.
    pub config: &'a ModelConfig,
    /// The numerics policy.
    pub numerics: Numerics,
    /// The rank whose graph it is.
    pub rank: &'a RankPlan,
    /// Its weights.
    pub weights: &'a WeightPlan,
}

/// A rank's part of the main model: token ids, or what the former stage sends, to logits, or to
/// the next stage.
pub fn main_model(inputs: ModelInputs<'_>, shape: StepShape, micro_batch: MicroBatch) -> Graph {
    let mut m = Model::new(inputs, shape, micro_batch);
    let rank = inputs.rank;
    let x = if rank.is_first_stage() { m.embed("embed") } else { m.receive() };
    // The residual stream: each norm first adds the block's output to it.
    let residual = x;
    let mut add = None;
    for layer in rank.layers.clone() {
        add = Some(m.block(layer, residual, add));
    }
    if rank.is_last_stage() {
        let hidden = m.final_norm("final norm", add, residual, (0, Role::FinalNorm), true);
        m.head("", hidden);
    } else {
        m.send(residual, add);
    }
    m.b.finish()
}

/// The multi-token prediction module (section 2.2 of the report): the main model's hidden state of
/// token i and the embedding of token i+1 give logits for token i+2. It comes with the last stage.
///
/// The released weights take the embedding first (`eh_proj`), the hidden state after the final
/// norm, and positions i.
pub fn mtp_module(inputs: ModelInputs<'_>, shape: StepShape) -> Option<Graph> {
    let layer = inputs.config.mtp_layer()?;
    let mut m = Model::new(inputs, shape, 0);
    let h = m.c.hidden_size;
    let hidden = m.b.output(Output::Hidden, inputs.numerics.activations(), &[shape.tokens, h]);
    let embedding = m.embed("mtp embed");
    m.b.scope = "mtp ".into();
    let rows = m.own_rows();
    let first = if rows < shape.tokens { inputs.rank.tensor.rank * rows } else { 0 };
    let hidden = hidden.narrowed(0, first, rows);
    let both = m.b.scratch("concat", &[rows, 2 * h]);
    let eps = m.eps();
    let enorm = m.b.weight(layer, Role::MtpEmbeddingNorm);
    let hnorm = m.b.weight(layer, Role::MtpHiddenNorm);
    m.b.norm_into("enorm", embedding, enorm, None, eps, both.columns(0, h));
    m.b.norm_into("hnorm", hidden, hnorm, None, eps, both.columns(h, h));
    let x = m.b.linear("eh_proj", &Activations::of(both, None), layer, Role::MtpProjection);
    let add = m.block(layer, x, None);
    let out = m.final_norm("mtp head norm", Some(add), x, (layer, Role::MtpHeadNorm), false);
    m.head("mtp ", out);
    Some(m.b.finish())
}

pub(super) struct Model<'a> {
    pub(super) c: &'a ModelConfig,
    pub(super) rank: &'a RankPlan,
    pub(super) b: Builder<'a>,
    pub(super) shape: StepShape,
}

impl<'a> Model<'a> {
    fn new(inputs: ModelInputs<'a>, shape: StepShape, micro_batch: MicroBatch) -> Self {
        let ModelInputs { config, numerics, rank, weights } = inputs;
        let power_of_two =
            config.quantization.is_some_and(|q| q.scale_fmt == ConfigScaleFormat::Ue8m0);
        let format = if power_of_two { ScaleFormat::PowerOfTwo } else { ScaleFormat::Float };
        let b = Builder::new(weights, rank, numerics, format, micro_batch);
        Model { c: config, rank, b, shape }
    }

    /// Tokens that this rank has outside attention.
    pub(super) fn own_rows(&self) -> usize {
        match self.rank.splits_tokens() {
            true => self.shape.tokens / self.rank.tensor.size,
            false => self.shape.tokens,
        }
    }

    /// Adds up what each rank of the tensor group has computed with its heads or columns.
    fn sum(&mut self, name: &str, partial: Slot) -> Slot {
        if self.rank.tensor.is_alone() {
            return partial;
        }
        if self.rank.splits_tokens() {
            return self.b.reduce_scatter(&format!("{name} reduce-scatter"), partial);
        }
        self.b.all_reduce(&format!("{name} all-reduce"), partial);
        partial
    }

    /// What the former stage has computed.
    fn receive(&mut self) -> Slot {
        let tensor = self.b.scratch("stage input", &[self.own_rows(), self.c.hidden_size]);
        let peer = self.rank.stage.rank - 1;
        self.b.collectives("receive", Group::Pipeline, vec![Collective::Recv { tensor, peer }]);
        tensor
    }

    /// Hands the residual stream to the next stage.
    fn send(&mut self, residual: Slot, add: Option<Slot>) {
        self.b.scope.clear();
        if let Some(add) = add {
            self.b.push("stage output", op::Add { a: residual, b: add, out: residual });
        }
        let peer = self.rank.stage.rank + 1;
        let send = Collective::Send { tensor: residual, peer };
        self.b.collectives("send", Group::Pipeline, vec![send]);
    }

    fn eps(&self) -> f32 {
        self.c.rms_norm_eps as f32
    }

    fn embed(&mut self, name: &str) -> Slot {
        let tokens = self.shape.tokens;
        let rows = self.b.input(Input::TokenIds, &[tokens]);
        let table = self.b.weight(0, Role::Embedding);
        let out = self.b.scratch(name, &[tokens, self.c.hidden_size]);
        let total_rows = self.c.vocab_size as u32;
        // Ids of other ranks' rows give zeros, so that the sum over the ranks is the embedding.
        let first_row = self.rank.tensor.part(self.c.vocab_size).start as u32;
        self.b.push(name, op::GatherRows { table, rows, out, first_row, total_rows });
        self.sum(name, out)
    }

    /// One transformer block. `add` is the former block's output, not yet in the residual stream;
    /// returned is this block's.
    fn block(&mut self, layer: usize, residual: Slot, add: Option<Slot>) -> Slot {
        let is_mtp = Some(layer) == self.c.mtp_layer();
        self.b.scope = if is_mtp { "mtp ".into() } else { format!("layer {layer} ") };
        let eps = self.eps();
        let weight = self.b.weight(layer, Role::InputNorm);
        let x = match add {
            Some(add) => self.b.norm("input norm", add, weight, Some(residual), eps),
            None => self.b.norm("input norm", residual, weight, None, eps),
        };
        let attended = self.attention(layer, x);
        let weight = self.b.weight(layer, Role::PostAttentionNorm);
        let x = self.b.norm("post-attention norm", attended, weight, Some(residual), eps);
        if self.c.is_moe_layer(layer) {
            return self.moe(layer, x);
        }
        let x = self.b.activations("mlp", x, (layer, Role::GateUp));
        let partial = self.mlp("mlp", layer, &x, Role::GateUp, Role::Down);
        self.sum_columns("mlp", partial)
    }

    /// Adds up the columns of MLPs, where ranks have some each.
    pub(super) fn sum_columns(&mut self, name: &str, partial: Slot) -> Slot {
        if self.rank.mlp_member().is_alone() { partial } else { self.sum(name, partial) }
    }

    /// Multi-head latent attention (section 2.1.1 of the report).
    fn attention(&mut self, layer: usize, x: Slot) -> Slot {
        let c = self.c;
        let tokens = self.shape.tokens;
        let (heads, rank, rope) = (self.heads(), c.kv_lora_rank, c.qk_rope_head_dim);
        let first = if c.q_lora_rank.is_some() { Role::QA } else { Role::Q };
        let mut x = self.b.activations("attention", x, (layer, first));
        if self.rank.splits_tokens() {
            x = self.b.gather_activations("attention all-gather", &x);
        }
        let q = match c.q_lora_rank {
            Some(_) => {
                let latent = self.b.linear("q_a", &x, layer, Role::QA);
                let weight = self.b.weight(layer, Role::QANorm);
                let latent = self.b.norm("q_a norm", latent, weight, None, LATENT_NORM_EPS);
                let latent = self.b.activations("q_b", latent, (layer, Role::QB));
                self.b.linear("q_b", &latent, layer, Role::QB)
            }
            None => self.b.linear("q", &x, layer, Role::Q),
        };
        let q = q.split_last(heads, c.qk_head_dim());
        let kv_a = self.b.linear("kv_a", &x, layer, Role::KvA);
        let weight = self.b.weight(layer, Role::KvANorm);
        // The rotary key is neither normed nor per head.
        let latent = kv_a.columns(0, rank);
        let latent = self.b.norm("kv_a norm", latent, weight, None, LATENT_NORM_EPS);
        let k_rope = kv_a.columns(rank, rope);
        let positions = self.b.input(Input::Positions, &[tokens]);
        let table = self.b.weight(0, Role::RopeTable);
        let q_rope = q.columns(c.qk_nope_head_dim, rope);
        self.b.push("q rope", op::Rope { x: q_rope, positions, table });
        self.b.push("k rope", op::Rope { x: k_rope.split_last(1, rope), positions, table });
        let cache = self.cache(layer);
        let slots = self.b.input(Input::Slots, &[tokens]);
        self.b.push("cache write", op::CacheWrite { latent, k_rope, slots, cache });
        let attended = match self.shape.form {
            Form::Expanded { keys } => self.expanded(layer, q, latent, k_rope, keys),
            Form::Absorbed => self.absorbed(layer, q),
        };
        let attended = attended.reshaped(&[tokens, heads * c.v_head_dim]);
        let attended = self.b.activations("o", attended, (layer, Role::O));
        let partial = self.b.linear("o", &attended, layer, Role::O);
        self.sum("o", partial)
    }

    /// Heads of this rank.
    fn heads(&self) -> usize {
        self.rank.tensor.part(self.c.num_attention_heads).len()
    }

    fn cache(&mut self, layer: usize) -> Slot {
        let StepShape { pages, page_size, .. } = self.shape;
        self.b.cache(layer, &[pages, page_size, self.c.kv_latent_width()])
    }

    fn expanded(&mut self, layer: usize, q: Slot, latent: Slot, k_rope: Slot, keys: usize) -> Slot {
        let c = self.c;
        let StepShape { tokens, sequences, max_pages, .. } = self.shape;
        let (heads, rank, rope) = (self.heads(), c.kv_lora_rank, c.qk_rope_head_dim);
        let q_starts = self.b.input(Input::QueryStarts, &[sequences + 1]);
        let kv_starts = self.b.input(Input::KeyStarts, &[sequences + 1]);
        let (latent, k_rope) = if keys == tokens {
            (latent, k_rope)
        } else {
            let cache = self.cache(layer);
            let block_table = self.b.input(Input::BlockTable, &[sequences, max_pages]);
            let out = self.b.scratch("past", &[keys, c.kv_latent_width()]);
            self.b.push("cache read", op::CacheRead { cache, block_table, kv_starts, out });
            (out.columns(0, rank), out.columns(rank, rope))
        };
        let latent = self.b.activations("kv_b", latent, (layer, Role::KvB));
        let kv = self.b.linear("kv_b", &latent, layer, Role::KvB);
        let kv = kv.split_last(heads, c.qk_nope_head_dim + c.v_head_dim);
        let out = self.b.scratch("attention", &[tokens, heads, c.v_head_dim]);
        let scale = c.softmax_scale() as f32;
        let work = AttentionWork::default();
        self.b.push(
            "attention",
            op::MlaPrefill { q, kv, k_rope, q_starts, kv_starts, out, scale, work },
        );
        out
    }

    fn absorbed(&mut self, layer: usize, q: Slot) -> Slot {
        let c = self.c;
        let StepShape { tokens, sequences, max_pages, .. } = self.shape;
        let (heads, rank) = (self.heads(), c.kv_lora_rank);
        let (nope, v) = (c.qk_nope_head_dim, c.v_head_dim);
        // kv_b is [h, nope + v, rank]: per head, W_UK above W_UV.
        let quantized = self.b.numerics == Numerics::Fp8 && c.quantization.is_some();
        let role = if quantized { Role::KvBAbsorbed } else { Role::KvB };
        let kv_b = self.b.weight(layer, role).reshaped(&[heads, nope + v, rank]);
        let w_uk = kv_b.narrowed(1, 0, nope);
        let w_uv = kv_b.narrowed(1, nope, v);
        let q_latent = self.b.scratch("q latent", &[tokens, heads, rank]);
        let x = q.columns(0, nope);
        self.b.push("q absorb", op::BatchedLinear { x, w: w_uk, out: q_latent, k_major: true });
        let attended = self.b.scratch("attention", &[tokens, heads, rank]);
        let decode = op::MlaDecode {
            q_latent,
            q_rope: q.columns(nope, c.qk_rope_head_dim),
            cache: self.cache(layer),
            block_table: self.b.input(Input::BlockTable, &[sequences, max_pages]),
            q_starts: self.b.input(Input::QueryStarts, &[sequences + 1]),
            kv_lens: self.b.input(Input::KeyCounts, &[sequences]),
            out: attended,
            scale: c.softmax_scale() as f32,
            work: AttentionWork::default(),
        };
        self.b.push("attention", decode);
        let out = self.b.scratch("v", &[tokens, heads, v]);
        self.b.push("v absorb", op::BatchedLinear { x: attended, w: w_uv, out, k_major: false });
        out
    }

    /// SwiGLU: `down(silu(gate(x)) · up(x))`.
    pub(super) fn mlp(
        &mut self,
        name: &str,
        layer: usize,
        x: &Activations,
        gate_up: Role,
        down: Role,
    ) -> Slot {
        let both = self.b.linear(&format!("{name} gate_up"), x, layer, gate_up);
        let inner = self.b.swiglu(name, both, None);
        let inner = self.b.activations(&format!("{name} down"), inner, (layer, down));
        self.b.linear(&format!("{name} down"), &inner, layer, down)
    }

    /// The last norm, on this rank's rows, and then the rows of all ranks of the tensor group.
    fn final_norm(
        &mut self,
        name: &str,
        add: Option<Slot>,
        residual: Slot,
        (layer, role): (usize, Role),
        outlives: bool,
    ) -> Slot {
        self.b.scope.clear();
        let (weight, eps) = (self.b.weight(layer, role), self.eps());
        let (tokens, h) = (self.shape.tokens, self.c.hidden_size);
        let dtype = residual.desc().dtype();
        let whole = match outlives {
            true => self.b.output(Output::Hidden, dtype, &[tokens, h]),
            false => self.b.scratch(name, &[tokens, h]),
        };
        let rows = self.own_rows();
        let own = match self.rank.splits_tokens() {
            true => whole.narrowed(0, self.rank.tensor.rank * rows, rows),
            false => whole,
        };
        match add {
            Some(add) => self.b.norm_into(name, add, weight, Some(residual), eps, own),
            None => self.b.norm_into(name, residual, weight, None, eps, own),
        }
        if self.rank.splits_tokens() {
            let gather = Collective::AllGather { send: own, recv: whole };
            self.b.collectives(&format!("{name} all-gather"), Group::Tensor, vec![gather]);
        }
        whole
    }

    /// Logits of the wanted rows for this rank's part of the vocabulary, and of each rank's part
    /// the largest.
    fn head(&mut self, prefix: &str, hidden: Slot) {
        let StepShape { tokens, logit_rows, vocabulary, .. } = self.shape;
        if logit_rows == 0 {
            return;
        }
        let wanted = if logit_rows == tokens {
            hidden
        } else {
            let rows = self.b.input(Input::LogitRows, &[logit_rows]);
            let out = self.b.scratch("wanted", &[logit_rows, self.c.hidden_size]);
            let total_rows = tokens as u32;
            let name = format!("{prefix}select rows");
            self.b
                .push(&name, op::GatherRows { table: hidden, rows, out, first_row: 0, total_rows });
            out
        };
        let part = self.rank.tensor.part(self.c.vocab_size);
        let logits = self.b.output(Output::Logits, DType::F32, &[logit_rows, part.len()]);
        let wanted = Activations::of(wanted, None);
        self.b.linear_into(&format!("{prefix}head"), &wanted, 0, Role::Head, logits);
        let ranks = self.rank.tensor.size;
        let out = self.b.output(Output::Candidates, DType::I32, &[2, ranks, logit_rows]);
        let values = out.narrowed(0, 0, 1).reinterpreted(DType::F32, &[ranks, logit_rows]);
        let indices = out.narrowed(0, 1, 1).reinterpreted(DType::I32, &[ranks, logit_rows]);
        let own = |whole: Slot| whole.narrowed(0, self.rank.tensor.rank, 1);
        // A part that is all padding has no candidate: the host leaves it out by its number.
        let limit = vocabulary.clamp(part.start + 1, part.end) - part.start;
        let largest = op::TopK {
            x: logits,
            values: own(values).reinterpreted(DType::F32, &[logit_rows, 1]),
            indices: own(indices).reinterpreted(DType::I32, &[logit_rows, 1]),
            limit: limit as u32,
        };
        self.b.push(&format!("{prefix}largest logit"), largest);
        let gather = |whole: Slot| Collective::AllGather { send: own(whole), recv: whole };
        let batch = vec![gather(values), gather(indices)];
        self.b.collectives(&format!("{prefix}candidates all-gather"), Group::Tensor, batch);
    }
}

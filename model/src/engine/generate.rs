//! Generation: a prompt goes in, tokens come out one by one.

use super::{Engine, EngineError, Sequence, StepOutput, Wanted};
use crate::sampling::{AllowedIds, Sampler, SamplingParams};
use hal::Clock;
use serde::Serialize;
use std::sync::Arc;

/// What to generate.
#[derive(Clone, Debug)]
pub struct GenerationOptions {
    /// The most tokens.
    pub max_tokens: usize,
    /// How to choose them.
    pub sampling: SamplingParams,
    /// Tokens that end the text; they are part of the output.
    pub stop_ids: Vec<u32>,
    /// Whether to go on over them.
    pub ignore_eos: bool,
    /// Ids that exist, if the vocabulary has holes or padding; `None` for all below the model's
    /// or the engine's limit.
    pub allowed: Option<Arc<[bool]>>,
}

/// Why generation ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum FinishReason {
    /// A stop token came.
    Stop,
    /// `max_tokens`, or the context, was reached.
    Length,
}

/// How long the device took, on the device's clock.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Timing {
    /// Which clock.
    pub clock: Clock,
    /// Picoseconds until the first token was known.
    pub prefill_ps: u64,
    /// Picoseconds from then until the last.
    pub decode_ps: u64,
}

/// What was generated.
#[derive(Clone, Debug)]
pub struct Generation {
    /// The new tokens, a stop token included.
    pub token_ids: Vec<u32>,
    /// Why it ended.
    pub finish_reason: FinishReason,
    /// How long it took, where the device has a clock.
    pub timing: Option<Timing>,
}

impl Engine {
    /// Generates from a prompt; `on_token` sees each token as it comes.
    ///
    /// # Errors
    ///
    /// As [`Engine::prefill`] and [`Engine::decode`]; [`EngineError::Sampling`] for impossible
    /// parameters, before anything runs, and for NaN logits.
    pub fn generate(
        &mut self,
        prompt: &[u32],
        options: &GenerationOptions,
        on_token: &mut dyn FnMut(u32),
    ) -> Result<Generation, EngineError> {
        self.check_prompt(prompt)?;
        if !self.is_functional() {
            return Err(EngineError::NoValues);
        }
        let vocabulary = self.vocabulary();
        let allowed = match &options.allowed {
            Some(mask) => AllowedIds::Mask(mask.clone()),
            None => AllowedIds::Below(vocabulary),
        };
        let chooser = Chooser {
            // The device can choose the largest by itself, unless ids below the limit are missing.
            on_device: options.sampling.temperature == 0.0
                && options.allowed.as_ref().is_none_or(|m| is_prefix(m, vocabulary)),
            sampler: Sampler::new(options.sampling.clone(), allowed)?,
        };
        let mut sequence = self.start();
        let result = self.generate_in(&mut sequence, prompt, options, chooser, on_token);
        self.end(sequence);
        result
    }

    /// When the last of all ranks was done with everything submitted so far, on the devices' clock.
    fn now(&self) -> Option<(Clock, u64)> {
        let ends = self.ranks.iter().filter_map(|rank| rank.point().completed_at());
        ends.map(|t| (t.clock, t.picos)).max_by_key(|(_, picos)| *picos)
    }

    /// When the last of all ranks was done with what was submitted so far, in picoseconds on the
    /// devices' clock; `None` where they have none.
    pub fn now_picos(&self) -> Option<u64> {
        self.now().map(|(_, picos)| picos)
    }

    fn generate_in(
        &mut self,
        sequence: &mut Sequence,
        prompt: &[u32],
        options: &GenerationOptions,
        mut chooser: Chooser,
        on_token: &mut dyn FnMut(u32),
    ) -> Result<Generation, EngineError> {
        let mut token_ids = Vec::new();
        let mut finish_reason = FinishReason::Length;
        // What ran before (loading, another prompt) has ended by now.
        let began = self.now();
        let mut first = None;
        let mut output = None;
        if options.max_tokens > 0 {
            output = Some(self.prefill(sequence, prompt, chooser.wanted())?);
            first = self.now();
        }
        while let Some(step) = output.take() {
            let token = chooser.choose(&step)?;
            token_ids.push(token);
            on_token(token);
            if !options.ignore_eos && options.stop_ids.contains(&token) {
                finish_reason = FinishReason::Stop;
            } else if token_ids.len() < options.max_tokens
                && sequence.len() < self.options.max_model_len
            {
                output = Some(self.decode(&mut [(sequence, token)], chooser.wanted())?);
            }
        }
        let timing = match (began, first, self.now()) {
            (Some((clock, start)), Some((_, first)), Some((_, end))) => {
                Some(Timing { clock, prefill_ps: first - start, decode_ps: end - first })
            }
            _ => None,
        };
        Ok(Generation { token_ids, finish_reason, timing })
    }
}

/// Chooses the next token, on the device or on the host.
struct Chooser {
    on_device: bool,
    sampler: Sampler,
}

impl Chooser {
    fn wanted(&self) -> Wanted {
        if self.on_device { Wanted::Greedy } else { Wanted::LastLogits }
    }

    fn choose(&mut self, step: &StepOutput) -> Result<u32, EngineError> {
        match step.greedy.first() {
            Some(&token) => Ok(token),
            None => Ok(self.sampler.sample(&step.logits)?),
        }
    }
}

/// Whether the mask allows exactly the ids below `limit`.
fn is_prefix(mask: &[bool], limit: usize) -> bool {
    mask.iter().enumerate().all(|(id, &real)| real == (id < limit))
}

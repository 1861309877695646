//! One step: new tokens of a batch of sequences go through the model.

use super::program::{Module, ProgramKey, read_tensor};
use super::{Engine, EngineError, Sequence};
use crate::graph::{Form, Input, Output, StepShape};
use hal::Tensor;
use hal::op::AttentionWork;

/// What a step is to give back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wanted {
    /// Nothing: an inner piece of a long prompt.
    Nothing,
    /// Of each sequence's last token, the most likely next one, chosen on the device.
    Greedy,
    /// Logits of each sequence's last token.
    LastLogits,
    /// Logits of every token.
    AllLogits,
}

/// What a step gave.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct StepOutput {
    /// With [`Wanted::Greedy`], one token per sequence.
    pub greedy: Vec<u32>,
    /// With logits wanted, `[rows, vocab]`, row-major.
    pub logits: Vec<f32>,
}

/// The new tokens of one sequence.
#[derive(Debug)]
pub(super) struct NewTokens<'s> {
    pub(super) sequence: &'s mut Sequence,
    pub(super) tokens: &'s [u32],
}

/// A batch, as a program's inputs.
struct Batch {
    tokens: Vec<u32>,
    /// Of each sequence: first new token within the batch, tokens cached before, new tokens.
    spans: Vec<(usize, usize, usize)>,
    pages: Vec<Vec<u32>>,
    slots: Vec<i32>,
    max_pages: usize,
}

impl Batch {
    fn inputs(&self, input: Input) -> Vec<i32> {
        // Token ids, positions and lengths are below the context and the vocabulary, both checked.
        let int = |n: usize| n as i32;
        let starts = |lengths: Vec<usize>| {
            let mut sum = 0;
            let mut starts = vec![0];
            starts.extend(lengths.into_iter().map(|n| {
                sum += n;
                int(sum)
            }));
            starts
        };
        match input {
            Input::TokenIds => self.tokens.iter().map(|&t| t as i32).collect(),
            Input::Positions => {
                self.spans.iter().flat_map(|&(_, past, new)| (past..past + new).map(int)).collect()
            }
            Input::Slots => self.slots.clone(),
            Input::QueryStarts => starts(self.spans.iter().map(|s| s.2).collect()),
            Input::KeyStarts => starts(self.spans.iter().map(|s| s.1 + s.2).collect()),
            Input::KeyCounts => self.spans.iter().map(|s| int(s.1 + s.2)).collect(),
            Input::BlockTable => {
                let mut table = vec![0; self.pages.len() * self.max_pages];
                for (row, pages) in table.chunks_mut(self.max_pages).zip(&self.pages) {
                    row.iter_mut().zip(pages).for_each(|(to, &page)| *to = page as i32);
                }
                table
            }
            Input::LogitRows => self.spans.iter().map(|s| int(s.0 + s.2 - 1)).collect(),
        }
    }

    fn work(&self) -> AttentionWork {
        let mut work = AttentionWork::default();
        self.spans.iter().for_each(|s| work.add(s.2 as u64, (s.1 + s.2) as u64));
        work
    }

    fn keys(&self) -> usize {
        self.spans.iter().map(|s| s.1 + s.2).sum()
    }
}

impl Engine {
    /// Starts a sequence.
    pub fn start(&self) -> Sequence {
        Sequence::default()
    }

    /// Ends a sequence and frees its pages.
    pub fn end(&mut self, sequence: Sequence) {
        self.cache.release(sequence);
    }

    /// Checks a prompt before anything is computed.
    ///
    /// # Errors
    ///
    /// Empty, a token out of range, or longer than the context.
    pub fn check_prompt(&self, tokens: &[u32]) -> Result<(), EngineError> {
        if tokens.is_empty() {
            return Err(EngineError::EmptyPrompt);
        }
        let vocabulary = self.config.vocab_size;
        if let Some(position) = tokens.iter().position(|&id| id as usize >= vocabulary) {
            return Err(EngineError::TokenOutOfRange {
                id: tokens[position],
                position,
                vocabulary,
            });
        }
        if tokens.len() > self.options.max_model_len {
            return Err(EngineError::ContextFull {
                tokens: tokens.len(),
                limit: self.options.max_model_len,
                hint: " or allow a longer context",
            });
        }
        Ok(())
    }

    /// Takes tokens into a sequence's cache by MLA's expanded form, in pieces of at most
    /// `prefill_chunk`.
    ///
    /// # Errors
    ///
    /// As [`Engine::check_prompt`]; [`EngineError::CacheFull`]; the device's.
    pub fn prefill(
        &mut self,
        sequence: &mut Sequence,
        tokens: &[u32],
        wanted: Wanted,
    ) -> Result<StepOutput, EngineError> {
        self.check_prompt(tokens)?;
        self.check_room(sequence.len() + tokens.len())?;
        let mut output = StepOutput::default();
        let mut rest = tokens;
        while !rest.is_empty() {
            let (chunk, later) = rest.split_at(rest.len().min(self.options.prefill_chunk));
            let last = later.is_empty();
            let wanted = if last || wanted == Wanted::AllLogits { wanted } else { Wanted::Nothing };
            let new = NewTokens { sequence: &mut *sequence, tokens: chunk };
            let (step, _) = self.step(&mut [new], true, wanted)?;
            output.greedy = step.greedy;
            output.logits.extend(step.logits);
            rest = later;
        }
        Ok(output)
    }

    /// One token each for a batch of sequences, by MLA's absorbed form.
    ///
    /// # Errors
    ///
    /// [`EngineError::ContextFull`], [`EngineError::CacheFull`]; the device's.
    pub fn decode(
        &mut self,
        batch: &mut [(&mut Sequence, u32)],
        wanted: Wanted,
    ) -> Result<StepOutput, EngineError> {
        for (sequence, token) in batch.iter() {
            self.check_prompt(&[*token])?;
            self.check_room(sequence.len() + 1)?;
        }
        let mut new: Vec<NewTokens<'_>> = batch
            .iter_mut()
            .map(|(sequence, token)| NewTokens { sequence, tokens: std::slice::from_ref(token) })
            .collect();
        Ok(self.step(&mut new, false, wanted)?.0)
    }

    /// Logits of every token of a sequence, and where the model has an MTP module, its logits for
    /// every token but the last: row `i` from hidden state `i` and token `i + 1`.
    ///
    /// # Errors
    ///
    /// As [`Engine::prefill`].
    pub fn all_logits(
        &mut self,
        tokens: &[u32],
    ) -> Result<(Vec<f32>, Option<Vec<f32>>), EngineError> {
        self.check_prompt(tokens)?;
        let mut sequence = self.start();
        let mut mtp_sequence = self.start();
        let result = self.all_logits_in(&mut sequence, &mut mtp_sequence, tokens);
        self.end(sequence);
        result
    }

    fn all_logits_in(
        &mut self,
        sequence: &mut Sequence,
        mtp: &mut Sequence,
        tokens: &[u32],
    ) -> Result<(Vec<f32>, Option<Vec<f32>>), EngineError> {
        let (mut logits, mut mtp_logits) = (Vec::new(), self.has_mtp.then(Vec::new));
        let mut at = 0;
        while at < tokens.len() {
            let end = (at + self.options.prefill_chunk).min(tokens.len());
            let new = NewTokens { sequence: &mut *sequence, tokens: &tokens[at..end] };
            let (step, hidden) = self.step(&mut [new], true, Wanted::AllLogits)?;
            logits.extend(step.logits);
            // The module's token i is the model's token i + 1, so the last hidden state is left.
            let following = &tokens[at + 1..(end + 1).min(tokens.len())];
            if let (Some(out), Some(hidden), false) =
                (&mut mtp_logits, hidden, following.is_empty())
            {
                let hidden = hidden.narrowed(0, 0, following.len());
                // Its layer has pages of the same numbers.
                mtp.share_pages(sequence);
                let new = NewTokens { sequence: &mut *mtp, tokens: following };
                let step = self.mtp_step(new, &hidden)?;
                out.extend(step.logits);
            }
            at = end;
        }
        Ok((logits, mtp_logits))
    }

    fn check_room(&self, tokens: usize) -> Result<(), EngineError> {
        let limit = self.options.max_model_len;
        if tokens > limit {
            let hint = " or allow a longer context";
            return Err(EngineError::ContextFull { tokens, limit, hint });
        }
        Ok(())
    }

    fn step(
        &mut self,
        new: &mut [NewTokens<'_>],
        expanded: bool,
        wanted: Wanted,
    ) -> Result<(StepOutput, Option<Tensor>), EngineError> {
        for item in new.iter_mut() {
            self.cache.grow(item.sequence, item.tokens.len())?;
        }
        let (output, hidden) = self.run(Module::Main, new, expanded, wanted, None)?;
        new.iter_mut().for_each(|item| item.sequence.advance(item.tokens.len()));
        Ok((output, hidden))
    }

    fn mtp_step(&mut self, new: NewTokens<'_>, hidden: &Tensor) -> Result<StepOutput, EngineError> {
        let mut new = [new];
        let (output, _) = self.run(Module::Mtp, &new, true, Wanted::AllLogits, Some(hidden))?;
        let [item] = &mut new;
        item.sequence.advance(item.tokens.len());
        Ok(output)
    }

    fn run(
        &mut self,
        module: Module,
        new: &[NewTokens<'_>],
        expanded: bool,
        wanted: Wanted,
        hidden: Option<&Tensor>,
    ) -> Result<(StepOutput, Option<Tensor>), EngineError> {
        let page_size = self.options.page_size;
        let max_pages = self.options.max_model_len.div_ceil(page_size);
        let mut batch = Batch {
            tokens: Vec::new(),
            spans: Vec::new(),
            pages: Vec::new(),
            slots: Vec::new(),
            max_pages,
        };
        for item in new {
            let past = item.sequence.len();
            batch.spans.push((batch.tokens.len(), past, item.tokens.len()));
            batch.tokens.extend(item.tokens);
            batch.pages.push(item.sequence.pages().to_vec());
            let positions = past..past + item.tokens.len();
            batch.slots.extend(positions.map(|p| item.sequence.slot(p, page_size) as i32));
        }
        let tokens = batch.tokens.len();
        let shape = StepShape {
            tokens,
            sequences: new.len(),
            logit_rows: match wanted {
                Wanted::Nothing => 0,
                Wanted::Greedy | Wanted::LastLogits => new.len(),
                Wanted::AllLogits => tokens,
            },
            form: if expanded { Form::Expanded { keys: batch.keys() } } else { Form::Absorbed },
            pages: self.cache.pages(),
            page_size,
            max_pages,
            vocabulary: self.options.vocabulary.unwrap_or(self.config.vocab_size),
        };
        let key = ProgramKey { module, shape };
        let mut program = self.program(key, hidden)?;
        let stream = &*self.stream;
        program.send(stream, |input| batch.inputs(input))?;
        program.submit(stream, batch.work())?;
        let mut output = StepOutput::default();
        let timeout = self.options.timeout;
        match wanted {
            Wanted::Nothing => {}
            Wanted::Greedy => {
                if let Some(tensor) = program.output(Output::Greedy) {
                    let bytes = read_tensor(stream, tensor, timeout)?;
                    let ids = bytes.as_chunks::<4>().0.iter().map(|b| u32::from_le_bytes(*b));
                    output.greedy = ids.collect();
                }
            }
            Wanted::LastLogits | Wanted::AllLogits => {
                if let Some(tensor) = program.output(Output::Logits) {
                    let bytes = read_tensor(stream, tensor, timeout)?;
                    let values = bytes.as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b));
                    output.logits = values.collect();
                }
            }
        }
        let hidden = program.output(Output::Hidden).cloned();
        self.keep(key, program);
        Ok((output, hidden))
    }
}

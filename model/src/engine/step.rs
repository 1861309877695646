//! One step: new tokens of a batch of sequences go through the model, on every rank.

use super::batch::{Batch, NewTokens};
use super::program::{Module, Program, ProgramKey, read_tensor};
use super::shape::{Part, Sizes, micro_batches, tokens_of};
use super::{Engine, EngineError, PagePool, Sequence};
use crate::graph::{Form, MicroBatch, Output, StepShape};
use crate::schedule::COMPUTE;
use hal::{Operand, Tensor};
use std::collections::HashMap;
use std::time::Instant;

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

/// Hidden states of one micro-batch of a step, on each rank of the last stage that took part.
struct Hidden {
    tokens: usize,
    on: HashMap<usize, Tensor>,
}

/// The micro-batches of each data rank that takes part in a step.
type Batches = Vec<(usize, Vec<Batch>)>;

impl Engine {
    /// Starts a sequence, with the data rank that has the fewest, of those that have not failed.
    pub fn start(&mut self) -> Sequence {
        let pools = self.pools.iter().enumerate();
        let load = |pool: &PagePool| (pool.has_failed(), pool.sequences());
        let least = pools.min_by_key(|(_, pool)| load(pool)).map_or(0, |(at, _)| at);
        self.pools[least].start();
        Sequence::on(least)
    }

    /// Ends a sequence and frees its pages.
    pub fn end(&mut self, sequence: Sequence) {
        self.pools[sequence.data_rank()].release(sequence);
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
        self.check_room(tokens.len())
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

    /// Takes tokens into the caches of several sequences in one step, by MLA's expanded form.
    ///
    /// # Errors
    ///
    /// As [`Engine::prefill`].
    pub fn prefill_batch(
        &mut self,
        batch: &mut [(&mut Sequence, &[u32])],
        wanted: Wanted,
    ) -> Result<StepOutput, EngineError> {
        for (sequence, tokens) in batch.iter() {
            self.check_prompt(tokens)?;
            self.check_room(sequence.len() + tokens.len())?;
        }
        let mut new: Vec<NewTokens<'_>> =
            batch.iter_mut().map(|(sequence, tokens)| NewTokens { sequence, tokens }).collect();
        Ok(self.step(&mut new, true, wanted)?.0)
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
        // Its layer has pages of the same numbers.
        let mut mtp_sequence = Sequence::on(sequence.data_rank());
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
            for hidden in hidden {
                let next = at + hidden.tokens;
                // The module's token i is the model's token i + 1: the last hidden state is left.
                let following = &tokens[at + 1..(next + 1).min(tokens.len())];
                if let (Some(out), false) = (&mut mtp_logits, following.is_empty()) {
                    mtp.share_pages(sequence);
                    let new = NewTokens { sequence: &mut *mtp, tokens: following };
                    out.extend(self.mtp_step(new, &hidden)?.logits);
                }
                at = next;
            }
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
    ) -> Result<(StepOutput, Vec<Hidden>), EngineError> {
        for item in new.iter_mut() {
            let pool = &mut self.pools[item.sequence.data_rank()];
            pool.grow(item.sequence, item.tokens.len())?;
        }
        let (output, hidden) = self.run(Module::Main, new, expanded, wanted, None)?;
        new.iter_mut().for_each(|item| item.sequence.advance(item.tokens.len()));
        Ok((output, hidden))
    }

    fn mtp_step(&mut self, new: NewTokens<'_>, hidden: &Hidden) -> Result<StepOutput, EngineError> {
        let mut new = [new];
        let (output, _) = self.run(Module::Mtp, &new, true, Wanted::AllLogits, Some(hidden))?;
        let [item] = &mut new;
        item.sequence.advance(item.tokens.len());
        Ok(output)
    }

    /// Who takes part in a step, and with which tokens.
    fn batches(&self, module: Module, new: &[NewTokens<'_>], wanted: Wanted) -> Batches {
        let page_size = self.options.page_size;
        let sizes = self.sizes();
        let spread = self.plan.experts().is_some();
        let of = |data: usize| {
            let items = new.iter().enumerate();
            let items = items.filter(move |(_, item)| item.sequence.data_rank() == data);
            Batch::of(items, page_size, sizes.max_pages(), wanted == Wanted::AllLogits)
        };
        let all: Vec<(usize, Batch)> = (0..self.pools.len()).map(|data| (data, of(data))).collect();
        // Ranks that share experts run the same collectives, with or without tokens of their own.
        let most = all.iter().map(|(_, batch)| batch.len()).max().unwrap_or(0);
        all.into_iter()
            .filter(|(_, batch)| spread || batch.len() > 0)
            .map(|(data, batch)| {
                let tokens = if spread { most } else { batch.len() };
                let overlap = match module {
                    Module::Main => self.options.overlap,
                    Module::Mtp => super::Overlap::None,
                };
                let half = tokens_of(0, 2, batch.len());
                let mut parts = match micro_batches(overlap, tokens) {
                    2 => batch.split(half).to_vec(),
                    _ => vec![batch],
                };
                let padding = self.pools[data].padding();
                for part in &mut parts {
                    part.pad(sizes.filled_up(part.len()), padding);
                }
                (data, parts)
            })
            .collect()
    }

    fn sizes(&self) -> Sizes {
        Sizes::of(&self.config, &self.plan, self.options)
    }

    fn shape(
        &self,
        batch: &Batch,
        expanded: bool,
        wanted: Wanted,
        expert_tokens: usize,
    ) -> StepShape {
        self.sizes().shape(Part {
            tokens: batch.len(),
            sequences: batch.sequences(),
            logit_rows: match wanted {
                Wanted::Nothing => 0,
                _ => batch.logit_rows().len(),
            },
            form: if expanded { Form::Expanded { keys: batch.keys() } } else { Form::Absorbed },
            expert_tokens,
        })
    }

    fn run(
        &mut self,
        module: Module,
        new: &[NewTokens<'_>],
        expanded: bool,
        wanted: Wanted,
        hidden: Option<&Hidden>,
    ) -> Result<(StepOutput, Vec<Hidden>), EngineError> {
        let batches = self.batches(module, new, wanted);
        let parts = batches.first().map_or(0, |(_, parts)| parts.len());
        let spread = self.plan.experts().is_some();
        let together: Vec<usize> = (0..if spread { parts } else { 0 })
            .map(|part| batches.iter().map(|(_, parts)| parts[part].len()).sum())
            .collect();
        let mut running: Vec<Running> = Vec::new();
        for (at, (data, parts)) in batches.iter().enumerate() {
            let shapes = parts.iter().enumerate().map(|(part, batch)| {
                self.shape(batch, expanded, wanted, together.get(part).copied().unwrap_or(0))
            });
            let key = ProgramKey { module, shapes: shapes.collect() };
            for stage in 0..self.plan.options().pipeline {
                if module == Module::Mtp && stage + 1 < self.plan.options().pipeline {
                    continue;
                }
                for tensor in 0..self.plan.options().tensor {
                    let rank = self.plan.rank_at(stage, *data, tensor);
                    running.push(Running {
                        rank,
                        batches: at,
                        key: key.clone(),
                        program: None,
                        at: Some(0),
                    });
                }
            }
        }
        let result = self.issue(&batches, &mut running, hidden);
        let result = result.and_then(|()| self.collect(&batches, &running, new.len(), wanted));
        let hidden = self.hidden(&batches, &running);
        let took_part: Vec<usize> = running.iter().map(|run| run.rank).collect();
        for run in running {
            if let Some(program) = run.program {
                self.ranks[run.rank].keep(run.key, program);
            }
        }
        match result {
            Ok(output) => Ok((output, hidden)),
            Err(error) => Err(self.failed(error, &took_part)),
        }
    }

    /// Submits the commands of every rank: as one list each, or one by one and in turns, so that
    /// ranks meet in their collectives while later commands are still being submitted.
    fn issue(
        &mut self,
        batches: &Batches,
        running: &mut [Running],
        hidden: Option<&Hidden>,
    ) -> Result<(), EngineError> {
        // All programs before any rank begins: one that cannot be made leaves nobody waiting.
        for run in running.iter_mut() {
            let (_, parts) = &batches[run.batches];
            let rank = &mut self.ranks[run.rank];
            let tokens = parts.first().map_or(0, Batch::len);
            let hidden = hidden
                .and_then(|h| h.on.get(&run.rank))
                .map(|h| h.narrowed(0, 0, tokens.min(h.desc().dim(0))));
            let program = rank.program(&self.config, &self.options, &run.key, hidden.as_ref())?;
            run.program = Some(program);
        }
        for run in running.iter_mut() {
            let (_, parts) = &batches[run.batches];
            let rank = &self.ranks[run.rank];
            let Some(program) = &mut run.program else { continue };
            program.send(&**rank.lane(COMPUTE), |part, input| parts[part].inputs(input))?;
            let work: Vec<_> = parts.iter().map(Batch::work).collect();
            program.begin(&work);
            if !self.options.enforce_eager {
                program.execute(&*rank.device, &rank.lanes)?;
                run.at = None;
            }
        }
        while running.iter().any(|run| run.at.is_some()) {
            for run in running.iter_mut() {
                if let (Some(at), Some(program)) = (run.at, &mut run.program) {
                    run.at = program.submit_from(at, &self.ranks[run.rank].lanes)?;
                }
            }
        }
        Ok(())
    }

    /// Reads what is wanted, and waits until every rank is done.
    fn collect(
        &self,
        batches: &Batches,
        running: &[Running],
        items: usize,
        wanted: Wanted,
    ) -> Result<StepOutput, EngineError> {
        let mut output = StepOutput::default();
        if wanted == Wanted::Nothing {
            return Ok(output);
        }
        let functional = self.is_functional();
        let deadline = Instant::now() + self.options.timeout;
        let vocabulary = self.config.vocab_size;
        output.greedy.resize(if wanted == Wanted::Greedy && functional { items } else { 0 }, 0);
        let mut rows: Vec<(usize, Vec<f32>)> = Vec::new();
        // Where the rows of the tensor group at hand begin: its first rank makes them.
        let mut group_began = 0;
        // Without values there is nothing to read, and times all the same.
        let last_stage = |run: &&Running| functional && self.ranks[run.rank].plan.is_last_stage();
        for run in running.iter().filter(last_stage) {
            let rank = &self.ranks[run.rank];
            let Some(program) = &run.program else { continue };
            let stream = &**rank.lane(COMPUTE);
            let (_, parts) = &batches[run.batches];
            let first = rank.plan.tensor.rank == 0;
            let mut at = 0;
            if first {
                group_began = rows.len();
            }
            for (part, batch) in parts.iter().enumerate() {
                let items = batch.row_items();
                let left = deadline.saturating_duration_since(Instant::now());
                match wanted {
                    Wanted::Greedy if first => {
                        let Some(tensor) = program.output(part, Output::Candidates) else {
                            continue;
                        };
                        let bytes = read_tensor(stream, tensor, left)?;
                        let tokens = self.choose(&bytes, items.len(), rank.plan.tensor.size);
                        for (item, token) in items.iter().zip(tokens) {
                            output.greedy[*item] = token;
                        }
                    }
                    Wanted::LastLogits | Wanted::AllLogits => {
                        let Some(tensor) = program.output(part, Output::Logits) else { continue };
                        let bytes = read_tensor(stream, tensor, left)?;
                        let columns = rank.plan.tensor.part(vocabulary);
                        let values = bytes.as_chunks::<4>().0;
                        for (item, own) in items.iter().zip(values.chunks(columns.len())) {
                            if first {
                                rows.push((*item, vec![0.0; vocabulary]));
                            }
                            let row = &mut rows[group_began + at].1[columns.clone()];
                            row.iter_mut()
                                .zip(own)
                                .for_each(|(to, b)| *to = f32::from_le_bytes(*b));
                            at += 1;
                        }
                    }
                    _ => {}
                }
            }
        }
        // A stable order by item keeps the rows of each item in theirs.
        rows.sort_by_key(|(item, _)| *item);
        output.logits = rows.into_iter().flat_map(|(_, row)| row).collect();
        for run in running {
            let left = deadline.saturating_duration_since(Instant::now());
            self.ranks[run.rank].point().synchronize(left)?;
        }
        Ok(output)
    }

    /// Of each row, the token with the largest logit: the best of the candidates of each rank's part
    /// of the vocabulary. Ties go to the lower token.
    fn choose(&self, bytes: &[u8], rows: usize, ranks: usize) -> Vec<u32> {
        let words: Vec<u32> =
            bytes.as_chunks::<4>().0.iter().map(|b| u32::from_le_bytes(*b)).collect();
        let (values, indices) = words.split_at(words.len() / 2);
        let best = |row: usize| {
            let mut best: Option<(f32, u32)> = None;
            for rank in 0..ranks {
                let first =
                    crate::plan::Member { rank, size: ranks }.part(self.config.vocab_size).start;
                let at = rank * rows + row;
                let (value, token) = (f32::from_bits(values[at]), first as u32 + indices[at]);
                let exists = (token as usize) < self.vocabulary();
                if exists && best.is_none_or(|(most, _)| value > most) {
                    best = Some((value, token));
                }
            }
            best.map_or(0, |(_, token)| token)
        };
        (0..rows).map(best).collect()
    }

    fn hidden(&self, batches: &Batches, running: &[Running]) -> Vec<Hidden> {
        let parts = batches.first().map_or(0, |(_, parts)| parts.len());
        let of = |part: MicroBatch| {
            let tokens = batches.iter().map(|(_, parts)| parts[part].real_tokens()).sum();
            let on = running.iter().filter_map(|run| {
                let hidden = run.program.as_ref()?.output(part, Output::Hidden)?;
                Some((run.rank, hidden.clone()))
            });
            Hidden { tokens, on: on.collect() }
        };
        // Data ranks without shared experts may have been split differently: each sequence is with
        // one of them, and only steps over one sequence ask.
        let parts = batches.iter().map(|(_, p)| p.len()).min().unwrap_or(parts);
        (0..parts).map(of).collect()
    }
}

/// A rank's part in a step.
struct Running {
    rank: usize,
    /// Its data rank's place among the batches.
    batches: usize,
    key: ProgramKey,
    program: Option<Program>,
    /// The command to submit next; none when all are.
    at: Option<usize>,
}

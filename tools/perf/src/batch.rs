//! What each micro-batch of a step looks like, on one data rank: as the engine cuts them.

use crate::workload::{Phase, Workload};
use hal::op::AttentionWork;
use model::config::ModelConfig;
use model::engine::{self, EngineOptions, StepPart, StepSizes};
use model::graph::{Form, StepShape};
use model::plan::ParallelPlan;

/// One micro-batch.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct MicroBatch {
    pub(crate) shape: StepShape,
    pub(crate) work: AttentionWork,
}

/// New tokens of sequences that are alike: how many, how long, how much before, and whether the
/// sequences' last tokens are among them.
#[derive(Clone, Copy, Debug)]
struct Span {
    sequences: usize,
    tokens: usize,
    past: usize,
    ends: bool,
}

/// Which part of the model a step goes through.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Module {
    Main,
    Mtp,
}

/// The micro-batches of one data rank.
pub(crate) fn micro_batches(
    config: &ModelConfig,
    plan: &ParallelPlan,
    options: &EngineOptions,
    workload: &Workload,
    module: Module,
) -> Vec<MicroBatch> {
    let queries = workload.queries();
    let whole = match workload.phase {
        Phase::Prefill { batch, input_len, past } => {
            Span { sequences: batch, tokens: input_len, past, ends: true }
        }
        Phase::Decode { batch, kv } => {
            Span { sequences: batch, tokens: queries, past: kv - 1, ends: true }
        }
    };
    let total = whole.sequences * whole.tokens;
    let parts = match engine::micro_batches(options.overlap, total) {
        2 if module == Module::Main => cut(whole, total.div_ceil(2)).to_vec(),
        _ => vec![vec![whole]],
    };
    let decode = matches!(workload.phase, Phase::Decode { .. });
    let all_rows = decode && module == Module::Main;
    let sizes = StepSizes::of(config, plan, *options);
    parts
        .into_iter()
        .map(|spans| {
            let mut work = AttentionWork::default();
            let (mut tokens, mut sequences, mut keys, mut logit_rows) = (0, 0, 0, 0);
            for span in &spans {
                let all = span.past + span.tokens;
                for _ in 0..span.sequences {
                    work.add(span.tokens as u64, all as u64);
                }
                tokens += span.sequences * span.tokens;
                sequences += span.sequences;
                keys += span.sequences * all;
                logit_rows += match (all_rows, span.ends) {
                    (true, _) => span.sequences * span.tokens,
                    (false, true) => span.sequences,
                    (false, false) => 0,
                };
            }
            let padded = sizes.filled_up(tokens);
            if padded > tokens {
                // A sequence of its own fills the batch up.
                let extra = padded - tokens;
                work.add(extra as u64, extra as u64);
                (sequences, keys) = (sequences + 1, keys + extra);
            }
            let shape = sizes.shape(StepPart {
                tokens: padded,
                sequences,
                logit_rows,
                form: if decode { Form::Absorbed } else { Form::Expanded { keys } },
                expert_tokens: padded * plan.options().data,
            });
            MicroBatch { shape, work }
        })
        .collect()
}

/// Cuts after so many tokens, through a sequence if need be.
fn cut(whole: Span, tokens: usize) -> [Vec<Span>; 2] {
    let before = tokens / whole.tokens;
    let through = tokens % whole.tokens;
    let rest = whole.sequences - before - usize::from(through > 0);
    let some = |sequences, tokens, past, ends| {
        (sequences > 0 && tokens > 0).then_some(Span { sequences, tokens, past, ends })
    };
    let Span { tokens: each, past, .. } = whole;
    let first = [some(before, each, past, true), some(1, through, past, false)];
    let left = if through > 0 { each - through } else { 0 };
    let second = [some(1, left, past + through, true), some(rest, each, past, true)];
    [first, second].map(|spans| spans.into_iter().flatten().collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use model::config::Preset;
    use model::engine::Overlap;
    use model::plan::ParallelOptions;

    fn parts(phase: Phase, overlap: Overlap, tensor: usize, data: usize) -> Vec<MicroBatch> {
        let config = Preset::DeepSeekV3.config();
        let expert = data > 1;
        let options = ParallelOptions { tensor, data, expert, ..ParallelOptions::default() };
        let plan = ParallelPlan::new(&config, options).unwrap();
        let options = EngineOptions { overlap, max_model_len: 4096, ..EngineOptions::default() };
        micro_batches(&config, &plan, &options, &Workload::new(phase), Module::Main)
    }

    #[test]
    fn halves_have_all_tokens_and_pairs_and_a_cut_goes_through_a_sequence() {
        for (batch, input_len) in [(1, 7), (3, 5), (4, 4096), (2, 1)] {
            let phase = Phase::Prefill { batch, input_len, past: 0 };
            let whole = parts(phase, Overlap::None, 1, 1);
            let halves = parts(phase, Overlap::TwoBatch, 1, 1);
            assert_eq!((whole.len(), halves.len()), (1, 2));
            let sum = |f: fn(&MicroBatch) -> u64| halves.iter().map(f).sum::<u64>();
            assert_eq!(sum(|m| m.shape.tokens as u64), (batch * input_len) as u64);
            assert_eq!(sum(|m| m.work.pairs), whole[0].work.pairs);
            assert_eq!(sum(|m| m.shape.logit_rows as u64), batch as u64);
        }
        let halves =
            parts(Phase::Prefill { batch: 1, input_len: 8, past: 0 }, Overlap::TwoBatch, 1, 1);
        assert_eq!(halves[0].shape.form, Form::Expanded { keys: 4 });
        assert_eq!(
            halves[1].shape.form,
            Form::Expanded { keys: 8 },
            "it reads the first half's keys"
        );
    }

    #[test]
    fn ranks_that_split_tokens_fill_up() {
        let decode = parts(Phase::Decode { batch: 5, kv: 100 }, Overlap::None, 4, 2);
        assert_eq!(decode[0].shape.tokens, 8);
        assert_eq!(decode[0].shape.sequences, 6);
        assert_eq!(decode[0].shape.expert_tokens, 16);
        assert_eq!(decode[0].shape.logit_rows, 5);
    }
}

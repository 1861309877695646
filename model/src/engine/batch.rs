//! Batches: which new tokens go through the model together, and what the host sends for them.

use super::Sequence;
use crate::graph::Input;
use hal::op::AttentionWork;
use std::ops::Range;

/// The new tokens of one sequence.
#[derive(Debug)]
pub(super) struct NewTokens<'s> {
    pub(super) sequence: &'s mut Sequence,
    pub(super) tokens: &'s [u32],
}

/// Consecutive new tokens of one sequence within a batch.
#[derive(Clone, Debug)]
struct Span {
    /// Which item of the step it belongs to; none for padding.
    item: Option<usize>,
    /// Its tokens within the batch.
    tokens: Range<usize>,
    /// Tokens of the sequence that are cached before.
    past: usize,
    /// Whether the sequence's last new token is among them.
    ends: bool,
    pages: Vec<u32>,
}

/// New tokens of one data rank's sequences: a step, or one micro-batch of it.
#[derive(Clone, Debug)]
pub(super) struct Batch {
    tokens: Vec<u32>,
    spans: Vec<Span>,
    page_size: usize,
    max_pages: usize,
    /// Whether every token's logits are wanted, or only those of each sequence's last one.
    all_rows: bool,
}

impl Batch {
    /// The new tokens of a data rank, in the order of the step's items.
    pub(super) fn of<'a>(
        items: impl Iterator<Item = (usize, &'a NewTokens<'a>)>,
        page_size: usize,
        max_pages: usize,
        all_rows: bool,
    ) -> Self {
        let (mut tokens, mut spans) = (Vec::new(), Vec::new());
        for (item, new) in items {
            let start = tokens.len();
            tokens.extend_from_slice(new.tokens);
            spans.push(Span {
                item: Some(item),
                tokens: start..tokens.len(),
                past: new.sequence.len(),
                ends: true,
                pages: new.sequence.pages().to_vec(),
            });
        }
        Batch { tokens, spans, page_size, max_pages, all_rows }
    }

    /// New tokens, padding included.
    pub(super) fn len(&self) -> usize {
        self.tokens.len()
    }

    pub(super) fn sequences(&self) -> usize {
        self.spans.len()
    }

    /// New tokens without padding.
    pub(super) fn real_tokens(&self) -> usize {
        self.spans.iter().filter(|s| s.item.is_some()).map(|s| s.tokens.len()).sum()
    }

    /// Cuts the batch after `tokens` tokens, through a sequence if need be.
    pub(super) fn split(mut self, tokens: usize) -> [Batch; 2] {
        let mut second = Batch { tokens: self.tokens.split_off(tokens), spans: Vec::new(), ..self };
        let mut first = Vec::new();
        for span in std::mem::take(&mut self.spans) {
            let Range { start, end } = span.tokens.clone();
            let cut = tokens.clamp(start, end);
            let rest = (cut < end).then(|| Span {
                tokens: cut - tokens..end - tokens,
                past: span.past + (cut - start),
                ..span.clone()
            });
            if start < cut {
                first.push(Span { tokens: start..cut, ends: span.ends && rest.is_none(), ..span });
            }
            second.spans.extend(rest);
        }
        self.spans = first;
        [self, second]
    }

    /// Fills up to `full` tokens with a sequence of its own, whose outcome is nobody's.
    pub(super) fn pad(&mut self, full: usize, pages: &[u32]) {
        let len = self.len();
        if full == len {
            return;
        }
        self.tokens.resize(full, 0);
        self.spans.push(Span {
            item: None,
            tokens: len..full,
            past: 0,
            ends: false,
            pages: pages.to_vec(),
        });
    }

    /// Keys that attention sees in all.
    pub(super) fn keys(&self) -> usize {
        self.spans.iter().map(|s| s.past + s.tokens.len()).sum()
    }

    pub(super) fn work(&self) -> AttentionWork {
        let mut work = AttentionWork::default();
        for s in &self.spans {
            work.add(s.tokens.len() as u64, (s.past + s.tokens.len()) as u64);
        }
        work
    }

    /// Tokens whose logits are wanted.
    pub(super) fn logit_rows(&self) -> Vec<usize> {
        let real = self.spans.iter().filter(|s| s.item.is_some());
        match self.all_rows {
            true => real.flat_map(|s| s.tokens.clone()).collect(),
            false => real.filter(|s| s.ends).map(|s| s.tokens.end - 1).collect(),
        }
    }

    /// Of each wanted row, the item of the step that it belongs to.
    pub(super) fn row_items(&self) -> Vec<usize> {
        let of = |s: &Span| match (s.item, self.all_rows) {
            (Some(item), true) => vec![item; s.tokens.len()],
            (Some(item), false) if s.ends => vec![item],
            _ => Vec::new(),
        };
        self.spans.iter().flat_map(of).collect()
    }

    /// What the host sends.
    pub(super) fn inputs(&self, input: Input) -> Vec<i32> {
        // Token ids, positions and lengths are below the context and the vocabulary, both checked.
        let int = |n: usize| n as i32;
        let starts = |lengths: &mut dyn Iterator<Item = usize>| {
            let mut sum = 0;
            let mut starts = vec![0];
            starts.extend(lengths.map(|n| {
                sum += n;
                int(sum)
            }));
            starts
        };
        let positions = |s: &Span| s.past..s.past + s.tokens.len();
        match input {
            Input::TokenIds => self.tokens.iter().map(|&t| t as i32).collect(),
            Input::Positions => self.spans.iter().flat_map(|s| positions(s).map(int)).collect(),
            Input::Slots => {
                let slot = |s: &Span, p: usize| {
                    int(s.pages[p / self.page_size] as usize * self.page_size + p % self.page_size)
                };
                self.spans.iter().flat_map(|s| positions(s).map(move |p| slot(s, p))).collect()
            }
            Input::QueryStarts => starts(&mut self.spans.iter().map(|s| s.tokens.len())),
            Input::KeyStarts => starts(&mut self.spans.iter().map(|s| s.past + s.tokens.len())),
            Input::KeyCounts => self.spans.iter().map(|s| int(s.past + s.tokens.len())).collect(),
            Input::BlockTable => {
                let mut table = vec![0; self.spans.len() * self.max_pages];
                for (row, span) in table.chunks_mut(self.max_pages).zip(&self.spans) {
                    row.iter_mut().zip(&span.pages).for_each(|(to, &page)| *to = page as i32);
                }
                table
            }
            Input::LogitRows => self.logit_rows().into_iter().map(int).collect(),
        }
    }
}

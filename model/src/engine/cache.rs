//! The pages of the latent KV cache (vLLM's PagedAttention, SOSP 2023): who holds which. The
//! memory itself, `[pages, page_size, latent + rope]` per layer, is the ranks'.

/// No page is free.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the KV cache is full: {wanted} more pages wanted, {free} of {pages} free")]
pub struct CacheFull {
    /// Pages wanted.
    pub wanted: usize,
    /// Pages free.
    pub free: usize,
    /// Pages in all.
    pub pages: usize,
}

/// A sequence's place in the cache. Made and ended by the engine.
#[derive(Debug, Default)]
pub struct Sequence {
    data_rank: usize,
    pages: Vec<u32>,
    len: usize,
}

impl Sequence {
    /// Tokens in the cache.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether nothing is cached yet.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Which of the ranks that share the sequences it is with.
    pub fn data_rank(&self) -> usize {
        self.data_rank
    }

    pub(super) fn on(data_rank: usize) -> Self {
        Sequence { data_rank, ..Sequence::default() }
    }

    pub(super) fn pages(&self) -> &[u32] {
        &self.pages
    }

    /// Takes another sequence's pages, for a layer that caches the same positions. The pages stay
    /// the other's: this sequence is dropped, not released.
    pub(super) fn share_pages(&mut self, other: &Sequence) {
        self.pages.clone_from(&other.pages);
    }

    /// The tokens of a step are in the cache now.
    pub(super) fn advance(&mut self, tokens: usize) {
        self.len += tokens;
    }
}

/// The pages of one data rank: the same numbers on each of its dies and in every layer.
#[derive(Debug)]
pub struct PagePool {
    free: Vec<u32>,
    /// Pages of tokens that only fill up a batch.
    padding: Vec<u32>,
    pages: usize,
    page_size: usize,
    sequences: usize,
    failed: bool,
}

impl PagePool {
    pub(super) fn new(pages: usize, padding: usize, page_size: usize) -> Self {
        // The lowest page is taken first, so that a run's addresses are the same every time.
        let free = (0..pages as u32).rev().collect();
        let padding = (pages as u32..(pages + padding) as u32).collect();
        PagePool { free, padding, pages, page_size, sequences: 0, failed: false }
    }

    /// Pages for sequences.
    pub fn pages(&self) -> usize {
        self.pages
    }

    /// Pages that no sequence holds.
    pub fn free_pages(&self) -> usize {
        self.free.len()
    }

    /// Pages of tokens that only fill up a batch.
    pub(super) fn padding(&self) -> &[u32] {
        &self.padding
    }

    /// Sequences that were started and not ended.
    pub(super) fn sequences(&self) -> usize {
        self.sequences
    }

    /// Whether a step on this data rank has failed: its streams take nothing more.
    pub fn has_failed(&self) -> bool {
        self.failed
    }

    pub(super) fn fail(&mut self) {
        self.failed = true;
    }

    pub(super) fn start(&mut self) {
        self.sequences += 1;
    }

    /// Makes room for `tokens` more tokens of a sequence.
    ///
    /// # Errors
    ///
    /// [`CacheFull`]; the sequence is as before.
    pub(super) fn grow(&mut self, sequence: &mut Sequence, tokens: usize) -> Result<(), CacheFull> {
        let needed = (sequence.len + tokens).div_ceil(self.page_size);
        let wanted = needed.saturating_sub(sequence.pages.len());
        if wanted > self.free.len() {
            return Err(CacheFull { wanted, free: self.free.len(), pages: self.pages });
        }
        let kept = self.free.len() - wanted;
        sequence.pages.extend(self.free.drain(kept..).rev());
        Ok(())
    }

    /// Ends a sequence; its pages are free again.
    pub(super) fn release(&mut self, sequence: Sequence) {
        self.sequences = self.sequences.saturating_sub(1);
        self.free.extend(sequence.pages.into_iter().rev());
    }
}

//! The latent KV cache in pages (vLLM's PagedAttention, SOSP 2023).

use super::EngineOptions;
use crate::config::ModelConfig;
use hal::{Stream, Tensor};

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

/// A sequence's place in the cache. Made and ended by the [`PagedCache`].
#[derive(Debug, Default)]
pub struct Sequence {
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

    pub(super) fn pages(&self) -> &[u32] {
        &self.pages
    }

    /// Where position `position` lies: page times page size plus offset.
    pub(super) fn slot(&self, position: usize, page_size: usize) -> usize {
        self.pages[position / page_size] as usize * page_size + position % page_size
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

/// Pages of cached latents, one tensor `[pages, page_size, latent + rope]` per layer; a page is the
/// same number in every layer.
#[derive(Debug)]
pub struct PagedCache {
    layers: Vec<Tensor>,
    free: Vec<u32>,
    pages: usize,
    page_size: usize,
}

/// Pages for as many sequences of full length as the options ask for.
pub(super) fn pages(options: EngineOptions) -> usize {
    options.max_sequences * options.max_model_len.div_ceil(options.page_size)
}

impl PagedCache {
    pub(super) fn new(
        stream: &dyn Stream,
        config: &ModelConfig,
        options: EngineOptions,
        layers: usize,
    ) -> hal::Result<Self> {
        let pages = pages(options);
        let shape = [pages, options.page_size, config.kv_latent_width()];
        let dtype = options.numerics.activations();
        let layers =
            (0..layers).map(|_| stream.alloc_tensor(dtype, &shape)).collect::<hal::Result<_>>()?;
        // The lowest page is taken first, so that a run's addresses are the same every time.
        let free = (0..pages as u32).rev().collect();
        Ok(PagedCache { layers, free, pages, page_size: options.page_size })
    }

    pub(super) fn layer(&self, layer: usize) -> &Tensor {
        &self.layers[layer]
    }

    /// Pages in all.
    pub fn pages(&self) -> usize {
        self.pages
    }

    /// Pages that no sequence holds.
    pub fn free_pages(&self) -> usize {
        self.free.len()
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
        self.free.extend(sequence.pages.into_iter().rev());
    }
}

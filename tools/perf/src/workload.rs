//! What a step has to do.

use crate::routing::Routing;
use serde::Serialize;

/// What goes through the model, on each data rank.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case", tag = "phase")]
pub enum Phase {
    /// New tokens of prompts.
    Prefill {
        /// Sequences of each data rank.
        batch: usize,
        /// New tokens of each sequence.
        input_len: usize,
        /// Tokens of each that are cached already.
        past: usize,
    },
    /// The next token of running sequences.
    Decode {
        /// Sequences of each data rank.
        batch: usize,
        /// Tokens that each sequence has, the new one included.
        kv: usize,
    },
}

/// A step.
#[derive(Clone, Debug, PartialEq)]
pub struct Workload {
    /// What goes through the model.
    pub phase: Phase,
    /// Whether each decode step verifies a token that the MTP module drafted, and drafts the next.
    pub mtp: bool,
    /// How often the drafted token is accepted, 0 to 1 (the report has 0.85 to 0.9, section 5.4.3).
    pub acceptance: f64,
    /// Where tokens' experts are.
    pub routing: Routing,
}

impl Workload {
    /// A step with balanced routing and no MTP.
    pub fn new(phase: Phase) -> Self {
        Workload { phase, mtp: false, acceptance: 0.0, routing: Routing::Balanced }
    }

    /// New tokens of each sequence in a decode step: the one that was sampled, and the drafted one.
    pub fn queries(&self) -> usize {
        1 + usize::from(self.drafts())
    }

    /// Whether the MTP module takes part.
    pub fn drafts(&self) -> bool {
        self.mtp && matches!(self.phase, Phase::Decode { .. })
    }

    /// Sequences of each data rank.
    pub fn sequences(&self) -> usize {
        match self.phase {
            Phase::Prefill { batch, .. } | Phase::Decode { batch, .. } => batch,
        }
    }

    /// The longest sequence after the step.
    pub fn longest(&self) -> usize {
        match self.phase {
            Phase::Prefill { input_len, past, .. } => input_len + past,
            Phase::Decode { kv, .. } => kv + self.queries() - 1,
        }
    }

    /// Tokens that each data rank gets out of the step: prompt tokens taken in, or tokens generated.
    pub fn tokens(&self) -> f64 {
        match self.phase {
            Phase::Prefill { batch, input_len, .. } => (batch * input_len) as f64,
            Phase::Decode { batch, .. } => {
                let accepted = if self.drafts() { self.acceptance } else { 0.0 };
                batch as f64 * (1.0 + accepted)
            }
        }
    }
}

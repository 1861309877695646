//! Which part of the model a command belongs to, by its label.

use serde::Serialize;

/// A part of the model.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum LayerKind {
    /// Token embedding.
    Embedding,
    /// Layers with a dense MLP, attention included.
    DenseLayers,
    /// Layers with experts, attention included.
    MoeLayers,
    /// The multi-token prediction module, its embedding and head included.
    Mtp,
    /// The final norm and the logits.
    Head,
    /// Choosing the largest logit.
    Sampling,
    /// Hand-over between pipeline stages.
    Stages,
    /// Everything else: inputs, outputs, waits.
    Other,
}

impl LayerKind {
    /// The part that labels of the model's graph name: "layer 4 input norm", "embed all-reduce".
    /// `is_moe` says which layers have experts.
    pub fn of(label: &str, is_moe: impl FnOnce(usize) -> bool) -> LayerKind {
        let begins = |words: &[&str]| words.iter().any(|word| label.starts_with(word));
        if let Some(rest) = label.strip_prefix("layer ") {
            let number = rest.split(' ').next().and_then(|number| number.parse::<usize>().ok());
            return match number {
                Some(number) if is_moe(number) => LayerKind::MoeLayers,
                Some(_) => LayerKind::DenseLayers,
                None => LayerKind::Other,
            };
        }
        match () {
            () if begins(&["mtp "]) => LayerKind::Mtp,
            () if begins(&["embed"]) => LayerKind::Embedding,
            () if begins(&["final norm", "select rows", "head"]) => LayerKind::Head,
            () if begins(&["largest logit", "candidates"]) => LayerKind::Sampling,
            () if begins(&["stage", "send", "receive"]) => LayerKind::Stages,
            () => LayerKind::Other,
        }
    }
}

impl LayerKind {
    /// What people call it.
    pub const fn name(self) -> &'static str {
        match self {
            LayerKind::Embedding => "embedding",
            LayerKind::DenseLayers => "dense layers",
            LayerKind::MoeLayers => "MoE layers",
            LayerKind::Mtp => "MTP module",
            LayerKind::Head => "head",
            LayerKind::Sampling => "sampling",
            LayerKind::Stages => "between stages",
            LayerKind::Other => "other",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn labels_tell_the_part() {
        for (label, kind) in [
            ("embed", LayerKind::Embedding),
            ("embed reduce-scatter", LayerKind::Embedding),
            ("layer 2 q_a norm + quantise", LayerKind::DenseLayers),
            ("layer 3 o all-reduce", LayerKind::MoeLayers),
            ("layer 60 combine", LayerKind::MoeLayers),
            ("layer x", LayerKind::Other),
            ("mtp embed", LayerKind::Mtp),
            ("mtp head", LayerKind::Mtp),
            ("final norm all-gather", LayerKind::Head),
            ("select rows", LayerKind::Head),
            ("head", LayerKind::Head),
            ("largest logit", LayerKind::Sampling),
            ("candidates all-gather", LayerKind::Sampling),
            ("stage output", LayerKind::Stages),
            ("send", LayerKind::Stages),
            ("receive", LayerKind::Stages),
            ("write", LayerKind::Other),
        ] {
            assert_eq!(LayerKind::of(label, |layer| layer >= 3), kind, "{label}");
        }
    }
}

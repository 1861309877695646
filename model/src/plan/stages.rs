//! Pipeline stages: consecutive layers, cut so that the slowest stage is as fast as it can be.

use crate::config::ModelConfig;
use std::ops::Range;

/// Bytes of weights that a decoded token reads in a layer, in elements: what decides a decode
/// step, and close to what decides prefill (operations are twice the elements that a token meets).
fn layer_cost(config: &ModelConfig, layer: usize) -> u64 {
    let c = config;
    let (h, heads) = (c.hidden_size, c.num_attention_heads);
    let q = match c.q_lora_rank {
        Some(rank) => rank * (h + heads * c.qk_head_dim()),
        None => h * heads * c.qk_head_dim(),
    };
    let kv = h * c.kv_latent_width()
        + c.kv_lora_rank * heads * (c.qk_nope_head_dim + c.v_head_dim)
        + heads * c.v_head_dim * h;
    let mlp = match c.is_moe_layer(layer) {
        true => {
            3 * h * (c.num_experts_per_tok * c.moe_intermediate_size + c.shared_intermediate_size())
        }
        false => 3 * h * c.intermediate_size,
    };
    (q + kv + mlp) as u64
}

/// Cuts the layers into `stages` runs with the smallest largest cost. The last stage also has the
/// head and, where there is one, the MTP layer.
pub(super) fn split(config: &ModelConfig, stages: usize) -> Vec<Range<usize>> {
    let layers = config.num_hidden_layers;
    let mut costs: Vec<u64> = (0..layers).map(|layer| layer_cost(config, layer)).collect();
    // BF16, twice the bytes of an FP8 weight.
    let head = 2 * (config.vocab_size * config.hidden_size) as u64;
    let mtp = config
        .mtp_layer()
        .map_or(0, |layer| layer_cost(config, layer) + 4 * (config.hidden_size as u64).pow(2));
    if let Some(last) = costs.last_mut() {
        *last += head + mtp;
    }
    cut(&costs, stages)
}

/// Cuts `costs` into `parts` non-empty runs whose largest sum is least, by bisection over that sum.
fn cut(costs: &[u64], parts: usize) -> Vec<Range<usize>> {
    let fits = |limit: u64| {
        let (mut runs, mut sum) = (1, 0u64);
        for &cost in costs {
            if sum > 0 && sum + cost > limit {
                runs += 1;
                sum = 0;
            }
            sum += cost;
        }
        runs <= parts
    };
    let (mut low, mut high) = (costs.iter().copied().max().unwrap_or(0), costs.iter().sum::<u64>());
    while low < high {
        let middle = low + (high - low) / 2;
        if fits(middle) { high = middle } else { low = middle + 1 }
    }
    let mut cuts = Vec::with_capacity(parts);
    let mut start = 0;
    for part in 0..parts {
        let left = parts - part - 1;
        let (mut end, mut sum) = (start, 0);
        // Each later part needs at least one layer, and this one too.
        while end < costs.len() - left && (end == start || sum + costs[end] <= low) {
            sum += costs[end];
            end += 1;
        }
        let end = if left == 0 { costs.len() } else { end };
        cuts.push(start..end);
        start = end;
    }
    cuts
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Preset;
    use proptest::prelude::*;

    #[test]
    fn the_last_stage_of_v3_has_fewer_layers() {
        let stages = split(&Preset::DeepSeekV3.config(), 2);
        assert_eq!(stages.iter().map(ExactSizeIterator::len).sum::<usize>(), 61);
        assert!(stages[1].len() < stages[0].len(), "it has the head and the MTP layer: {stages:?}");
        assert_eq!(split(&Preset::DeepSeekV3.config(), 61).len(), 61);
    }

    proptest! {
        #[test]
        fn cuts_are_optimal(costs in prop::collection::vec(1u64..20, 1..9), parts in 1usize..5) {
            let parts = parts.min(costs.len());
            let cuts = cut(&costs, parts);
            prop_assert_eq!(cuts.len(), parts);
            prop_assert!(cuts.iter().all(|c| !c.is_empty()));
            prop_assert!(cuts.windows(2).all(|w| w[0].end == w[1].start));
            prop_assert_eq!((cuts[0].start, cuts[parts - 1].end), (0, costs.len()));
            let worst = |cuts: &[Range<usize>]| {
                cuts.iter().map(|c| costs[c.clone()].iter().sum::<u64>()).max().unwrap()
            };
            // Every way to cut, by brute force.
            let mut best = u64::MAX;
            for mask in 0u32..1 << (costs.len() - 1) {
                if mask.count_ones() as usize + 1 != parts { continue }
                let mut all = Vec::new();
                let mut start = 0;
                for end in 1..=costs.len() {
                    if end == costs.len() || mask >> (end - 1) & 1 == 1 {
                        all.push(start..end);
                        start = end;
                    }
                }
                best = best.min(worst(&all));
            }
            prop_assert_eq!(worst(&cuts), best);
        }
    }
}

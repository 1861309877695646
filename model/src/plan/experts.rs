//! Where routed experts live: copies of hot ones, and ranks with equal load.

use serde::Serialize;
use std::ops::Range;

/// The fewest copies with which the experts divide evenly over the ranks: 256 become 288 on 72 or
/// 144 ranks and 320 on 320.
pub(super) fn fewest_redundant(experts: usize, ranks: usize) -> usize {
    experts.next_multiple_of(ranks) - experts
}

/// Which logical expert each physical one is. Physical experts are numbered rank by rank, the
/// same number on each.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct ExpertPlacement {
    experts: usize,
    ranks: usize,
    logical: Vec<u32>,
}

impl ExpertPlacement {
    /// Experts in order, and copies of the first ones behind them: nothing is known about load.
    pub fn even(experts: usize, redundant: usize, ranks: usize) -> Self {
        let logical = (0..experts + redundant).map(|p| (p % experts) as u32).collect();
        ExpertPlacement { experts, ranks, logical }
    }

    /// Logical experts.
    pub fn experts(&self) -> usize {
        self.experts
    }

    /// Ranks that hold them.
    pub fn ranks(&self) -> usize {
        self.ranks
    }

    /// Physical experts: logical ones and their copies.
    pub fn physical(&self) -> usize {
        self.logical.len()
    }

    /// Physical experts of one rank.
    pub fn per_rank(&self) -> usize {
        self.logical.len() / self.ranks
    }

    /// Logical experts that a rank holds, in the order of their physical numbers.
    pub fn of_rank(&self, rank: usize) -> &[u32] {
        let Range { start, end } = rank * self.per_rank()..(rank + 1) * self.per_rank();
        &self.logical[start..end]
    }

    /// Whether physical and logical numbers are the same.
    pub fn is_identity(&self) -> bool {
        self.logical.iter().enumerate().all(|(p, &l)| p == l as usize)
    }

    /// The most copies of any expert.
    pub fn most_replicas(&self) -> usize {
        self.replicas().iter().map(Vec::len).max().unwrap_or(0)
    }

    /// Of each logical expert, its physical ones in ascending order.
    pub fn replicas(&self) -> Vec<Vec<u32>> {
        let mut replicas = vec![Vec::new(); self.experts];
        for (physical, &logical) in self.logical.iter().enumerate() {
            replicas[logical as usize].push(physical as u32);
        }
        replicas
    }

    /// Load of each rank where each copy of an expert takes an equal share of its load.
    pub fn rank_loads(&self, load: &[u64]) -> Vec<f64> {
        let counts: Vec<usize> = self.replicas().iter().map(Vec::len).collect();
        let share = |&e: &u32| load[e as usize] as f64 / counts[e as usize] as f64;
        (0..self.ranks).map(|r| self.of_rank(r).iter().map(share).sum()).collect()
    }

    /// The most loaded rank against the mean: 1 is perfect.
    pub fn imbalance(&self, load: &[u64]) -> f64 {
        let loads = self.rank_loads(load);
        let mean = loads.iter().sum::<f64>() / loads.len() as f64;
        if mean == 0.0 { 1.0 } else { loads.iter().copied().fold(0.0, f64::max) / mean }
    }
}

/// Places experts by load, as DeepSeek's expert-parallel load balancer does (EPLB, hierarchical
/// policy): whole routing groups go to nodes, so that group-limited routing stays inside few of
/// them; within a node the hottest experts get copies; copies go to the rank with the least load.
///
/// `groups` routing groups are kept together where they divide over the `nodes`; otherwise, or
/// with one node, experts are placed freely.
pub fn balance(
    load: &[u64],
    redundant: usize,
    ranks: usize,
    groups: usize,
    nodes: usize,
) -> ExpertPlacement {
    let experts = load.len();
    let physical = experts + redundant;
    let hierarchical = nodes > 1
        && groups.is_multiple_of(nodes)
        && experts.is_multiple_of(groups.max(1))
        && ranks.is_multiple_of(nodes)
        && physical.is_multiple_of(ranks);
    let nodes = if hierarchical { nodes } else { 1 };
    let node_experts: Vec<Vec<u32>> = if hierarchical {
        let size = experts / groups;
        let loads: Vec<f64> =
            load.chunks(size).map(|group| group.iter().sum::<u64>() as f64).collect();
        pack(&loads, nodes, groups / nodes)
            .into_iter()
            .map(|of_node| {
                of_node.iter().flat_map(|&g| g * size..(g + 1) * size).map(|e| e as u32).collect()
            })
            .collect()
    } else {
        vec![(0..experts as u32).collect()]
    };
    let mut logical = Vec::with_capacity(physical);
    for experts in node_experts {
        let (ranks, copies) = (ranks / nodes, physical / nodes);
        let slots = replicate(&experts, load, copies);
        let weights: Vec<f64> = slots.iter().map(|&(_, load)| load).collect();
        for of_rank in pack(&weights, ranks, copies / ranks) {
            let mut held: Vec<u32> = of_rank.iter().map(|&slot| slots[slot].0).collect();
            held.sort_unstable();
            logical.extend(held);
        }
    }
    ExpertPlacement { experts, ranks, logical }
}

/// Copies of experts until there are `copies`: each time one more of whichever has the largest
/// load per copy. Each slot with its share of the load.
fn replicate(experts: &[u32], load: &[u64], copies: usize) -> Vec<(u32, f64)> {
    let mut counts = vec![1usize; experts.len()];
    let of = |i: usize, count: usize| load[experts[i] as usize] as f64 / count as f64;
    for _ in experts.len()..copies {
        let hottest = (0..experts.len())
            .max_by(|&a, &b| of(a, counts[a]).total_cmp(&of(b, counts[b])).then(b.cmp(&a)));
        if let Some(hottest) = hottest {
            counts[hottest] += 1;
        }
    }
    let shares = |i: usize| std::iter::repeat_n((experts[i], of(i, counts[i])), counts[i]);
    (0..experts.len()).flat_map(shares).collect()
}

/// Packs items into `bins` bins of `each` items with even sums: heaviest first into the lightest
/// bin that has room, then swaps between the heaviest bin and others while that helps.
fn pack(weights: &[f64], bins: usize, each: usize) -> Vec<Vec<usize>> {
    let mut order: Vec<usize> = (0..weights.len()).collect();
    order.sort_by(|&a, &b| weights[b].total_cmp(&weights[a]).then(a.cmp(&b)));
    let mut packed: Vec<Vec<usize>> = vec![Vec::with_capacity(each); bins];
    let mut sums = vec![0f64; bins];
    for item in order {
        let open = (0..bins).filter(|&b| packed[b].len() < each);
        let Some(bin) = open.min_by(|&a, &b| sums[a].total_cmp(&sums[b]).then(a.cmp(&b))) else {
            continue;
        };
        packed[bin].push(item);
        sums[bin] += weights[item];
    }
    improve(weights, &mut packed, &mut sums);
    packed
}

/// Swaps an item of the heaviest bin for a lighter one elsewhere while the heavier of the two
/// sums falls.
fn improve(weights: &[f64], packed: &mut [Vec<usize>], sums: &mut [f64]) {
    // Each swap lowers the largest sum or the number of bins that have it; the bound is for safety.
    for _ in 0..4 * weights.len() {
        let Some(heavy) = (0..sums.len()).max_by(|&a, &b| sums[a].total_cmp(&sums[b])) else {
            return;
        };
        let mut best: Option<(f64, usize, usize, usize)> = None;
        for (light, items) in packed.iter().enumerate().filter(|(b, _)| *b != heavy) {
            for (i, &mine) in packed[heavy].iter().enumerate() {
                for (j, &theirs) in items.iter().enumerate() {
                    let moved = weights[mine] - weights[theirs];
                    let worst = (sums[heavy] - moved).max(sums[light] + moved);
                    let gain = sums[heavy] - worst;
                    if gain > 1e-9 * sums[heavy] && best.is_none_or(|(g, ..)| gain > g) {
                        best = Some((gain, i, light, j));
                    }
                }
            }
        }
        let Some((_, i, light, j)) = best else { return };
        let moved = weights[packed[heavy][i]] - weights[packed[light][j]];
        sums[heavy] -= moved;
        sums[light] += moved;
        let (mine, theirs) = (packed[heavy][i], packed[light][j]);
        packed[heavy][i] = theirs;
        packed[light][j] = mine;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn the_fewest_copies_make_experts_divide() {
        for (ranks, physical) in [(1, 256), (32, 256), (72, 288), (144, 288), (320, 320)] {
            assert_eq!(256 + fewest_redundant(256, ranks), physical, "{ranks} ranks");
        }
    }

    /// Loads by Zipf's law, in an order that has nothing to do with expert numbers.
    fn zipf(experts: u64, exponent: f64) -> Vec<u64> {
        (0..experts)
            .map(|e| (1e6 / ((e * 97 % experts) as f64 + 1.0).powf(exponent)) as u64)
            .collect()
    }

    #[test]
    fn a_skewed_load_is_balanced_with_32_copies_on_32_ranks() {
        for exponent in [0.3, 0.5, 0.8] {
            let load = zipf(256, exponent);
            let plain = ExpertPlacement::even(256, 0, 32).imbalance(&load);
            let balanced = balance(&load, 32, 32, 8, 4).imbalance(&load);
            let flat = balance(&load, 32, 32, 8, 1).imbalance(&load);
            assert!(flat < 1.10, "exponent {exponent}: {flat}");
            assert!(balanced < plain && plain > 1.2, "{exponent}: {balanced} against {plain}");
        }
    }

    #[test]
    fn groups_stay_within_nodes() {
        let load = zipf(256, 0.8);
        let placement = balance(&load, 32, 32, 8, 4);
        for node in 0..4 {
            let held = (node * 8..node * 8 + 8).flat_map(|r| placement.of_rank(r));
            let mut groups: Vec<u32> = held.map(|e| e / 32).collect();
            groups.sort_unstable();
            groups.dedup();
            assert_eq!(groups.len(), 2, "8 groups on 4 nodes");
        }
    }

    proptest! {
        #[test]
        fn every_expert_is_somewhere_and_ranks_hold_the_same_number(
            load in prop::collection::vec(0u64..1000, 8..40), per_rank in 1usize..6, nodes in 1usize..3
        ) {
            let ranks = load.len().div_ceil(per_rank);
            let redundant = ranks * per_rank - load.len();
            let placement = balance(&load, redundant, ranks, 4, nodes);
            prop_assert_eq!(placement.physical(), ranks * per_rank);
            prop_assert!(placement.replicas().iter().all(|r| !r.is_empty()));
            let total: f64 = placement.rank_loads(&load).iter().sum();
            prop_assert!((total - load.iter().sum::<u64>() as f64).abs() < 1e-6 * total.max(1.0));
        }
    }
}

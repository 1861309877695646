//! Ranks that do the same at the same times: one of each kind is played.
//!
//! Two ranks are alike if they are in the same stage, hold parts of the same sizes that meet the
//! quantisation blocks alike, have as much load, and if each of their groups lies on the machine
//! alike: the same dies apart from a shift by whole cards or hosts.

use crate::routing::Loads;
use hal::{DeviceId, DiePlacement, Topology};
use model::config::ModelConfig;
use model::plan::{Group, ParallelPlan, RankKinds, RankPlan};
use sim::Machine;
use sim::machine::LinkConstants;
use std::collections::HashMap;

/// One rank of each kind.
#[derive(Clone, Debug)]
pub(crate) struct Folded {
    /// The ranks that are played.
    pub(crate) ranks: Vec<RankPlan>,
    /// The kind of each rank of the plan.
    pub(crate) of_rank: Vec<u32>,
}

/// Where a group's dies lie, apart from a shift: numbers, cards and hosts against the first one's, and
/// which of the ports that dies share the first one has.
type Pattern = Vec<[u32; 3]>;

impl Folded {
    /// The kinds of a plan's ranks on a machine; `shared` dies, neighbours in number, share a port.
    pub(crate) fn new(
        config: &ModelConfig,
        plan: &ParallelPlan,
        topology: &Topology,
        shared: u32,
        loads: &Loads,
    ) -> Self {
        let kinds = RankKinds::of(config, plan);
        let mut groups = Groups { patterns: HashMap::new(), known: HashMap::new() };
        let mut known: HashMap<(usize, [Option<u32>; 5], u64), u32> = HashMap::new();
        let (mut ranks, mut of_rank) = (Vec::new(), Vec::with_capacity(plan.ranks()));
        for number in 0..plan.ranks() {
            let rank = plan.rank(number);
            let lie = RankPlan::GROUPS.map(|group| groups.pattern(&rank, group, topology, shared));
            let load = loads.factor(rank.expert.rank).to_bits();
            let next = ranks.len() as u32;
            let kind = *known.entry((kinds.of_rank[number], lie, load)).or_insert(next);
            if kind == next {
                ranks.push(rank);
            }
            of_rank.push(kind);
        }
        Folded { ranks, of_rank }
    }

    /// Every rank by itself.
    pub(crate) fn none(plan: &ParallelPlan) -> Self {
        let ranks = (0..plan.ranks()).map(|number| plan.rank(number)).collect();
        Folded { ranks, of_rank: (0..plan.ranks() as u32).collect() }
    }

    /// How many ranks of the plan a kind stands for.
    pub(crate) fn weight(&self, kind: u32) -> usize {
        self.of_rank.iter().filter(|&&k| k == kind).count()
    }
}

/// Dies, neighbours in number, that share a port of any kind.
pub(crate) fn sharers(machine: &Machine) -> u32 {
    let links = [&machine.link.on_card, &machine.link.in_host, &machine.link.network];
    links.into_iter().flatten().map(LinkConstants::sharers).max().unwrap_or(1)
}

/// Patterns of groups, each worked out once.
struct Groups {
    patterns: HashMap<Pattern, u32>,
    known: HashMap<(Group, usize), Option<u32>>,
}

impl Groups {
    fn pattern(
        &mut self,
        rank: &RankPlan,
        group: Group,
        topology: &Topology,
        shared: u32,
    ) -> Option<u32> {
        // Which of the groups of this kind, without listing its members.
        let stage_ranks = rank.tensor.size * rank.data.size;
        let within = rank.rank % stage_ranks;
        let which = match group {
            Group::Tensor => rank.rank / rank.tensor.size,
            Group::Pipeline => within,
            Group::Expert => rank.stage.rank,
            Group::ExpertNodes => rank.stage.rank * stage_ranks + within % rank.node_size,
            Group::ExpertNode => rank.rank / rank.node_size,
        };
        if let Some(known) = self.known.get(&(group, which)) {
            return *known;
        }
        let pattern = rank.group(group).map(|(members, _)| {
            let next = self.patterns.len() as u32;
            *self.patterns.entry(lie(&members, topology, shared)).or_insert(next)
        });
        self.known.insert((group, which), pattern);
        pattern
    }
}

fn lie(members: &[usize], topology: &Topology, shared: u32) -> Pattern {
    let place = |rank: usize| topology.placement(DeviceId(rank as u32)).unwrap_or_default();
    let first = members[0];
    let DiePlacement { host, card, .. } = place(first);
    let mut pattern = vec![[first as u32 % shared.max(1), 0, 0]];
    pattern.extend(members.iter().map(|&rank| {
        let at = place(rank);
        [(rank - first) as u32, at.card - card, at.host - host]
    }));
    pattern
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::routing::Routing;
    use model::config::Preset;
    use model::plan::ParallelOptions;

    fn kinds(machine: &str, options: ParallelOptions, routing: &Routing) -> usize {
        let config = Preset::DeepSeekV3.config();
        let plan = ParallelPlan::new(&config, options).unwrap();
        let machine = Machine::named(machine).unwrap().enlarged(plan.ranks() as u32).unwrap();
        let loads = routing.loads(&config, &plan).unwrap();
        Folded::new(&config, &plan, &machine.topology(), sharers(&machine), &loads).ranks.len()
    }

    #[test]
    fn symmetric_plans_have_one_kind_and_others_as_many_as_differ() {
        let base = ParallelOptions::default();
        let ep = ParallelOptions { data: 32, expert: true, ..base };
        let (v, h) = ("va16", "h800");
        // Half a quantisation block each: even and odd ranks meet the blocks in two ways.
        assert_eq!(kinds(v, ParallelOptions { tensor: 32, ..base }, &Routing::Balanced), 2);
        assert_eq!(kinds(h, ep, &Routing::Balanced), 1);
        let hops = ParallelOptions { ranks_per_node: Some(8), ..ep };
        assert_eq!(kinds(h, hops, &Routing::Balanced), 1);
        // Stages differ, and so does the place on the card of those that hand over; groups of three lie
        // across cards in several ways.
        let staged = ParallelOptions { tensor: 8, pipeline: 4, ..base };
        assert_eq!(kinds(v, staged, &Routing::Balanced), 16);
        let odd = kinds(v, ParallelOptions { tensor: 3, data: 4, ..base }, &Routing::Balanced);
        assert!((3..=12).contains(&odd), "{odd}");
        let skewed = kinds(h, ep, &Routing::Zipf { s: 1.0, seed: 1 });
        assert!(skewed > 8, "{skewed} kinds of loads");
    }
}

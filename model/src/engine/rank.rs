//! One rank of an engine: a die with its streams, weights, cache and programs.

use super::program::{Program, ProgramKey};
use super::{EngineError, EngineOptions};
use crate::config::ModelConfig;
use crate::plan::{Group, ParallelPlan, RankPlan};
use crate::schedule::{COMPUTE, Lane, lane_label};
use crate::weights::{WeightPlan, Weights};
use hal::{Buffer, Communicator, Device, Point, Stream, Tensor};
use std::collections::HashMap;
use std::sync::Arc;

#[derive(Debug)]
pub(super) struct Rank {
    pub(super) plan: RankPlan,
    pub(super) device: Arc<dyn Device>,
    pub(super) lanes: Vec<Arc<dyn Stream>>,
    pub(super) weight_plan: WeightPlan,
    pub(super) weights: Weights,
    pub(super) cache: HashMap<usize, Tensor>,
    pub(super) workspace: Option<Buffer>,
    pub(super) communicators: HashMap<Group, Arc<dyn Communicator>>,
    pub(super) programs: HashMap<ProgramKey, Program>,
}

impl Rank {
    /// Opens the streams and makes room for the cache.
    pub(super) fn new(
        device: Arc<dyn Device>,
        plan: RankPlan,
        weight_plan: WeightPlan,
        weights: Weights,
    ) -> hal::Result<Self> {
        let lanes = vec![device.stream(lane_label(COMPUTE))?];
        Ok(Rank {
            plan,
            device,
            lanes,
            weight_plan,
            weights,
            cache: HashMap::new(),
            workspace: None,
            communicators: HashMap::new(),
            programs: HashMap::new(),
        })
    }

    /// Makes room for the latents of the rank's layers.
    pub(super) fn allocate_cache(
        &mut self,
        config: &ModelConfig,
        options: EngineOptions,
        pages: usize,
        mtp: Option<usize>,
    ) -> hal::Result<()> {
        let shape = [pages, options.page_size, config.kv_latent_width()];
        for layer in cached_layers(&self.plan, mtp) {
            let tensor =
                self.lanes[COMPUTE].alloc_tensor(options.numerics.activations(), &shape)?;
            self.cache.insert(layer, tensor);
        }
        Ok(())
    }

    /// The stream of a lane.
    pub(super) fn lane(&self, lane: Lane) -> &Arc<dyn Stream> {
        &self.lanes[lane]
    }

    /// Opens the streams of the lanes that a schedule uses.
    pub(super) fn open_lanes(&mut self, lanes: usize) -> hal::Result<()> {
        for lane in self.lanes.len()..lanes {
            self.lanes.push(self.device.stream(lane_label(lane))?);
        }
        Ok(())
    }

    /// Grows the workspace if it is too small. Memory of the former one is freed in stream order.
    pub(super) fn reserve_workspace(&mut self, bytes: u64) -> Result<(), EngineError> {
        if self.workspace.as_ref().is_some_and(|w| w.size() >= bytes) {
            return Ok(());
        }
        self.programs.clear();
        self.workspace = None;
        self.workspace = Some(self.lanes[COMPUTE].alloc(bytes.max(1))?);
        Ok(())
    }

    /// The point at which everything submitted so far is done: schedules end on this lane.
    pub(super) fn point(&self) -> Point {
        self.lanes[COMPUTE].point()
    }
}

/// Layers whose latents a rank caches.
pub(super) fn cached_layers(
    plan: &RankPlan,
    mtp: Option<usize>,
) -> impl Iterator<Item = usize> + use<> {
    plan.layers.clone().chain(mtp.filter(|_| plan.is_last_stage()))
}

/// Makes the communicators of every group and gives each rank its own.
pub(super) fn connect(ranks: &mut [Rank], plan: &ParallelPlan) -> hal::Result<()> {
    for group in RankPlan::GROUPS {
        let mut ids: HashMap<usize, hal::CommunicatorId> = HashMap::new();
        for number in 0..plan.ranks() {
            let Some((members, at)) = ranks[number].plan.group(group) else { continue };
            // The first member makes the id; within a process, the others are handed it.
            let id = match ids.get(&members[0]) {
                Some(id) => *id,
                None => {
                    let id = ranks[members[0]].device.communicator_id()?;
                    ids.insert(members[0], id);
                    id
                }
            };
            let communicator = ranks[number].device.communicator(id, at, members.len())?;
            ranks[number].communicators.insert(group, communicator);
        }
    }
    Ok(())
}

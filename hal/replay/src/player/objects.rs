//! Dies, buffers, streams and communicators by their recorded numbers.

use super::{Lane, Memory, Opened, Player, Rank, Stop};
use crate::player::writers::Writers;
use crate::record::{Die, Failed};
use hal::{Buffer, Communicator, DeviceId, Stream};
use std::sync::Arc;

impl Player<'_> {
    pub(super) fn open_die(&mut self, recorded: &Die) -> Result<(), Stop> {
        let id = DeviceId(recorded.die);
        let device = (self.open)(id).map_err(|error| Stop::Open(recorded.die, error))?;
        let now = device.properties();
        self.report.replayed_dies.push(Die {
            die: recorded.die,
            backend: now.backend.to_string(),
            name: now.name.clone(),
            memory_bytes: now.memory_bytes,
            cores: now.cores,
            functional: now.functional,
        });
        self.report.recorded_dies.push(recorded.clone());
        self.dies.insert(recorded.die, Opened { device, had_values: recorded.functional });
        Ok(())
    }

    pub(super) fn join(
        &mut self,
        die: u32,
        id: [u64; 2],
        rank: usize,
        size: usize,
    ) -> Result<hal::Result<Arc<dyn Communicator>>, Stop> {
        let device = self.die(die)?.device.clone();
        let id = match self.ids.get(&id) {
            Some(id) => *id,
            None => match device.communicator_id() {
                Ok(made) => *self.ids.entry(id).or_insert(made),
                Err(error) => return Ok(Err(error)),
            },
        };
        Ok(device.communicator(id, rank, size))
    }

    pub(super) fn keep(
        &mut self,
        number: u64,
        recorded: Option<&Failed>,
        made: hal::Result<Buffer>,
    ) {
        let memory = self
            .outcome(recorded, made)
            .map(|buffer| Memory { buffer, writers: Writers::default() });
        // What could not be had at recording was not used there either.
        self.buffers.insert(number, memory.filter(|_| recorded.is_none()));
    }

    pub(super) fn die(&self, die: u32) -> Result<&Opened, Stop> {
        self.dies.get(&die).ok_or_else(|| Stop::Bad(format!("die {die} was not opened")))
    }

    pub(super) fn memory(&self, buffer: u64) -> Result<&Memory, Stop> {
        match self.buffers.get(&buffer) {
            Some(Some(memory)) => Ok(memory),
            Some(None) => Err(Stop::Absent),
            None => Err(Stop::Bad(format!("there is no buffer {buffer}"))),
        }
    }

    pub(super) fn rank(&self, communicator: u64) -> Result<&Rank, Stop> {
        match self.communicators.get(&communicator) {
            Some(Some(rank)) => Ok(rank),
            Some(None) => Err(Stop::Absent),
            None => Err(Stop::Bad(format!("there is no communicator {communicator}"))),
        }
    }

    pub(super) fn lane(&self, stream: u64) -> Result<&Lane, Stop> {
        match self.streams.get(&stream) {
            Some(Some(lane)) => Ok(lane),
            Some(None) => Err(Stop::Absent),
            None => Err(Stop::Bad(format!("there is no stream {stream}"))),
        }
    }

    /// A stream that can be submitted to, and its die.
    pub(super) fn stream(&self, stream: u64) -> Result<(Arc<dyn Stream>, u32), Stop> {
        let lane = self.lane(stream)?;
        match &lane.stream {
            Some(open) => Ok((open.clone(), lane.die)),
            None => Err(Stop::Bad(format!("stream {stream} was closed"))),
        }
    }
}

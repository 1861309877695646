//! Command lists: commands of several streams of one die, recorded once and launched many times.
//!
//! A step of a model issues the same commands again and again. A list holds them ready, so that a
//! device can take all of them at the cost of one call ([`crate::Device::execute`]), as with a
//! captured CUDA graph. What differs between two launches is the contents of device memory, which
//! the commands read when they run, and the amount of attention work, which only cost models read
//! ([`CommandList::set_attention_work`]).

use crate::op::AttentionWork;
use crate::{
    Collective, Command, Communicator, DeviceId, Error, Label, Op, Point, Region, Result, Stream,
};
use parking_lot::Mutex;
use std::any::Any;
use std::sync::{Arc, OnceLock};

/// What an entry of a list does.
#[derive(Clone, Debug)]
pub enum ListAction {
    /// [`Stream::submit`].
    Op(Box<Command>),
    /// [`Stream::submit_collectives`]; the batch is not empty.
    Collectives {
        /// The rank that takes part.
        communicator: Arc<dyn Communicator>,
        /// What it takes part in.
        batch: Vec<Collective>,
        /// How traces and errors call it.
        label: Label,
    },
    /// [`Stream::fill`].
    Fill {
        /// The bytes to set.
        region: Region,
        /// To what.
        byte: u8,
    },
    /// [`Stream::wait`] for what the list itself contains.
    Wait(WaitFor),
}

/// What a wait inside a list waits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum WaitFor {
    /// Everything that was submitted to stream 0 before the list.
    Start,
    /// An earlier entry, by its number; it is on another stream.
    Entry(usize),
}

/// One command, and the stream that it goes to.
#[derive(Clone, Debug)]
pub struct Entry {
    /// Which of the streams that the list is launched on.
    pub stream: usize,
    /// What to do.
    pub action: ListAction,
}

/// Commands of several streams of one die, in the order of issue. Each entry is exactly one command
/// of its stream.
///
/// A list keeps the memory and the communicators that it names. It may be launched any number of
/// times, also while an earlier launch still runs: launches are ordered as their commands are, by
/// the streams.
#[doc(alias = "cudaGraph_t")]
#[doc(alias = "cudaGraphExec_t")]
#[derive(Debug)]
pub struct CommandList {
    entries: Vec<Entry>,
    streams: usize,
    /// Of each entry, where its point is kept, if a wait names it. Place 0 is the start.
    marks: Vec<Option<usize>>,
    /// Of each wait, where the point that it waits for is kept.
    awaited: Vec<usize>,
    places: usize,
    scratch: Mutex<ListPoints>,
    prepared: OnceLock<Box<dyn Any + Send + Sync>>,
}

impl Clone for CommandList {
    fn clone(&self) -> Self {
        let CommandList { entries, streams, marks, awaited, places, .. } = self;
        let (entries, marks, awaited) = (entries.clone(), marks.clone(), awaited.clone());
        let (streams, places, scratch) = (*streams, *places, Mutex::default());
        // What a backend made of one list does not hold for another.
        let prepared = OnceLock::new();
        CommandList { entries, streams, marks, awaited, places, scratch, prepared }
    }
}

/// Points of one launch that is issued command by command: see [`CommandList::submit_entry`].
/// Reused from launch to launch, so that nothing is allocated.
#[derive(Debug, Default)]
pub struct ListPoints(Vec<Option<Point>>);

/// Why commands make no list.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ListError {
    /// An entry for a stream that the list does not have.
    #[error("entry {entry} is for stream {stream}, and the list has {streams} of them")]
    Stream {
        /// The entry.
        entry: usize,
        /// The stream that it names.
        stream: usize,
        /// How many the list is for.
        streams: usize,
    },
    /// A wait for what does not come before it on another stream.
    #[error("entry {entry} waits for {target}; a wait names an earlier entry of another stream")]
    Wait {
        /// The wait.
        entry: usize,
        /// What it names, in words.
        target: String,
    },
    /// Collectives without any.
    #[error("entry {entry} is an empty batch of collectives")]
    Empty {
        /// The entry.
        entry: usize,
    },
    /// Collectives of communicators of several dies.
    #[error("entry {entry} uses a communicator of {device}, and entries before it one of {other}")]
    Dies {
        /// The entry.
        entry: usize,
        /// The die of its communicator.
        device: DeviceId,
        /// The die of those before.
        other: DeviceId,
    },
}

impl CommandList {
    /// A list of these commands for so many streams.
    ///
    /// # Errors
    ///
    /// [`ListError`]: streams that the list does not have, waits for anything but an earlier entry
    /// of another stream (or, on any stream but 0, the start), empty batches, communicators of
    /// several dies. Shapes and memory are looked at when the list is launched.
    pub fn new(entries: Vec<Entry>, streams: usize) -> Result<CommandList, ListError> {
        let mut marks = vec![None; entries.len()];
        let mut awaited = vec![0; entries.len()];
        let mut places = 1;
        let mut die: Option<DeviceId> = None;
        for (at, Entry { stream, action }) in entries.iter().enumerate() {
            if *stream >= streams {
                return Err(ListError::Stream { entry: at, stream: *stream, streams });
            }
            match action {
                ListAction::Wait(target) => {
                    awaited[at] = match *target {
                        WaitFor::Start if *stream != 0 => 0,
                        WaitFor::Entry(e) if e < at && entries[e].stream != *stream => *marks[e]
                            .get_or_insert_with(|| {
                                places += 1;
                                places - 1
                            }),
                        WaitFor::Start => {
                            let target = "the start of its own stream".to_string();
                            return Err(ListError::Wait { entry: at, target });
                        }
                        WaitFor::Entry(e) => {
                            let what = if e < at { " of its own stream" } else { "" };
                            let target = format!("entry {e}{what}");
                            return Err(ListError::Wait { entry: at, target });
                        }
                    };
                }
                ListAction::Collectives { batch, .. } if batch.is_empty() => {
                    return Err(ListError::Empty { entry: at });
                }
                ListAction::Collectives { communicator, .. } => {
                    let device = communicator.device();
                    let other = *die.get_or_insert(device);
                    if other != device {
                        return Err(ListError::Dies { entry: at, device, other });
                    }
                }
                ListAction::Op(_) | ListAction::Fill { .. } => {}
            }
        }
        let (scratch, prepared) = (Mutex::default(), OnceLock::new());
        Ok(CommandList { entries, streams, marks, awaited, places, scratch, prepared })
    }

    /// The commands, in the order of issue.
    pub fn entries(&self) -> &[Entry] {
        &self.entries
    }

    /// How many streams it is for.
    pub fn streams(&self) -> usize {
        self.streams
    }

    /// The first `count` entries, as a list of their own.
    #[must_use]
    pub fn prefix(&self, count: usize) -> CommandList {
        let mut list = self.clone();
        list.entries.truncate(count);
        list
    }

    /// Changes how much work an attention op is told that it does, for launches from now on. Says
    /// whether the entry is one.
    pub fn set_attention_work(&mut self, entry: usize, work: AttentionWork) -> bool {
        let Some(Entry { action: ListAction::Op(command), .. }) = self.entries.get_mut(entry)
        else {
            return false;
        };
        match &mut command.op {
            Op::MlaPrefill(op) => op.work = work,
            Op::MlaDecode(op) => op.work = work,
            _ => return false,
        }
        true
    }

    /// For backends: what `make` makes of the list at its first launch, such as the memory behind
    /// its operands, kept for later ones. It must hold for any streams, and for any
    /// [amount of attention work](CommandList::set_attention_work), which is the one thing that
    /// may change. A clone and a [prefix](CommandList::prefix) begin anew.
    ///
    /// `None` if something of another type is kept: another backend's.
    pub fn prepared<T: Any + Send + Sync>(&self, make: impl FnOnce() -> T) -> Option<&T> {
        self.prepared.get_or_init(|| Box::new(make())).downcast_ref()
    }

    /// Checks that a list can be launched on these streams.
    ///
    /// # Errors
    ///
    /// [`Error::Usage`] unless there are as many as the list is for, distinct and of `device`.
    pub fn check_streams(&self, device: DeviceId, streams: &[Arc<dyn Stream>]) -> Result<()> {
        if streams.len() != self.streams {
            let (needed, given) = (self.streams, streams.len());
            let problem = format!("a list for {needed} streams was launched on {given}");
            return Err(Error::usage(device, problem));
        }
        for (i, stream) in streams.iter().enumerate() {
            let id = stream.id();
            if id.device != device {
                let problem = format!("a list was launched here with {id} as its stream {i}");
                return Err(Error::usage(device, problem));
            }
            if streams[..i].iter().any(|other| other.id() == id) {
                let problem = format!("a list was launched with {id} as two of its streams");
                return Err(Error::usage(device, problem));
            }
        }
        Ok(())
    }

    /// Issues every entry by itself, in order: [`crate::Device::execute`] of a device that has no
    /// lists of its own.
    ///
    /// # Errors
    ///
    /// As [`crate::Device::execute`].
    pub fn issue(&self, device: DeviceId, streams: &[Arc<dyn Stream>]) -> Result<()> {
        self.check_streams(device, streams)?;
        let mut own = None;
        // Two threads may launch one list on different streams.
        let mut scratch = self.scratch.try_lock();
        let points = match &mut scratch {
            Some(points) => &mut **points,
            None => own.insert(ListPoints::default()),
        };
        let issued =
            (0..self.entries.len()).try_for_each(|at| self.submit_entry(at, streams, points));
        // The list must not keep streams that its caller has dropped.
        points.0.clear();
        issued
    }

    /// Issues one entry: for a caller that issues lists of several dies in turns. Entries are issued
    /// in order, each once; the first takes the point of the start, and `points` is kept from the
    /// first to the last.
    ///
    /// # Errors
    ///
    /// As the stream's method that the entry names. [`Error::Usage`] for an entry that the list does
    /// not have, a stream that is missing, and a wait whose target was not issued with `points`.
    pub fn submit_entry(
        &self,
        at: usize,
        streams: &[Arc<dyn Stream>],
        points: &mut ListPoints,
    ) -> Result<()> {
        let entry = self.entries.get(at);
        let Some((Entry { action, .. }, stream)) =
            entry.and_then(|entry| Some((entry, streams.get(entry.stream)?)))
        else {
            let device = streams.first().map_or(DeviceId(0), |s| s.id().device);
            let given = streams.len();
            let problem = format!("a list has no entry {at} for {given} streams");
            return Err(Error::usage(device, problem));
        };
        if at == 0 {
            points.0.clear();
            points.0.resize(self.places, None);
            points.0[0] = Some(streams[0].point());
        }
        match action {
            ListAction::Op(command) => stream.submit(command)?,
            ListAction::Collectives { communicator, batch, label } => {
                stream.submit_collectives(communicator, batch, label)?;
            }
            ListAction::Fill { region, byte } => stream.fill(region, *byte)?,
            ListAction::Wait(target) => {
                let point = points.0.get(self.awaited[at]).and_then(Option::as_ref);
                let point = point.ok_or_else(|| {
                    let problem = format!("entry {at} waits for {target:?}, which was not issued");
                    Error::usage(stream.id().device, problem)
                })?;
                stream.wait(point)?;
            }
        }
        if let Some(place) = self.marks[at]
            && let Some(kept) = points.0.get_mut(place)
        {
            *kept = Some(stream.point());
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Device, NullDevice, Stream};

    fn fill(stream: usize, device: &NullDevice) -> Entry {
        let buffer = device.alloc_host(8).unwrap();
        Entry { stream, action: ListAction::Fill { region: buffer.whole(), byte: 1 } }
    }

    fn wait(stream: usize, target: WaitFor) -> Entry {
        Entry { stream, action: ListAction::Wait(target) }
    }

    #[test]
    fn only_what_can_run_makes_a_list() {
        let device = NullDevice::new(DeviceId(3), 1 << 20);
        let communicator = |die| {
            let device = NullDevice::new(DeviceId(die), 0);
            device.communicator(crate::CommunicatorId([0, 0]), 0, 1).unwrap()
        };
        let batch = |die, batch| Entry {
            stream: 0,
            action: ListAction::Collectives {
                communicator: communicator(die),
                batch,
                label: "batch".into(),
            },
        };
        let one = || {
            let tensor = crate::Tensor::new(
                device.alloc_host(4).unwrap(),
                0,
                crate::TensorDesc::new(crate::DType::F32, &[1]),
            );
            vec![Collective::Broadcast { tensor, root: 0 }]
        };
        let f = |stream| fill(stream, &device);
        let good = [
            vec![],
            vec![f(0), wait(1, WaitFor::Start), wait(1, WaitFor::Entry(0)), f(1)],
            vec![batch(3, one()), batch(3, one())],
        ];
        for entries in good {
            CommandList::new(entries, 2).unwrap();
        }
        let bad: [(Vec<Entry>, &str); 7] = [
            (vec![f(0), f(2)], "entry 1 is for stream 2"),
            (vec![wait(0, WaitFor::Start)], "the start of its own stream"),
            (vec![f(0), wait(0, WaitFor::Entry(0))], "entry 0 of its own stream"),
            (vec![wait(1, WaitFor::Entry(0))], "waits for entry 0;"),
            (vec![wait(1, WaitFor::Entry(1)), f(0)], "waits for entry 1;"),
            (vec![batch(3, vec![])], "empty batch"),
            (vec![batch(3, one()), batch(4, one())], "entry 1 uses a communicator of die 4"),
        ];
        for (entries, words) in bad {
            let error = CommandList::new(entries, 2).unwrap_err().to_string();
            assert!(error.contains(words), "{error:?} lacks {words:?}");
        }
    }

    #[test]
    fn what_a_backend_makes_of_a_list_is_kept_and_not_copied() {
        let device = NullDevice::new(DeviceId(0), 1 << 20);
        let list = CommandList::new(vec![fill(0, &device)], 1).unwrap();
        assert_eq!(list.prepared(|| 1u32), Some(&1));
        assert_eq!(list.prepared(|| 2u32), Some(&1));
        assert_eq!(list.prepared(|| "another backend's"), None);
        assert_eq!(list.clone().prepared(|| 3u32), Some(&3));
        assert_eq!(list.prefix(1).prepared(|| 4u32), Some(&4));
    }

    #[test]
    fn streams_are_as_many_as_needed_distinct_and_of_the_die() {
        let (device, other) =
            (NullDevice::new(DeviceId(0), 1 << 20), NullDevice::new(DeviceId(1), 1 << 20));
        let entries = vec![fill(0, &device), wait(1, WaitFor::Entry(0)), fill(1, &device)];
        let list = CommandList::new(entries, 2).unwrap();
        let (a, b) = (device.stream("a").unwrap(), device.stream("b").unwrap());
        let foreign = other.stream("c").unwrap();
        for (streams, words) in [
            (vec![a.clone()], "for 2 streams was launched on 1"),
            (vec![a.clone(), a.clone()], "two of its streams"),
            (vec![a.clone(), foreign], "die 1 stream 0"),
        ] {
            let error = device.execute(&list, &streams).unwrap_err().to_string();
            assert!(error.contains(words), "{error:?} lacks {words:?}");
        }
        assert_eq!((a.point().value(), b.point().value()), (0, 0), "nothing was submitted");
        let streams: [Arc<dyn Stream>; 2] = [a.clone(), b.clone()];
        device.execute(&list, &streams).unwrap();
        device.execute(&list.prefix(1), &streams).unwrap();
        assert_eq!((a.point().value(), b.point().value()), (2, 2));
        let mut points = ListPoints::default();
        let error = list.submit_entry(1, &streams, &mut points).unwrap_err().to_string();
        assert!(error.contains("was not issued"), "{error}");
        assert!(list.submit_entry(3, &streams, &mut points).is_err(), "there is no entry 3");
    }
}

//! Who touched a buffer last.
//!
//! A list touches the same ranges at every launch, and only the numbers of its commands change.
//! Noting them buffer by buffer would cost more than all else about a launch; so the list
//! [stands](Standing) for the accesses of its latest launch, until somebody else wants to know.

use hal::StreamId;
use hal::hazard::{AccessLog, PastAccess};
use parking_lot::Mutex;
use std::sync::Arc;

/// The accesses of one buffer.
#[derive(Debug, Default)]
pub(crate) struct Accesses {
    log: AccessLog,
    /// A list that made the latest ones, and the buffer's place in it.
    standing: Option<(Arc<Standing>, usize)>,
}

impl Accesses {
    /// All of them, written down.
    pub(crate) fn log(&mut self) -> &mut AccessLog {
        if let Some((list, at)) = self.standing.take() {
            list.settle(at, &mut self.log);
        }
        &mut self.log
    }

    /// Lets a list stand for its accesses.
    pub(crate) fn stand(&mut self, list: &Arc<Standing>, at: usize) {
        self.log();
        self.standing = Some((list.clone(), at));
    }
}

/// The accesses of a list's latest launch.
#[derive(Debug)]
pub(crate) struct Standing {
    /// Of each buffer, what is left of all accesses to it; streams and numbers are those of the
    /// list.
    logs: Vec<AccessLog>,
    launch: Mutex<Latest>,
}

#[derive(Debug)]
struct Latest {
    /// The list's streams, and the last command of each before the launch.
    streams: Vec<(StreamId, u64)>,
    /// The buffers that it does not stand for, or no more.
    settled: Vec<usize>,
}

impl Standing {
    pub(crate) fn new(logs: Vec<AccessLog>) -> Self {
        let settled = (0..logs.len()).collect();
        Standing { logs, launch: Mutex::new(Latest { streams: Vec::new(), settled }) }
    }

    /// Writes down the accesses to a buffer, and stands for it no more.
    fn settle(&self, at: usize, log: &mut AccessLog) {
        let mut latest = self.launch.lock();
        latest.settled.push(at);
        for PastAccess { stream, sequence, range, wrote } in self.logs[at].past().iter().cloned() {
            let (stream, before) = latest.streams[stream.index as usize];
            log.note(stream, before + sequence, range, wrote);
        }
    }

    /// The streams of the latest launch, and the last command of each before it.
    pub(crate) fn latest(&self) -> Vec<(StreamId, u64)> {
        self.launch.lock().streams.clone()
    }

    /// There is a new launch.
    pub(crate) fn launched(&self, streams: Vec<(StreamId, u64)>) {
        self.launch.lock().streams = streams;
    }

    /// Takes the numbers of the buffers that it does not stand for.
    pub(crate) fn take_settled(&self) -> Vec<usize> {
        std::mem::take(&mut self.launch.lock().settled)
    }

    /// Puts back what was taken and not acted upon.
    pub(crate) fn put_back(&self, settled: Vec<usize>) {
        self.launch.lock().settled.extend(settled);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use hal::DeviceId;

    #[test]
    fn a_list_stands_for_its_latest_launch_until_somebody_looks() {
        let stream = |index| StreamId { device: DeviceId(0), index };
        let mut log = AccessLog::default();
        // The third command of the list's only stream writes the first four bytes.
        log.note(stream(0), 3, 0..4, true);
        let list = Arc::new(Standing::new(vec![log]));
        assert_eq!(list.take_settled(), [0], "before the first launch");
        let mut buffer = Accesses::default();
        buffer.log().note(stream(5), 9, 4..8, true);
        list.launched(vec![(stream(5), 10)]);
        buffer.stand(&list, 0);
        list.launched(vec![(stream(5), 20)]);
        assert_eq!(list.take_settled(), [0; 0]);
        let expected = [(9, 4..8), (23, 0..4)];
        let noted = |log: &AccessLog| -> Vec<_> {
            log.past().iter().map(|p| (p.sequence, p.range.clone())).collect()
        };
        assert_eq!(noted(buffer.log()), expected);
        assert_eq!(list.take_settled(), [0]);
        // It stands for the buffer no more.
        list.launched(vec![(stream(5), 30)]);
        assert_eq!(noted(buffer.log()), expected);
    }
}

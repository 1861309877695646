//! The events of a [`Timeline`].

use super::share::{self, Claim, FULL};
use crate::cost::Cost;
use std::cmp::Reverse;
use std::collections::{BinaryHeap, HashMap, VecDeque};

/// A stream of a timeline, by number.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct StreamIndex(pub u32);

/// A collective that several streams take part in: the group, and which one of the group it is.
pub type MeetKey = ([u64; 2], u64);

/// A send and its receive: the group, sender and receiver, and which one of theirs it is.
pub type PairKey = ([u64; 2], u32, u32, u64);

/// A command, as far as time is concerned.
#[derive(Clone, Debug, PartialEq)]
pub enum Step {
    /// Runs on its die.
    Run(Cost),
    /// Ends when command `value` of another stream has ended; streams count from 1.
    Wait {
        /// The other stream.
        stream: StreamIndex,
        /// The command.
        value: u64,
    },
    /// Runs together with others, all of which give the same key.
    Meet {
        /// Which collective.
        key: MeetKey,
        /// How many streams take part.
        size: u32,
        /// What it costs when nothing else runs on its dies.
        cost: Cost,
    },
    /// Sends and receives, each of which begins when both sides are ready. What they pass is taken
    /// as small beside what else the die does.
    Pairs {
        /// Each, and its picoseconds.
        pairs: Vec<(PairKey, u64)>,
    },
}

/// A command that has ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Done {
    /// Its stream.
    pub stream: StreamIndex,
    /// Its place there, from 1.
    pub value: u64,
    /// Picoseconds when its own stream was ready for it, and the host had issued it.
    pub ready: u64,
    /// Picoseconds when it began: for a collective, when all ranks were ready; for sends and
    /// receives, when both sides of the first one were.
    pub start: u64,
    /// Picoseconds when it ended.
    pub end: u64,
}

/// See the module.
#[derive(Debug, Default)]
pub struct Timeline {
    streams: Vec<Stream>,
    dies: Vec<Die>,
    jobs: Vec<Job>,
    free: Vec<JobIndex>,
    agenda: BinaryHeap<Reverse<(u64, Event)>>,
    /// Streams whose next command is to be looked at.
    awake: VecDeque<StreamIndex>,
    meets: HashMap<MeetKey, Meeting>,
    pairs: HashMap<PairKey, (StreamIndex, u64, u64)>,
    done: Vec<Done>,
    claims: Vec<Claim>,
    rates: Vec<u64>,
}

type JobIndex = usize;

#[derive(Clone, Debug, Default)]
struct Die {
    running: Vec<JobIndex>,
    /// Streams that have commands which have not ended. While there is one only, nothing is shared.
    active: u32,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Event {
    /// A job has ended, if its version still holds.
    End { job: JobIndex, version: u64 },
    /// A job begins.
    Start { job: JobIndex },
}

#[derive(Debug)]
struct Stream {
    die: u32,
    pending: VecDeque<(u64, u64, Step)>,
    /// When its last command ended.
    now: u64,
    /// Commands that have ended.
    ended: u64,
    /// Ends of the last of them.
    ends: VecDeque<u64>,
    /// The command at the head is under way, or waits for others.
    busy: bool,
    /// Streams that wait for a command of this one.
    waiters: Vec<(u64, StreamIndex)>,
    /// Of pairs: how many are still open, when the first one began and the last one ended.
    open: (usize, u64, u64),
}

/// A command that runs on one die, or a collective on several.
#[derive(Debug, Default)]
struct Job {
    /// Its streams, of different dies, ascending.
    members: Vec<StreamIndex>,
    /// What each die would let it do.
    limits: Vec<u64>,
    shares: share::Shares,
    start: u64,
    /// Picoseconds of work left, in parts of [`FULL`], as of `updated`.
    left: u128,
    updated: u64,
    rate: u64,
    version: u64,
    /// Of each member, when its stream was ready, and extra picoseconds after it: delays that fault
    /// rules add.
    arrivals: Vec<(u64, u64)>,
}

#[derive(Debug, Default)]
struct Meeting {
    arrived: Vec<(StreamIndex, u64, u64)>,
    cost: Option<Cost>,
}

impl Timeline {
    /// A timeline of so many dies.
    pub fn new(dies: usize) -> Self {
        Timeline { dies: vec![Die::default(); dies], ..Timeline::default() }
    }

    /// A new stream of a die.
    pub fn stream(&mut self, die: u32) -> StreamIndex {
        let index = StreamIndex(self.streams.len() as u32);
        self.streams.push(Stream {
            die,
            pending: VecDeque::new(),
            now: 0,
            ended: 0,
            ends: VecDeque::new(),
            busy: false,
            waiters: Vec::new(),
            open: (0, u64::MAX, 0),
        });
        index
    }

    /// Appends a command, which the host has issued at `issued` picoseconds and which takes `delay`
    /// longer than it should.
    pub fn push(&mut self, stream: StreamIndex, issued: u64, delay: u64, step: Step) {
        let s = &mut self.streams[stream.0 as usize];
        if s.pending.is_empty() && !s.busy {
            self.dies[s.die as usize].active += 1;
            self.awake.push_back(stream);
        }
        s.pending.push_back((issued, delay, step));
    }

    /// When a command ended, if it has and is remembered.
    pub fn end(&self, stream: StreamIndex, value: u64) -> Option<u64> {
        let s = &self.streams[stream.0 as usize];
        let from_last = s.ended.checked_sub(value)?;
        let at = (s.ends.len() as u64).checked_sub(from_last + 1)?;
        s.ends.get(at as usize).copied()
    }

    /// How many commands of a stream have ended.
    pub fn ended(&self, stream: StreamIndex) -> u64 {
        self.streams[stream.0 as usize].ended
    }

    /// Plays until a command has ended; `false` if what has been pushed does not lead there.
    pub fn play_until(&mut self, stream: StreamIndex, value: u64) -> bool {
        while self.streams[stream.0 as usize].ended < value {
            if !self.next() {
                return false;
            }
        }
        true
    }

    /// Begins every collective and transfer that waits for others with those who are there: the others
    /// have failed. Says whether there were any.
    pub fn give_up_on_others(&mut self) -> bool {
        let mut keys: Vec<MeetKey> = self.meets.keys().copied().collect();
        keys.sort_unstable();
        keys.iter().for_each(|&key| self.begin(key));
        let mut pairs: Vec<_> = self.pairs.drain().collect();
        pairs.sort_unstable();
        for (_, (stream, ready, picos)) in &pairs {
            let (open, began, ended) = &mut self.streams[stream.0 as usize].open;
            (*open, *began) = (*open - 1, (*began).min(*ready));
            *ended = (*ended).max(ready + picos);
        }
        for (_, (stream, ..)) in &pairs {
            if self.pairs_ended(*stream) {
                self.awake.push_back(*stream);
            }
        }
        !keys.is_empty() || !pairs.is_empty()
    }

    /// Forgets the ends of a stream's commands before this one.
    pub fn forget_before(&mut self, stream: StreamIndex, value: u64) {
        let s = &mut self.streams[stream.0 as usize];
        let first = s.ended + 1 - s.ends.len() as u64;
        let gone = value.saturating_sub(first).min(s.ends.len() as u64);
        s.ends.drain(..gone as usize);
    }

    /// Plays all that can be played.
    pub fn play(&mut self) {
        while self.next() {}
    }

    /// Takes what has ended since the last call, in the order of the streams' commands.
    pub fn take_done(&mut self) -> std::vec::Drain<'_, Done> {
        self.done.drain(..)
    }

    /// Carries out the next event; `false` if there is none.
    fn next(&mut self) -> bool {
        if let Some(stream) = self.awake.pop_front() {
            self.advance(stream);
            return true;
        }
        let Some(Reverse((time, event))) = self.agenda.pop() else { return false };
        match event {
            Event::Start { job } => self.start(job, time),
            Event::End { job, version } if self.jobs[job].version == version => {
                self.finish_job(job, time);
            }
            Event::End { .. } => {}
        }
        true
    }

    /// Whether no other stream of its die has anything to run, now or later, that is known: a stream
    /// by itself need not be played event by event.
    fn is_alone(&self, stream: StreamIndex) -> bool {
        self.dies[self.streams[stream.0 as usize].die as usize].active == 1
    }

    /// Looks at the head of a stream, and goes on as long as commands end at once.
    fn advance(&mut self, index: StreamIndex) {
        loop {
            let s = &mut self.streams[index.0 as usize];
            if s.busy {
                return;
            }
            let Some((issued, delay, step)) = s.pending.pop_front() else { return };
            s.busy = true;
            let ready = s.now.max(issued);
            match step {
                Step::Run(cost) if cost.picos == 0 || self.is_alone(index) => {
                    self.ends(index, ready, ready, ready + cost.picos + delay);
                }
                Step::Run(cost) => {
                    let job = self.job(vec![index], cost, ready, vec![(ready, delay)]);
                    self.agenda.push(Reverse((ready, Event::Start { job })));
                    return;
                }
                Step::Wait { stream, value } => {
                    let target = &mut self.streams[stream.0 as usize];
                    if target.ended < value {
                        target.waiters.push((value, index));
                        let s = &mut self.streams[index.0 as usize];
                        s.pending.push_front((issued, delay, Step::Wait { stream, value }));
                        return;
                    }
                    let at = self.end(stream, value).unwrap_or(0).max(ready);
                    self.ends(index, ready, at, at + delay);
                }
                Step::Meet { key, size, cost } => {
                    self.meet(index, key, size, cost, ready, delay);
                }
                Step::Pairs { pairs } => {
                    if !self.exchange(index, &pairs, ready, delay) {
                        return;
                    }
                }
            }
        }
    }

    fn meet(
        &mut self,
        index: StreamIndex,
        key: MeetKey,
        size: u32,
        cost: Cost,
        ready: u64,
        delay: u64,
    ) {
        let meeting = self.meets.entry(key).or_default();
        meeting.arrived.push((index, ready, delay));
        // Ranks may hold different parts: the one with the most to do decides.
        if meeting.cost.is_none_or(|known| known.picos < cost.picos) {
            meeting.cost = Some(cost);
        }
        if meeting.arrived.len() >= size as usize {
            self.begin(key);
        }
    }

    /// Begins a collective with those who are there.
    fn begin(&mut self, key: MeetKey) {
        let Some(Meeting { mut arrived, cost }) = self.meets.remove(&key) else { return };
        arrived.sort_unstable_by_key(|&(stream, ..)| stream);
        let start = arrived.iter().map(|&(_, ready, _)| ready).max().unwrap_or(0);
        let picos = cost.map_or(0, |cost| cost.picos);
        if picos == 0 || arrived.iter().all(|&(stream, ..)| self.is_alone(stream)) {
            for (stream, ready, delay) in arrived {
                self.ends(stream, ready, start, start + picos + delay);
                self.awake.push_back(stream);
            }
            return;
        }
        let members: Vec<_> = arrived.iter().map(|&(stream, ..)| stream).collect();
        let arrivals = arrived.iter().map(|&(_, ready, delay)| (ready, delay)).collect();
        let job = self.job(members, cost.unwrap_or(Cost::NOTHING), start, arrivals);
        self.agenda.push(Reverse((start, Event::Start { job })));
    }

    /// Whether all pairs have met, so that the command has ended.
    fn exchange(
        &mut self,
        index: StreamIndex,
        pairs: &[(PairKey, u64)],
        ready: u64,
        delay: u64,
    ) -> bool {
        let s = &mut self.streams[index.0 as usize];
        s.open = (pairs.len(), u64::MAX, ready);
        // Until all are known, they are kept with the command.
        s.pending.push_front((ready, delay, Step::Pairs { pairs: Vec::new() }));
        let mut others = Vec::new();
        for &(key, picos) in pairs {
            let Some((other, since, _)) = self.pairs.remove(&key) else {
                self.pairs.insert(key, (index, ready, picos));
                continue;
            };
            let both = ready.max(since);
            for stream in [index, other] {
                let (open, began, ended) = &mut self.streams[stream.0 as usize].open;
                (*open, *began) = (*open - 1, (*began).min(both));
                *ended = (*ended).max(both + picos);
            }
            others.push(other);
        }
        let ended = self.pairs_ended(index);
        for other in others {
            if other != index && self.pairs_ended(other) {
                self.awake.push_back(other);
            }
        }
        ended
    }

    fn pairs_ended(&mut self, index: StreamIndex) -> bool {
        let s = &mut self.streams[index.0 as usize];
        let (0, start, end) = s.open else { return false };
        let Some((ready, delay, Step::Pairs { .. })) = s.pending.front() else { return false };
        let (ready, delay) = (*ready, *delay);
        s.pending.pop_front();
        self.ends(index, ready, start.min(end), end + delay);
        true
    }

    /// A command has ended: its stream may go on.
    fn ends(&mut self, index: StreamIndex, ready: u64, start: u64, end: u64) {
        let s = &mut self.streams[index.0 as usize];
        s.busy = false;
        s.now = end;
        s.ended += 1;
        s.ends.push_back(end);
        if s.pending.is_empty() {
            self.dies[s.die as usize].active -= 1;
        }
        let value = s.ended;
        self.done.push(Done { stream: index, value, ready, start, end });
        if s.waiters.is_empty() {
            return;
        }
        let woken: Vec<_> = s.waiters.extract_if(.., |&mut (v, _)| v <= value).collect();
        for (_, stream) in woken {
            self.streams[stream.0 as usize].busy = false;
            self.awake.push_back(stream);
        }
    }

    fn job(
        &mut self,
        members: Vec<StreamIndex>,
        cost: Cost,
        start: u64,
        arrivals: Vec<(u64, u64)>,
    ) -> JobIndex {
        let index = self.free.pop().unwrap_or_else(|| {
            self.jobs.push(Job::default());
            self.jobs.len() - 1
        });
        let job = &mut self.jobs[index];
        job.limits.clear();
        job.limits.resize(members.len(), FULL);
        (job.members, job.arrivals) = (members, arrivals);
        job.shares = cost.shares;
        (job.start, job.updated, job.rate) = (start, start, 0);
        job.left = u128::from(cost.picos) * u128::from(FULL);
        index
    }

    fn start(&mut self, job: JobIndex, time: u64) {
        let members = std::mem::take(&mut self.jobs[job].members);
        for stream in &members {
            let die = self.streams[stream.0 as usize].die;
            self.dies[die as usize].running.push(job);
        }
        self.jobs[job].members = members;
        self.share(job, time);
    }

    fn finish_job(&mut self, index: JobIndex, time: u64) {
        let job = &mut self.jobs[index];
        job.version += 1;
        let (start, members) = (job.start, std::mem::take(&mut job.members));
        let arrivals = std::mem::take(&mut job.arrivals);
        for stream in &members {
            let die = self.streams[stream.0 as usize].die;
            self.dies[die as usize].running.retain(|&other| other != index);
        }
        self.jobs[index].members = members;
        self.share(index, time);
        let members = std::mem::take(&mut self.jobs[index].members);
        self.free.push(index);
        for (&stream, (ready, delay)) in members.iter().zip(arrivals) {
            self.ends(stream, ready, start, time + delay);
        }
        self.awake.extend(members);
    }

    /// Shares out the dies of a job anew, since it begins or has ended.
    fn share(&mut self, job: JobIndex, time: u64) {
        let dies: Vec<u32> =
            self.jobs[job].members.iter().map(|s| self.streams[s.0 as usize].die).collect();
        // What each die lets its collectives do.
        let mut changed: Vec<JobIndex> = Vec::new();
        for &die in &dies {
            self.limit(die, &mut changed);
        }
        // A collective goes as fast as its slowest die: where that changes, its other dies have more
        // or less for what else they run.
        let mut others = dies;
        changed.sort_unstable();
        changed.dedup();
        for job in changed {
            let rate = self.jobs[job].limits.iter().copied().min().unwrap_or(FULL);
            if rate != self.jobs[job].rate {
                self.set_rate(job, rate, time);
                let members = &self.jobs[job].members;
                others.extend(members.iter().map(|s| self.streams[s.0 as usize].die));
            }
        }
        others.sort_unstable();
        others.dedup();
        for die in others {
            self.rest(die, time);
        }
    }

    /// Works out what a die would let each of its collectives do.
    fn limit(&mut self, die: u32, changed: &mut Vec<JobIndex>) {
        let running = &self.dies[die as usize].running;
        if !running.iter().any(|&job| self.jobs[job].members.len() > 1) {
            return;
        }
        self.claims.clear();
        self.claims
            .extend(running.iter().map(|&job| Claim { shares: self.jobs[job].shares, rate: None }));
        share::rates(&self.claims, &mut self.rates);
        for (&index, &rate) in running.iter().zip(&self.rates) {
            let job = &mut self.jobs[index];
            if job.members.len() < 2 {
                continue;
            }
            let streams = &self.streams;
            let member = job.members.iter().position(|s| streams[s.0 as usize].die == die);
            if let Some(member) = member {
                job.limits[member] = rate;
                changed.push(index);
            }
        }
    }

    /// Gives a die's own commands what its collectives leave.
    fn rest(&mut self, die: u32, time: u64) {
        let running = std::mem::take(&mut self.dies[die as usize].running);
        self.claims.clear();
        for &index in &running {
            let job = &self.jobs[index];
            let rate = (job.members.len() > 1).then_some(job.rate);
            self.claims.push(Claim { shares: job.shares, rate });
        }
        let mut rates = std::mem::take(&mut self.rates);
        share::rates(&self.claims, &mut rates);
        for (&index, &rate) in running.iter().zip(&rates) {
            if self.jobs[index].members.len() < 2 && self.jobs[index].rate != rate {
                self.set_rate(index, rate, time);
            }
        }
        (self.dies[die as usize].running, self.rates) = (running, rates);
    }

    fn set_rate(&mut self, index: JobIndex, rate: u64, time: u64) {
        let job = &mut self.jobs[index];
        let at = time.max(job.updated);
        let done = u128::from(at - job.updated) * u128::from(job.rate);
        job.left = job.left.saturating_sub(done);
        (job.updated, job.rate) = (at, rate);
        job.version += 1;
        let end = at + job.left.div_ceil(u128::from(rate.max(1))) as u64;
        let version = job.version;
        self.agenda.push(Reverse((end, Event::End { job: index, version })));
    }
}

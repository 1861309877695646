//! One stream's queue: how commands enter it, advance, complete and fail.
//!
//! A stream is idle, scheduled on a worker, held by something that will wake it, or hung. A worker
//! drains it until it is empty or held. No worker blocks, so that any number of streams runs on any
//! number of threads.
//!
//! A command that has been carried out is noted with what it costs and what it waited for. When it
//! would have run, [`crate::clock`] works out when somebody asks.

use super::prepared::Rest;
use super::work::{Outcome, Work};
use crate::clock::Carried;
use crate::collective::Group;
use crate::cost::Cost;
use crate::device::DieState;
use crate::memory::Memory;
use crate::system::Shared;
use crate::timeline::{Step, StreamIndex};
use crate::workers::Task;
use hal::fault::FaultAction;
use hal::op::Access;
use hal::trace::{CommandKind, Span, WaitedFor};
use hal::{Cause, Clock, Error, Failure, Label, Result, StreamId};
use parking_lot::{Condvar, Mutex, MutexGuard};
use rayon::prelude::*;
use std::cell::Cell;
use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// A stream, as its queue, its waiters and its workers share it.
#[derive(Debug)]
pub(crate) struct StreamShared {
    pub(crate) system: Arc<Shared>,
    pub(crate) id: StreamId,
    pub(crate) label: Arc<str>,
    /// Its number on the clock.
    pub(crate) index: StreamIndex,
    pub(super) queue: Mutex<Queue>,
    pub(super) reached: AtomicU64,
    pub(super) changed: Condvar,
}

/// Commands of a stream that are carried out before the clock works them out unasked.
const MOST_CARRIED: u64 = 1 << 16;

#[derive(Debug)]
pub(super) struct Queue {
    pub(super) pending: VecDeque<Queued>,
    pub(super) activity: Activity,
    pub(super) submitted: u64,
    pub(super) failure: Option<Error>,
    /// The sequence number of the last command that was carried out.
    pub(super) completed: u64,
    /// What has been carried out and not been taken in by the clock.
    carried: Vec<Carried>,
    /// Commands submitted when the clock last worked out everything by itself.
    worked_out: u64,
    waiters: Vec<Waiter>,
    /// The lowest value that a host thread sleeps for.
    pub(super) host_waits_for: Option<u64>,
    /// Communicators that it has submitted collectives to.
    groups: Vec<Arc<Group>>,
}

#[derive(Clone, Debug)]
pub(super) enum Activity {
    Idle,
    /// A worker is draining it, or will.
    Scheduled,
    /// The command with this sequence number waits for something that will wake the stream.
    Held(Brief),
    /// A fault rule made this command endless.
    Hung(Brief),
}

impl Activity {
    /// Whether a worker must be asked, which then is noted.
    pub(super) fn start(&mut self) -> bool {
        let idle = matches!(self, Activity::Idle);
        if idle {
            *self = Activity::Scheduled;
        }
        idle
    }
}

/// What messages say about a command.
#[derive(Clone, Debug)]
pub(super) struct Brief {
    pub(super) sequence: u64,
    pub(super) kind: CommandKind,
    pub(super) label: Label,
    pub(super) waits_for: Option<Blocker>,
}

/// What keeps a command: as data, and in words.
#[derive(Clone, Debug)]
pub(super) struct Blocker {
    pub(super) who: WaitedFor,
    pub(super) words: String,
}

impl Brief {
    pub(super) fn of(pending: &Pending, waits_for: Option<Blocker>) -> Self {
        let Pending { sequence, kind, label, .. } = pending;
        Brief { sequence: *sequence, kind: *kind, label: label.clone(), waits_for }
    }
}

/// What a queue holds.
#[derive(Debug)]
pub(super) enum Queued {
    One(Pending),
    /// What is left of a list; at least one command.
    List(Rest),
}

impl Queued {
    /// What messages say about the next command.
    pub(super) fn brief(&self) -> Brief {
        match self {
            Queued::One(pending) => Brief::of(pending, None),
            Queued::List(rest) => {
                let (sequence, command) = rest.peek();
                let (kind, label) = (command.kind, command.label.clone());
                Brief { sequence, kind, label, waits_for: None }
            }
        }
    }
}

/// A command in the queue.
#[derive(Debug)]
pub(crate) struct Pending {
    pub(crate) sequence: u64,
    pub(crate) kind: CommandKind,
    pub(crate) label: Label,
    /// When the host had issued it.
    pub(crate) issued: u64,
    fault: FaultAction,
    work: Work,
}

impl Pending {
    /// A command that no fault rule concerns.
    pub(super) fn new(
        sequence: u64,
        kind: CommandKind,
        label: Label,
        issued: u64,
        work: Work,
    ) -> Self {
        Pending { sequence, kind, label, issued, fault: FaultAction::Pass, work }
    }
}

/// A command that is the head of its stream and waits for other ranks. Whoever holds it completes
/// or fails it.
#[derive(Debug)]
pub(crate) struct Held {
    pub(crate) stream: Arc<StreamShared>,
    pub(crate) sequence: u64,
    pub(crate) label: Label,
    kind: CommandKind,
    issued: u64,
    delay: u64,
    /// The ranks that it meets, for traces.
    pub(crate) waited_for: Option<WaitedFor>,
}

/// A range that a command is about to touch.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Touch<'a> {
    pub(crate) memory: &'a Memory,
    pub(crate) offset: u64,
    pub(crate) len: u64,
    pub(crate) access: Access,
}

/// One call with which the host issues commands: one alone, or all of a list. It costs the host
/// time once, when the first is accepted.
#[derive(Debug, Default)]
pub(crate) struct Launch(Cell<Option<u64>>);

impl Launch {
    /// When the host had issued it.
    pub(super) fn issued(&self, stream: &StreamShared) -> u64 {
        if !stream.timed() {
            return 0;
        }
        self.0.get().unwrap_or_else(|| {
            let cost = stream.system.cost.host_issue();
            let at = stream.die().host_clock.fetch_add(cost, Ordering::Relaxed) + cost;
            self.0.set(Some(at));
            at
        })
    }
}

/// A command that was accepted and has its place in the queue; the queue stays locked until its
/// work is pushed.
pub(crate) struct Admitted<'q> {
    stream: &'q Arc<StreamShared>,
    queue: MutexGuard<'q, Queue>,
    sequence: u64,
    kind: CommandKind,
    label: Label,
    issued: u64,
    fault: FaultAction,
}

impl Admitted<'_> {
    /// Puts the work in the queue and returns its sequence number.
    pub(crate) fn push(self, work: Work) -> u64 {
        let Admitted { stream, mut queue, sequence, kind, label, issued, fault } = self;
        queue.submitted = sequence;
        let pending = Pending { sequence, kind, label, issued, fault, work };
        queue.pending.push_back(Queued::One(pending));
        let start = queue.activity.start();
        drop(queue);
        if start {
            stream.schedule();
        }
        sequence
    }
}

impl Admitted<'_> {
    /// Puts the work in front of what was queued since it was admitted, and starts the stream.
    fn push_first(self, work: Work) {
        let Admitted { stream, mut queue, sequence, kind, label, issued, fault } = self;
        let pending = Pending { sequence, kind, label, issued, fault, work };
        queue.pending.push_front(Queued::One(pending));
        drop(queue);
        stream.schedule();
    }
}

/// Copies with all threads where it is worth it.
fn copy(pool: &rayon::ThreadPool, src: &[u8], dst: &mut [u8]) {
    const PIECE: usize = 1 << 20;
    if src.len() < 4 * PIECE {
        return dst.copy_from_slice(src);
    }
    pool.install(|| {
        dst.par_chunks_mut(PIECE)
            .zip(src.par_chunks(PIECE))
            .for_each(|(dst, src)| dst.copy_from_slice(src));
    });
}

enum Next {
    Run(Pending),
    Done,
}

/// Whether the worker goes on with the stream's next command.
enum Flow {
    Continue,
    Stop,
}

impl Queue {
    /// As [`StreamShared::takes_part_in`].
    pub(super) fn takes_part_in(&mut self, group: &Arc<Group>) {
        if !self.groups.iter().any(|g| Arc::ptr_eq(g, group)) {
            self.groups.push(group.clone());
        }
    }
}

/// A stream whose command `sequence` waits for `value` of the stream that keeps this.
#[derive(Debug)]
struct Waiter {
    value: u64,
    stream: Arc<StreamShared>,
    sequence: u64,
}

/// What remains of a command once it has run.
struct Finished {
    sequence: u64,
    kind: CommandKind,
    label: Label,
    issued: u64,
    waited_for: Option<WaitedFor>,
}

impl From<Pending> for Finished {
    fn from(p: Pending) -> Self {
        Finished {
            sequence: p.sequence,
            kind: p.kind,
            label: p.label,
            issued: p.issued,
            waited_for: None,
        }
    }
}

impl Task for StreamShared {
    fn carry_out(self: Arc<Self>) {
        self.drain();
    }
}

impl StreamShared {
    pub(crate) fn new(system: Arc<Shared>, id: StreamId, label: &str) -> Self {
        StreamShared {
            index: system.clock.stream(id.device.0),
            system,
            id,
            label: label.into(),
            queue: Mutex::new(Queue {
                pending: VecDeque::new(),
                activity: Activity::Idle,
                submitted: 0,
                failure: None,
                completed: 0,
                carried: Vec::new(),
                worked_out: 0,
                waiters: Vec::new(),
                host_waits_for: None,
                groups: Vec::new(),
            }),
            reached: AtomicU64::new(0),
            changed: Condvar::new(),
        }
    }

    pub(super) fn die(&self) -> &DieState {
        &self.system.dies[self.id.device.0 as usize]
    }

    pub(super) fn timed(&self) -> bool {
        self.system.mode.timed()
    }

    /// An error if the die is lost or the stream poisoned.
    pub(crate) fn usable(&self) -> Result<()> {
        self.die().alive()?;
        self.queue.lock().failure.clone().map_or(Ok(()), Err)
    }

    /// The sequence number of the last command submitted.
    pub(crate) fn submitted(&self) -> u64 {
        self.queue.lock().submitted
    }

    /// Marks fresh memory as written by this stream's last command.
    pub(crate) fn note_allocation(&self, memory: &Memory) {
        let sequence = self.submitted();
        memory.accesses.lock().log().note(self.id, sequence, 0..memory.size, true);
    }

    /// Accepts a command: the stream works, nothing conflicts with it, the host has issued it.
    pub(crate) fn admit<'q>(
        self: &'q Arc<Self>,
        kind: CommandKind,
        label: &Label,
        touches: &[Touch<'_>],
        launch: &Launch,
    ) -> Result<Admitted<'q>> {
        self.die().alive()?;
        let mut queue = self.queue.lock();
        if queue.submitted >= queue.worked_out + MOST_CARRIED && self.timed() {
            // A host that never looks must not fill its memory with what has been carried out.
            queue.worked_out = queue.submitted;
            MutexGuard::unlocked(&mut queue, || self.system.clock.play(&self.system));
        }
        if let Some(failure) = &queue.failure {
            return Err(failure.clone());
        }
        let sequence = queue.submitted + 1;
        for touch in touches {
            self.check_hazard(touch, kind, label)?;
        }
        for Touch { memory, offset, len, access } in touches {
            let range = *offset..offset + len;
            memory.accesses.lock().log().note(self.id, sequence, range, access.writes());
        }
        let issued = launch.issued(self);
        let fault = match self.die().faults() {
            Some(plan) => plan.decide(self.id.device, kind.name(), label.as_str()),
            None => FaultAction::Pass,
        };
        Ok(Admitted { stream: self, queue, sequence, kind, label: label.clone(), issued, fault })
    }

    /// Accepts a command and queues its work.
    pub(crate) fn submit(
        self: &Arc<Self>,
        kind: CommandKind,
        label: Label,
        touches: &[Touch<'_>],
        work: Work,
        launch: &Launch,
    ) -> Result<u64> {
        Ok(self.admit(kind, &label, touches, launch)?.push(work))
    }

    fn check_hazard(&self, touch: &Touch<'_>, kind: CommandKind, label: &Label) -> Result<()> {
        let Touch { memory, offset, len, access } = *touch;
        let (mut accesses, range) = (memory.accesses.lock(), offset..offset + len);
        let conflict =
            accesses.log().conflict(&self.system.order, self.id, &range, access.writes());
        let Some(past) = conflict else { return Ok(()) };
        let verb = |writes| if writes { "writes" } else { "reads" };
        let problem = format!(
            "hazard: it {} bytes {}..{} of buffer {} and nothing orders it after command {} of {}, \
             which {} bytes {}..{}; wait for a point of that stream first",
            verb(access.writes()),
            range.start,
            range.end,
            memory.id.0,
            past.sequence,
            past.stream,
            verb(past.wrote),
            past.range.start,
            past.range.end,
        );
        Err(Error::misuse(self.id.device, kind.name(), label, problem))
    }

    /// Copies host memory to the device: at once if the stream is idle, else from a copy of its
    /// own.
    pub(crate) fn write(
        self: &Arc<Self>,
        memory: &Arc<Memory>,
        offset: u64,
        src: &[u8],
    ) -> Result<()> {
        let len = src.len() as u64;
        let touch = [Touch { memory, offset, len, access: Access::Write }];
        let label = Label::Static("write");
        let mut admitted = self.admit(CommandKind::Write, &label, &touch, &Launch::default())?;
        let work = |bytes| Work::Write { memory: memory.clone(), offset, bytes, len };
        let idle = matches!(admitted.queue.activity, Activity::Idle)
            && admitted.fault == FaultAction::Pass;
        if !self.system.mode.functional() {
            admitted.push(work(Box::default()));
        } else if !idle {
            admitted.push(work(src.into()));
        } else {
            // Taken, so that no worker starts and others queue up behind while this thread copies.
            admitted.queue.activity = Activity::Scheduled;
            admitted.queue.submitted = admitted.sequence;
            let copied = MutexGuard::unlocked(&mut admitted.queue, || {
                memory.try_write(offset, len, |m| copy(&self.system.pool, src, m)).is_some()
            });
            admitted.push_first(work(if copied { Box::default() } else { src.into() }));
        }
        Ok(())
    }

    /// Queues a wait for another stream, and returns the number of the last command, which it is
    /// unless there is nothing to wait for.
    pub(crate) fn wait_for(
        self: &Arc<Self>,
        target: &StreamShared,
        value: u64,
        launch: &Launch,
    ) -> Result<u64> {
        if target.id == self.id {
            return Ok(self.submitted());
        }
        if !Arc::ptr_eq(&target.system, &self.system) {
            let problem = format!("the point on {} is another system's", target.id);
            return Err(Error::usage(self.id.device, problem));
        }
        let Some(target) = self.system.dies[target.id.device.0 as usize].stream(target.id) else {
            // A stream that nobody holds has no points either.
            return Ok(self.submitted());
        };
        let admitted = self.admit(CommandKind::Wait, &"wait".into(), &[], launch)?;
        self.system.order.wait(self.id, admitted.sequence, target.id, value);
        Ok(admitted.push(Work::Wait { target, value }))
    }

    /// Asks a worker to drain the stream.
    pub(super) fn schedule(self: &Arc<Self>) {
        self.system.pool.run(self.clone());
    }

    /// Wakes a held stream, if `sequence` is what holds it.
    fn wake(self: &Arc<Self>, sequence: u64) {
        let mut queue = self.queue.lock();
        if matches!(&queue.activity, Activity::Held(brief) if brief.sequence == sequence) {
            queue.activity = Activity::Scheduled;
            drop(queue);
            self.schedule();
        }
    }

    /// Runs commands until there are none or one is held. Runs on one worker at a time.
    fn drain(self: &Arc<Self>) {
        loop {
            let pending = match self.next() {
                Next::Run(pending) => pending,
                Next::Done => return,
            };
            let delay = match &pending.fault {
                FaultAction::Pass => 0,
                FaultAction::Delay(by) => (by.as_nanos() * 1000).min(u128::from(u64::MAX)) as u64,
                FaultAction::Fail(text) => {
                    return self.fail_command(&pending, Cause::Injected(text.clone()));
                }
                FaultAction::Lose => return self.die().lose("a fault rule took it away".into()),
                _ => {
                    let mut queue = self.queue.lock();
                    queue.activity = Activity::Hung(Brief::of(&pending, None));
                    return;
                }
            };
            match self.execute(pending, delay) {
                Flow::Continue => {}
                Flow::Stop => return,
            }
        }
    }

    fn next(&self) -> Next {
        let mut queue = self.queue.lock();
        match queue.pending.pop_front() {
            Some(next) if queue.failure.is_none() => Next::Run(match next {
                Queued::One(pending) => pending,
                Queued::List(mut rest) => {
                    let pending = rest.next();
                    if !rest.is_empty() {
                        queue.pending.push_front(Queued::List(rest));
                    }
                    pending
                }
            }),
            _ => {
                queue.activity = Activity::Idle;
                Next::Done
            }
        }
    }

    fn execute(self: &Arc<Self>, mut pending: Pending, delay: u64) -> Flow {
        match std::mem::replace(&mut pending.work, Work::Nothing) {
            Work::Wait { target, value } => self.execute_wait(pending, target, value, delay),
            Work::Collective(collective) => {
                let held = self.hold(&pending, delay, collective.waits_for());
                collective.arrive(held);
                Flow::Stop
            }
            work => match work.run(&self.system) {
                Outcome::Done(cost) => {
                    self.finish(&pending.into(), Step::Run(cost), cost, delay);
                    Flow::Continue
                }
                Outcome::Busy => {
                    // Another command holds the memory (disjoint parts of one buffer): later.
                    pending.work = work;
                    self.queue.lock().pending.push_front(Queued::One(pending));
                    self.schedule();
                    Flow::Stop
                }
                Outcome::Failed(cause) => {
                    self.fail_command(&pending, cause);
                    Flow::Stop
                }
            },
        }
    }

    fn execute_wait(
        self: &Arc<Self>,
        mut pending: Pending,
        target: Arc<StreamShared>,
        value: u64,
        delay: u64,
    ) -> Flow {
        let answer = target.queue.lock().passed(value);
        match answer {
            Some(Ok(())) => {
                let waited_for = Some(WaitedFor::Command { stream: target.id, sequence: value });
                let done = Finished { waited_for, ..pending.into() };
                let step = Step::Wait { stream: target.index, value };
                self.finish(&done, step, Cost::NOTHING, delay);
                return Flow::Continue;
            }
            Some(Err(error)) => {
                self.fail(error);
                return Flow::Stop;
            }
            None => {}
        }
        // Back into the queue, to be asked again when the target wakes this stream. Never two
        // queues locked at once: two streams may wait for each other's past.
        let sequence = pending.sequence;
        let who = WaitedFor::Command { stream: target.id, sequence: value };
        let words = format!("command {value} of {}", target.describe());
        let waits_for = Some(Blocker { who, words });
        let brief = Brief::of(&pending, waits_for);
        pending.work = Work::Wait { target: target.clone(), value };
        {
            let mut queue = self.queue.lock();
            queue.pending.push_front(Queued::One(pending));
            queue.activity = Activity::Held(brief);
        }
        let mut queue = target.queue.lock();
        if queue.passed(value).is_none() {
            queue.waiters.push(Waiter { value, stream: self.clone(), sequence });
        } else {
            drop(queue);
            self.wake(sequence);
        }
        Flow::Stop
    }

    /// Hands the head of the stream to a collective.
    fn hold(self: &Arc<Self>, pending: &Pending, delay: u64, who: WaitedFor) -> Held {
        let mut queue = self.queue.lock();
        let waits_for = Some(Blocker { who, words: "the other ranks".to_string() });
        queue.activity = Activity::Held(Brief::of(pending, waits_for));
        Held {
            stream: self.clone(),
            sequence: pending.sequence,
            label: pending.label.clone(),
            kind: pending.kind,
            issued: pending.issued,
            delay,
            waited_for: None,
        }
    }

    /// A command has been carried out: what it costs, and whoever waits for it.
    fn finish(&self, done: &Finished, step: Step, cost: Cost, delay: u64) {
        let mut queue = self.queue.lock();
        if queue.failure.is_some() {
            return;
        }
        if self.timed() {
            let span = self.die().is_traced().then(|| Span {
                stream: self.id,
                sequence: done.sequence,
                kind: done.kind,
                label: done.label.clone(),
                clock: Clock::Simulated,
                ready: 0,
                start: 0,
                end: 0,
                operations: cost.operations,
                bytes: cost.bytes,
                bound: cost.bound,
                waited_for: done.waited_for,
            });
            queue.carried.push(Carried { issued: done.issued, delay, step, span });
        }
        queue.completed = done.sequence;
        self.reached.store(done.sequence, Ordering::Release);
        let woken: Vec<Waiter> = if queue.waiters.is_empty() {
            Vec::new()
        } else {
            queue.waiters.extract_if(.., |w| w.value <= done.sequence).collect()
        };
        // Waking the host for every command would cost more than the commands.
        let wake_host = queue.host_waits_for.is_some_and(|value| value <= done.sequence);
        if wake_host {
            queue.host_waits_for = None;
        }
        drop(queue);
        if wake_host {
            self.changed.notify_all();
        }
        for waiter in woken {
            waiter.stream.wake(waiter.sequence);
        }
    }

    fn fail_command(self: &Arc<Self>, pending: &Pending, cause: Cause) {
        self.fail(self.failure_of(pending.sequence, pending.kind, &pending.label, cause));
    }

    fn failure_of(&self, sequence: u64, kind: CommandKind, label: &Label, cause: Cause) -> Error {
        Error::Failed(Arc::new(Failure {
            stream: self.id,
            stream_label: self.label.clone(),
            sequence,
            op: kind.name(),
            label: label.clone(),
            cause,
        }))
    }

    /// Poisons the stream: nothing more runs on it, and whoever waits for it fails alike. The
    /// first failure stays.
    pub(crate) fn fail(&self, error: Error) {
        let (dropped, waiters, groups) = {
            let mut queue = self.queue.lock();
            if queue.failure.is_some() {
                return;
            }
            queue.failure = Some(error.clone());
            if matches!(queue.activity, Activity::Held(_) | Activity::Hung(_)) {
                queue.activity = Activity::Idle;
            }
            (
                std::mem::take(&mut queue.pending),
                std::mem::take(&mut queue.waiters),
                std::mem::take(&mut queue.groups),
            )
        };
        self.changed.notify_all();
        drop(dropped);
        for waiter in waiters {
            waiter.stream.wake(waiter.sequence);
        }
        // A rank that will never arrive fails the collectives of all others.
        for group in groups {
            group.fail(error.clone());
        }
    }

    /// The stream has work in a communicator: if the stream fails, the communicator does.
    pub(crate) fn takes_part_in(&self, group: &Arc<Group>) {
        self.queue.lock().takes_part_in(group);
    }

    /// Hands what has been carried out to the clock.
    pub(crate) fn take_in(&self) {
        let carried = std::mem::take(&mut self.queue.lock().carried);
        if !carried.is_empty() {
            self.system.clock.take_in(self.index, carried.into_iter());
        }
    }

    pub(crate) fn describe(&self) -> String {
        format!("stream {:?} on {}", self.label, self.id.device)
    }
}

impl Held {
    /// Completes the command.
    pub(crate) fn complete(self, step: Step, cost: Cost) {
        let done = Finished {
            sequence: self.sequence,
            kind: self.kind,
            label: self.label.clone(),
            issued: self.issued,
            waited_for: self.waited_for,
        };
        self.stream.finish(&done, step, cost, self.delay);
        self.stream.wake(self.sequence);
    }

    /// Fails the command: with `error` itself if it came from elsewhere, or as its own failure.
    pub(crate) fn fail(self, error: Error) {
        self.stream.fail(error);
    }

    /// The failure of this command for this reason.
    pub(crate) fn failure(&self, cause: Cause) -> Error {
        self.stream.failure_of(self.sequence, self.kind, &self.label, cause)
    }
}

impl Drop for StreamShared {
    fn drop(&mut self) {
        // Other streams may have met this one's collectives.
        self.take_in();
    }
}

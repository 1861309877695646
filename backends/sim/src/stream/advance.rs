//! How a stream's commands are carried out: one after the other, until it is empty or held.
//!
//! A worker drains a stream. A command that waits for another stream or for other ranks holds the
//! stream, and what it waits for wakes it; no worker blocks meanwhile. A failure poisons the stream,
//! and whatever waits for it.

use super::prepared::Rest;
use super::queue::{Activity, Blocker, Brief, Pending, Queued, StreamShared};
use super::work::{Halt, Work};
use crate::clock::{Carried, Single};
use crate::cost::Cost;
use crate::timeline::Step;
use crate::workers::Task;
use hal::fault::FaultAction;
use hal::trace::{CommandKind, Span, WaitedFor};
use hal::{Cause, Error, Failure, Label};
use std::sync::Arc;
use std::sync::atomic::Ordering;

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

/// A stream whose command `sequence` waits for `value` of the stream that keeps this.
#[derive(Debug)]
pub(super) struct Waiter {
    value: u64,
    stream: Arc<StreamShared>,
    sequence: u64,
}

enum Next {
    Run(Pending),
    List(Rest),
    Done,
}

/// Whether the worker goes on with the stream's next command.
enum Flow {
    Continue,
    Stop,
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
        if self.timed() {
            // By workers, side by side, rather than by the host, which they wait for.
            self.system.clock.take_in_if_free(&self);
        }
    }
}

impl StreamShared {
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
                Next::List(rest) => match self.carry_on(rest) {
                    Flow::Continue => continue,
                    Flow::Stop => return,
                },
                Next::Done => return,
            };
            let delay = match &pending.fault {
                FaultAction::Pass => 0,
                FaultAction::Delay(by) => (by.as_nanos() * 1000).min(u128::from(u64::MAX)) as u64,
                FaultAction::Fail(text) => {
                    let cause = Cause::Injected(text.clone());
                    return self.fail_command(&pending, cause);
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
            Some(next) if queue.failure.is_none() => match next {
                Queued::One(pending) => Next::Run(pending),
                Queued::List(rest) => {
                    if rest.done == 0 && self.timed() {
                        let (script, issued) = (rest.track().script.clone(), rest.launched.issued);
                        queue.carried.push(Carried::Launch(Box::new((script, issued))));
                    }
                    Next::List(rest)
                }
            },
            _ => {
                queue.activity = Activity::Idle;
                Next::Done
            }
        }
    }

    /// Goes on with a list.
    fn carry_on(self: &Arc<Self>, mut rest: Rest) -> Flow {
        while !rest.is_empty() {
            let Some(result) = rest.run(&self.system) else {
                let pending = rest.take();
                if !rest.is_empty() {
                    self.queue.lock().pending.push_front(Queued::List(rest));
                }
                return self.execute(pending, 0);
            };
            match result {
                Ok(cost) => {
                    let at = rest.done as u32;
                    let carried = || match cost {
                        None => Carried::Listed(at),
                        Some(cost) => Carried::ListedAt(at, Box::new(cost)),
                    };
                    if !self.finish(rest.sequence(), carried) {
                        return Flow::Stop;
                    }
                    rest.done += 1;
                }
                Err(Halt::Busy) => {
                    self.queue.lock().pending.push_front(Queued::List(rest));
                    self.schedule();
                    return Flow::Stop;
                }
                Err(Halt::Failed(cause)) => {
                    let (kind, label) = (rest.command().kind(), rest.command().label());
                    self.fail(self.failure_of(rest.sequence(), kind, &label, cause));
                    return Flow::Stop;
                }
            }
        }
        Flow::Continue
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
                Ok(cost) => self.finish_one(pending.into(), Step::Run(cost), cost, delay),
                Err(Halt::Busy) => {
                    // Another command holds the memory (disjoint parts of one buffer): later.
                    pending.work = work;
                    self.queue.lock().pending.push_front(Queued::One(pending));
                    self.schedule();
                    Flow::Stop
                }
                Err(Halt::Failed(cause)) => {
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
                return self.finish_one(done, step, Cost::NOTHING, delay);
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

    /// A command that is not an op of a list has been carried out.
    fn finish_one(&self, done: Finished, step: Step, cost: Cost, delay: u64) -> Flow {
        let Finished { sequence, kind, label, issued, waited_for } = done;
        let carried = || {
            let span = || Span { waited_for, ..cost.span(self.id, sequence, kind, label) };
            let span = self.die().is_traced().then(span);
            Carried::One(Box::new(Single { issued, delay, step, span }))
        };
        if self.finish(sequence, carried) { Flow::Continue } else { Flow::Stop }
    }

    /// A command has been carried out: the clock is told, and whoever waits for it. `false` if the
    /// stream has failed meanwhile.
    fn finish(&self, sequence: u64, carried: impl FnOnce() -> Carried) -> bool {
        let mut queue = self.queue.lock();
        if queue.failure.is_some() {
            return false;
        }
        if self.timed() {
            queue.carried.push(carried());
        }
        queue.completed = sequence;
        self.reached.store(sequence, Ordering::Release);
        let woken: Vec<Waiter> = if queue.waiters.is_empty() {
            Vec::new()
        } else {
            queue.waiters.extract_if(.., |w| w.value <= sequence).collect()
        };
        // Waking the host for every command would cost more than the commands.
        let wake_host = queue.host_waits_for.is_some_and(|value| value <= sequence);
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
        true
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
}

impl Held {
    /// Completes the command.
    pub(crate) fn complete(self, step: Step, cost: Cost) {
        let done = Finished {
            sequence: self.sequence,
            kind: self.kind,
            label: self.label,
            issued: self.issued,
            waited_for: self.waited_for,
        };
        self.stream.finish_one(done, step, cost, self.delay);
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

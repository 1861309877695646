//! One stream's queue, and how commands enter it.
//!
//! A stream is idle, scheduled on a worker, held by something that will wake it, or hung;
//! [`super::advance`] carries it on.
//!
//! A command that has been carried out is noted with what it costs and what it waited for. When it
//! would have run, [`crate::clock`] works out when somebody asks.

use super::advance::Waiter;
use super::prepared::Rest;
use super::work::Work;
use crate::clock::Carried;
use crate::collective::Group;
use crate::device::DieState;
use crate::memory::Memory;
use crate::system::Shared;
use crate::timeline::StreamIndex;
use hal::fault::FaultAction;
use hal::op::Access;
use hal::trace::{CommandKind, WaitedFor};
use hal::{Error, Label, Result, StreamId};
use parking_lot::{Condvar, Mutex, MutexGuard};
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
    pub(super) carried: Vec<Carried>,
    /// Commands submitted when the clock last worked out everything by itself.
    worked_out: u64,
    pub(super) waiters: Vec<Waiter>,
    /// The lowest value that a host thread sleeps for.
    pub(super) host_waits_for: Option<u64>,
    /// Communicators that it has submitted collectives to.
    pub(super) groups: Vec<Arc<Group>>,
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
                let sequence = rest.sequence();
                let (kind, label) = (rest.command().kind(), rest.command().label());
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
    pub(super) fault: FaultAction,
    pub(super) work: Work,
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

impl Queue {
    /// As [`StreamShared::takes_part_in`].
    pub(super) fn takes_part_in(&mut self, group: &Arc<Group>) {
        if !self.groups.iter().any(|g| Arc::ptr_eq(g, group)) {
            self.groups.push(group.clone());
        }
    }
}

impl StreamShared {
    pub(crate) fn new(system: Arc<Shared>, id: StreamId, label: &str) -> Self {
        StreamShared {
            index: system.clock.stream(id),
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
                self.system.put(memory, offset, src).is_some()
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

    /// The stream has work in a communicator: if the stream fails, the communicator does.
    pub(crate) fn takes_part_in(&self, group: &Arc<Group>) {
        self.queue.lock().takes_part_in(group);
    }

    /// Hands over what has been carried out, for an empty list.
    pub(crate) fn take_carried(&self, empty: &mut Vec<Carried>) {
        std::mem::swap(&mut self.queue.lock().carried, empty);
    }

    pub(crate) fn describe(&self) -> String {
        format!("stream {:?} on {}", self.label, self.id.device)
    }
}

impl Drop for StreamShared {
    fn drop(&mut self) {
        // Other streams may have met this one's collectives.
        self.system.clock.take_in(self);
    }
}

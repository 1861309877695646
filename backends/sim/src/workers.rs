//! The worker threads of a system, which end with it.
//!
//! Tasks wait in one queue. A thread of the pool that has taken one goes on with the next, and looks
//! out for more for a moment before it sleeps: ranks meet at collectives some ten times a token, and
//! what all of them wait for is over sooner than a thread falls asleep and is woken again.
//!
//! A thread may take tasks while it waits for pieces of a kernel that another one has, and goes on with
//! the kernel only when it comes back. So it takes some and comes back: there may always be more. A task
//! that finds memory held is queued again, and that very kernel may hold it.

use crossbeam::queue::SegQueue;
use parking_lot::{Condvar, Mutex};
use std::cell::Cell;
use std::ops::Deref;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering, fence};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// Something for a worker to do.
pub(crate) trait Task: Send + Sync + 'static {
    fn carry_out(self: Arc<Self>);
}

/// A task that is done once.
struct Once<F>(Mutex<Option<F>>);

impl<F: FnOnce() + Send + 'static> Task for Once<F> {
    fn carry_out(self: Arc<Self>) {
        let work = self.0.lock().take();
        if let Some(work) = work {
            work();
        }
    }
}

/// A pool whose threads end with it. Whoever drops it joins them, unless that is one of them: a
/// worker may be the last owner, for a moment after its last command. [`Threads`] then joins.
#[derive(Debug)]
pub(crate) struct Workers {
    pool: Option<rayon::ThreadPool>,
    threads: Arc<Threads>,
    tasks: Arc<Tasks>,
}

/// How long a worker without tasks looks out for some: what it takes to fall asleep and be woken.
const LOOKOUT: Duration = Duration::from_micros(50);

/// Tasks that a thread takes before it looks whether it has something else to go on with.
const TURN: usize = 32;

/// Looks at the queue before it looks for pieces of kernels.
const SPINS: usize = 64;

/// Tasks that are queued or running, and who carries them out.
#[derive(Default)]
struct Tasks {
    queue: SegQueue<Arc<dyn Task>>,
    /// Queued or running.
    count: AtomicUsize,
    /// Threads that take tasks, or are about to.
    takers: AtomicUsize,
    /// Those of them that have none and look out for some.
    looking: AtomicUsize,
    most_takers: usize,
    sleepers: Mutex<()>,
    none: Condvar,
}

impl std::fmt::Debug for Tasks {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} tasks", self.count.load(Ordering::Relaxed))
    }
}

/// Counts a task as done when dropped, however it ended.
struct Taken<'t>(&'t Tasks);

impl Drop for Taken<'_> {
    fn drop(&mut self) {
        if self.0.count.fetch_sub(1, Ordering::AcqRel) == 1 {
            // Whoever has seen a task under this lock sleeps by now.
            drop(self.0.sleepers.lock());
            self.0.none.notify_all();
        }
    }
}

thread_local! {
    /// Whether this thread takes tasks already.
    static TAKES: Cell<bool> = const { Cell::new(false) };
}

impl Tasks {
    /// Whether another taker is called for, which then counts as one.
    fn wants_taker(&self) -> bool {
        // Between queueing a task and looking at takers; they do it the other way round.
        fence(Ordering::SeqCst);
        self.looking.load(Ordering::Relaxed) == 0 && !self.queue.is_empty() && self.one_more()
    }

    fn one_more(&self) -> bool {
        let more = |takers| (takers < self.most_takers).then_some(takers + 1);
        self.takers.fetch_update(Ordering::SeqCst, Ordering::Relaxed, more).is_ok()
    }

    /// What a taker does.
    fn take(self: &Arc<Self>) {
        if TAKES.replace(true) {
            // While it looked out or waited for pieces, this thread was given what was meant for
            // another one. It finds the tasks by itself, and then calls the other one again.
            self.takers.fetch_sub(1, Ordering::SeqCst);
            return;
        }
        let mut left = TURN;
        loop {
            while left > 0
                && let Some(task) = self.queue.pop()
            {
                let _counted = Taken(self);
                task.carry_out();
                left -= 1;
            }
            if !self.look_out() {
                break;
            }
            if left == 0 {
                // The next turn has this one's place.
                self.spawn_taker();
                break;
            }
        }
        TAKES.set(false);
    }

    /// Whether there is something to take within a moment. Else this is a taker no more.
    fn look_out(self: &Arc<Self>) -> bool {
        let began = Instant::now();
        while self.queue.is_empty() && began.elapsed() < LOOKOUT {
            self.looking.fetch_add(1, Ordering::SeqCst);
            for _ in 0..SPINS {
                if !self.queue.is_empty() {
                    break;
                }
                std::hint::spin_loop();
            }
            self.looking.fetch_sub(1, Ordering::SeqCst);
            // Kernels cut their work into pieces for whoever is free.
            if self.queue.is_empty() {
                rayon::yield_now();
            }
        }
        if self.queue.is_empty() {
            self.takers.fetch_sub(1, Ordering::SeqCst);
            // Whoever queued something before that has found no place for a taker.
            fence(Ordering::SeqCst);
            return !self.queue.is_empty() && self.one_more();
        }
        // Whoever queued several may have relied on this thread, which takes one at a time.
        if self.wants_taker() {
            self.spawn_taker();
        }
        true
    }

    /// Only for workers.
    fn spawn_taker(self: &Arc<Self>) {
        let tasks = self.clone();
        rayon::spawn(move || tasks.take());
    }
}

/// The threads of a pool, which outlive it by a moment.
#[derive(Debug, Default)]
pub(crate) struct Threads {
    state: Mutex<State>,
    told_to_end: Condvar,
}

#[derive(Debug, Default)]
struct State {
    handles: Vec<JoinHandle<()>>,
    told_to_end: bool,
}

impl Workers {
    /// Starts this many.
    pub(crate) fn start(count: usize) -> Result<Workers, rayon::ThreadPoolBuildError> {
        let mut handles = Vec::with_capacity(count);
        let pool = rayon::ThreadPoolBuilder::new()
            .num_threads(count)
            .spawn_handler(|thread| {
                let name = format!("sim-{}", thread.index());
                let builder = std::thread::Builder::new().name(name);
                handles.push(builder.spawn(|| thread.run())?);
                Ok(())
            })
            .build()?;
        let state = Mutex::new(State { handles, told_to_end: false });
        let threads = Arc::new(Threads { state, told_to_end: Condvar::new() });
        let tasks = Arc::new(Tasks { most_takers: pool.current_num_threads(), ..Tasks::default() });
        Ok(Workers { pool: Some(pool), threads, tasks })
    }

    /// Has a task carried out by a worker.
    pub(crate) fn run(&self, task: Arc<dyn Task>) {
        self.tasks.count.fetch_add(1, Ordering::AcqRel);
        self.tasks.queue.push(task);
        if self.tasks.wants_taker() {
            let tasks = self.tasks.clone();
            self.spawn(move || tasks.take());
        }
    }

    /// As [`Workers::run`], for what is done once.
    pub(crate) fn run_once(&self, work: impl FnOnce() + Send + 'static) {
        self.run(Arc::new(Once(Mutex::new(Some(work)))));
    }

    /// Whether there is no task at the moment.
    pub(crate) fn is_idle(&self) -> bool {
        self.tasks.count.load(Ordering::Acquire) == 0
    }

    /// Spins for a moment until there is no task; whether there is none.
    pub(crate) fn is_idle_soon(&self, spin: Duration) -> bool {
        let began = Instant::now();
        while !self.is_idle() && began.elapsed() < spin {
            std::hint::spin_loop();
        }
        self.is_idle()
    }

    /// Sleeps until there was a moment without tasks, until `enough` says so, or until the limit.
    pub(crate) fn wait_until_idle(&self, enough: impl Fn() -> bool, limit: Duration) {
        let began = Instant::now();
        let mut sleepers = self.tasks.sleepers.lock();
        while !self.is_idle() && !enough() && began.elapsed() < limit {
            self.tasks.none.wait_for(&mut sleepers, Duration::from_millis(1));
        }
    }

    /// What can be waited for when the pool is dropped.
    pub(crate) fn threads(&self) -> Arc<Threads> {
        self.threads.clone()
    }
}

impl Deref for Workers {
    type Target = rayon::ThreadPool;

    fn deref(&self) -> &rayon::ThreadPool {
        // Taken only when dropped.
        self.pool.as_ref().unwrap_or_else(|| unreachable!("the pool is there while it is borrowed"))
    }
}

impl Drop for Workers {
    fn drop(&mut self) {
        // Not by comparing `thread::current()`: that would give a C program's thread a handle,
        // which nobody frees.
        let by_a_worker = self.current_thread_index().is_some();
        // Rayon tells its threads to end, and does not wait for them.
        drop(self.pool.take());
        let mut state = self.threads.state.lock();
        state.told_to_end = true;
        self.threads.told_to_end.notify_all();
        if !by_a_worker {
            state.join();
        }
    }
}

impl State {
    fn join(&mut self) {
        for thread in self.handles.drain(..) {
            // A worker's panic was told where it happened.
            let _ = thread.join();
        }
    }
}

impl Threads {
    /// Waits until the pool is dropped and its threads have ended; `false` if it is not dropped
    /// within the limit. Not for the threads themselves.
    pub(crate) fn join(&self, limit: Duration) -> bool {
        let mut state = self.state.lock();
        self.told_to_end.wait_while_for(&mut state, |state| !state.told_to_end, limit);
        if state.told_to_end {
            state.join();
        }
        state.told_to_end
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::AtomicBool;

    /// Tasks that come one at a time, many at once, from tasks, and just when workers fall asleep.
    #[test]
    fn every_task_is_carried_out() {
        let workers = Arc::new(Workers::start(3).unwrap());
        let done = Arc::new(AtomicUsize::new(0));
        let mut expected = 0;
        for round in 0..300u32 {
            for _ in 0..=round % 40 {
                let (again, done) = (workers.clone(), done.clone());
                workers.run_once(move || {
                    done.fetch_add(1, Ordering::Relaxed);
                    again.run_once(move || {
                        done.fetch_add(1, Ordering::Relaxed);
                    });
                });
                expected += 2;
            }
            // Around the time for which workers look out.
            std::thread::sleep(LOOKOUT * (round % 4) / 2);
        }
        workers.wait_until_idle(|| false, Duration::from_secs(60));
        assert_eq!(done.load(Ordering::Relaxed), expected);
    }

    /// How far a test has come.
    #[derive(Default)]
    struct Flag(AtomicBool);

    impl Flag {
        fn raise(&self) {
            self.0.store(true, Ordering::Release);
        }

        fn is_up(&self) -> bool {
            self.0.load(Ordering::Acquire)
        }

        fn wait(&self) {
            while !self.is_up() {
                std::thread::yield_now();
            }
        }
    }

    #[derive(Default)]
    struct Flags {
        piece_began: Flag,
        part_began: Flag,
        task_began: Flag,
        kernel_ended: Flag,
    }

    /// Is queued again until the kernel has ended, as if that held its memory.
    struct Again(Arc<Workers>, Arc<Flags>);

    impl Task for Again {
        fn carry_out(self: Arc<Self>) {
            self.1.task_began.raise();
            if !self.1.kernel_ended.is_up() {
                self.0.clone().run(self);
            }
        }
    }

    /// A thread with a piece of a kernel waits for a part of it, which another thread has, and takes a
    /// task meanwhile that comes again and again until the kernel has ended.
    #[test]
    fn tasks_do_not_keep_the_kernel_that_they_interrupt() {
        let workers = Arc::new(Workers::start(2).unwrap());
        let flags = Arc::new(Flags::default());
        let f = flags.clone();
        workers.run_once(move || {
            let part = || {
                f.part_began.raise();
                f.task_began.wait();
            };
            let piece = || {
                f.piece_began.raise();
                rayon::join(|| f.part_began.wait(), part);
            };
            rayon::join(|| f.piece_began.wait(), piece);
            f.kernel_ended.raise();
        });
        flags.part_began.wait();
        workers.run(Arc::new(Again(workers.clone(), flags.clone())));
        workers.wait_until_idle(|| false, Duration::from_secs(60));
        assert!(workers.is_idle() && flags.kernel_ended.is_up());
    }

    #[test]
    fn threads_end_whoever_drops_the_pool() {
        for by_a_worker in [false, true] {
            let workers = Arc::new(Workers::start(2).unwrap());
            let threads = workers.threads();
            assert!(!threads.join(Duration::from_millis(1)), "the pool is in use");
            if by_a_worker {
                let (told, wait) = std::sync::mpsc::channel::<()>();
                let held = workers.clone();
                workers.spawn(move || {
                    let _ = wait.recv();
                    drop(held);
                });
                drop(workers);
                drop(told);
            } else {
                drop(workers);
            }
            assert!(threads.join(Duration::from_secs(60)), "{by_a_worker}");
            assert!(threads.state.lock().handles.is_empty());
        }
    }
}

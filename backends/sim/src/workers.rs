//! The worker threads of a system, which end with it.

use parking_lot::{Condvar, Mutex};
use std::ops::Deref;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// A pool whose threads end with it. Whoever drops it joins them, unless that is one of them: a
/// worker may be the last owner, for a moment after its last command. [`Threads`] then joins.
#[derive(Debug)]
pub(crate) struct Workers {
    pool: Option<rayon::ThreadPool>,
    threads: Arc<Threads>,
    tasks: Arc<Tasks>,
}

/// How many tasks are queued or running.
#[derive(Debug, Default)]
struct Tasks {
    count: AtomicUsize,
    sleepers: Mutex<()>,
    none: Condvar,
}

/// A task that counts until it is dropped.
struct Task(Arc<Tasks>);

impl Drop for Task {
    fn drop(&mut self) {
        if self.0.count.fetch_sub(1, Ordering::AcqRel) == 1 {
            // Whoever has seen a task under this lock sleeps by now.
            drop(self.0.sleepers.lock());
            self.0.none.notify_all();
        }
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
        Ok(Workers { pool: Some(pool), threads, tasks: Arc::default() })
    }

    /// Has a task carried out by a worker.
    pub(crate) fn run(&self, work: impl FnOnce() + Send + 'static) {
        self.tasks.count.fetch_add(1, Ordering::AcqRel);
        let task = Task(self.tasks.clone());
        self.spawn(move || {
            // Before the work: what it holds may be the pool's last owner.
            let _counts = task;
            work();
        });
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

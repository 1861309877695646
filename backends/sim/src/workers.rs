//! The worker threads of a system, which end with it.

use std::ops::Deref;
use std::thread::JoinHandle;

/// A pool whose threads are gone when it is: a library that serves the simulator must leave nothing
/// running behind, and rayon alone only tells its threads to stop.
#[derive(Debug)]
pub(crate) struct Workers {
    pool: Option<rayon::ThreadPool>,
    threads: Vec<JoinHandle<()>>,
}

impl Workers {
    /// Starts this many.
    pub(crate) fn start(count: usize) -> Result<Workers, rayon::ThreadPoolBuildError> {
        let mut threads = Vec::with_capacity(count);
        let pool = rayon::ThreadPoolBuilder::new()
            .num_threads(count)
            .spawn_handler(|thread| {
                let name = format!("sim-{}", thread.index());
                let builder = std::thread::Builder::new().name(name);
                threads.push(builder.spawn(|| thread.run())?);
                Ok(())
            })
            .build()?;
        Ok(Workers { pool: Some(pool), threads })
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
        drop(self.pool.take());
        let me = std::thread::current().id();
        // The last owner may be a worker that has just finished a stream's work.
        for thread in self.threads.drain(..).filter(|t| t.thread().id() != me) {
            let _ = thread.join();
        }
    }
}

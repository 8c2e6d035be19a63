//! What the threads do next: jobs that finish what is done come first, then new chunks of the input, but never so many that
//! the fastest thread runs further ahead of the slowest than a window, so that memory stays flat.

use std::collections::VecDeque;
use std::sync::{Arc, Condvar, Mutex, MutexGuard};

use crate::shard::write::{ShardIndex, ShardWriter};

/// Work for any thread.
#[derive(Debug)]
pub enum Job {
    /// Write token ids to their place in a shard.
    Store {
        /// Number of the shard.
        shard: usize,
        writer: Arc<ShardWriter>,
        /// Number of the first token in the shard.
        first: usize,
        ids: Vec<u32>,
    },
    /// Complete a shard whose tokens are all stored.
    Finish {
        /// Number of the shard.
        shard: usize,
        writer: Arc<ShardWriter>,
        index: ShardIndex,
    },
}

/// What a thread is told to do.
#[derive(Debug)]
pub enum Task {
    Job(Job),
    /// Take a chunk from the source. A thread that finds none says so: [`Schedule::end_input`].
    Chunk,
}

/// Hands out tasks to the threads.
pub struct Schedule {
    window: u64,
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    jobs: VecDeque<Job>,
    /// Chunks that were begun, and those of them whose tokens have a place and are stored or about to be.
    num_begun: u64,
    num_done: u64,
    /// Chunks that are there; without a limit if it takes no waiting to read them.
    num_offered: Option<u64>,
    is_input_read: bool,
    is_closed: bool,
}

impl Schedule {
    /// A schedule that lets at most `window` chunks be under way.
    pub fn new(window: u64) -> Self {
        Self { window, state: Mutex::default(), changed: Condvar::new() }
    }

    /// As [`new`](Self::new), for chunks that come from elsewhere: none is there before it is offered.
    pub fn waiting(window: u64) -> Self {
        let state = State { num_offered: Some(0), ..State::default() };
        Self { state: Mutex::new(state), ..Self::new(window) }
    }

    /// So many more chunks are there.
    pub fn offer(&self, num_chunks: u64) {
        self.update(|state| state.num_offered = state.num_offered.map(|offered| offered + num_chunks));
    }

    /// No more chunks will come than were offered: who asks for another finds none.
    pub fn offer_all(&self) {
        self.update(|state| state.num_offered = None);
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect("no thread panics while it holds the schedule")
    }

    fn update(&self, change: impl FnOnce(&mut State)) {
        change(&mut self.lock());
        self.changed.notify_all();
    }

    /// Waits for a task; none when the work is over.
    pub fn next(&self) -> Option<Task> {
        let has_none = |state: &mut State| {
            let is_ahead = state.num_begun - state.num_done >= self.window;
            let is_next_missing = state.num_offered.is_some_and(|offered| state.num_begun >= offered);
            let must_wait = state.is_input_read || is_ahead || is_next_missing;
            !state.is_closed && state.jobs.is_empty() && must_wait
        };
        let waited = self.changed.wait_while(self.lock(), has_none);
        let mut state = waited.expect("no thread panics while it holds the schedule");
        if state.is_closed {
            return None;
        }
        match state.jobs.pop_front() {
            Some(job) => Some(Task::Job(job)),
            None => {
                state.num_begun += 1;
                Some(Task::Chunk)
            }
        }
    }

    /// Adds a job.
    pub fn add(&self, job: Job) {
        self.update(|state| state.jobs.push_back(job));
    }

    /// One more chunk is done, but for jobs.
    pub fn advance(&self) {
        self.update(|state| state.num_done += 1);
    }

    /// The chunk that the thread was to take is not there: the input is read.
    pub fn end_input(&self) {
        self.update(|state| {
            state.num_begun -= 1;
            state.is_input_read = true;
        });
    }

    /// How many chunks the input has, once that is known.
    pub fn num_chunks(&self) -> Option<u64> {
        let state = self.lock();
        state.is_input_read.then_some(state.num_begun)
    }

    /// A guard that ends the work when it is dropped, whatever is left to do.
    pub fn close_on_drop(&self) -> impl Drop + '_ {
        Close { schedule: self, always: true }
    }

    /// A guard that ends the work when the thread panics, so that the others do not wait for its chunk.
    pub fn close_on_panic(&self) -> impl Drop + '_ {
        Close { schedule: self, always: false }
    }
}

struct Close<'a> {
    schedule: &'a Schedule,
    always: bool,
}

impl Drop for Close<'_> {
    fn drop(&mut self) {
        if self.always || std::thread::panicking() {
            self.schedule.update(|state| state.is_closed = true);
        }
    }
}

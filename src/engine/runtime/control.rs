//! What all nodes of a run share: pacing, the last step, the first failure, times.

use std::ops::Range;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::SeqCst};
use std::time::Duration;

use super::RunError;
use crate::graph::Graph;

/// State shared between the nodes of a run and the loop that drives it.
///
/// timely has no backpressure, so sources are paced: they may run at most `window` steps ahead of the slowest node.
pub struct Control {
    names: Vec<String>,
    window: u64,
    completed: AtomicU64,
    granted: AtomicU64,
    end: AtomicU64,
    interrupted: AtomicBool,
    checkpoint_every: Option<u64>,
    failed: AtomicBool,
    failure: Mutex<Option<RunError>>,
    busy_nanoseconds: Vec<AtomicU64>,
    engine_nanoseconds: AtomicU64,
}

impl Control {
    /// Nothing done yet; steps `first_step..total_steps` ahead.
    pub fn new(graph: &Graph, first_step: u64, total_steps: u64) -> Self {
        let staleness =
            graph.edges.iter().filter_map(|edge| edge.feedback).map(|feedback| feedback.max_staleness).max();
        let window = 1 + staleness.unwrap_or(0);
        Control {
            names: graph.nodes.iter().map(|node| node.name.clone()).collect(),
            window,
            completed: AtomicU64::new(first_step),
            granted: AtomicU64::new((first_step + window).min(total_steps)),
            end: AtomicU64::new(total_steps.max(first_step)),
            interrupted: AtomicBool::new(false),
            checkpoint_every: graph.run.checkpoint.every,
            failed: AtomicBool::new(false),
            failure: Mutex::new(None),
            busy_nanoseconds: graph.nodes.iter().map(|_| AtomicU64::new(0)).collect(),
            engine_nanoseconds: AtomicU64::new(0),
        }
    }

    /// Steps below this are done by all nodes.
    pub fn completed(&self) -> u64 {
        self.completed.load(SeqCst)
    }

    /// Sources may run steps below this.
    pub fn granted(&self) -> u64 {
        self.granted.load(SeqCst)
    }

    /// Nobody runs this step or a later one.
    pub fn end(&self) -> u64 {
        self.end.load(SeqCst)
    }

    /// Note that all steps below `completed` are done, and let sources go on. The steps that this is news of.
    pub fn advance(&self, completed: u64) -> Range<u64> {
        let completed = completed.min(self.end());
        let before = self.completed.fetch_max(completed, SeqCst);
        self.granted.fetch_max((completed + self.window).min(self.end()), SeqCst);
        before..completed
    }

    /// End the run early, with a checkpoint. One more step is granted: nobody can have begun it, so all nodes learn in
    /// time that a snapshot is due after it.
    pub fn interrupt(&self) {
        let end = self.granted() + 1;
        if end < self.end() && !self.interrupted.swap(true, SeqCst) {
            self.end.store(end, SeqCst);
            self.granted.store(end, SeqCst);
        }
    }

    /// The number of steps done, if the run was ended early.
    pub fn interrupted_at(&self) -> Option<u64> {
        self.interrupted.load(SeqCst).then(|| self.end())
    }

    /// Whether a snapshot is due once `steps` steps are done.
    pub fn checkpoint_due(&self, steps: u64) -> bool {
        let regular =
            self.checkpoint_every.is_some_and(|every| every > 0 && steps.is_multiple_of(every) && steps < self.end());
        regular || (self.interrupted.load(SeqCst) && steps == self.end())
    }

    /// Note a failure; the first one is kept, and ends the run.
    pub fn fail(&self, error: RunError) {
        let mut failure = self.failure.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        failure.get_or_insert(error);
        self.failed.store(true, SeqCst);
    }

    /// Whether the run has failed.
    pub fn has_failed(&self) -> bool {
        self.failed.load(SeqCst)
    }

    /// Take the failure that ended the run.
    pub fn failure(&self) -> Option<RunError> {
        self.failure.lock().unwrap_or_else(|poisoned| poisoned.into_inner()).take()
    }

    /// Count a node's work.
    pub fn add_busy(&self, node: usize, took: Duration) {
        self.busy_nanoseconds[node].fetch_add(took.as_nanos() as u64, SeqCst);
    }

    /// Count the engine's own work: processor time of a worker that no operator took.
    pub fn add_engine(&self, took: Duration) {
        self.engine_nanoseconds.fetch_add(took.as_nanos() as u64, SeqCst);
    }

    /// The engine's own work.
    pub fn engine(&self) -> Duration {
        Duration::from_nanos(self.engine_nanoseconds.load(SeqCst))
    }

    /// Each node's work so far, in graph order.
    pub fn busy(&self) -> Vec<(String, Duration)> {
        let nanoseconds = self.busy_nanoseconds.iter().map(|busy| Duration::from_nanos(busy.load(SeqCst)));
        self.names.iter().cloned().zip(nanoseconds).collect()
    }
}

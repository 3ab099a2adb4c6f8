//! The timeline of a run: which node worked on what, and when. Kept only where somebody asks for it.

use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use super::executor::Job;

/// What a node was called for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Work {
    /// To be made, from its settings.
    Build,
    /// To take up a checkpoint.
    Restore,
    /// To make ready for the first step.
    Start,
    /// To do this step.
    Step(u64),
    /// To write its part of a checkpoint, after so many steps.
    Snapshot(u64),
    /// To end, after the last step.
    Finish,
}

impl Work {
    /// What a job is; none for what takes no time to speak of.
    pub(super) fn of(job: &Job) -> Option<Self> {
        match job {
            Job::Restore(_) => Some(Work::Restore),
            Job::Start(_) => Some(Work::Start),
            Job::Step(step, _) => Some(Work::Step(*step)),
            Job::Snapshot(steps, _) => Some(Work::Snapshot(*steps)),
            Job::Finish => Some(Work::Finish),
            Job::Reattach(_) | Job::Elements => None,
        }
    }
}

/// A node at work.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Span {
    /// Its index in the graph.
    pub node: usize,
    /// What it did.
    pub work: Work,
    /// When it began, from the beginning of the timeline.
    pub began: Duration,
    /// How long that took; for steps, what counts as the node's busy time.
    pub took: Duration,
}

/// The spans of a run so far, whatever becomes of it.
#[derive(Debug)]
pub struct Timeline {
    began: Instant,
    spans: Mutex<Vec<Span>>,
}

impl Timeline {
    /// An empty timeline that begins now.
    pub fn begin() -> Arc<Self> {
        Arc::new(Timeline { began: Instant::now(), spans: Mutex::new(Vec::new()) })
    }

    /// The spans that have ended, in the order in which they did.
    pub fn spans(&self) -> Vec<Span> {
        self.spans.lock().unwrap_or_else(|poisoned| poisoned.into_inner()).clone()
    }

    fn note(&self, node: usize, work: Work, began: Instant, took: Duration) {
        let span = Span { node, work, began: began.saturating_duration_since(self.began), took };
        self.spans.lock().unwrap_or_else(|poisoned| poisoned.into_inner()).push(span);
    }
}

/// Where a node's spans go, if anywhere.
#[derive(Clone, Default)]
pub struct Track {
    timeline: Option<Arc<Timeline>>,
    node: usize,
}

impl Track {
    /// Of a node of the graph.
    pub fn new(timeline: Option<&Arc<Timeline>>, node: usize) -> Self {
        Track { timeline: timeline.cloned(), node }
    }

    /// Note that the node has worked.
    pub(super) fn note(&self, work: Option<Work>, began: Instant, took: Duration) {
        if let (Some(timeline), Some(work)) = (&self.timeline, work) {
            timeline.note(self.node, work, began, took);
        }
    }
}

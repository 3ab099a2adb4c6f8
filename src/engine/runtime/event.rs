//! What a run tells the people watching it.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::record::Metrics;

/// Something worth showing.
#[derive(Clone, Debug)]
pub enum Event {
    /// A node has begun its work before the first step (loading a model, reading data).
    NodeStarted {
        /// The node.
        node: String,
        /// How long that took.
        took: Duration,
    },
    /// Every node is ready and the first step may begin.
    RunStarted {
        /// The first step, above 0 when resumed.
        first_step: u64,
        /// Steps of the whole run.
        total_steps: u64,
    },
    /// All nodes have done a step.
    StepCompleted {
        /// The step.
        step: u64,
        /// Work of every node so far in this process, in graph order.
        busy: Vec<(String, Duration)>,
    },
    /// The metrics of a step, from a `metrics_sink`.
    Metrics {
        /// The sink.
        node: String,
        /// The step.
        step: u64,
        /// The values.
        metrics: Arc<Metrics>,
    },
    /// A held-out evaluation.
    Evaluation {
        /// The evaluator.
        node: String,
        /// Updates the evaluated weights have had.
        version: u64,
        /// The values: `eval_nll`, `eval_accuracy`, `eval_margin`.
        metrics: Arc<Metrics>,
        /// What the model answers to some prompts.
        shown: Vec<Completion>,
    },
    /// A model was written that other programs can load.
    ModelSaved {
        /// The node.
        node: String,
        /// The directory.
        path: PathBuf,
    },
    /// A checkpoint is complete on disk.
    CheckpointSaved {
        /// Steps it covers.
        step: u64,
        /// Its directory.
        path: PathBuf,
    },
    /// A line for people.
    Note {
        /// The node.
        node: String,
        /// The text.
        message: String,
    },
}

/// What a model answers to a prompt.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Completion {
    /// The prompt, as text.
    pub prompt: String,
    /// The answer, as text.
    pub answer: String,
}

/// Where operators and the runtime send events. Sending never blocks and never fails.
#[derive(Clone)]
pub struct EventSender {
    sender: Option<crossbeam::channel::Sender<Event>>,
}

impl EventSender {
    /// A sender and the receiver of its events.
    pub fn channel() -> (Self, crossbeam::channel::Receiver<Event>) {
        let (sender, receiver) = crossbeam::channel::unbounded();
        (EventSender { sender: Some(sender) }, receiver)
    }

    /// A sender that drops everything.
    pub fn sink() -> Self {
        EventSender { sender: None }
    }

    /// Send an event.
    pub fn send(&self, event: Event) {
        if let Some(sender) = &self.sender {
            // The receiver may be gone when nobody watches any more; that is not the run's concern.
            let _ = sender.send(event);
        }
    }
}

//! An operator behind one interface, whether it runs on the timely worker or on a device thread of its own.
//!
//! Jobs to a device thread are answered in order. The thread sends an answer first and wakes the worker then; it wakes
//! the worker once more when it ends, however it ends, so that a lost thread is noticed and never waited for.

use std::any::Any;
use std::collections::VecDeque;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::PathBuf;
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use crossbeam::channel::{Receiver, Sender, TryRecvError, unbounded};
use timely::scheduling::SyncActivator;

use super::RunError;
use super::openmp;
use super::processor;
use super::timeline::{Track, Work};
use crate::operator::{Inputs, Operator, OperatorError, Outputs};
use crate::record::Record;
use crate::relation::Element;

/// One call of an operator.
pub enum Job {
    /// [`Operator::restore`].
    Restore(PathBuf),
    /// [`Operator::start`].
    Start(Inputs),
    /// [`Operator::reattach`].
    Reattach(Record),
    /// [`Operator::step`].
    Step(u64, Inputs),
    /// [`Operator::snapshot`] after so many steps.
    Snapshot(u64, PathBuf),
    /// [`Operator::elements`].
    Elements,
    /// [`Operator::finish`].
    Finish,
}

/// What came of a job.
#[derive(Debug)]
pub enum Answer {
    /// Nothing to tell.
    Done,
    /// Of a start.
    Started(Outputs),
    /// Of a reattach.
    Reattached(Record),
    /// Of elements.
    Elements(Vec<Element>),
    /// Of a step, with the time it took.
    Stepped(u64, Outputs, Duration),
    /// Of a snapshot after so many steps.
    Snapshotted(u64),
}

/// Run a job, and note on the node's track how long it took; a panic becomes an error.
fn perform(operator: &mut dyn Operator, job: Job, track: &Track) -> Result<Answer, OperatorError> {
    let (work, began) = (Work::of(&job), Instant::now());
    let outcome = catch_unwind(AssertUnwindSafe(|| match job {
        Job::Restore(directory) => operator.restore(&directory).map(|()| Answer::Done),
        Job::Start(inputs) => operator.start(inputs).map(Answer::Started),
        Job::Reattach(mut record) => operator.reattach(&mut record).map(|()| Answer::Reattached(record)),
        Job::Step(step, inputs) => {
            operator.step(step, inputs).map(|outputs| Answer::Stepped(step, outputs, began.elapsed()))
        }
        Job::Snapshot(step, directory) => operator.snapshot(&directory).map(|()| Answer::Snapshotted(step)),
        Job::Elements => Ok(Answer::Elements(operator.elements())),
        Job::Finish => operator.finish().map(|()| Answer::Done),
    }));
    let took = match &outcome {
        Ok(Ok(Answer::Stepped(_, _, took))) => *took,
        _ => began.elapsed(),
    };
    track.note(work, began, took);
    outcome.unwrap_or_else(|panic| Err(format!("panicked: {}", panic_message(&*panic)).into()))
}

/// The text of a panic.
fn panic_message(panic: &(dyn Any + Send)) -> &str {
    if let Some(text) = panic.downcast_ref::<&str>() {
        text
    } else if let Some(text) = panic.downcast_ref::<String>() {
        text
    } else {
        "(no message)"
    }
}

/// An operator ready to be called.
pub enum Executor {
    /// On the worker: answers are there at once.
    Worker {
        /// The operator.
        operator: Box<dyn Operator>,
        /// Where its spans go.
        track: Track,
        /// Answers not taken yet.
        answers: VecDeque<Result<Answer, OperatorError>>,
        /// Processor time that submitted jobs took.
        took: Duration,
    },
    /// On a thread.
    Device(DeviceThread),
}

impl Executor {
    /// Run calls on the calling thread.
    pub fn on_worker(operator: Box<dyn Operator>, track: Track) -> Self {
        Executor::Worker { operator, track, answers: VecDeque::new(), took: Duration::ZERO }
    }

    /// Run calls on a new thread, named after the node.
    pub fn on_thread(node: &str, mut operator: Box<dyn Operator>, track: Track) -> Result<Self, RunError> {
        let body = move |jobs: Receiver<Job>, answers: AnswerSender| {
            for job in jobs {
                let answer = perform(operator.as_mut(), job, &track);
                let failed = answer.is_err();
                if !answers.send(answer) || failed {
                    break;
                }
                openmp::release_team();
            }
        };
        DeviceThread::spawn(node, body).map(Executor::Device).map_err(|error| RunError::node(node, error.into()))
    }

    /// Hand over a job; its answer is taken with [`take_answer`](Self::take_answer).
    pub fn submit(&mut self, job: Job) {
        match self {
            Executor::Worker { operator, track, answers, took } => {
                let began = processor::thread_time();
                answers.push_back(perform(operator.as_mut(), job, track));
                *took += processor::thread_time().saturating_sub(began);
            }
            Executor::Device(thread) => thread.submit(job),
        }
    }

    /// The next answer, if there is one.
    pub fn take_answer(&mut self) -> Option<Result<Answer, OperatorError>> {
        match self {
            Executor::Worker { answers, .. } => answers.pop_front(),
            Executor::Device(thread) => thread.take_answer(),
        }
    }

    /// Run a job and wait for its answer. No other job may be under way.
    ///
    /// # Errors
    /// The operator's own, its panic, or the loss of its thread.
    pub fn call(&mut self, job: Job) -> Result<Answer, OperatorError> {
        match self {
            Executor::Worker { operator, track, .. } => perform(operator.as_mut(), job, track),
            Executor::Device(thread) => {
                thread.submit(job);
                thread.answers.recv().unwrap_or_else(|_| Err(LOST_THREAD.into()))
            }
        }
    }

    /// Processor time that submitted jobs have taken of the worker's.
    pub fn taken_of_worker(&self) -> Duration {
        match self {
            Executor::Worker { took, .. } => *took,
            Executor::Device(_) => Duration::ZERO,
        }
    }

    /// Whom to wake when an answer is there.
    pub fn set_activator(&self, activator: SyncActivator) {
        if let Executor::Device(thread) = self {
            // Set once, when the node's timely operator is built; a node is built on one worker only.
            let _ = thread.activator.set(activator);
        }
    }
}

const LOST_THREAD: &str = "its device thread ended without an answer";

/// The sending side of a device thread's answers. Wakes the worker after each, and when dropped.
pub struct AnswerSender {
    sender: Option<Sender<Result<Answer, OperatorError>>>,
    activator: Arc<OnceLock<SyncActivator>>,
}

impl AnswerSender {
    /// Send an answer; false when nobody takes it any more.
    fn send(&self, answer: Result<Answer, OperatorError>) -> bool {
        let sent = self.sender.as_ref().is_some_and(|sender| sender.send(answer).is_ok());
        self.wake();
        sent
    }

    fn wake(&self) {
        if let Some(activator) = self.activator.get() {
            // Fails only when the worker is gone, which then needs no waking.
            let _ = activator.activate();
        }
    }
}

impl Drop for AnswerSender {
    fn drop(&mut self) {
        self.sender = None;
        self.wake();
    }
}

/// A thread that owns an operator and answers jobs in order.
pub struct DeviceThread {
    jobs: Option<Sender<Job>>,
    answers: Receiver<Result<Answer, OperatorError>>,
    activator: Arc<OnceLock<SyncActivator>>,
    handle: Option<std::thread::JoinHandle<()>>,
    outstanding: usize,
}

impl DeviceThread {
    /// Start a thread that runs `body`, which takes jobs until there are none and answers each.
    fn spawn(node: &str, body: impl FnOnce(Receiver<Job>, AnswerSender) + Send + 'static) -> std::io::Result<Self> {
        let (jobs, job_receiver) = unbounded();
        let (sender, answers) = unbounded();
        let activator = Arc::new(OnceLock::new());
        let answer_sender = AnswerSender { sender: Some(sender), activator: activator.clone() };
        let handle = std::thread::Builder::new().name(node.into()).spawn(move || body(job_receiver, answer_sender))?;
        Ok(DeviceThread { jobs: Some(jobs), answers, activator, handle: Some(handle), outstanding: 0 })
    }

    fn submit(&mut self, job: Job) {
        self.outstanding += 1;
        if let Some(jobs) = &self.jobs {
            // A thread that is gone shows as a disconnect when its answer is asked for.
            let _ = jobs.send(job);
        }
    }

    fn take_answer(&mut self) -> Option<Result<Answer, OperatorError>> {
        match self.answers.try_recv() {
            Ok(answer) => {
                self.outstanding -= 1;
                Some(answer)
            }
            Err(TryRecvError::Empty) => None,
            Err(TryRecvError::Disconnected) if self.outstanding > 0 => {
                self.outstanding = 0;
                Some(Err(LOST_THREAD.into()))
            }
            Err(TryRecvError::Disconnected) => None,
        }
    }
}

impl Drop for DeviceThread {
    /// Lets the thread end after the job it is at, and waits for that a while: tensors must not be in use when the
    /// process exits, but a job that never ends must not keep the process.
    fn drop(&mut self) {
        const PATIENCE: Duration = Duration::from_secs(20);
        self.jobs = None;
        let until = Instant::now() + PATIENCE;
        // Answers still come in order; a disconnect means that the thread has left its loop.
        while self.answers.recv_deadline(until).is_ok() {}
        if let Some(handle) = self.handle.take()
            && (handle.is_finished() || Instant::now() < until)
        {
            let _ = handle.join();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_thread_that_dies_is_an_error_and_not_a_wait() {
        let thread = DeviceThread::spawn("dies", |jobs, _answers| drop(jobs.recv())).expect("threads can be started");
        let mut executor = Executor::Device(thread);
        let error = executor.call(Job::Finish).expect_err("the thread ended without an answer");
        assert_eq!(error.to_string(), "its device thread ended without an answer");
    }

    struct Panics;

    impl Operator for Panics {
        fn step(&mut self, step: u64, _: Inputs) -> Result<Outputs, OperatorError> {
            panic!("no step {step}")
        }
    }

    #[test]
    fn a_panic_is_an_error_in_both_places() {
        let on_thread = Executor::on_thread("panics", Box::new(Panics), Track::default());
        let on_thread = on_thread.expect("threads can be started");
        for mut executor in [Executor::on_worker(Box::new(Panics), Track::default()), on_thread] {
            let error = executor.call(Job::Step(3, Inputs::default())).expect_err("it panics");
            assert_eq!(error.to_string(), "panicked: no step 3");
        }
    }
}

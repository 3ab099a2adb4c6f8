//! A child process that answers lines with lines, within time limits.
//!
//! A thread of its own writes to the child, one reads its answers and one its standard error, so that no full pipe can
//! make both sides wait for each other. The child leads a process group, which is killed as a whole; where the system can
//! (Linux), the child is killed too when the thread that started it is gone.

use std::collections::{BTreeMap, VecDeque};
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::process::CommandExt;
use std::process::{self, Command, ExitStatus, Stdio};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use crossbeam::channel::{Receiver, RecvTimeoutError, Sender, bounded, unbounded};
use sapo_flow_training::device::own_variables;

/// What to start, and how long to wait for it.
#[derive(Clone, Debug)]
pub struct Program {
    /// The node's name, for the log.
    pub node: String,
    /// The program and its arguments; not empty.
    pub command: Vec<String>,
    /// Environment variables besides those of this process.
    pub environment: BTreeMap<String, String>,
    /// For all answers to one exchange.
    pub time_limit: Duration,
}

/// Why a child is of no more use.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum Failure {
    /// It cannot be started.
    #[error("cannot start `{command}`: {reason}")]
    Start {
        /// The program.
        command: String,
        /// What the system said.
        reason: String,
    },
    /// It ended, or closed its output.
    #[error("`{command}` ended ({status}) when {missing}{last_words}")]
    Ended {
        /// The program.
        command: String,
        /// How it ended.
        status: String,
        /// The answers still to come.
        missing: String,
        /// The end of its standard error.
        last_words: String,
    },
    /// It took too long.
    #[error("`{command}` was not done within {seconds} seconds, when {missing}{last_words}")]
    TimedOut {
        /// The program.
        command: String,
        /// The limit.
        seconds: f64,
        /// The answers still to come.
        missing: String,
        /// The end of its standard error.
        last_words: String,
    },
    /// An answer is longer than any can be.
    #[error("`{command}` wrote a line of over {} MiB{last_words}", MAX_LINE_BYTES >> 20)]
    LongLine {
        /// The program.
        command: String,
        /// The end of its standard error.
        last_words: String,
    },
}

/// Longest answer, in bytes.
const MAX_LINE_BYTES: usize = 64 << 20;
/// Answers that may wait to be read.
const WAITING_LINES: usize = 1024;
/// Lines of standard error that an error repeats, and the characters of each.
const LAST_WORDS: (usize, usize) = (8, 300);
/// How long a child may take to end after its last answer, or to be gone once killed.
const PATIENCE: Duration = Duration::from_secs(5);

/// A running child.
pub struct Child {
    program: Program,
    process: process::Child,
    /// To the writing thread; none once the child's input is closed.
    input: Option<Sender<Vec<u8>>>,
    lines: Receiver<Line>,
    last_words: Arc<Mutex<VecDeque<String>>>,
    /// Disconnected when standard error has been read to its end.
    stderr_ended: Receiver<()>,
    /// Whether it has been killed and collected, so that its id may be another's by now.
    is_gone: bool,
}

/// What the reading thread found.
enum Line {
    Whole(Vec<u8>),
    TooLong,
}

impl Child {
    /// Start a program.
    ///
    /// # Errors
    /// [`Failure::Start`].
    pub fn start(program: &Program) -> Result<Self, Failure> {
        let failed = |reason: String| Failure::Start { command: program.text(), reason };
        let (name, arguments) = program.command.split_first().ok_or_else(|| failed("it has no name".into()))?;
        let mut command = Command::new(name);
        for name in own_variables() {
            command.env_remove(name);
        }
        command.args(arguments).envs(&program.environment).process_group(0);
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        die_with_this_thread(&mut command);
        let mut process = command.spawn().map_err(|error| failed(error.to_string()))?;
        let pipes = (process.stdin.take(), process.stdout.take(), process.stderr.take());
        let (Some(stdin), Some(stdout), Some(stderr)) = pipes else {
            return Err(failed("its pipes were not opened".into()));
        };
        let (input, requests) = unbounded();
        let (line_sender, lines) = bounded(WAITING_LINES);
        let (end_of_stderr, stderr_ended) = bounded(0);
        let last_words = Arc::new(Mutex::new(VecDeque::new()));
        // Threads end with their pipes, which the end of the child closes; nothing waits for them.
        thread::spawn(move || write_all(stdin, &requests));
        thread::spawn(move || read_lines(stdout, &line_sender));
        let (node, words) = (program.node.clone(), last_words.clone());
        thread::spawn(move || {
            log_lines(stderr, &node, &words);
            drop(end_of_stderr);
        });
        Ok(Child {
            program: program.clone(),
            process,
            input: Some(input),
            lines,
            last_words,
            stderr_ended,
            is_gone: false,
        })
    }

    /// Send lines, each ending in a line break, and wait for as many lines as `answers`.
    ///
    /// # Errors
    /// When the child ends or takes too long; it is killed then.
    pub fn exchange(&mut self, lines: Vec<u8>, answers: usize) -> Result<Vec<Vec<u8>>, Failure> {
        let deadline = Instant::now() + self.program.time_limit;
        if let Some(input) = &self.input {
            // A child that no longer reads shows as one that no longer answers.
            let _ = input.send(lines);
        }
        let mut found = Vec::with_capacity(answers);
        while found.len() < answers {
            match self.lines.recv_deadline(deadline) {
                Ok(Line::Whole(line)) => found.push(line),
                Ok(Line::TooLong) => {
                    self.kill();
                    let (command, last_words) = (self.program.text(), self.last_words());
                    return Err(Failure::LongLine { command, last_words });
                }
                Err(error) => {
                    let missing = format!("{} of {answers} answers were missing", answers - found.len());
                    return Err(self.failed(error, missing));
                }
            }
        }
        Ok(found)
    }

    /// Close the child's input and wait for its end, a while. Returns answers that nobody asked for.
    ///
    /// # Errors
    /// When it ends with a status that means failure.
    pub fn finish(mut self) -> Result<usize, Failure> {
        self.input = None;
        let deadline = Instant::now() + PATIENCE.min(self.program.time_limit);
        let mut unasked = 0;
        loop {
            match self.lines.recv_deadline(deadline) {
                Ok(_) => unasked += 1,
                Err(RecvTimeoutError::Timeout) => {
                    tracing::warn!(node = self.program.node, "`{}` goes on after its input's end", self.program.text());
                    return Ok(unasked);
                }
                Err(RecvTimeoutError::Disconnected) => break,
            }
        }
        match self.wait(deadline) {
            Some(status) if !status.success() => {
                let missing = "no answer was missing".into();
                Err(Failure::Ended {
                    command: self.program.text(),
                    status: status.to_string(),
                    missing,
                    last_words: self.last_words(),
                })
            }
            _ => Ok(unasked),
        }
    }

    fn failed(&mut self, error: RecvTimeoutError, missing: String) -> Failure {
        let command = self.program.text();
        match error {
            RecvTimeoutError::Timeout => {
                self.kill();
                let (seconds, last_words) = (self.program.time_limit.as_secs_f64(), self.last_words());
                Failure::TimedOut { command, seconds, missing, last_words }
            }
            RecvTimeoutError::Disconnected => {
                let status = self.wait(Instant::now() + PATIENCE);
                self.kill();
                let status = status.map_or_else(|| "it closed its output".into(), |status| status.to_string());
                Failure::Ended { command, status, missing, last_words: self.last_words() }
            }
        }
    }

    /// How it ended, if it does by then.
    fn wait(&mut self, deadline: Instant) -> Option<ExitStatus> {
        loop {
            match self.process.try_wait() {
                Ok(Some(status)) => return Some(status),
                // The standard library cannot wait with a limit.
                Ok(None) if Instant::now() < deadline => thread::sleep(Duration::from_millis(5)),
                _ => return None,
            }
        }
    }

    /// End the child and what it started, and collect it.
    fn kill(&mut self) {
        self.input = None;
        if std::mem::replace(&mut self.is_gone, true) {
            return;
        }
        if let Ok(group) = libc::pid_t::try_from(self.process.id()) {
            // SAFETY: sends a signal to the group that the child was made leader of.
            unsafe { libc::kill(-group, libc::SIGKILL) };
        }
        // Both fail only where it is gone already.
        let _ = self.process.kill();
        let _ = self.process.wait();
    }

    /// The end of its standard error, as part of a message.
    fn last_words(&self) -> String {
        // Read to its end, unless something that the child started keeps it open.
        let _ = self.stderr_ended.recv_timeout(PATIENCE);
        let words = self.last_words.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        if words.is_empty() {
            return String::new();
        }
        let lines: String = words.iter().map(|line| format!("\n    {line}")).collect();
        format!("; its standard error ended in{lines}")
    }
}

impl Drop for Child {
    fn drop(&mut self) {
        self.kill();
    }
}

impl Program {
    /// As one would type it, more or less.
    pub fn text(&self) -> String {
        self.command.join(" ")
    }
}

/// Have the system kill the child when this thread is gone, whatever ended it.
#[cfg(target_os = "linux")]
fn die_with_this_thread(command: &mut Command) {
    let ask = || {
        // SAFETY: one system call, which may be made between fork and exec.
        let answer = unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) };
        if answer == 0 { Ok(()) } else { Err(std::io::Error::last_os_error()) }
    };
    // SAFETY: the closure neither allocates nor locks.
    unsafe { command.pre_exec(ask) };
}

#[cfg(not(target_os = "linux"))]
fn die_with_this_thread(_: &mut Command) {}

fn write_all(mut stdin: process::ChildStdin, requests: &Receiver<Vec<u8>>) {
    for request in requests {
        // Fails when the child is gone, which shows in its answers.
        if stdin.write_all(&request).and_then(|()| stdin.flush()).is_err() {
            return;
        }
    }
}

fn read_lines(stdout: process::ChildStdout, lines: &Sender<Line>) {
    let mut stdout = BufReader::new(stdout);
    loop {
        let mut line = Vec::new();
        let read = stdout.by_ref().take(MAX_LINE_BYTES as u64 + 1).read_until(b'\n', &mut line);
        let line = match read {
            Ok(0) | Err(_) => return,
            Ok(_) if line.len() > MAX_LINE_BYTES => Line::TooLong,
            Ok(_) => Line::Whole(line),
        };
        let is_last = matches!(line, Line::TooLong);
        if lines.send(line).is_err() || is_last {
            return;
        }
    }
}

fn log_lines(stderr: process::ChildStderr, node: &str, last_words: &Mutex<VecDeque<String>>) {
    let mut stderr = BufReader::new(stderr);
    let (lines, characters) = LAST_WORDS;
    loop {
        let mut line = Vec::new();
        // What has no line breaks, such as a progress bar, comes in pieces.
        match stderr.by_ref().take(1 << 16).read_until(b'\n', &mut line) {
            Ok(0) | Err(_) => return,
            Ok(_) => {}
        }
        let text = String::from_utf8_lossy(&line);
        let text = text.trim_end();
        if text.is_empty() {
            continue;
        }
        tracing::info!(target: "subprocess", node, "{text}");
        let mut words = last_words.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        words.push_back(text.chars().take(characters).collect());
        if words.len() > lines {
            words.pop_front();
        }
    }
}

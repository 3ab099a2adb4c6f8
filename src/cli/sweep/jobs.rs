//! The runs of a sweep as processes of their own, some at a time.

use std::fs::{self, File};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};

use anyhow::Context;
use crossbeam::channel;
use serde_json::{Map, Value};

use super::queue::Job;
use crate::cli::manifest::{self, Ending, Manifest};

/// What became of a run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Fate {
    /// It was finished before.
    Kept,
    /// It is finished.
    Finished,
    /// It ended with an error: the last line of what it said.
    Failed(String),
    /// It was stopped, and can go on.
    Interrupted,
}

/// How often Ctrl-C was pressed, and the processes to pass it on to.
#[derive(Clone, Default)]
pub struct Interrupts {
    count: Arc<AtomicUsize>,
    running: Arc<Mutex<Vec<u32>>>,
}

impl Interrupts {
    /// Listen for Ctrl-C, and for polite kills.
    pub fn listen(message: fn(&str)) -> anyhow::Result<Self> {
        let interrupts = Interrupts::default();
        let handler = interrupts.clone();
        ctrlc::set_handler(move || {
            if handler.count.fetch_add(1, Ordering::SeqCst) == 0 {
                message("interrupted: the runs under way store a checkpoint; once more to stop them at once");
            }
            handler.running().iter().for_each(|process| interrupt(*process));
        })
        .context("cannot listen for Ctrl-C")?;
        Ok(interrupts)
    }

    /// Whether the sweep is to end.
    pub fn any(&self) -> bool {
        self.count.load(Ordering::SeqCst) > 0
    }

    fn running(&self) -> MutexGuard<'_, Vec<u32>> {
        self.running.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    /// Wait for a process, which is interrupted when the sweep is.
    fn wait(&self, mut child: Child) -> std::io::Result<Option<i32>> {
        let process = child.id();
        self.running().push(process);
        // The sweep may have been interrupted before the process was known.
        if self.any() {
            interrupt(process);
        }
        let status = child.wait();
        self.running().retain(|other| *other != process);
        Ok(status?.code())
    }
}

/// What Ctrl-C does to a process.
fn interrupt(process: u32) {
    // Safety: sends a signal to a child that has not been waited for, so that its number is still its own.
    unsafe {
        libc::kill(process as libc::pid_t, libc::SIGINT);
    }
}

/// Where and how the runs of a sweep are run.
pub struct Runner {
    /// The sweep's directory.
    pub directory: PathBuf,
    /// The pipeline's file.
    pub pipeline: PathBuf,
    /// Parameters that have one value in all runs.
    pub fixed: Map<String, Value>,
    /// Runs at a time.
    pub at_a_time: usize,
    /// Who stops them.
    pub interrupts: Interrupts,
}

impl Runner {
    /// Run all that is not finished; `tell` hears of every run that begins (without a fate) and that ends.
    ///
    /// # Errors
    /// When processes cannot be started.
    pub fn run(&self, jobs: &[Job], tell: impl Fn(&Job, Option<&Fate>) + Sync) -> anyhow::Result<Vec<Fate>> {
        let fates: Vec<Mutex<Option<anyhow::Result<Fate>>>> = jobs.iter().map(|_| Mutex::new(None)).collect();
        let (sender, receiver) = channel::unbounded();
        // The receiver is there until the end of this function.
        (0..jobs.len()).for_each(|index| sender.send(index).unwrap_or_default());
        drop(sender);
        std::thread::scope(|scope| {
            for _ in 0..self.at_a_time.min(jobs.len()) {
                scope.spawn(|| {
                    for index in &receiver {
                        let fate = self.one(&jobs[index], &tell);
                        if let Ok(fate) = &fate {
                            tell(&jobs[index], Some(fate));
                        }
                        *fates[index].lock().unwrap_or_else(|poisoned| poisoned.into_inner()) = Some(fate);
                    }
                });
            }
        });
        let fate = |fate: Mutex<Option<_>>| {
            fate.into_inner().unwrap_or_else(|poisoned| poisoned.into_inner()).unwrap_or(Ok(Fate::Interrupted))
        };
        fates.into_iter().map(fate).collect()
    }

    fn one(&self, job: &Job, tell: &(impl Fn(&Job, Option<&Fate>) + Sync)) -> anyhow::Result<Fate> {
        let directory = job.directory(&self.directory);
        if is_finished(&directory)? {
            return Ok(Fate::Kept);
        }
        if self.interrupts.any() {
            return Ok(Fate::Interrupted);
        }
        tell(job, None);
        let said = job.log(&self.directory);
        let code = self.interrupts.wait(self.start(job, &directory, &said)?)?;
        if fs::metadata(&said).is_ok_and(|file| file.len() == 0) {
            fs::remove_file(&said).with_context(|| format!("cannot remove {}", said.display()))?;
        }
        Ok(match code {
            Some(0) => Fate::Finished,
            Some(130) => Fate::Interrupted,
            _ if self.interrupts.any() => Fate::Interrupted,
            code => Fate::Failed(last_line(&said).unwrap_or_else(|| match code {
                Some(code) => format!("it exited with {code}, and said nothing"),
                None => "it was killed".to_owned(),
            })),
        })
    }

    /// The process of a run, fresh or resumed. What it says goes to a file beside its directory.
    fn start(&self, job: &Job, directory: &Path, said: &Path) -> anyhow::Result<Child> {
        let program = std::env::current_exe().context("cannot find this program")?;
        let mut command = Command::new(&program);
        command.arg("run").arg("--quiet");
        if manifest::is_there(directory) {
            command.arg("--resume").arg(directory);
        } else {
            // A run that was killed before it had a manifest had not begun.
            if directory.exists() {
                fs::remove_dir_all(directory).with_context(|| format!("cannot remove {}", directory.display()))?;
            }
            command.arg(&self.pipeline).arg("--run-dir").arg(directory).arg(format!("--seed={}", job.seed));
            let fixed = self.fixed.iter().filter(|(name, _)| !job.params.contains_key(*name));
            for (name, value) in fixed.chain(&job.params) {
                // JSON is YAML.
                command.arg("-S").arg(format!("{name}={value}"));
            }
            command.arg(format!("--threads={}", self.threads()));
        }
        let file = File::create(said).with_context(|| format!("cannot make {}", said.display()))?;
        command.stdin(Stdio::null()).stdout(file.try_clone()?).stderr(file);
        // In a group of their own: what the terminal sends on Ctrl-C is passed on, once.
        command.process_group(0);
        // Safety: between fork and exec only async-signal-safe functions may be called, and prctl is a system call. A run
        // whose sweep was killed stores a checkpoint and ends: nobody waits for it, and it would keep cores and device.
        unsafe {
            command.pre_exec(|| match libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGINT) {
                0 => Ok(()),
                _ => Err(std::io::Error::last_os_error()),
            });
        }
        command.spawn().with_context(|| format!("cannot start {}", program.display()))
    }

    /// Threads for each run.
    fn threads(&self) -> usize {
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        (cores / self.at_a_time).max(1)
    }
}

fn is_finished(directory: &Path) -> anyhow::Result<bool> {
    if !manifest::is_there(directory) {
        return Ok(false);
    }
    let manifest = Manifest::read(directory)?;
    let ended = manifest.processes.last().and_then(|process| process.ended.as_ref());
    Ok(ended.is_some_and(|ended| ended.outcome == Ending::Finished))
}

/// The last line that says something.
pub fn last_line(path: &Path) -> Option<String> {
    let text = fs::read_to_string(path).ok()?;
    text.lines().rev().map(str::trim).find(|line| !line.is_empty()).map(str::to_owned)
}

//! What is shown while a run goes on: a live display on a terminal, lines elsewhere.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crossbeam::channel::{Receiver, Sender, bounded};
use crossbeam::select;
use indicatif::{ProgressBar, ProgressStyle};
use sapo_flow_engine::Metrics;
use sapo_flow_engine::runtime::event::{Completion, Event};

use super::report::{self, Evaluation, Evaluations};
use super::{explained, terminal};

/// Metrics that the display tells, and what it calls them.
const SHOWN: &[(&str, &str)] =
    &[("loss", "loss"), ("rewards/margins", "margin"), ("rewards/accuracies", "accuracy"), ("tokens/s", "tokens/s")];

/// Seconds between lines where there is no terminal, unless a twentieth of the run is done before.
const SECONDS_BETWEEN_LINES: u64 = 10;

/// How much to show.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Display {
    /// A bar that is redrawn.
    Bar,
    /// Lines.
    Lines,
    /// Nothing.
    Quiet,
}

/// What the events of a run come to.
pub struct Summary {
    /// Held-out evaluations.
    pub evaluations: Evaluations,
    /// The model that each node wrote last.
    pub models: BTreeMap<String, PathBuf>,
}

/// Watches a run from a thread of its own.
pub struct Watcher {
    thread: JoinHandle<Summary>,
    done: Sender<()>,
}

impl Watcher {
    /// Begin to watch.
    pub fn start(events: Receiver<Event>, display: Display, evaluations: Evaluations) -> Self {
        let (done, ended) = bounded(1);
        let mut view = View::new(display, evaluations);
        let thread = std::thread::spawn(move || {
            loop {
                select! {
                    recv(events) -> event => match event {
                        Ok(event) => view.take(event),
                        Err(_) => break,
                    },
                    recv(ended) -> _ => break,
                }
            }
            events.try_iter().for_each(|event| view.take(event));
            view.finish()
        });
        Watcher { thread, done }
    }

    /// Stop watching, once all events so far are shown.
    pub fn finish(self) -> anyhow::Result<Summary> {
        // The thread may have ended with the last sender.
        let _ = self.done.send(());
        self.thread.join().map_err(|_| anyhow::anyhow!("the progress display failed"))
    }
}

/// What is known of the run, and how it is shown.
struct View {
    display: Display,
    bar: Option<ProgressBar>,
    started: Instant,
    first_step: u64,
    total_steps: u64,
    last_line: Option<(u64, Instant)>,
    metrics: BTreeMap<String, f64>,
    summary: Summary,
}

impl View {
    fn new(display: Display, evaluations: Evaluations) -> Self {
        View {
            display,
            bar: None,
            started: Instant::now(),
            first_step: 0,
            total_steps: 0,
            last_line: None,
            metrics: BTreeMap::new(),
            summary: Summary { evaluations, models: BTreeMap::new() },
        }
    }

    fn take(&mut self, event: Event) {
        match event {
            Event::NodeStarted { node, took } if took > Duration::from_millis(500) => {
                self.say(&format!("{node} is ready after {:.1} s", took.as_secs_f64()));
            }
            Event::NodeStarted { .. } => {}
            Event::RunStarted { first_step, total_steps } => self.begin(first_step, total_steps),
            Event::Metrics { metrics, .. } => {
                self.metrics.extend(metrics.values.iter().map(|(name, value)| (name.clone(), *value)));
            }
            Event::StepCompleted { step, busy } => self.step(step + 1, &busy),
            Event::Evaluation { node, version, metrics, shown } => {
                let values: Vec<String> =
                    metrics.values.iter().map(|(name, value)| format!("{name} {}", report::number(*value))).collect();
                self.say(&format!("{node} after {version} updates: {}", values.join("  ")));
                for Completion { prompt, answer } in &shown {
                    self.say(&format!("{node} after {version} updates: {prompt:?} is answered {answer:?}"));
                }
                let evaluation = Evaluation { metrics: Metrics::clone(&metrics), shown };
                if let Err(error) = self.summary.evaluations.add(&node, version, evaluation) {
                    tracing::warn!("{}", explained(&error));
                }
            }
            Event::ModelSaved { node, path } => {
                self.say(&format!("{node} wrote the model {}", path.display()));
                self.summary.models.insert(node, path);
            }
            Event::CheckpointSaved { step, path } => {
                self.say(&format!("checkpoint after {step} steps: {}", path.display()));
            }
            Event::Note { node, message } => self.say(&format!("{node}: {message}")),
        }
    }

    fn begin(&mut self, first_step: u64, total_steps: u64) {
        (self.first_step, self.total_steps, self.started) = (first_step, total_steps, Instant::now());
        if self.display == Display::Bar {
            let bar = terminal::BARS.add(ProgressBar::new(total_steps));
            if let Ok(style) = ProgressStyle::with_template("{wide_bar} step {pos}/{len}\n{msg}") {
                bar.set_style(style);
            }
            bar.set_position(first_step);
            self.bar = Some(bar);
        }
        let from = if first_step > 0 { format!(" from step {first_step}") } else { String::new() };
        self.say(&format!("training{from}: {total_steps} steps"));
    }

    /// `done` steps are complete.
    fn step(&mut self, done: u64, busy: &[(String, Duration)]) {
        if let Some(bar) = &self.bar {
            bar.set_position(done);
            bar.set_message(format!("{}\n{}", self.figures(done).join("  "), shares(busy, 5)));
        } else if self.display == Display::Lines && self.line_is_due(done) {
            self.last_line = Some((done, Instant::now()));
            let mut parts = vec![format!("step {done}/{}", self.total_steps)];
            parts.extend(self.figures(done));
            self.say(&format!("{}  [{}]", parts.join("  "), shares(busy, 3)));
        }
    }

    fn line_is_due(&self, done: u64) -> bool {
        let Some((step, time)) = self.last_line else { return true };
        done == self.total_steps
            || done >= step + (self.total_steps / 20).max(1)
            || time.elapsed() >= Duration::from_secs(SECONDS_BETWEEN_LINES)
    }

    /// Metrics and the time left.
    fn figures(&self, done: u64) -> Vec<String> {
        let mut parts: Vec<String> = SHOWN
            .iter()
            .filter_map(|(name, label)| {
                let value = *self.metrics.get(*name)?;
                Some(if *name == "tokens/s" { format!("{value:.0} {label}") } else { format!("{label} {value:.4}") })
            })
            .collect();
        let here = done.saturating_sub(self.first_step);
        if here > 0 && done < self.total_steps {
            let each = self.started.elapsed().as_secs_f64() / here as f64;
            let left = Duration::from_secs_f64(each * (self.total_steps - done) as f64);
            parts.push(format!("{} left", report::duration(left)));
        }
        parts
    }

    fn say(&self, text: &str) {
        if self.display != Display::Quiet {
            terminal::message(text);
        }
    }

    fn finish(self) -> Summary {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
        self.summary
    }
}

/// The nodes that take most of the working time.
fn shares(busy: &[(String, Duration)], most: usize) -> String {
    let total: f64 = busy.iter().map(|(_, time)| time.as_secs_f64()).sum();
    let mut busy: Vec<_> = busy.iter().collect();
    busy.sort_by_key(|(_, time)| std::cmp::Reverse(*time));
    let part = |(node, time): &&(String, Duration)| {
        format!("{node} {:.0}%", 100.0 * time.as_secs_f64() / total.max(f64::MIN_POSITIVE))
    };
    busy.iter().take(most).map(part).collect::<Vec<_>>().join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shares_are_of_the_working_time() {
        let busy = [("a", 100), ("b", 300), ("c", 0)].map(|(node, ms)| (node.to_owned(), Duration::from_millis(ms)));
        assert_eq!(shares(&busy, 2), "b 75%, a 25%");
        assert_eq!(shares(&[], 2), "");
    }
}

//! `run --trace`: when each node worked, in the Trace Event Format (Google, "Trace Event Format", 2016), which Perfetto
//! and chrome://tracing show. One track for each node, in graph order, and one slice for each call of its operator.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context, bail};
use sapo_flow_engine::Graph;
use sapo_flow_engine::runtime::timeline::{Span, Timeline, Work};
use serde_json::{Value, json};

use super::directory::{stem, temporary, write_whole};

/// The process that all tracks belong to: there is one.
const PROCESS: u32 = 1;

/// A trace that is to be written.
pub struct Trace {
    path: PathBuf,
    name: String,
    nodes: Vec<String>,
    /// Where the run notes its spans.
    pub timeline: Arc<Timeline>,
}

impl Trace {
    /// Begin the timeline of a run, once it is certain that the file can be written.
    ///
    /// # Errors
    /// When it cannot.
    pub fn begin(path: &Path, pipeline: &Path, graph: &Graph) -> anyhow::Result<Self> {
        let cannot = || format!("cannot write the trace {}", path.display());
        if path.is_dir() {
            bail!("{}: it is a directory", cannot());
        }
        // As it will be written: under another name beside it.
        let tried = temporary(path);
        File::create(&tried).and_then(|_| fs::remove_file(&tried)).with_context(cannot)?;
        let nodes = graph.nodes.iter().map(|node| node.name.clone()).collect();
        Ok(Trace { path: path.into(), name: stem(pipeline), nodes, timeline: Timeline::begin() })
    }

    /// Write what there is so far; where it was written.
    ///
    /// # Errors
    /// When the file cannot be written after all.
    pub fn write(&self) -> anyhow::Result<&Path> {
        let named = |kind: &str, track: usize, name: &str| json!({"ph": "M", "pid": PROCESS, "tid": track, "name": kind, "args": {"name": name}});
        let mut lines = vec![named("process_name", 0, &format!("sapo-flow: {}", self.name)).to_string()];
        for (node, name) in self.nodes.iter().enumerate() {
            lines.push(named("thread_name", track(node), name).to_string());
            let order = json!({"ph": "M", "pid": PROCESS, "tid": track(node), "name": "thread_sort_index",
                               "args": {"sort_index": node}});
            lines.push(order.to_string());
        }
        lines.extend(self.timeline.spans().iter().map(|span| slice(span).to_string()));
        write_whole(
            &self.path,
            &format!("{{\"displayTimeUnit\":\"ms\",\"traceEvents\":[\n{}\n]}}\n", lines.join(",\n")),
        )?;
        Ok(&self.path)
    }
}

/// A node's track. 0 would be the process's own.
fn track(node: usize) -> usize {
    node + 1
}

/// A span as a complete event. Times are in microseconds, with the nanoseconds behind the point.
fn slice(span: &Span) -> Value {
    let (category, name, args) = match span.work {
        Work::Build => ("build", "build".to_owned(), json!({})),
        Work::Restore => ("restore", "restore".to_owned(), json!({})),
        Work::Start => ("start", "start".to_owned(), json!({})),
        Work::Step(step) => ("step", format!("step {step}"), json!({"step": step})),
        Work::Snapshot(steps) => ("snapshot", format!("snapshot after {steps}"), json!({"steps": steps})),
        Work::Finish => ("finish", "finish".to_owned(), json!({})),
    };
    let microseconds = |time: std::time::Duration| time.as_nanos() as f64 / 1e3;
    json!({
        "ph": "X", "pid": PROCESS, "tid": track(span.node), "cat": category, "name": name,
        "ts": microseconds(span.began), "dur": microseconds(span.took), "args": args,
    })
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    /// The example of a complete event in the format's description, with our names.
    #[test]
    fn a_span_is_a_complete_event() {
        let (began, took) = (Duration::from_nanos(456_123_500), Duration::from_micros(234));
        let event = slice(&Span { node: 2, work: Work::Step(7), began, took });
        let expected = json!({"ph": "X", "pid": 1, "tid": 3, "cat": "step", "name": "step 7", "ts": 456_123.5,
                              "dur": 234.0, "args": {"step": 7}});
        assert_eq!(event, expected);
    }
}

//! Checkpoints: consistent cuts, atomic on disk.
//!
//! A checkpoint after t steps holds each node's state once its step t - 1 is done, and what is in flight on feedback
//! edges. Nodes reach that point at different moments; the last one completes the checkpoint. It is written under a
//! temporary name, synced, described by a manifest with a hash for each file, renamed, and only then named by `latest`.
//!
//! ```text
//! checkpoints/
//!   latest                 the name of the newest complete checkpoint
//!   step-00000300/
//!     manifest.json        step, pipeline hash, SHA-256 of every other file
//!     in_flight.json       records on feedback edges
//!     nodes/NAME/...       what the node's operator wrote
//! ```

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Instant;

use serde::{Deserialize, Serialize};

use super::control::Control;
use super::disk::{files_under, sha256, sync_and_hash, sync_directories, sync_directory, write_synced};
use super::event::{Event, EventSender};
use super::{RunError, RunOptions};
use crate::graph::Graph;
use crate::record::Record;

/// Records in flight on feedback edges, by edge name; the n-th entry is due at the n-th step after the cut.
type InFlight = BTreeMap<String, Vec<Vec<Record>>>;

/// The description of a complete checkpoint.
#[derive(Debug, Serialize, Deserialize)]
struct Manifest {
    format: u32,
    step: u64,
    pipeline_sha256: String,
    files: BTreeMap<String, String>,
}

const FORMAT: u32 = 2;
const MANIFEST: &str = "manifest.json";
const IN_FLIGHT: &str = "in_flight.json";
const LATEST: &str = "latest";
/// The folder of a run directory that holds its checkpoints.
const DIRECTORY: &str = "checkpoints";
/// What the name of a checkpoint under construction begins with.
const HALF_WRITTEN: &str = ".writing-";

/// A checkpoint under construction.
#[derive(Default)]
struct Pending {
    nodes: usize,
    in_flight: InFlight,
}

/// Collects the snapshots of all nodes into checkpoints.
pub struct Checkpointer {
    root: PathBuf,
    keep: usize,
    node_count: usize,
    edge_names: Vec<String>,
    pipeline_sha256: String,
    events: EventSender,
    pending: Mutex<BTreeMap<u64, Pending>>,
    writers: Mutex<Vec<JoinHandle<()>>>,
}

impl Checkpointer {
    /// For the checkpoints of one run. Removes what a killed process left half written in its directory.
    ///
    /// # Errors
    /// When that cannot be removed.
    pub fn new(graph: &Graph, options: &RunOptions) -> Result<Self, RunError> {
        let root = options.run_directory.join(DIRECTORY);
        remove_half_written(&root).map_err(|error| failed(&root, error))?;
        Ok(Checkpointer {
            root,
            keep: graph.run.checkpoint.keep.max(1),
            node_count: graph.nodes.len(),
            edge_names: (0..graph.edges.len()).map(|edge| edge_name(graph, edge)).collect(),
            pipeline_sha256: pipeline_sha256(graph),
            events: options.events.clone(),
            pending: Mutex::new(BTreeMap::new()),
            writers: Mutex::new(Vec::new()),
        })
    }

    /// The empty directory a node writes its snapshot into.
    ///
    /// # Errors
    /// When it cannot be made.
    pub fn node_directory(&self, step: u64, node: &str) -> Result<PathBuf, RunError> {
        let directory = self.temporary(step).join("nodes").join(node);
        fs::create_dir_all(&directory).map_err(|error| failed(&directory, error))?;
        Ok(directory)
    }

    /// Take a node's snapshot as done. The last node's completes the checkpoint, on a thread of its own; if that fails, so
    /// does the run, at once: work done after a checkpoint that cannot be written may be lost.
    ///
    /// # Errors
    /// When that thread cannot be started.
    pub fn node_done(
        &self,
        step: u64,
        node: &str,
        in_flight: Vec<(usize, Vec<Vec<Record>>)>,
        control: &Arc<Control>,
    ) -> Result<(), RunError> {
        let mut pending = locked(&self.pending);
        let entry = pending.entry(step).or_default();
        entry.nodes += 1;
        entry.in_flight.extend(in_flight.into_iter().map(|(edge, records)| (self.edge_names[edge].clone(), records)));
        tracing::debug!(node, step, done = entry.nodes, of = self.node_count, "snapshot taken");
        if entry.nodes < self.node_count || control.has_failed() {
            return Ok(());
        }
        let in_flight = pending.remove(&step).unwrap_or_default().in_flight;
        drop(pending);
        self.wait(control);
        let writer = Writer {
            root: self.root.clone(),
            temporary: self.temporary(step),
            keep: self.keep,
            step,
            pipeline_sha256: self.pipeline_sha256.clone(),
            events: self.events.clone(),
        };
        let control = control.clone();
        let complete = move || writer.complete(&in_flight).unwrap_or_else(|error| control.fail(error));
        let thread = std::thread::Builder::new().name("checkpoint".into()).spawn(complete);
        locked(&self.writers).push(thread.map_err(|error| failed(&self.root, error))?);
        Ok(())
    }

    /// Wait until no checkpoint is being completed.
    pub fn wait(&self, control: &Control) {
        for writer in locked(&self.writers).drain(..) {
            if writer.join().is_err() {
                let message = "its writer panicked".into();
                control.fail(RunError::Checkpoint { path: self.root.clone(), message });
            }
        }
    }

    fn temporary(&self, step: u64) -> PathBuf {
        self.root.join(format!("{HALF_WRITTEN}{}", checkpoint_name(step)))
    }
}

/// Completes one checkpoint.
struct Writer {
    root: PathBuf,
    temporary: PathBuf,
    keep: usize,
    step: u64,
    pipeline_sha256: String,
    events: EventSender,
}

impl Writer {
    fn complete(self, in_flight: &InFlight) -> Result<(), RunError> {
        let began = Instant::now();
        let path = self.temporary.join(IN_FLIGHT);
        let text = serde_json::to_vec(in_flight).map_err(|error| failed(&path, error))?;
        fs::write(&path, text).map_err(|error| failed(&path, error))?;
        let mut files = BTreeMap::new();
        for file in files_under(&self.temporary).map_err(|error| failed(&self.temporary, error))? {
            let path = self.temporary.join(&file);
            files.insert(file, sync_and_hash(&path).map_err(|error| failed(&path, error))?);
        }
        let manifest =
            Manifest { format: FORMAT, step: self.step, pipeline_sha256: self.pipeline_sha256.clone(), files };
        let text = serde_json::to_vec_pretty(&manifest).map_err(|error| failed(&self.temporary, error))?;
        write_synced(&self.temporary.join(MANIFEST), &text).map_err(|error| failed(&self.temporary, error))?;
        // The files' bytes are on disk; their names are once their directories are, the innermost first.
        sync_directories(&self.temporary).map_err(|error| failed(&self.temporary, error))?;

        let name = checkpoint_name(self.step);
        let target = self.root.join(&name);
        self.publish(&name, &target).map_err(|error| failed(&target, error))?;
        let seconds = began.elapsed().as_secs_f64();
        tracing::debug!(step = self.step, seconds, path = %target.display(), "checkpoint complete");
        self.events.send(Event::CheckpointSaved { step: self.step, path: target });
        Ok(())
    }

    /// Rename into place, point `latest` there, and drop what is too old.
    fn publish(&self, name: &str, target: &Path) -> io::Result<()> {
        if target.exists() {
            fs::remove_dir_all(target)?;
        }
        fs::rename(&self.temporary, target)?;
        sync_directory(&self.root)?;
        let pointer = self.root.join(".latest");
        write_synced(&pointer, name.as_bytes())?;
        fs::rename(&pointer, self.root.join(LATEST))?;
        sync_directory(&self.root)?;
        let mut names: Vec<String> = fs::read_dir(&self.root)?
            .filter_map(|entry| entry.ok()?.file_name().into_string().ok())
            .filter(|name| name.starts_with("step-") && name.as_str() <= checkpoint_name(self.step).as_str())
            .collect();
        names.sort();
        let old = names.len().saturating_sub(self.keep);
        for name in &names[..old] {
            fs::remove_dir_all(self.root.join(name))?;
        }
        Ok(())
    }
}

/// A checkpoint that a run can take up: complete, unaltered, and of the same pipeline.
pub struct LoadedCheckpoint {
    /// Steps it covers: the first step of the resumed run.
    pub step: u64,
    /// Its directory.
    pub directory: PathBuf,
    in_flight: InFlight,
}

impl LoadedCheckpoint {
    /// Check and load the newest checkpoint of a run directory; `None` where there is none.
    ///
    /// # Errors
    /// When a file is missing, truncated or altered, or the checkpoint is of another pipeline. The error names those to
    /// choose from instead.
    pub fn latest(run_directory: &Path, graph: &Graph) -> Result<Option<Self>, RunError> {
        let root = run_directory.join(DIRECTORY);
        let pointer = root.join(LATEST);
        let whole = || seemingly_whole(&root).map_err(|error| failed(&root, error));
        let name = match fs::read_to_string(&pointer) {
            Ok(name) => Some(name.trim().to_owned()),
            // A kill may come after the first checkpoint is in its place, and before its name is in this one.
            Err(error) if error.kind() == io::ErrorKind::NotFound => whole()?.pop(),
            Err(error) => return Err(failed(&pointer, error)),
        };
        let Some(name) = name else { return Ok(None) };
        match Self::load(&root.join(&name), graph) {
            Err(RunError::Checkpoint { path, message }) => {
                let mut others = whole()?;
                others.retain(|other| *other != name);
                let advice = match others.is_empty() {
                    true => String::new(),
                    false => format!(
                        "; these seem whole: {}; to go on from one of them, write its name into {}",
                        others.join(", "),
                        pointer.display()
                    ),
                };
                Err(failed(&path, message + &advice))
            }
            loaded => loaded.map(Some),
        }
    }

    /// Check and load a checkpoint.
    ///
    /// # Errors
    /// See [`latest`](Self::latest).
    pub fn load(directory: &Path, graph: &Graph) -> Result<Self, RunError> {
        let path = directory.join(MANIFEST);
        let text = fs::read(&path).map_err(|error| failed(&path, error))?;
        let manifest: Manifest = serde_json::from_slice(&text).map_err(|error| failed(&path, error))?;
        if manifest.format != FORMAT {
            return Err(failed(&path, format!("format {FORMAT} expected, {} found", manifest.format)));
        }
        let name = checkpoint_name(manifest.step);
        if !directory.ends_with(&name) {
            return Err(failed(
                &path,
                format!("it is of step {}, which belongs into a directory {name}", manifest.step),
            ));
        }
        if manifest.pipeline_sha256 != pipeline_sha256(graph) {
            return Err(RunError::OtherPipeline { path });
        }
        let found = files_under(directory).map_err(|error| failed(directory, error))?;
        if let Some(extra) = found.iter().find(|file| *file != MANIFEST && !manifest.files.contains_key(*file)) {
            return Err(failed(&directory.join(extra), "not part of the checkpoint's manifest"));
        }
        for (file, expected) in &manifest.files {
            let path = directory.join(file);
            let found = sync_and_hash(&path).map_err(|error| failed(&path, error))?;
            if found != *expected {
                let message = format!("truncated or altered: SHA-256 {expected} expected, {found} found");
                return Err(failed(&path, message));
            }
        }
        let path = directory.join(IN_FLIGHT);
        let text = fs::read(&path).map_err(|error| failed(&path, error))?;
        let in_flight = serde_json::from_slice(&text).map_err(|error| failed(&path, error))?;
        Ok(LoadedCheckpoint { step: manifest.step, directory: directory.into(), in_flight })
    }

    /// Where a node's snapshot lies.
    pub fn node_directory(&self, node: &str) -> PathBuf {
        self.directory.join("nodes").join(node)
    }

    /// What was in flight on a feedback edge.
    ///
    /// # Errors
    /// When the checkpoint knows nothing of the edge.
    pub fn in_flight(&self, graph: &Graph, edge: usize) -> Result<Vec<Vec<Record>>, RunError> {
        let name = edge_name(graph, edge);
        let records = self.in_flight.get(&name).cloned();
        records.ok_or_else(|| failed(&self.directory.join(IN_FLIGHT), format!("nothing about the edge {name}")))
    }
}

/// Names of the checkpoints that have a manifest and the files it lists, the oldest first. Hashes are not looked at, since
/// that takes long; loading does.
fn seemingly_whole(root: &Path) -> io::Result<Vec<String>> {
    let entries = match fs::read_dir(root) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(error),
    };
    let is_whole = |name: &String| {
        let manifest = fs::read(root.join(name).join(MANIFEST)).ok();
        let manifest = manifest.and_then(|text| serde_json::from_slice::<Manifest>(&text).ok());
        manifest.is_some_and(|manifest| {
            let is_there = |file: &String| root.join(name).join(file).is_file();
            *name == checkpoint_name(manifest.step) && manifest.files.keys().all(is_there)
        })
    };
    let names = entries.filter_map(|entry| entry.ok()?.file_name().into_string().ok());
    let mut names: Vec<String> = names.filter(is_whole).collect();
    names.sort();
    Ok(names)
}

/// Remove checkpoints that were never completed.
fn remove_half_written(root: &Path) -> io::Result<()> {
    let entries = match fs::read_dir(root) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(error),
    };
    for entry in entries {
        let entry = entry?;
        if entry.file_name().to_string_lossy().starts_with(HALF_WRITTEN) {
            fs::remove_dir_all(entry.path())?;
        }
    }
    Ok(())
}

/// The directory name of a checkpoint, sorting by step.
fn checkpoint_name(step: u64) -> String {
    format!("step-{step:08}")
}

/// An edge as people write it.
fn edge_name(graph: &Graph, edge: usize) -> String {
    let edge = &graph.edges[edge];
    let (from, to) = (&graph.nodes[edge.from_node], &graph.nodes[edge.to_node]);
    format!("{}.{} -> {}.{}", from.name, from.op.outputs[edge.from_port].name, to.name, to.op.inputs[edge.to_port].name)
}

/// A hash of what must not change between a run and its resumption: the graph, its settings and the seed.
/// How often checkpoints are taken, and how many are kept, may change.
fn pipeline_sha256(graph: &Graph) -> String {
    let mut text = String::new();
    for node in &graph.nodes {
        text +=
            &format!("{} {} {}\n", node.name, node.op.name, serde_json::to_string(&node.config).unwrap_or_default());
    }
    for edge in 0..graph.edges.len() {
        text += &format!("{} {:?}\n", edge_name(graph, edge), graph.edges[edge].feedback);
    }
    let run = &graph.run;
    text += &format!("{} {:?} {:?} {} {:?} ", run.seed, run.epochs, run.steps, run.device, run.dtype);
    text += &format!("{:?} {:?}", run.kernels, run.threads);
    sha256(text.as_bytes())
}

fn failed(path: &Path, message: impl ToString) -> RunError {
    RunError::Checkpoint { path: path.into(), message: message.to_string() }
}

fn locked<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
}

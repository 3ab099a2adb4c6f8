//! Files a sink appends to, which a resumed run cuts back to where its checkpoint was taken.

use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::{Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use crate::Error;

/// A file that only grows, except on resuming.
#[derive(Debug)]
pub struct LogFile {
    path: PathBuf,
    file: File,
}

impl LogFile {
    /// Open `path` for this process alone: emptied in a fresh run, as it is in a resumed one. Makes its directory.
    pub fn open(path: PathBuf, resumed: bool) -> Result<Self, Error> {
        if let Some(parent) = path.parent() {
            fs::create_dir_all(parent).map_err(Error::io(parent))?;
        }
        let open = OpenOptions::new().create(true).write(true).truncate(false).open(&path);
        let mut file = open.map_err(Error::io(&path))?;
        match file.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => {
                let message = format!(
                    "{}: another sink writes this file (give each its own `file`), or another process is at work on \
                     this run",
                    path.display()
                );
                return Err(Error::Input(message));
            }
            Err(TryLockError::Error(source)) => return Err(Error::Io { path, source }),
        }
        if !resumed {
            file.set_len(0).map_err(Error::io(&path))?;
        }
        file.seek(SeekFrom::End(0)).map_err(Error::io(&path))?;
        Ok(LogFile { path, file })
    }

    /// Append bytes.
    pub fn append(&mut self, bytes: &[u8]) -> Result<(), Error> {
        self.file.write_all(bytes).map_err(Error::io(&self.path))
    }

    /// Make what was written safe on disk; its length in bytes.
    pub fn sync(&mut self) -> Result<u64, Error> {
        self.file.sync_data().map_err(Error::io(&self.path))?;
        self.length()
    }

    /// Cut the file back to `length` bytes, the state of a checkpoint.
    pub fn cut_back(&mut self, length: u64) -> Result<(), Error> {
        let found = self.length()?;
        if found < length {
            let path = self.path.display();
            let message = format!("{path} has {found} bytes, but had {length} when the checkpoint was taken");
            return Err(Error::Restore(message));
        }
        self.file.set_len(length).map_err(Error::io(&self.path))?;
        self.file.seek(SeekFrom::Start(length)).map_err(Error::io(&self.path))?;
        Ok(())
    }

    fn length(&self) -> Result<u64, Error> {
        Ok(self.file.metadata().map_err(Error::io(&self.path))?.len())
    }
}

/// Files that the run itself keeps in its directory.
const FILES_OF_THE_RUN: [&str; 3] = ["pipeline.yaml", "manifest.json", "evaluations.json"];

/// Folders that the run itself, or a node of any name, keeps in its directory.
const FOLDERS_OF_THE_RUN: [&str; 3] = ["checkpoints", "tensorboard", "edits"];

/// What is wrong with a `file` key: it must be a plain name inside the run directory, and none that the run itself uses.
pub fn check_file_name(file: &str) -> Option<String> {
    let path = Path::new(file);
    if path.file_name().is_none_or(|name| name != file) {
        return Some(format!("expected a file name inside the run directory, found `{file}`"));
    }
    // Files are `writing` until they are whole.
    let is_taken = FILES_OF_THE_RUN.contains(&file)
        || FOLDERS_OF_THE_RUN.contains(&file)
        || file.starts_with('.')
        || file.ends_with(".writing")
        || (file.contains("-failed-at-step-") && file.ends_with(".json"));
    is_taken.then(|| format!("the run itself uses `{file}` in its directory: choose another name"))
}

/// What is wrong with the name of a node that writes into a folder of its name: the run itself may use that folder.
pub fn check_folder_name(node: &str) -> Option<String> {
    let folder = node.split('/').next().filter(|folder| FOLDERS_OF_THE_RUN.contains(folder))?;
    Some(format!(
        "the run itself uses the folder `{folder}` in its directory, which is this node's: choose another name"
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_resumed_run_goes_on_from_the_cut() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("log/a.jsonl");
        let mut log = LogFile::open(path.clone(), false).unwrap();
        log.append(b"one\n").unwrap();
        assert_eq!(log.sync().unwrap(), 4);
        log.append(b"two\n").unwrap();
        drop(log);
        let mut log = LogFile::open(path.clone(), true).unwrap();
        log.cut_back(4).unwrap();
        log.append(b"three\n").unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"one\nthree\n");
        assert!(log.cut_back(11).unwrap_err().to_string().contains("has 10 bytes, but had 11"));
        drop(log);
        LogFile::open(path.clone(), false).unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"");
    }

    #[test]
    fn two_sinks_cannot_share_a_file() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("a.jsonl");
        let _first = LogFile::open(path.clone(), false).unwrap();
        let error = LogFile::open(path, false).unwrap_err();
        assert!(error.to_string().contains("another sink writes this file"), "{error}");
    }

    #[test]
    fn a_file_name_stays_in_the_run_directory() {
        assert_eq!(check_file_name("metrics.jsonl"), None);
        for wrong in ["", "..", "a/b", "/a", "a/"] {
            assert!(check_file_name(wrong).is_some(), "{wrong}");
        }
    }

    #[test]
    fn each_node_writes_a_place_of_its_own() {
        let complaint = |sinks: &str| {
            let text = format!(
                "version: 1\nrun: {{steps: 1}}\nnodes:
  prompts: {{op: prompt_source, with: {{path: a, tokenizer: m, batch_size: 1}}}}
  batches: {{op: batcher, in: prompts.pairs, with: {{batch_size: 1, max_length: 8}}}}
  learner: {{op: preference_learner, in: batches, with: {{model: m, objective: orpo, learning_rate: 1.0}}}}
{sinks}"
            );
            let found = sapo_flow_engine::pipeline::parse_str("p.yaml", &text, &[], &crate::registry()).err();
            found.map_or_else(String::new, |found| {
                found.list.iter().map(|found| format!("{}: {}\n", found.line, found.message)).collect()
            })
        };
        let sink =
            |name: &str, with: &str| format!("  {name}: {{op: metrics_sink, in: learner.metrics, with: {{{with}}}}}\n");
        let model = "  model: {op: checkpoint, in: learner.weights}\n";
        let samples = "  samples: {op: sample_sink, in: prompts.pairs, with: {tokenizer: m, file: model}}\n";
        assert_eq!(complaint(&[&sink("metrics", "file: models"), model, &sink("more", "file: more")].concat()), "");
        assert_eq!(
            complaint(&[&sink("metrics", "file: model"), model].concat()),
            "8: `metrics` and `model` both write `model` of the run directory\n"
        );
        assert_eq!(
            complaint(&[model, samples].concat()),
            "8: `model` and `samples` both write `model` of the run directory\n"
        );
        assert_eq!(
            complaint(&[sink("metrics", ""), sink("more", "every: 2")].concat()),
            "8: `metrics` and `more` both write `metrics.jsonl` of the run directory\n"
        );
        assert_eq!(
            complaint(&[sink("metrics", ""), sink("more", "file: metrics.txt")].concat()),
            "8: `metrics` and `more` both write `tensorboard/metrics` of the run directory\n"
        );
    }

    #[test]
    fn names_that_the_run_itself_uses_are_left_to_it() {
        for wrong in ["pipeline.yaml", ".lock", "manifest.writing", "learner-failed-at-step-3.json", "tensorboard"] {
            assert!(check_file_name(wrong).is_some(), "{wrong}");
        }
        assert!(check_folder_name("checkpoints").is_some());
        assert!(check_folder_name("checkpoints/model").is_some());
        assert_eq!(check_folder_name("model/checkpoints"), None);
    }
}

//! The run directory: made for a fresh run, found for a resumed one, never overwritten.

use std::fs;
use std::io::{ErrorKind, Write};
use std::path::{Path, PathBuf};

use anyhow::{Context, bail};
use chrono::Utc;
use sapo_flow_engine::Graph;

use super::lock;

/// The resolved pipeline in a run directory.
pub const PIPELINE: &str = "pipeline.yaml";

/// What the first line of a stored pipeline ends with.
const HEADER: &str = " with every parameter filled in, as sapo-flow ran it.";

/// What may lie in the directory of a run that has no manifest yet.
const BEGINNING: [&str; 4] = [lock::FILE, PIPELINE, "pipeline.writing", "manifest.writing"];

/// Held-out evaluations in a run directory.
pub const EVALUATIONS: &str = "evaluations.json";

/// Make a directory named after pipeline and time under the one that the pipeline's `run` block names.
pub fn create(graph: &Graph, pipeline: &Path) -> anyhow::Result<PathBuf> {
    create_named(Path::new(&graph.run.directory), &stem(pipeline))
}

/// Make a directory of that name with the time behind it.
pub fn create_named(parent: &Path, name: &str) -> anyhow::Result<PathBuf> {
    fs::create_dir_all(parent).with_context(|| format!("cannot make the directory {}", parent.display()))?;
    let name = format!("{name}-{}", Utc::now().format("%Y%m%dT%H%M%SZ"));
    // Runs that begin within the same second get numbers.
    for number in 1.. {
        let directory = parent.join(if number == 1 { name.clone() } else { format!("{name}-{number}") });
        match fs::create_dir(&directory) {
            Ok(()) => return Ok(directory),
            Err(error) if error.kind() == ErrorKind::AlreadyExists => continue,
            Err(error) => return Err(error).with_context(|| format!("cannot make {}", directory.display())),
        }
    }
    bail!("{} is full of runs of this second", parent.display())
}

/// Make a directory that the user named, or take it if it is empty.
pub fn create_at(directory: &Path) -> anyhow::Result<PathBuf> {
    fs::create_dir_all(directory).with_context(|| format!("cannot make {}", directory.display()))?;
    if !is_free(directory).with_context(|| format!("cannot read {}", directory.display()))? {
        bail!(
            "the run directory {} is not empty: name another one, or go on with its run by `--resume {}`",
            directory.display(),
            directory.display()
        );
    }
    Ok(directory.to_owned())
}

/// Whether a directory is empty, or holds no more than a run does that was killed before it wrote its manifest.
fn is_free(directory: &Path) -> std::io::Result<bool> {
    let names: Vec<_> = fs::read_dir(directory)?.map(|entry| Ok(entry?.file_name())).collect::<std::io::Result<_>>()?;
    let has_begun = || -> std::io::Result<bool> {
        let text = match fs::read(directory.join(PIPELINE)) {
            Ok(text) => text,
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(true),
            Err(error) => return Err(error),
        };
        // A pipeline that people keep there has not our header.
        Ok(String::from_utf8_lossy(&text).lines().next().is_none_or(|header| header.ends_with(HEADER)))
    };
    Ok(names.is_empty()
        || (names.iter().any(|name| name == lock::FILE)
            && names.iter().all(|name| BEGINNING.iter().any(|file| name == file))
            && has_begun()?))
}

/// The directory and those around it that are not there, the innermost first.
pub fn absent(directory: &Path) -> Vec<PathBuf> {
    let around = directory.ancestors().filter(|path| !path.as_os_str().is_empty());
    around.take_while(|path| !path.exists()).map(Path::to_owned).collect()
}

/// Remove what is written before a run has a manifest, and the lock. What cannot be removed stays.
pub fn clear_beginning(directory: &Path) {
    for file in BEGINNING {
        let _ = fs::remove_file(directory.join(file));
    }
}

/// The directory of a pipeline's latest run.
pub fn latest(graph: &Graph, pipeline: &Path) -> anyhow::Result<PathBuf> {
    let parent = Path::new(&graph.run.directory);
    let prefix = format!("{}-", stem(pipeline));
    let mut names: Vec<String> = match fs::read_dir(parent) {
        Ok(entries) => entries.filter_map(|entry| entry.ok()?.file_name().into_string().ok()).collect(),
        Err(error) if error.kind() == ErrorKind::NotFound => Vec::new(),
        Err(error) => return Err(error).with_context(|| format!("cannot read {}", parent.display())),
    };
    names.retain(|name| name.strip_prefix(&prefix).is_some_and(begins_with_time));
    names.sort();
    match names.pop() {
        Some(name) => Ok(parent.join(name)),
        None => bail!("there is no run of `{}` in {} to resume", stem(pipeline), parent.display()),
    }
}

/// Write the resolved pipeline.
pub fn write_pipeline(directory: &Path, graph: &Graph, pipeline: &Path) -> anyhow::Result<()> {
    let yaml = serde_yaml::to_string(&graph.resolved)?;
    let header = format!("# {}{HEADER}\n", pipeline.display());
    write_whole(&directory.join(PIPELINE), &format!("{header}{yaml}"))
}

/// Remove what a run that begins anew would otherwise go on from, or leave beside its own results: evaluations, and the
/// pairs of failed updates. The operators' own files begin anew by themselves.
pub fn clear_results(directory: &Path) -> anyhow::Result<()> {
    let clear = || -> std::io::Result<()> {
        for entry in fs::read_dir(directory)? {
            let entry = entry?;
            let name = entry.file_name().to_string_lossy().into_owned();
            if name == EVALUATIONS || (name.contains("-failed-at-step-") && name.ends_with(".json")) {
                fs::remove_file(entry.path())?;
            }
        }
        Ok(())
    };
    clear().with_context(|| format!("cannot clear {}", directory.display()))
}

/// Write a file so that it is there whole or not at all.
pub fn write_whole(path: &Path, text: &str) -> anyhow::Result<()> {
    let temporary = temporary(path);
    let written = fs::File::create(&temporary).and_then(|mut file| {
        file.write_all(text.as_bytes())?;
        file.sync_all()?;
        fs::rename(&temporary, path)
    });
    written.with_context(|| format!("cannot write {}", path.display()))
}

/// Where a file lies until it is whole.
pub fn temporary(path: &Path) -> PathBuf {
    path.with_extension("writing")
}

/// The pipeline's name: that of its file, without the extension.
pub fn stem(pipeline: &Path) -> String {
    pipeline.file_stem().map_or_else(|| "pipeline".to_owned(), |stem| stem.to_string_lossy().into_owned())
}

/// `20250131T235959Z`, perhaps with something behind it.
fn begins_with_time(text: &str) -> bool {
    let bytes = text.as_bytes();
    let digits = |range: std::ops::Range<usize>| bytes[range].iter().all(u8::is_ascii_digit);
    bytes.len() >= 16 && digits(0..8) && bytes[8] == b'T' && digits(9..15) && bytes[15] == b'Z'
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_run_is_known_by_its_time() {
        assert!(begins_with_time("20250131T235959Z"));
        assert!(begins_with_time("20250131T235959Z-2"));
        assert!(!begins_with_time("long-20250131T235959Z"));
        assert!(!begins_with_time("2025"));
    }
}

//! The recording of a watched data set: which rows came and went at which steps, with their text, so that a run can be
//! repeated exactly.
//!
//! A JSON line for each step at which something changed; the first one, of step 0, holds the rows that the run began with.

use std::fs::{self, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};

use sapo_flow_engine::runtime::disk::{sync_directory, write_synced};
use serde::{Deserialize, Serialize};

use crate::Error;

/// Where a row stands, or stood.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Place {
    /// The row's number, which no other row of the run has.
    pub row: u64,
    /// The file.
    pub file: PathBuf,
    /// Its line, from 1.
    pub line: u64,
}

/// A row that came.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Added {
    /// Where.
    #[serde(flatten)]
    pub place: Place,
    /// The line as it stood in the file.
    pub text: String,
}

/// What changed at a step.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Edit {
    /// The step at which it took effect.
    pub step: u64,
    /// Rows that went.
    pub removed: Vec<Place>,
    /// Rows that came, in the order in which they are to be read.
    pub added: Vec<Added>,
}

impl Edit {
    /// Whether it changes nothing.
    pub fn is_empty(&self) -> bool {
        self.removed.is_empty() && self.added.is_empty()
    }

    /// As a line of the recording.
    pub fn to_line(&self) -> Result<String, Error> {
        let text = serde_json::to_string(self).map_err(|error| Error::Data(error.to_string()))?;
        Ok(text + "\n")
    }
}

/// The edits of a recording, and the bytes they take. A last line without an end was being written when its run was
/// killed, before it had any effect: it is left out.
///
/// # Errors
/// When the file cannot be read, or a line is none of a recording.
pub fn read(path: &Path) -> Result<(Vec<Edit>, String), Error> {
    let text = fs::read_to_string(path).map_err(Error::io(path))?;
    let whole = text.rfind('\n').map_or("", |end| &text[..=end]);
    let mut edits: Vec<Edit> = Vec::new();
    for (number, line) in (1..).zip(whole.lines()) {
        let edit: Edit = serde_json::from_str(line)
            .map_err(|error| Error::Data(format!("{}:{number}: not a recorded edit: {error}", path.display())))?;
        if edits.last().is_some_and(|last| last.step >= edit.step) {
            let message = format!("{}:{number}: its step {} is not above the one before", path.display(), edit.step);
            return Err(Error::Data(message));
        }
        edits.push(edit);
    }
    if edits.first().is_none_or(|first| first.step != 0) {
        let message = format!("{}: not a recording: expected a line of step 0, with the first rows", path.display());
        return Err(Error::Data(message));
    }
    let whole = whole.to_owned();
    Ok((edits, whole))
}

/// Begin a recording with this text, on disk before this returns. It takes the place of one that is there in one go: a
/// run that is killed meanwhile finds one or the other whole.
///
/// # Errors
/// When it cannot be written.
pub fn write(path: &Path, text: &str) -> Result<(), Error> {
    let folder = path.parent().unwrap_or(Path::new(""));
    fs::create_dir_all(folder).map_err(Error::io(folder))?;
    let writing = path.with_extension("writing");
    let written = write_synced(&writing, text.as_bytes()).and_then(|()| fs::rename(&writing, path));
    written.map_err(Error::io(path))?;
    sync_directory(folder).map_err(Error::io(folder))
}

/// Cut off the last line where it has no end: only the first `bytes` bytes are whole lines.
///
/// # Errors
/// When it cannot be written.
pub fn cut(path: &Path, bytes: u64) -> Result<(), Error> {
    let cut = || {
        let file = OpenOptions::new().write(true).open(path)?;
        if file.metadata()?.len() > bytes {
            file.set_len(bytes)?;
            file.sync_all()?;
        }
        Ok(())
    };
    cut().map_err(Error::io(path))
}

/// Add an edit, on disk before this returns.
///
/// # Errors
/// When it cannot be written.
pub fn append(path: &Path, edit: &Edit) -> Result<(), Error> {
    let line = edit.to_line()?;
    let file = OpenOptions::new().append(true).open(path);
    let written = file.and_then(|mut file| file.write_all(line.as_bytes()).and_then(|()| file.sync_data()));
    written.map_err(Error::io(path))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::Harness;

    /// Whoever has the old one open goes on reading it, as does whoever looks after a kill: its bytes are never cut.
    #[test]
    fn a_recording_is_replaced_in_one_go() {
        let harness = Harness::new();
        let path = harness.path("edits/rows.jsonl");
        write(&path, "old\n").unwrap();
        let old = fs::File::open(&path).unwrap();
        write(&path, "new\n").unwrap();
        assert_eq!(std::io::read_to_string(old).unwrap(), "old\n");
        assert_eq!(fs::read_to_string(&path).unwrap(), "new\n");
        assert_eq!(fs::read_dir(harness.path("edits")).unwrap().count(), 1);
    }
}

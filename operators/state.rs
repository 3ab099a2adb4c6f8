//! What operators put into a checkpoint besides tensors: JSON files, read back with the path in every error.

use std::fs;
use std::path::Path;

use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::Error;

/// Write `state` to `directory/file`.
pub fn write(directory: &Path, file: &str, state: &impl Serialize) -> Result<(), Error> {
    let path = directory.join(file);
    let text =
        serde_json::to_vec_pretty(state).map_err(|error| Error::Restore(format!("{}: {error}", path.display())))?;
    fs::write(&path, text).map_err(Error::io(&path))
}

/// Read what [`write()`] wrote.
pub fn read<S: DeserializeOwned>(directory: &Path, file: &str) -> Result<S, Error> {
    let path = directory.join(file);
    let text = fs::read(&path).map_err(Error::io(&path))?;
    serde_json::from_slice(&text).map_err(|error| Error::Restore(format!("{}: {error}", path.display())))
}

//! Where the golden data lies: `tests/golden` of the repository, or the folder that GOLDEN_DIR names.

use std::path::PathBuf;

/// A file or folder of the golden data.
pub fn path(name: &str) -> PathBuf {
    let folder = match std::env::var_os("GOLDEN_DIR") {
        Some(folder) => PathBuf::from(folder),
        None => PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden"),
    };
    folder.join(name)
}

/// A JSON file of the golden data.
pub fn json(name: &str) -> serde_json::Value {
    let path = path(name);
    let text = std::fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    serde_json::from_str(&text).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

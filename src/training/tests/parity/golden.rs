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

/// A list of numbers.
pub fn floats(value: &serde_json::Value) -> Vec<f64> {
    let list = value.as_array().unwrap_or_else(|| panic!("expected a list of numbers, found {value}"));
    list.iter().map(|number| number.as_f64().unwrap_or_else(|| panic!("expected a number, found {number}"))).collect()
}

/// Fail unless all numbers agree within `tolerance`, relative to the expected value where that is above 1.
#[track_caller]
pub fn assert_close(what: &str, found: &[f64], expected: &[f64], tolerance: f64) {
    assert_eq!(found.len(), expected.len(), "{what}: number of values");
    for (index, (found, expected)) in found.iter().zip(expected).enumerate() {
        let bound = tolerance * expected.abs().max(1.0);
        assert!((found - expected).abs() <= bound, "{what}, value {index}: expected {expected}, found {found}");
    }
}

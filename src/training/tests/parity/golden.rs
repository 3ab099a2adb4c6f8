//! Where the golden data lies: `tests/golden` of the repository, or the folder that GOLDEN_DIR names.

use std::path::{Path, PathBuf};

use tch::Tensor;

/// A file or folder of the golden data.
pub fn path(name: impl AsRef<Path>) -> PathBuf {
    let folder = match std::env::var_os("GOLDEN_DIR") {
        Some(folder) => PathBuf::from(folder),
        None => PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden"),
    };
    folder.join(name)
}

/// A JSON file of the golden data.
pub fn json(name: impl AsRef<Path>) -> serde_json::Value {
    let path = path(name);
    let text = std::fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    serde_json::from_str(&text).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

/// The cases of a JSON file: at least so many in the repository's own, and one elsewhere.
pub fn cases(name: &str, count: usize) -> Vec<serde_json::Value> {
    let cases = json(name).as_array().unwrap_or_else(|| panic!("{name}: expected a list of cases")).clone();
    let elsewhere = std::env::var_os("GOLDEN_DIR").is_some();
    assert!(cases.len() >= count || elsewhere && !cases.is_empty(), "{name}: {} cases", cases.len());
    cases
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

/// The directories of the golden models, in the order of their names; there is at least one.
pub fn models() -> Vec<PathBuf> {
    let entries = std::fs::read_dir(path("models")).expect("golden data has a folder of models");
    let mut models: Vec<PathBuf> = entries.map(|entry| entry.expect("a readable folder").path()).collect();
    models.sort();
    assert!(!models.is_empty(), "golden data has models");
    models
}

/// A list of token ids.
pub fn tokens(value: &serde_json::Value) -> Vec<u32> {
    serde_json::from_value(value.clone()).unwrap_or_else(|error| panic!("expected token ids, found {value}: {error}"))
}

/// The largest absolute difference between two tensors of one shape.
pub fn largest_difference(left: &Tensor, right: &Tensor) -> f64 {
    assert_eq!(left.size(), right.size());
    (left - right).abs().max().double_value(&[])
}

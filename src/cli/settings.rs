//! Pipelines' settings by dotted key, and where two pipelines differ.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;

use anyhow::Context;
use serde_json::Value;

use super::directory::PIPELINE;

/// Values by dotted key, such as `nodes.learner.with.learning_rate`.
pub type Settings = BTreeMap<String, Value>;

/// The settings of the pipeline that a run directory stores.
pub fn stored(run_directory: &Path) -> anyhow::Result<Settings> {
    let path = run_directory.join(PIPELINE);
    let text = fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))?;
    from_yaml(&text).with_context(|| path.display().to_string())
}

/// The settings of a resolved pipeline, as they are once stored and read again.
pub fn of(resolved: &serde_yaml::Value) -> anyhow::Result<Settings> {
    from_yaml(&serde_yaml::to_string(resolved)?)
}

/// What is not the same in both, with the value in each.
pub fn differences(first: &Settings, second: &Settings) -> Vec<(String, [Option<Value>; 2])> {
    let names: BTreeSet<&String> = first.keys().chain(second.keys()).collect();
    names
        .into_iter()
        .map(|name| (name.clone(), [first.get(name).cloned(), second.get(name).cloned()]))
        .filter(|(_, [a, b])| a != b)
        .collect()
}

fn from_yaml(text: &str) -> anyhow::Result<Settings> {
    let mut found = BTreeMap::new();
    flatten(String::new(), &serde_yaml::from_str(text)?, &mut found);
    Ok(found)
}

fn flatten(name: String, value: &Value, found: &mut Settings) {
    match value {
        Value::Object(entries) if !entries.is_empty() => {
            for (key, value) in entries {
                flatten(if name.is_empty() { key.clone() } else { format!("{name}.{key}") }, value, found);
            }
        }
        value => {
            found.insert(name, value.clone());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_differs_is_named_by_its_place() {
        let first = from_yaml("{run: {seed: 1}, nodes: {a: {with: {x: 1.0, only: [1]}}}}").unwrap();
        let second = from_yaml("{run: {seed: 2}, nodes: {a: {with: {x: 1.0}}}}").unwrap();
        let found: Vec<String> = differences(&first, &second).into_iter().map(|(name, _)| name).collect();
        assert_eq!(found, ["nodes.a.with.only", "run.seed"]);
        assert_eq!(differences(&first, &first), []);
    }
}

//! What config.json may say of rotary embeddings: nothing of it is ignored.

use sapo_flow_training::model::ModelConfig;
use sapo_flow_training::model::rope::{RopeConfig, RopeScaling};
use serde_json::{Value, json};

use crate::directories::{configure, copy};

/// A golden model's embeddings with these keys in its config.json, and without those that are null here.
fn rope(keys: &Value) -> Result<RopeConfig, String> {
    let directory = copy();
    for key in ["rope_theta", "rope_scaling", "rope_parameters"] {
        configure(directory.path(), key, Value::Null);
    }
    for (key, value) in keys.as_object().unwrap() {
        configure(directory.path(), key, value.clone());
    }
    ModelConfig::load(directory.path()).map(|config| config.rope).map_err(|error| error.to_string())
}

#[test]
fn what_models_have_is_read() {
    for (keys, theta) in [
        (json!({}), 10_000.0),
        (json!({"rope_theta": 500}), 500.0),
        (json!({"rope_scaling": {"rope_type": "default"}}), 10_000.0),
        (json!({"rope_parameters": {"rope_theta": 500.0}}), 500.0),
        (json!({"rope_parameters": {"rope_theta": 500.0, "rope_type": "default"}, "rope_theta": 500.0}), 500.0),
    ] {
        let found = rope(&keys).unwrap();
        assert_eq!((found.theta, found.scaling), (theta, RopeScaling::Default), "{keys}");
    }
    // `configure` would remove the key.
    let directory = copy();
    let path = directory.path().join("config.json");
    let mut config: Value = serde_json::from_str(&std::fs::read_to_string(&path).unwrap()).unwrap();
    config["rope_scaling"] = Value::Null;
    std::fs::write(&path, config.to_string()).unwrap();
    assert_eq!(ModelConfig::load(directory.path()).unwrap().rope.scaling, RopeScaling::Default);

    let found = rope(&json!({"rope_scaling": {"type": "linear", "factor": 2}})).unwrap();
    assert_eq!(found.scaling, RopeScaling::Linear { factor: 2.0 });
    let both = json!({"rope_scaling": {"type": "linear", "factor": 2}, "rope_parameters": {"rope_theta": 500.0}});
    assert_eq!(rope(&both).unwrap().theta, 500.0);
}

#[test]
fn what_would_be_ignored_is_refused() {
    let llama3 = |low: f64, high: f64| {
        json!({"rope_scaling": {
            "rope_type": "llama3", "factor": 8.0, "low_freq_factor": low, "high_freq_factor": high,
            "original_max_position_embeddings": 64,
        }})
    };
    rope(&llama3(1.0, 4.0)).unwrap();
    for (keys, expected) in [
        (json!({"rope_scaling": "linear"}), "`rope_scaling`: expected a mapping or null, found \"linear\""),
        (json!({"rope_parameters": [2]}), "`rope_parameters`: expected a mapping or null, found [2]"),
        (json!({"rope_scaling": {"factor": 2.0}}), "`rope_scaling`: expected a `rope_type`, found only factor"),
        (
            json!({"rope_scaling": {"type": "linear", "factor": 0.0}}),
            "`factor`: expected a number above 0, within float32, found 0.0",
        ),
        (
            json!({"rope_scaling": {"type": "dynamic", "factor": -2}}),
            "`factor`: expected a number above 0, within float32, found -2.0",
        ),
        (
            json!({"rope_scaling": {"type": "yarn", "factor": 1e39}}),
            "`factor`: expected a number above 0, within float32, found 1e39",
        ),
        (llama3(4.0, 4.0), "`high_freq_factor`: expected more than low_freq_factor, 4.0, found 4.0"),
        (llama3(0.0, 4.0), "`low_freq_factor`: expected a number above 0, within float32, found 0.0"),
        (
            json!({"rope_theta": 100.0, "rope_parameters": {"rope_theta": 500.0}}),
            "`rope_parameters.rope_theta`: expected 100.0 as in `rope_theta`, found 500.0",
        ),
        (json!({"rope_theta": 1e39}), "`rope_theta`: expected a number above 0, within float32, found 1e39"),
    ] {
        let message = rope(&keys).expect_err(&keys.to_string());
        assert!(message.contains("config.json: ") && message.contains(expected), "{message}");
    }
}

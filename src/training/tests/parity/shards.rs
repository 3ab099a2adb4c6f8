//! Weights in several files with an index, and weights of the wrong type.

use std::collections::BTreeMap;
use std::path::Path;

use sapo_flow_training::parameters::ParameterSet;
use serde_json::json;
use tch::Kind;

use crate::directories::{assert_same, copy, load};

const NORM: &str = "model.norm.weight";
type WeightMap = BTreeMap<String, String>;

fn file(part: usize) -> String {
    format!("model-0000{}-of-00003.safetensors", part + 1)
}

/// Divides a copy's weights among three files; their index is what `spoil` makes of the right one.
fn divide(directory: &Path, spoil: impl FnOnce(&mut WeightMap)) -> ParameterSet {
    let whole = load(directory).unwrap().parameters;
    std::fs::remove_file(directory.join("model.safetensors")).unwrap();
    let mut weight_map = WeightMap::new();
    for part in 0..3 {
        let names = whole.iter().enumerate().filter(|(index, _)| index % 3 == part);
        let tensors: ParameterSet = names.map(|(_, (name, tensor))| (name.into(), tensor.shallow_clone())).collect();
        weight_map.extend(tensors.names().map(|name| (name.to_owned(), file(part))));
        tensors.write(&directory.join(file(part)), None).unwrap();
    }
    spoil(&mut weight_map);
    let index = json!({"metadata": {"total_size": 0}, "weight_map": weight_map});
    std::fs::write(directory.join("model.safetensors.index.json"), index.to_string()).unwrap();
    whole
}

#[test]
fn weights_in_several_files() {
    let directory = copy();
    let whole = divide(directory.path(), |_| {});
    assert_same(&load(directory.path()).unwrap().parameters, &whole);
}

#[test]
fn what_an_index_says_of_absent_rope_frequencies_is_not_asked_for() {
    let directory = copy();
    let name = "model.layers.0.self_attn.rotary_emb.inv_freq";
    let whole = divide(directory.path(), |map| drop(map.insert(name.into(), file(0))));
    assert_same(&load(directory.path()).unwrap().parameters, &whole);
}

#[test]
fn an_index_that_does_not_fit_its_files_is_refused() {
    let directory = copy();
    let mut own = String::new();
    divide(directory.path(), |map| own = map.remove(NORM).unwrap());
    let message = load(directory.path()).unwrap_err().to_string();
    let expected = format!("index.json: `weight_map.{NORM}`: expected {own}, which has it, found nothing");
    assert!(message.contains(&expected), "{message}");

    let directory = copy();
    let other = (0..3).map(file).find(|file| *file != own).unwrap();
    divide(directory.path(), |map| drop(map.insert(NORM.into(), other.clone())));
    let message = load(directory.path()).unwrap_err().to_string();
    let expected = format!("index.json: `weight_map.{NORM}`: expected {own}, which has it, found {other}");
    assert!(message.contains(&expected), "{message}");

    let directory = copy();
    divide(directory.path(), |_| {});
    let path = directory.path().join(&other);
    let shard = ParameterSet::read(&path, tch::Device::Cpu).unwrap();
    let second = (NORM.to_owned(), shard.iter().next().unwrap().1.shallow_clone());
    let more: ParameterSet =
        shard.iter().map(|(name, tensor)| (name.into(), tensor.shallow_clone())).chain([second]).collect();
    more.write(&path, None).unwrap();
    let message = load(directory.path()).unwrap_err().to_string();
    assert!(message.contains(&format!("tensor `{NORM}`: expected in one file, found in ")), "{message}");
}

#[test]
fn weights_of_integers_are_refused() {
    let directory = copy();
    let whole = load(directory.path()).unwrap().parameters;
    let path = directory.path().join("model.safetensors");
    let spoil = |(name, tensor): (&str, &tch::Tensor)| {
        let kind = if name == NORM { Kind::Int64 } else { Kind::Float };
        (name.to_owned(), tensor.to_kind(kind))
    };
    whole.iter().map(spoil).collect::<ParameterSet>().write(&path, None).unwrap();
    let message = load(directory.path()).unwrap_err().to_string();
    let expected = format!("model.safetensors: tensor `{NORM}`: expected dtype F32, BF16, F16 or F64, found I64");
    assert!(message.contains(&expected), "{message}");
}

//! A scaffold as text: its nodes with the settings of their operators' examples, and parameters for what these share.

use std::path::PathBuf;

use serde_yaml::{Mapping, Value};

use super::scaffold::{Draft, Node, Wire};
use crate::operator::{Connections, OperatorSpec, Source};

impl Draft<'_> {
    /// The pipeline as YAML.
    pub fn to_text(&self) -> Result<String, serde_yaml::Error> {
        let mut params = Mapping::new();
        let mut settings: Vec<Option<Value>> =
            self.nodes.iter().map(|node| self.settings(node)).collect::<Result<_, _>>()?;
        share_model(&mut settings, &mut params);
        self.share_data(&mut settings, &mut params);
        self.part_files(&mut settings);
        let mut nodes = Mapping::new();
        for (node, with) in self.nodes.iter().zip(settings) {
            let mut entry = Mapping::new();
            entry.insert("op".into(), node.spec.name.into());
            if !node.wires.is_empty() {
                entry.insert("in".into(), Value::Mapping(inputs(node)));
            }
            if let Some(with) = with {
                entry.insert("with".into(), with);
            }
            nodes.insert(node.name.as_str().into(), Value::Mapping(entry));
        }
        let part = |key: &str, value: Mapping| serde_yaml::to_string(&Mapping::from_iter([(key.into(), value.into())]));
        let params = if params.is_empty() { String::new() } else { part("params", params)? + "\n" };
        let nodes: String = part("nodes", nodes)?;
        Ok(format!(
            "# Settings are those of the operators' examples: set paths and sizes to yours, then `sapo-flow validate FILE`.\n\
             version: 1\n\n{params}run:\n  seed: 42\n  steps: 100\n\n{nodes}"
        ))
    }

    /// Make what sources read parameters: `data`, and a number for each source more.
    fn share_data(&self, settings: &mut [Option<Value>], params: &mut Mapping) {
        let sources = self.nodes.iter().zip(settings).filter(|(node, _)| node.spec.inputs.is_empty());
        let paths = sources.filter_map(|(_, with)| with.as_mut()?.get_mut("path")).filter(|path| path.is_string());
        for (index, path) in paths.enumerate() {
            let name = if index == 0 { "data".to_owned() } else { format!("data_{}", index + 1) };
            params.insert(name.as_str().into(), std::mem::replace(path, format!("${{{name}}}").into()));
        }
    }

    /// Give a sink that would write another one's file its own, named after the node.
    fn part_files(&self, settings: &mut [Option<Value>]) {
        let mut taken: Vec<PathBuf> = Vec::new();
        for (node, with) in self.nodes.iter().zip(settings) {
            let writes = |with: &Option<Value>| (node.spec.writes)(with.as_ref().unwrap_or(&Value::Null), &node.name);
            if writes(with).iter().any(|path| taken.contains(path))
                && let Value::Mapping(with) = with.get_or_insert_with(|| Mapping::new().into())
            {
                with.insert("file".into(), format!("{}.jsonl", node.name).into());
            }
            taken.extend(writes(with));
        }
    }

    /// The settings of a node in its operator's own example; or where these do not go with what the node reads, those
    /// in the example of that.
    fn settings(&self, node: &Node) -> Result<Option<Value>, serde_yaml::Error> {
        let own = example_settings(&node.spec, node.spec.example)?;
        let mut connections = Connections::default();
        let mut examples = Vec::new();
        for wire in &node.wires {
            let from = &self.nodes[self.position(&wire.from)];
            let output = from.spec.outputs.iter().find(|output| output.name == wire.output);
            let carried = output.map_or_else(Vec::new, |output| self.carried(from, output));
            connections.inputs.extend(carried.into_iter().map(|kind| (wire.input, kind)));
            connections.sources.push(Source { input: wire.input, node: from.name.clone(), op: from.spec.name });
            examples.push(from.spec.example);
        }
        let fits = |with: &Value| (node.spec.check_connections)(with, &connections).is_empty();
        if own.as_ref().is_none_or(fits) {
            return Ok(own);
        }
        for example in examples {
            if let Some(with) = example_settings(&node.spec, example)?.filter(fits) {
                return Ok(Some(with));
            }
        }
        Ok(own)
    }
}

/// Make the model, and the tokenizer that is the model's, one parameter.
fn share_model(settings: &mut [Option<Value>], params: &mut Mapping) {
    let named = |key: &str| settings.iter().flatten().find_map(|with| with.get(key).filter(|value| value.is_string()));
    let Some(model) = named("model").or_else(|| named("tokenizer")).cloned() else { return };
    params.insert("model".into(), model);
    for with in settings.iter_mut().flatten() {
        for key in ["model", "tokenizer"] {
            if let Some(value) = with.get_mut(key).filter(|value| value.is_string()) {
                *value = "${model}".into();
            }
        }
    }
}

fn inputs(node: &Node) -> Mapping {
    let mut inputs = Mapping::new();
    for input in node.spec.inputs {
        let mut sources: Vec<Value> =
            node.wires.iter().filter(|wire| wire.input == input.name).map(|wire| wire.to_value()).collect();
        match sources.len() {
            0 => {}
            1 => {
                inputs.insert(input.name.into(), sources.remove(0));
            }
            _ => {
                inputs.insert(input.name.into(), Value::Sequence(sources));
            }
        }
    }
    inputs
}

impl Wire {
    fn to_value(&self) -> Value {
        let from = Value::String(format!("{}.{}", self.from, self.output));
        if !self.feedback {
            return from;
        }
        let feedback = Mapping::from_iter([("max_staleness".into(), 0.into())]);
        Value::Mapping(Mapping::from_iter([("from".into(), from), ("feedback".into(), Value::Mapping(feedback))]))
    }
}

/// The settings of an operator's node in an example.
pub(crate) fn example_settings(spec: &OperatorSpec, example: &str) -> Result<Option<Value>, serde_yaml::Error> {
    let example: Mapping = serde_yaml::from_str(example)?;
    let node = example.values().find(|node| node["op"] == spec.name);
    Ok(node.and_then(|node| node.get("with")).cloned())
}

//! The JSON Schema of pipelines, with which editors complete and check as one types (yaml-language-server).
//!
//! Made from the same registry that validation reads. It says less than validation does: that references name what is
//! there, and that edges carry what their ends expect, no schema can say.

use serde_json::{Map, Value as Json, json};

use crate::graph::{Feedback, RunSettings};
use crate::operator::{OperatorSpec, PortSpec, Registry};

const IDENTIFIER: &str = "[A-Za-z_][A-Za-z0-9_]*";

/// The JSON Schema (draft 2020-12) of pipelines with these operators.
pub fn json_schema(registry: &Registry) -> Json {
    let mut definitions = Map::new();
    let run = schemars::SchemaGenerator::default().into_root_schema_for::<RunSettings>().to_value();
    definitions.insert("run".to_owned(), embedded(run, "run"));
    definitions.insert("source".to_owned(), source());
    definitions.insert("parameter".to_owned(), parameter());
    definitions.insert("nodes".to_owned(), nodes(registry));
    definitions.insert("composite".to_owned(), composite());
    for spec in registry.iter() {
        let name = format!("with_{}", spec.name);
        definitions.insert(name.clone(), embedded((spec.config_schema)().to_value(), &name));
    }
    json!({
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "sapo-flow pipeline",
        "type": "object",
        "additionalProperties": false,
        "required": ["version"],
        // A pipeline runs; a file that is included only defines.
        "anyOf": [{"required": ["run", "nodes"]}, {"required": ["operators"]}, {"required": ["include"]}],
        "properties": {
            "version": {"const": 1, "description": "Version of the language."},
            "include": {
                "description": "Files with composite operators, relative to this one.",
                "anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}],
            },
            "env": {
                "description": "Environment variables that the pipeline may read, with defaults: `${env.NAME}`.",
                "type": "object",
                "propertyNames": {"pattern": format!("^{IDENTIFIER}$")},
                "additionalProperties": {"type": ["string", "number", "boolean", "null"]},
            },
            "params": {
                "description": "Values that `-S name=value` replaces: `${name}`.",
                "type": "object",
                "propertyNames": {"pattern": format!("^{IDENTIFIER}$")},
                "additionalProperties": {"$ref": "#/$defs/parameter"},
            },
            "operators": {
                "description": "Composite operators, each made of nodes.",
                "type": "object",
                "propertyNames": {"pattern": format!("^{IDENTIFIER}$")},
                "additionalProperties": {"$ref": "#/$defs/composite"},
            },
            "run": {"$ref": "#/$defs/run"},
            "nodes": {"$ref": "#/$defs/nodes"},
            "sweep": sweep(),
            "tests": tests(),
        },
        "$defs": definitions,
    })
}

fn nodes(registry: &Registry) -> Json {
    let names: Vec<&str> = registry.iter().map(|spec| spec.name).collect();
    let branches: Vec<Json> = registry.iter().map(|spec| branch(spec)).collect();
    json!({
        "description": "The nodes by name.",
        "type": "object",
        "minProperties": 1,
        "propertyNames": {"pattern": format!("^{IDENTIFIER}(/{IDENTIFIER})*$")},
        "additionalProperties": {
            "type": "object",
            "additionalProperties": false,
            "required": ["op"],
            "properties": {
                "op": {
                    "description": "The operator: a built-in one, or a composite one by its name.",
                    "anyOf": [{"enum": names}, {"type": "string"}],
                },
                "in": {"description": "What it reads: `node`, `node.port`, or these by input."},
                "with": {"description": "Its settings."},
            },
            "allOf": branches,
        },
    })
}

/// What holds for the nodes with one operator.
fn branch(spec: &OperatorSpec) -> Json {
    let schema = (spec.config_schema)().to_value();
    let needs_settings = schema["required"].as_array().is_some_and(|keys| !keys.is_empty());
    let needs_inputs = spec.inputs.iter().any(|port| port.required);
    let required: Vec<&str> = [("with", needs_settings), ("in", needs_inputs)]
        .iter()
        .filter(|(_, needed)| *needed)
        .map(|(key, _)| *key)
        .collect();
    let with = json!({"$ref": format!("#/$defs/with_{}", spec.name)});
    let with = if needs_settings { with } else { json!({"anyOf": [with, {"type": "null"}]}) };
    json!({
        "if": {"required": ["op"], "properties": {"op": {"const": spec.name}}},
        "then": {
            "description": spec.summary,
            "required": required,
            "properties": {"in": inputs(spec.inputs), "with": with},
        },
    })
}

/// The values of `in` for these ports.
fn inputs(ports: &[PortSpec]) -> Json {
    if ports.is_empty() {
        return json!({"type": "null"});
    }
    let source = json!({"$ref": "#/$defs/source"});
    let value = json!({"anyOf": [source, {"type": "array", "items": source}]});
    let property = |port: &PortSpec| {
        let mut value = value.clone();
        value["description"] = json!(port.doc);
        (port.name.to_owned(), value)
    };
    let properties: Map<String, Json> = ports.iter().map(property).collect();
    let required: Vec<&str> = ports.iter().filter(|port| port.required).map(|port| port.name).collect();
    let by_port =
        json!({"type": "object", "additionalProperties": false, "required": required, "properties": properties});
    let mut forms = vec![by_port];
    // A node with several required inputs cannot leave all but the first out.
    if required.len() <= 1 {
        forms.push(value);
    }
    if required.is_empty() {
        forms.push(json!({"type": "null"}));
    }
    json!({"anyOf": forms})
}

fn source() -> Json {
    let steps = json!({"type": "integer", "minimum": 0, "maximum": Feedback::MAX_STALENESS});
    let staleness = json!({"anyOf": [steps, reference()]});
    json!({
        "anyOf": [
            {"type": "string", "description": "`node` or `node.port`."},
            {
                "type": "object",
                "additionalProperties": false,
                "required": ["from"],
                "properties": {
                    "from": {"type": "string", "description": "`node` or `node.port`."},
                    "feedback": {
                        "description": "Marks the edge that closes a cycle.",
                        "type": "object",
                        "additionalProperties": false,
                        "required": ["max_staleness"],
                        "properties": {"max_staleness": staleness},
                    },
                },
            },
        ],
    })
}

fn parameter() -> Json {
    let kind = json!({"enum": ["integer", "number", "text", "boolean", "list", "mapping"]});
    json!({
        "description": "A default, whose type values must have, or `{default, type, min, max, choices, description}`.",
        "if": {
            "type": "object",
            "anyOf": [
                {"required": ["default"]},
                {"required": ["type"]},
                {"required": ["min"]},
                {"required": ["max"]},
                {"required": ["choices"]},
            ],
        },
        "then": {
            "additionalProperties": false,
            "properties": {
                "default": {},
                "type": {"anyOf": [kind, {"type": "array", "minItems": 1, "items": kind}]},
                "min": {"type": "number"},
                "max": {"type": "number"},
                "choices": {"type": "array", "minItems": 1},
                "description": {"type": "string"},
            },
        },
    })
}

fn composite() -> Json {
    let reference = json!({"type": "string", "description": "`node` or `node.port` of the nodes inside."});
    json!({
        "type": "object",
        "additionalProperties": false,
        "required": ["nodes"],
        "properties": {
            "description": {"type": "string"},
            "params": {"type": "object", "additionalProperties": {"$ref": "#/$defs/parameter"}},
            "inputs": {"type": "object", "additionalProperties": {"type": ["string", "null"]}},
            "outputs": {
                "type": "object",
                "additionalProperties": {"anyOf": [reference, {"type": "array", "items": reference}]},
            },
            "nodes": {"$ref": "#/$defs/nodes"},
        },
    })
}

fn sweep() -> Json {
    json!({
        "description": "Values that parameters take in turn: every combination of `grid`, with every entry of `list`, \
                        with every seed.",
        "type": "object",
        "additionalProperties": false,
        "properties": {
            "grid": {
                "description": "Parameters with lists of values.",
                "type": "object",
                "additionalProperties": {"type": "array", "minItems": 1},
            },
            "list": {
                "description": "Values that belong together, each entry a mapping from parameters.",
                "type": "array",
                "minItems": 1,
                "items": {"type": "object"},
            },
            "seeds": {"type": "array", "minItems": 1, "items": {"type": "integer", "minimum": 0}},
        },
    })
}

fn tests() -> Json {
    let step = json!({"anyOf": [{"type": "null"}, {"type": "object"}, {"type": "array", "items": {"type": "object"}}]});
    let whole = json!({
        "type": "object",
        "additionalProperties": false,
        "properties": {
            "count": {"description": "How many records there are in all: a number, or what holds of it."},
            "each": {"type": "object", "description": "What every record is like."},
            "any": {"type": "object", "description": "What at least one record is like."},
            "no": {"type": "object", "description": "What no record is like."},
        },
    });
    json!({
        "description": "What nodes are to emit for records that are fed to them: `sapo-flow test`.",
        "type": "array",
        "items": {
            "type": "object",
            "additionalProperties": false,
            "required": ["name"],
            "anyOf": [{"required": ["expect"]}, {"required": ["fails"]}],
            "properties": {
                "name": {"type": "string", "description": "What is tested."},
                "params": {"type": "object", "description": "Values for parameters, in this test."},
                "steps": {
                    "description": "Steps to run; as many as are fed or listed, unless given.",
                    "anyOf": [{"type": "integer", "minimum": 1}, reference()],
                },
                "feed": {
                    "description": "Outputs (`node` or `node.port`) with the records to stand for what they emit, a \
                                    step an entry.",
                    "type": "object",
                    "additionalProperties": {"type": "array", "items": step},
                },
                "expect": {
                    "description": "Outputs with what they are to emit: a step an entry, or what holds of all records.",
                    "type": "object",
                    "minProperties": 1,
                    "additionalProperties": {"anyOf": [{"type": "array", "items": step}, whole]},
                },
                "fails": {
                    "description": "The failure that the run is to end with.",
                    "type": "object",
                    "additionalProperties": false,
                    "required": ["node"],
                    "properties": {"node": {"type": "string"}, "step": {}, "message": {}},
                },
            },
        },
    })
}

/// Text with a parameter in it, which may stand for any value.
fn reference() -> Json {
    json!({"type": "string", "pattern": "\\$\\{"})
}

/// A schema of its own as the definition of that name: its references lead there, and where it has a value, a parameter
/// may stand.
fn embedded(mut schema: Json, name: &str) -> Json {
    if let Some(object) = schema.as_object_mut() {
        object.remove("$schema");
        object.remove("title");
    }
    redirect(&mut schema, name);
    admit_references(&mut schema);
    schema
}

fn redirect(schema: &mut Json, name: &str) {
    match schema {
        Json::Object(entries) => {
            for (key, value) in entries {
                match value {
                    Json::String(target) if key == "$ref" => {
                        *target = target.replacen("#/", &format!("#/$defs/{name}/"), 1);
                    }
                    value => redirect(value, name),
                }
            }
        }
        Json::Array(items) => items.iter_mut().for_each(|item| redirect(item, name)),
        _ => {}
    }
}

fn admit_references(schema: &mut Json) {
    match schema {
        Json::Object(entries) => {
            for (key, value) in entries {
                match (key.as_str(), value) {
                    ("properties", Json::Object(properties)) => properties.values_mut().for_each(admit_reference),
                    ("items" | "additionalProperties", value @ Json::Object(_)) => admit_reference(value),
                    ("default" | "enum" | "const" | "examples", _) => {}
                    (_, value) => admit_references(value),
                }
            }
        }
        Json::Array(items) => items.iter_mut().for_each(admit_references),
        _ => {}
    }
}

/// The schema, or text with a parameter in it. What is told about the value stays outside, where editors look for it.
fn admit_reference(schema: &mut Json) {
    admit_references(schema);
    // A constant tells alternatives apart: no parameter can stand there.
    if schema.get("const").is_some() {
        return;
    }
    let told = ["description", "default"].map(|key| (key, schema.get(key).cloned()));
    let mut either = json!({"anyOf": [schema.take(), reference()]});
    for (key, value) in told {
        if let Some(value) = value {
            either[key] = value;
        }
    }
    *schema = either;
}

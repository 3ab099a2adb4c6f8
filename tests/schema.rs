//! The JSON Schema that `sapo-flow schema` prints: it admits the pipelines that ship, and refuses what validation does.

use std::fs;
use std::path::Path;

use sapo_flow_engine::pipeline;
use serde_json::{Value, json};

/// Whether a value is what a schema asks for: the part of JSON Schema that ours is written in.
fn admits(schema: &Value, value: &Value, root: &Value) -> bool {
    let Some(schema) = schema.as_object() else { return schema != &json!(false) };
    schema.iter().all(|(keyword, given)| keyword_holds(keyword, given, schema, value, root))
}

fn keyword_holds(
    keyword: &str,
    given: &Value,
    schema: &serde_json::Map<String, Value>,
    value: &Value,
    root: &Value,
) -> bool {
    let any = |schemas: &Value| schemas.as_array().unwrap().iter().any(|schema| admits(schema, value, root));
    let bound =
        |holds: fn(f64, f64) -> bool| value.as_f64().is_none_or(|number| holds(number, given.as_f64().unwrap()));
    let object = value.as_object();
    match keyword {
        "$ref" => admits(root.pointer(&given.as_str().unwrap()[1..]).expect("it leads somewhere"), value, root),
        "type" => match given {
            Value::Array(kinds) => kinds.iter().any(|kind| has_type(kind.as_str().unwrap(), value)),
            kind => has_type(kind.as_str().unwrap(), value),
        },
        "enum" => given.as_array().unwrap().contains(value),
        "const" => given == value,
        "anyOf" | "oneOf" => any(given),
        "allOf" => given.as_array().unwrap().iter().all(|schema| admits(schema, value, root)),
        "if" => !admits(given, value, root) || admits(&schema["then"], value, root),
        "required" => {
            object.is_none_or(|o| given.as_array().unwrap().iter().all(|k| o.contains_key(k.as_str().unwrap())))
        }
        "properties" => object.is_none_or(|o| o.iter().all(|(k, v)| given.get(k).is_none_or(|s| admits(s, v, root)))),
        "additionalProperties" => object.is_none_or(|object| {
            let known = |key: &str| schema.get("properties").is_some_and(|known| known.get(key).is_some());
            object.iter().filter(|(key, _)| !known(key)).all(|(_, value)| admits(given, value, root))
        }),
        "propertyNames" => object.is_none_or(|o| o.keys().all(|key| !key.contains(' '))),
        "minProperties" => object.is_none_or(|o| o.len() as u64 >= given.as_u64().unwrap()),
        "items" => value.as_array().is_none_or(|items| items.iter().all(|item| admits(given, item, root))),
        "minItems" => value.as_array().is_none_or(|items| items.len() as u64 >= given.as_u64().unwrap()),
        "maxItems" => value.as_array().is_none_or(|items| items.len() as u64 <= given.as_u64().unwrap()),
        "minimum" => bound(|number, bound| number >= bound),
        "maximum" => bound(|number, bound| number <= bound),
        "exclusiveMinimum" => bound(|number, bound| number > bound),
        "exclusiveMaximum" => bound(|number, bound| number < bound),
        "pattern" if given == "\\$\\{" => value.as_str().is_none_or(|text| text.contains("${")),
        "pattern" if given == "^values\\..+" => {
            value.as_str().is_none_or(|text| text.strip_prefix("values.").is_some_and(|name| !name.is_empty()))
        }
        "description" | "default" | "title" | "format" | "then" | "$schema" | "$defs" => true,
        other => panic!("the keyword {other} is not known here"),
    }
}

fn has_type(kind: &str, value: &Value) -> bool {
    match kind {
        "object" => value.is_object(),
        "array" => value.is_array(),
        "string" => value.is_string(),
        "boolean" => value.is_boolean(),
        "null" => value.is_null(),
        "number" => value.is_number(),
        "integer" => value.is_i64() || value.is_u64(),
        other => panic!("the type {other} is not known here"),
    }
}

fn yaml(text: &str) -> Value {
    serde_yaml::from_str(text).expect("it is YAML")
}

fn files() -> Vec<String> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let pipelines = fs::read_dir(root.join("pipelines")).unwrap().map(|entry| entry.unwrap().path());
    let paths = pipelines.chain([root.join("operators/self_augment.yaml")]);
    paths
        .filter(|path| path.extension().is_some_and(|extension| extension == "yaml"))
        .map(|path| fs::read_to_string(path).unwrap())
        .collect()
}

#[test]
fn what_ships_is_admitted() {
    let registry = sapo_flow_operators::registry();
    let schema = pipeline::json_schema(&registry);
    for text in files() {
        assert!(admits(&schema, &yaml(&text), &schema), "{text}");
    }
    for operator in registry.iter() {
        let example = json!({"version": 1, "run": {"steps": 1}, "nodes": yaml(operator.example)});
        assert!(admits(&schema, &example, &schema), "{}", operator.name);
    }
}

#[test]
fn mistakes_are_refused() {
    let schema = pipeline::json_schema(&sapo_flow_operators::registry());
    let read = |file: &str| fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join(file)).unwrap();
    let files = ["pipelines/sapo_orpo.yaml", "operators/self_augment.yaml"].map(read);
    let cases = [
        ("version: 1", "version: 2"),
        ("\nrun:", "\nruns:"),
        ("\nparams:", "\nparam:"),
        ("  seed: 42", "  sead: 42"),
        ("  seed: 42", "  seed: many"),
        ("device: auto", "device: 1"),
        ("op: ema", "opp: ema"),
        ("{decay: \"${ema_decay}\"}", "{dekay: \"${ema_decay}\"}"),
        ("{decay: \"${ema_decay}\"}", "{decay: half}"),
        ("with: {decay: \"${ema_decay}\"}", "with: 0.5"),
        ("sampling: inverse_count", "sampling: inverse_cuont"),
        ("          prompts: prompts", "          prompt: prompts"),
        ("feedback: {max_staleness: ", "feedback: {staleness: "),
        ("max_staleness: \"${max_staleness}\"}}", "max_staleness: 10001}}"),
        ("objective: {name: orpo, beta", "objective: {name: orpo, betta"),
        ("objective: {name: orpo", "objective: {name: orpoo"),
        ("nll: sequence}", "nll: sequences}"),
    ];
    for (from, to) in cases {
        let text = files.iter().find(|text| text.contains(from)).unwrap_or_else(|| panic!("{from}"));
        assert!(!admits(&schema, &yaml(&text.replace(from, to)), &schema), "{from} -> {to}");
    }
}

//! Records as tests write them: the fields of the record types, most of which may be left out.

use std::sync::Arc;

use serde::Serialize;
use serde_json::{Map, Value as Json, json};

use crate::pipeline::diagnostic::Report;
use crate::pipeline::schema::Validator;
use crate::pipeline::yaml::Yaml;
use crate::record::{Batch, Metrics, Pair, PortType, Prompt, Record, Retracted, Retraction, Sample, Values};

/// Where in a feed a record stands.
pub(super) struct Place<'a> {
    /// The node that the feed stands for.
    pub node: &'a str,
    pub step: u64,
    /// Among the records of the step.
    pub position: u32,
    /// Among all records of the feed: the row of those that say none.
    pub index: u64,
}

/// The JSON Schema of a record on such a port, in a feed or as expected.
pub(super) fn schema(kind: PortType) -> Json {
    let mut schema = match kind {
        PortType::Prompts => schemars::schema_for!(Prompt).to_value(),
        PortType::Samples => schemars::schema_for!(Sample).to_value(),
        PortType::Pairs => schemars::schema_for!(Pair).to_value(),
        PortType::Batches => schemars::schema_for!(Batch).to_value(),
        PortType::Metrics => json!({"type": "object", "additionalProperties": {"type": "number"}}),
        PortType::Weights => {
            json!({"type": "object", "properties": {"model": {"type": "string"}, "version": {"type": "integer"}}})
        }
        PortType::Changes => json!({
            "type": "object",
            "properties": {
                "element": {"type": "array", "items": {"type": "integer"}},
                "diff": {"type": "integer"},
            },
        }),
    };
    if matches!(kind, PortType::Prompts | PortType::Samples | PortType::Pairs) {
        schema["properties"]["retract"] = json!({
            "type": "object",
            "properties": {
                "row": {"type": "integer", "minimum": 0},
                "source": {"type": "string"},
                "origin": {"type": "string"},
                "step": {"type": "integer", "minimum": 0},
                "position": {"type": "integer", "minimum": 0},
                "because": {"type": ["string", "null"]},
            },
        });
    }
    // What is left out has a default.
    for record in ["", "/$defs/Pair"] {
        if let Some(Json::Object(object)) = schema.pointer_mut(record) {
            object.remove("required");
        }
    }
    schema
}

/// A record of a feed. None where something is wrong with it, which has been reported.
pub(super) fn read(kind: PortType, yaml: &Yaml, place: &Place, report: &mut Report) -> Option<Record> {
    let before = report.errors();
    let schema = schema(kind);
    Validator { root: &schema }.check(yaml, "", yaml.span, report);
    if report.errors() > before {
        return None;
    }
    let given = serde_json::to_value(yaml.to_value()).ok()?;
    match record(kind, given, place) {
        Ok(record) => Some(record),
        Err(message) => {
            report.error(yaml.span, format!("this is no record of {kind}: {message}"));
            None
        }
    }
}

fn record(kind: PortType, mut given: Json, place: &Place) -> Result<Record, String> {
    if let Some(of) = given.get("retract").cloned() {
        if given.as_object().is_some_and(|fields| fields.len() > 1) {
            return Err("`retract` stands alone".to_owned());
        }
        return Ok(Record::Retraction(retraction(kind, &of, place)?));
    }
    let record = match kind {
        PortType::Prompts => Record::Prompt(Arc::new(filled(given, &default_prompt(place))?)),
        PortType::Samples => Record::Sample(Arc::new(filled(given, &default_sample(place))?)),
        PortType::Pairs => Record::Pair(Arc::new(filled(given, &default_pair(place, place.position))?)),
        PortType::Batches => {
            for (position, pair) in given["pairs"].as_array_mut().into_iter().flatten().enumerate() {
                *pair = merged(pair.take(), &default_pair(place, position as u32))?;
            }
            Record::Batch(Arc::new(filled(given, &Batch { pairs: Vec::new(), reference: None })?))
        }
        PortType::Metrics => Record::Metrics(Arc::new(Metrics { values: read_as(given)? })),
        PortType::Weights | PortType::Changes => return Err(format!("{kind} cannot be fed")),
    };
    Ok(record)
}

/// `{row, source}` or `{origin, step, position}`, each perhaps with `because`. The source is the one that records of the
/// feed stem from unless they say otherwise.
fn retraction(port_type: PortType, of: &Json, place: &Place) -> Result<Retraction, String> {
    let number = |key: &str| of[key].as_u64();
    let text = |key: &str| of[key].as_str().map(str::to_owned);
    let of_row = number("row")
        .map(|row| Retracted::Row { source: text("source").unwrap_or_else(|| place.node.to_owned()), row });
    let of_record = match (text("origin"), number("step"), number("position")) {
        (Some(origin), Some(step), Some(position)) => {
            Some(Retracted::Record { origin, step, position: position as u32 })
        }
        _ => None,
    };
    let parts = of.as_object().map_or(0, |fields| fields.keys().filter(|key| *key != "because").count());
    let of = match (of_row, of_record) {
        (Some(row), None) if parts <= 2 && number("step").or(number("position")).is_none() => row,
        (None, Some(record)) if parts == 3 => record,
        _ => {
            return Err(
                "`retract` has `row`, perhaps with `source`, or else `origin`, `step` and `position`".to_owned()
            );
        }
    };
    Ok(Retraction { port_type, of, because: text("because") })
}

/// The fields given, and those of `default` for the others.
fn filled<T: Serialize + serde::de::DeserializeOwned>(given: Json, default: &T) -> Result<T, String> {
    read_as(merged(given, default)?)
}

fn merged(given: Json, default: &impl Serialize) -> Result<Json, String> {
    let mut fields = serde_json::to_value(default).map_err(|error| error.to_string())?;
    for (key, value) in given.as_object().into_iter().flatten() {
        fields[key] = value.clone();
    }
    Ok(fields)
}

fn read_as<T: serde::de::DeserializeOwned>(fields: Json) -> Result<T, String> {
    serde_json::from_value(fields).map_err(|error| error.to_string())
}

fn default_prompt(place: &Place) -> Prompt {
    Prompt {
        source: place.node.to_owned(),
        row: place.index,
        epoch: 0,
        prompt_ids: vec![1],
        chosen_ids: vec![2],
        rejected_ids: None,
        values: Values::new(),
    }
}

fn default_sample(place: &Place) -> Sample {
    Sample {
        step: place.step,
        position: place.position,
        origin: place.node.to_owned(),
        source: place.node.to_owned(),
        row: place.index,
        prompt_ids: vec![1],
        response_ids: vec![2],
        weights_version: None,
        seed: None,
        values: Values::new(),
    }
}

fn default_pair(place: &Place, position: u32) -> Pair {
    Pair {
        step: place.step,
        position,
        origin: place.node.to_owned(),
        source: place.node.to_owned(),
        row: place.index,
        prompt_ids: vec![1],
        chosen_ids: vec![2],
        rejected_ids: Some(vec![3]),
        segment: None,
        weights_version: None,
        seed: None,
        values: Values::new(),
    }
}

/// What a record says, in the form that expectations are written in.
pub(super) fn fields(record: &Record) -> Json {
    let fields = match record {
        Record::Prompt(prompt) => serde_json::to_value(prompt),
        Record::Sample(sample) => serde_json::to_value(sample),
        Record::Pair(pair) => serde_json::to_value(pair),
        Record::Batch(batch) => serde_json::to_value(batch),
        Record::Metrics(metrics) => serde_json::to_value(&metrics.values),
        Record::Weights(weights) => serde_json::to_value(weights),
        Record::Change(change) => serde_json::to_value(change),
        Record::Retraction(Retraction { of, because, .. }) => Ok(json!({"retract": match of {
            Retracted::Row { source, row } => json!({"row": row, "source": source, "because": because}),
            Retracted::Record { origin, step, position } => {
                json!({"origin": origin, "step": step, "position": position, "because": because})
            }
        }})),
    };
    // Not-a-number cannot be written as JSON, and nothing else can go wrong.
    fields.unwrap_or(Json::Object(Map::new()))
}

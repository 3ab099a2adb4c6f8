//! What records are grouped and compared by.

use std::borrow::Cow;
use std::fmt;

use sapo_flow_engine::{PortType, Record, TokenId};
use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::{Deserialize, Deserializer, Serialize};

/// Something that records have.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Field {
    /// The data row they stem from, of its source.
    Row,
    /// The prompt's tokens.
    Prompt,
    /// A sample's response, in tokens.
    Response,
    /// The better response of a pair, or a prompt's answer, in tokens.
    Chosen,
    /// The worse response of a pair, or of a prompt, in tokens.
    Rejected,
    /// The node that made a sample or a pair.
    Origin,
    /// A number by name.
    Value(String),
}

const EXPECTED: &str = "expected row, prompt, response, chosen, rejected, origin or values.NAME";

impl fmt::Display for Field {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Field::Row => f.write_str("row"),
            Field::Prompt => f.write_str("prompt"),
            Field::Response => f.write_str("response"),
            Field::Chosen => f.write_str("chosen"),
            Field::Rejected => f.write_str("rejected"),
            Field::Origin => f.write_str("origin"),
            Field::Value(name) => write!(f, "values.{name}"),
        }
    }
}

impl Field {
    fn parse(text: &str) -> Option<Self> {
        Some(match text {
            "row" => Field::Row,
            "prompt" => Field::Prompt,
            "response" => Field::Response,
            "chosen" => Field::Chosen,
            "rejected" => Field::Rejected,
            "origin" => Field::Origin,
            _ => Field::Value(text.strip_prefix("values.").filter(|name| !name.is_empty())?.to_owned()),
        })
    }

    /// Whether records of this type have it.
    pub fn fits(&self, port_type: PortType) -> bool {
        match self {
            Field::Row | Field::Prompt | Field::Value(_) => true,
            Field::Response => port_type == PortType::Samples,
            Field::Chosen | Field::Rejected => port_type != PortType::Samples,
            Field::Origin => port_type != PortType::Prompts,
        }
    }

    /// It, of a record; or in words that the record has none.
    pub fn of(&self, record: &Record) -> Result<Part, String> {
        let part = match (self, record) {
            (Field::Row, _) => record.row().map(|(source, row)| Part::Row(source.into(), row)),
            (Field::Prompt, _) => prompt(record).map(|ids| Part::Tokens(ids.to_vec())),
            (Field::Response, Record::Sample(sample)) => Some(Part::Tokens(sample.response_ids.clone())),
            (Field::Chosen, Record::Pair(pair)) => Some(Part::Tokens(pair.chosen_ids.clone())),
            (Field::Chosen, Record::Prompt(prompt)) => Some(Part::Tokens(prompt.chosen_ids.clone())),
            (Field::Rejected, Record::Pair(pair)) => pair.rejected_ids.clone().map(Part::Tokens),
            (Field::Rejected, Record::Prompt(prompt)) => prompt.rejected_ids.clone().map(Part::Tokens),
            (Field::Origin, _) => record.identity().map(|(origin, ..)| Part::Name(origin.into())),
            (Field::Value(name), _) => match value(record, name) {
                Some(value) if value.is_nan() => return Err(format!("{} has {self} NaN", named(record))),
                value => value.map(|value| Part::Number(sortable(value))),
            },
            _ => None,
        };
        part.ok_or_else(|| format!("{} has no {self}", named(record)))
    }
}

/// A record's number by name.
pub fn value(record: &Record, name: &str) -> Option<f64> {
    let values = match record {
        Record::Prompt(prompt) => &prompt.values,
        Record::Sample(sample) => &sample.values,
        Record::Pair(pair) => &pair.values,
        _ => return None,
    };
    values.get(name).copied()
}

fn prompt(record: &Record) -> Option<&[TokenId]> {
    match record {
        Record::Prompt(prompt) => Some(&prompt.prompt_ids),
        Record::Sample(sample) => Some(&sample.prompt_ids),
        Record::Pair(pair) => Some(&pair.prompt_ids),
        _ => None,
    }
}

/// How messages name a record.
pub fn named(record: &Record) -> String {
    let (source, row) = record.row().unwrap_or_default();
    match record.identity() {
        None => format!("row {row} of `{source}`"),
        Some((origin, step, position)) => {
            let kind = if record.port_type() == PortType::Samples { "sample" } else { "pair" };
            format!("row {row} of `{source}` ({kind} {position} of `{origin}` at step {step})")
        }
    }
}

/// A number as an integer that sorts alike. Both zeros are one.
pub fn sortable(value: f64) -> u64 {
    let bits = (value + 0.0).to_bits();
    if bits >> 63 == 1 { !bits } else { bits | 1 << 63 }
}

/// A component of a key.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum Part {
    /// A source and the index of its row.
    Row(String, u64),
    /// Token ids.
    Tokens(Vec<TokenId>),
    /// A node's name.
    Name(String),
    /// See [`sortable`].
    Number(u64),
}

/// What a group's records have in common.
pub type Key = Vec<Part>;

/// One field or several: records belong together that agree in all.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub struct Fields(pub Vec<Field>);

impl Fields {
    /// Group by one field.
    pub fn one(field: Field) -> Self {
        Fields(vec![field])
    }

    /// The key of a record. What a record lacks is an error of the node's step, and no part here.
    pub fn key(&self, record: &Record) -> Key {
        self.0.iter().filter_map(|field| field.of(record).ok()).collect()
    }

    /// With the key under `with` that names them.
    pub fn named(&self, key: &'static str) -> Vec<(&'static str, Field)> {
        self.0.iter().map(|field| (key, field.clone())).collect()
    }
}

impl<'de> Deserialize<'de> for Field {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        Field::parse(&text).ok_or_else(|| serde::de::Error::custom(format!("{EXPECTED}, found `{text}`")))
    }
}

impl<'de> Deserialize<'de> for Fields {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        #[derive(Deserialize)]
        #[serde(untagged)]
        enum Written {
            One(String),
            Several(Vec<String>),
        }
        let texts = match Written::deserialize(deserializer)? {
            Written::One(text) => vec![text],
            Written::Several(texts) => texts,
        };
        let fields = texts.iter().map(|text| {
            Field::parse(text).ok_or_else(|| serde::de::Error::custom(format!("{EXPECTED}, found `{text}`")))
        });
        fields.collect::<Result<_, _>>().map(Fields)
    }
}

impl JsonSchema for Field {
    fn schema_name() -> Cow<'static, str> {
        "Field".into()
    }

    fn inline_schema() -> bool {
        true
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        // The text is values.NAME; reading it checks that.
        json_schema!({"anyOf": [
            {"type": "string", "enum": ["row", "prompt", "response", "chosen", "rejected", "origin"]},
            {"type": "string"},
        ]})
    }
}

impl JsonSchema for Fields {
    fn schema_name() -> Cow<'static, str> {
        "Fields".into()
    }

    fn inline_schema() -> bool {
        true
    }

    fn json_schema(generator: &mut SchemaGenerator) -> Schema {
        let one = Field::json_schema(generator);
        json_schema!({"anyOf": [one, {"type": "array", "items": one}]})
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_sort_as_they_do() {
        let ascending = [f64::NEG_INFINITY, -2.5, -1e-300, 0.0, 1e-300, 0.5, 3.0, f64::INFINITY];
        assert!(ascending.map(sortable).is_sorted_by(|a, b| a < b));
        assert_eq!(sortable(-0.0), sortable(0.0));
    }

    #[test]
    fn fields_are_read_from_text() {
        let fields: Fields = serde_yaml::from_str("[row, values.score]").unwrap();
        assert_eq!(fields, Fields(vec![Field::Row, Field::Value("score".into())]));
        assert_eq!(serde_yaml::from_str::<Fields>("prompt").unwrap(), Fields::one(Field::Prompt));
        let error = serde_yaml::from_str::<Fields>("values.").unwrap_err().to_string();
        assert!(error.contains("or values.NAME, found `values.`"), "{error}");
    }
}

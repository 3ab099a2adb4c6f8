//! What records are grouped and compared by.

use std::borrow::Cow;
use std::fmt;

use sapo_flow_engine::operator::ConfigIssue;
use sapo_flow_engine::pipeline::closest;
use sapo_flow_engine::{PortType, Record, TokenId, Values};
use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::{Deserialize, Deserializer, Serialize, Serializer};

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
    /// A number or a text by name.
    Value(String),
    /// What was written, and means none of these: [`Field::issue`] says so.
    Unknown(String),
}

const NAMES: [&str; 6] = ["row", "prompt", "response", "chosen", "rejected", "origin"];

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
            Field::Unknown(text) => f.write_str(text),
        }
    }
}

impl Field {
    fn parse(text: &str) -> Self {
        match text {
            "row" => Field::Row,
            "prompt" => Field::Prompt,
            "response" => Field::Response,
            "chosen" => Field::Chosen,
            "rejected" => Field::Rejected,
            "origin" => Field::Origin,
            _ => match text.strip_prefix("values.").filter(|name| !name.is_empty()) {
                Some(name) => Field::Value(name.to_owned()),
                None => Field::Unknown(text.to_owned()),
            },
        }
    }

    /// What is wrong with it, where it is no field at all.
    pub fn issue(&self, key: impl Into<String>) -> Option<ConfigIssue> {
        let Field::Unknown(text) = self else { return None };
        let issue = ConfigIssue::new(key, format!("expected {} or values.NAME, found `{text}`", NAMES.join(", ")));
        let near = closest(text, NAMES).map(str::to_owned).or_else(|| {
            // `value.score`, or `score` alone.
            let name = text.rsplit('.').next().filter(|name| !name.is_empty()).unwrap_or("NAME");
            (text.ends_with('.') || closest(text.split('.').next()?, ["values"]).is_some() || !text.contains('.'))
                .then(|| format!("values.{name}"))
        });
        Some(ConfigIssue { help: near.map(|near| format!("did you mean `{near}`?")), ..issue })
    }

    /// Whether records of this type have it.
    pub fn fits(&self, port_type: PortType) -> bool {
        match self {
            Field::Row | Field::Prompt | Field::Value(_) | Field::Unknown(_) => true,
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
            (Field::Value(name), _) => match values(record).and_then(|values| values.get(name)) {
                Some(value) if value.is_nan() => return Err(format!("{} has {self} NaN", named(record))),
                Some(value) => Some(Part::Number(sortable(*value))),
                None => values(record).and_then(|values| values.text(name)).map(|text| Part::Name(text.into())),
            },
            _ => None,
        };
        part.ok_or_else(|| format!("{} has no {self}", named(record)))
    }
}

fn values(record: &Record) -> Option<&Values> {
    match record {
        Record::Prompt(prompt) => Some(&prompt.values),
        Record::Sample(sample) => Some(&sample.values),
        Record::Pair(pair) => Some(&pair.values),
        _ => None,
    }
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
    /// A node's name, or another text.
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

    /// What is wrong with those that are no fields at all; `key` names them.
    pub fn issues(&self, key: &str) -> Vec<ConfigIssue> {
        match self.0.as_slice() {
            [field] => field.issue(key).into_iter().collect(),
            fields => {
                (0..).zip(fields).filter_map(|(i, field): (usize, _)| field.issue(format!("{key}.{i}"))).collect()
            }
        }
    }

    /// With the key under `with` that names them.
    pub fn named(&self, key: &'static str) -> Vec<(&'static str, Field)> {
        self.0.iter().map(|field| (key, field.clone())).collect()
    }
}

impl<'de> Deserialize<'de> for Field {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        Ok(Field::parse(&String::deserialize(deserializer)?))
    }
}

impl Serialize for Field {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Fields {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        #[derive(Deserialize)]
        #[serde(untagged)]
        enum Written {
            One(Field),
            Several(Vec<Field>),
        }
        Ok(match Written::deserialize(deserializer)? {
            Written::One(field) => Fields::one(field),
            Written::Several(fields) => Fields(fields),
        })
    }
}

impl Serialize for Fields {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self.0.as_slice() {
            [field] => field.serialize(serializer),
            fields => fields.serialize(serializer),
        }
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
        // Validation takes any text here, and leaves it to `Field::issue` to say which are none.
        json_schema!({"anyOf": [
            {"type": "string", "enum": NAMES},
            {"type": "string", "pattern": "^values\\..+"},
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
        assert_eq!(serde_yaml::to_string(&fields).unwrap(), "- row\n- values.score\n");
    }

    #[test]
    fn texts_are_keys_too() {
        let mut pair = crate::testing::pair(1, &[5], &[6], None);
        pair.values.insert_text("category".into(), "math".into());
        let part = Field::Value("category".into()).of(&Record::Pair(pair.into()));
        assert_eq!(part, Ok(Part::Name("math".into())));
    }

    #[test]
    fn what_is_no_field_is_told_at_its_key() {
        let told = |text: &str| {
            let issues = serde_yaml::from_str::<Fields>(text).unwrap().issues("by");
            issues.into_iter().map(|issue| (issue.key.clone(), issue.to_string())).collect::<Vec<_>>()
        };
        let message = |found: &str, meant: &str| {
            let fields = "row, prompt, response, chosen, rejected, origin or values.NAME";
            format!("expected {fields}, found `{found}` (did you mean `{meant}`?)")
        };
        assert_eq!(told("promt"), [("by".into(), message("promt", "prompt"))]);
        assert_eq!(told("[row, values.]"), [("by.1".into(), message("values.", "values.NAME"))]);
        assert_eq!(told("score"), [("by".into(), message("score", "values.score"))]);
        assert_eq!(told("value.score"), [("by".into(), message("value.score", "values.score"))]);
        assert_eq!(told("[row, values.score]"), []);
    }
}

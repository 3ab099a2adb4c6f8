//! What belongs to a record by name: numbers and texts.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::ops::Index;

use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// Numbers and texts that belong to a record, by name: scores, lengths, weights; categories, sources. A name stands for one
/// of them. In JSON they are one mapping.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Values {
    numbers: BTreeMap<String, f64>,
    texts: BTreeMap<String, String>,
}

/// A value as JSON has it.
#[derive(Deserialize)]
#[serde(untagged, expecting = "expected a number or a text")]
enum Written {
    Number(f64),
    Text(String),
}

impl Values {
    /// None.
    pub fn new() -> Self {
        Values::default()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.numbers.is_empty() && self.texts.is_empty()
    }

    /// The number of that name.
    pub fn get(&self, name: &str) -> Option<&f64> {
        self.numbers.get(name)
    }

    /// The text of that name.
    pub fn text(&self, name: &str) -> Option<&str> {
        self.texts.get(name).map(String::as_str)
    }

    /// All numbers, by name.
    pub fn numbers(&self) -> impl Iterator<Item = (&String, f64)> {
        self.numbers.iter().map(|(name, number)| (name, *number))
    }

    /// All texts, by name.
    pub fn texts(&self) -> impl Iterator<Item = (&String, &String)> {
        self.texts.iter()
    }

    /// All names, those of numbers first.
    pub fn names(&self) -> impl Iterator<Item = &String> {
        self.numbers.keys().chain(self.texts.keys())
    }

    /// Set a number.
    pub fn insert(&mut self, name: String, number: f64) {
        self.texts.remove(&name);
        self.numbers.insert(name, number);
    }

    /// Set a text.
    pub fn insert_text(&mut self, name: String, text: String) {
        self.numbers.remove(&name);
        self.texts.insert(name, text);
    }

    /// Set all of these.
    pub fn extend(&mut self, others: Values) {
        others.numbers.into_iter().for_each(|(name, number)| self.insert(name, number));
        others.texts.into_iter().for_each(|(name, text)| self.insert_text(name, text));
    }

    /// The same under longer names.
    pub fn prefixed(&self, prefix: &str) -> Self {
        Values {
            numbers: self.numbers.iter().map(|(name, number)| (format!("{prefix}{name}"), *number)).collect(),
            texts: self.texts.iter().map(|(name, text)| (format!("{prefix}{name}"), text.clone())).collect(),
        }
    }
}

impl Index<&str> for Values {
    type Output = f64;

    /// The number of that name.
    ///
    /// # Panics
    /// When there is none: [`Values::get`] asks.
    fn index(&self, name: &str) -> &f64 {
        &self.numbers[name]
    }
}

impl FromIterator<(String, f64)> for Values {
    fn from_iter<I: IntoIterator<Item = (String, f64)>>(numbers: I) -> Self {
        Values { numbers: numbers.into_iter().collect(), texts: BTreeMap::new() }
    }
}

impl<const N: usize> From<[(String, f64); N]> for Values {
    fn from(numbers: [(String, f64); N]) -> Self {
        numbers.into_iter().collect()
    }
}

impl Serialize for Values {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        // Forms that do not say what follows keep the two apart.
        if !serializer.is_human_readable() {
            return (&self.numbers, &self.texts).serialize(serializer);
        }
        let numbers = self.numbers.iter().map(|(name, number)| (name, serde_json::json!(number)));
        let texts = self.texts.iter().map(|(name, text)| (name, serde_json::json!(text)));
        serializer.collect_map(numbers.chain(texts).collect::<BTreeMap<_, _>>())
    }
}

impl<'de> Deserialize<'de> for Values {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        if !deserializer.is_human_readable() {
            let (numbers, texts) = Deserialize::deserialize(deserializer)?;
            return Ok(Values { numbers, texts });
        }
        let mut values = Values::new();
        for (name, value) in BTreeMap::<String, Written>::deserialize(deserializer)? {
            match value {
                Written::Number(number) => values.insert(name, number),
                Written::Text(text) => values.insert_text(name, text),
            }
        }
        Ok(values)
    }
}

impl JsonSchema for Values {
    fn schema_name() -> Cow<'static, str> {
        "Values".into()
    }

    fn inline_schema() -> bool {
        true
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({
            "type": "object",
            "additionalProperties": {"anyOf": [{"type": "number"}, {"type": "string"}]},
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn json_is_one_mapping() {
        let mut values: Values = [("score".to_owned(), 0.5), ("age".to_owned(), 3.0)].into();
        values.insert_text("category".into(), "math".into());
        let json = serde_json::to_string(&values).unwrap();
        assert_eq!(json, r#"{"age":3.0,"category":"math","score":0.5}"#);
        assert_eq!(serde_json::from_str::<Values>(&json).unwrap(), values);
        // As checkpoints and programs wrote them before there were texts.
        let numbers: Values = serde_json::from_str(r#"{"age": 3, "score": 0.5}"#).unwrap();
        assert_eq!(numbers, [("score".to_owned(), 0.5), ("age".to_owned(), 3.0)].into());
        let error = serde_json::from_str::<Values>(r#"{"age": [3]}"#).unwrap_err().to_string();
        assert!(error.contains("expected a number or a text"), "{error}");
    }

    #[test]
    fn a_name_stands_for_one_value() {
        let mut values: Values = [("kind".to_owned(), 1.0)].into();
        values.insert_text("kind".into(), "a".into());
        assert_eq!((values.get("kind"), values.text("kind")), (None, Some("a")));
        values.extend([("kind".to_owned(), 2.0)].into());
        assert_eq!((values.get("kind"), values.text("kind")), (Some(&2.0), None));
        assert_eq!(values.prefixed("chosen_").names().collect::<Vec<_>>(), ["chosen_kind"]);
    }
}

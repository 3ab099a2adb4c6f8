//! Numbers in JSON, the ones that are not finite too, for which JSON has no form: they are text, `NaN`, `Infinity` and
//! `-Infinity`, the names that protobuf's JSON gives them.

use std::collections::BTreeMap;

use serde::{Deserialize, Deserializer, Serialize, Serializer};
use serde_json::Value;

/// A number that comes back from JSON as it went.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Number(pub f64);

/// As JSON has it.
#[derive(Deserialize)]
#[serde(untagged, expecting = "expected a number, `NaN`, `Infinity` or `-Infinity`")]
enum Written {
    Number(f64),
    Name(Name),
}

#[derive(Deserialize)]
enum Name {
    NaN,
    Infinity,
    #[serde(rename = "-Infinity")]
    MinusInfinity,
}

impl From<Number> for Value {
    fn from(Number(number): Number) -> Self {
        match number {
            _ if number.is_finite() => number.into(),
            _ if number.is_nan() => "NaN".into(),
            _ if number > 0.0 => "Infinity".into(),
            _ => "-Infinity".into(),
        }
    }
}

impl Serialize for Number {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match serializer.is_human_readable() {
            true => Value::from(*self).serialize(serializer),
            false => serializer.serialize_f64(self.0),
        }
    }
}

impl<'de> Deserialize<'de> for Number {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        if !deserializer.is_human_readable() {
            return f64::deserialize(deserializer).map(Number);
        }
        Ok(Number(match Written::deserialize(deserializer)? {
            Written::Number(number) => number,
            Written::Name(Name::NaN) => f64::NAN,
            Written::Name(Name::Infinity) => f64::INFINITY,
            Written::Name(Name::MinusInfinity) => f64::NEG_INFINITY,
        }))
    }
}

/// For `#[serde(with = "...")]` on numbers by name.
pub mod by_name {
    use super::*;

    /// As a mapping.
    ///
    /// # Errors
    /// The serializer's.
    pub fn serialize<S: Serializer>(numbers: &BTreeMap<String, f64>, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_map(numbers.iter().map(|(name, number)| (name, Number(*number))))
    }

    /// From a mapping.
    ///
    /// # Errors
    /// When there is something else than numbers.
    pub fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<BTreeMap<String, f64>, D::Error> {
        let numbers = BTreeMap::<String, Number>::deserialize(deserializer)?;
        Ok(numbers.into_iter().map(|(name, number)| (name, number.0)).collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::record::Metrics;

    #[test]
    fn every_number_comes_back() {
        let numbers = [0.1 + 0.2, -0.0, f64::MIN_POSITIVE, f64::NAN, f64::INFINITY, f64::NEG_INFINITY];
        let json = serde_json::to_string(&numbers.map(Number)).unwrap();
        assert_eq!(json, r#"[0.30000000000000004,-0.0,2.2250738585072014e-308,"NaN","Infinity","-Infinity"]"#);
        let back: Vec<Number> = serde_json::from_str(&json).unwrap();
        for (number, Number(back)) in numbers.into_iter().zip(back) {
            assert!(number.to_bits() == back.to_bits() || number.is_nan() && back.is_nan(), "{number}: {back}");
        }
        let metrics = Metrics { values: [("loss".to_owned(), f64::NEG_INFINITY), ("step".to_owned(), 3.0)].into() };
        let json = serde_json::to_string(&metrics).unwrap();
        assert_eq!(json, r#"{"values":{"loss":"-Infinity","step":3.0}}"#);
        assert_eq!(serde_json::from_str::<Metrics>(&json).unwrap(), metrics);
        let error = serde_json::from_str::<Number>("\"nan\"").unwrap_err().to_string();
        assert!(error.starts_with("expected a number, `NaN`"), "{error}");
    }
}

//! Rotary position embeddings as config.json describes them. What transformers would ignore, or only warn of, is an error.

use serde_json::{Map, Value};

use super::{RopeConfig, RopeScaling};
use crate::Result;
use crate::model::config::Fields;

/// Keys of the mapping that say nothing of how frequencies are scaled.
const NOT_OF_SCALING: [&str; 2] = ["rope_theta", "partial_rotary_factor"];
const SCALING: &str = "rope_scaling";
const PARAMETERS: &str = "rope_parameters";

impl RopeConfig {
    /// Reads `rope_parameters` (transformers 5), or `rope_theta` and `rope_scaling` (transformers 4).
    pub(in crate::model) fn from_fields(config: &Fields, head_dim: i64, max_position_embeddings: i64) -> Result<Self> {
        let (nothing, nothing_either) = (Map::new(), Map::new());
        let scaling = object(config, SCALING)?;
        let parameters = object(config, PARAMETERS)?;
        // Where both are there transformers prefers the older key.
        let key = if scaling.is_some() { SCALING } else { PARAMETERS };
        let theta = theta(config, &[(SCALING, scaling), (PARAMETERS, parameters)])?;
        let fields = Fields { path: config.path, object: scaling.or(parameters).unwrap_or(&nothing) };
        let both = scaling.and(parameters).unwrap_or(&nothing_either);
        for fields in [config, &fields, &Fields { path: config.path, object: both }] {
            if fields.optional::<f64>("partial_rotary_factor")?.is_some_and(|factor| factor != 1.0) {
                return Err(fields.error("partial_rotary_factor", "only whole heads can be rotated here"));
            }
        }
        let scaling = RopeScaling::from_fields(config, &fields, key, head_dim, max_position_embeddings)?;
        Ok(RopeConfig { theta, dim: head_dim, max_position_embeddings, scaling })
    }
}

/// A key's mapping; none where it is absent or null.
fn object<'a>(config: &Fields<'a>, key: &str) -> Result<Option<&'a Map<String, Value>>> {
    match config.object.get(key) {
        None | Some(Value::Null) => Ok(None),
        Some(Value::Object(object)) => Ok(Some(object)),
        Some(other) => Err(config.error(key, format!("expected a mapping or null, found {other}"))),
    }
}

/// The base, which may stand in three places, but must be the same in each.
fn theta(config: &Fields, mappings: &[(&str, Option<&Map<String, Value>>)]) -> Result<f64> {
    let mut found: Option<(String, f64)> = None;
    let whole = [(String::new(), Some(config.object))];
    for (prefix, object) in whole.into_iter().chain(mappings.iter().map(|(key, object)| (format!("{key}."), *object))) {
        let Some(object) = object else { continue };
        let fields = Fields { path: config.path, object };
        let name = format!("{prefix}rope_theta");
        let Some(theta) = fields.optional::<f64>("rope_theta")? else { continue };
        if theta <= 0.0 || !(theta as f32).is_finite() {
            return Err(config.error(&name, format!("expected a number above 0, within float32, found {theta:?}")));
        }
        match &found {
            Some((other, known)) if *known != theta => {
                return Err(config.error(&name, format!("expected {known:?} as in `{other}`, found {theta:?}")));
            }
            Some(_) => {}
            None => found = Some((name, theta)),
        }
    }
    Ok(found.map_or(10_000.0, |(_, theta)| theta))
}

/// What to divide by: above 0, and finite in float32, in which frequencies are computed.
fn positive(fields: &Fields, key: &str) -> Result<Option<f64>> {
    let value: Option<f64> = fields.optional(key)?;
    match value.filter(|value| *value <= 0.0 || !(*value as f32).is_finite()) {
        Some(wrong) => Err(fields.error(key, format!("expected a number above 0, within float32, found {wrong:?}"))),
        None => Ok(value),
    }
}

fn required(fields: &Fields, key: &str) -> Result<f64> {
    positive(fields, key)?.ok_or_else(|| fields.error(key, "is missing"))
}

impl RopeScaling {
    fn from_fields(
        config: &Fields,
        fields: &Fields,
        key: &str,
        head_dim: i64,
        max_position_embeddings: i64,
    ) -> Result<Self> {
        let kind: Option<String> = match fields.optional("rope_type")? {
            Some(kind) => Some(kind),
            None => fields.optional("type")?,
        };
        let original_max_position_embeddings = || -> Result<f64> {
            let own = match positive(config, "original_max_position_embeddings")? {
                Some(original) => Some(original),
                None => positive(fields, "original_max_position_embeddings")?,
            };
            Ok(own.unwrap_or(max_position_embeddings as f64))
        };
        if kind.is_none() && fields.object.keys().any(|key| !NOT_OF_SCALING.contains(&key.as_str())) {
            let keys: Vec<&str> = fields.object.keys().map(String::as_str).collect();
            return Err(config.error(key, format!("expected a `rope_type`, found only {}", keys.join(", "))));
        }
        Ok(match kind.as_deref().unwrap_or("default") {
            "default" => RopeScaling::Default,
            "linear" => RopeScaling::Linear { factor: required(fields, "factor")? },
            "dynamic" => RopeScaling::Dynamic { factor: required(fields, "factor")? },
            "llama3" => llama3(fields, original_max_position_embeddings()?)?,
            "yarn" => yarn(fields, original_max_position_embeddings()?, max_position_embeddings)?,
            "longrope" => longrope(fields, original_max_position_embeddings()?, head_dim, max_position_embeddings)?,
            other => {
                let known = "default, linear, dynamic, llama3, yarn or longrope";
                return Err(config.error(key, format!("expected rope_type {known}, found `{other}`")));
            }
        })
    }
}

fn llama3(fields: &Fields, original: f64) -> Result<RopeScaling> {
    let factor = required(fields, "factor")?;
    let (low, high) = (required(fields, "low_freq_factor")?, required(fields, "high_freq_factor")?);
    if high <= low {
        // What lies between them is mixed, by where it lies: a division by their distance.
        let message = format!("expected more than low_freq_factor, {low:?}, found {high:?}");
        return Err(fields.error("high_freq_factor", message));
    }
    Ok(RopeScaling::Llama3 {
        factor,
        low_freq_factor: low,
        high_freq_factor: high,
        original_max_position_embeddings: original,
    })
}

fn yarn(fields: &Fields, original: f64, max_position_embeddings: i64) -> Result<RopeScaling> {
    let factor = positive(fields, "factor")?.unwrap_or(max_position_embeddings as f64 / original);
    let scale = |m: f64| if factor <= 1.0 { 1.0 } else { 0.1 * m * factor.ln() + 1.0 };
    let nonzero = |key: &str| -> Result<Option<f64>> { Ok(fields.optional(key)?.filter(|&value: &f64| value != 0.0)) };
    let attention_factor = match (positive(fields, "attention_factor")?, nonzero("mscale")?, nonzero("mscale_all_dim")?)
    {
        (Some(given), _, _) => given,
        (None, Some(mscale), Some(all_dim)) => scale(mscale) / scale(all_dim),
        (None, _, _) => scale(1.0),
    };
    Ok(RopeScaling::Yarn {
        factor,
        attention_factor,
        beta_fast: nonzero("beta_fast")?.unwrap_or(32.0),
        beta_slow: nonzero("beta_slow")?.unwrap_or(1.0),
        truncate: fields.optional("truncate")?.unwrap_or(true),
        original_max_position_embeddings: original,
    })
}

fn longrope(fields: &Fields, original: f64, head_dim: i64, max_position_embeddings: i64) -> Result<RopeScaling> {
    let factors = |key: &str| -> Result<Vec<f32>> {
        let factors: Vec<f32> = fields.required(key)?;
        if factors.len() as i64 != head_dim / 2 {
            return Err(fields.error(key, format!("expected {} numbers, found {}", head_dim / 2, factors.len())));
        }
        match factors.iter().find(|factor| **factor <= 0.0 || !factor.is_finite()) {
            Some(wrong) => Err(fields.error(key, format!("expected numbers above 0, within float32, found {wrong:?}"))),
            None => Ok(factors),
        }
    };
    let factor = positive(fields, "factor")?.unwrap_or(max_position_embeddings as f64 / original);
    let suggested = if factor <= 1.0 { 1.0 } else { (1.0 + factor.ln() / original.ln()).sqrt() };
    Ok(RopeScaling::LongRope {
        attention_factor: positive(fields, "attention_factor")?.unwrap_or(suggested),
        short_factor: factors("short_factor")?,
        long_factor: factors("long_factor")?,
        original_max_position_embeddings: original,
    })
}

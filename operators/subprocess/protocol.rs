//! The lines that `subprocess` and its program exchange.

use sapo_flow_engine::{OperatorError, Values};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::Map;

use crate::item::{Item, Part, Texts};

/// What a program is told of a record.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Field {
    /// Its parts as text.
    Text,
    /// Its parts as token ids.
    Tokens,
    /// Its numbers by name.
    Values,
    /// Where it comes from: source and data row, and the node, step and position of its making.
    Origin,
}

/// The line that asks about a record.
///
/// # Errors
/// When its tokens are no text of the tokenizer's.
pub fn request(id: &str, item: &Item, send: &[Field], texts: Option<&Texts>) -> Result<Vec<u8>, OperatorError> {
    let parts = || Part::of(item.port_type()).iter().filter_map(|part| Some((*part, item.ids(*part)?)));
    let mut line = Map::new();
    line.insert("id".into(), id.into());
    for field in send {
        match field {
            Field::Text => {
                let texts = texts.ok_or("`send` has text, which needs `tokenizer`")?;
                for (part, ids) in parts() {
                    line.insert(part.name().into(), texts.decode(part, ids)?.into());
                }
            }
            Field::Tokens => line.extend(parts().map(|(part, ids)| (part.ids_name().into(), ids.into()))),
            Field::Values => {
                line.insert("values".into(), serde_json::to_value(item.values())?);
            }
            Field::Origin => {
                line.insert("source".into(), item.source().into());
                line.insert("row".into(), item.row().into());
                if let Some((origin, step, position)) = item.made() {
                    line.insert("origin".into(), origin.into());
                    line.insert("step".into(), step.into());
                    line.insert("position".into(), position.into());
                }
            }
        }
    }
    let mut bytes = serde_json::to_vec(&line)?;
    bytes.push(b'\n');
    Ok(bytes)
}

/// What a program says of a record.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Answer {
    id: String,
    /// Numbers and texts to add to the record's.
    #[serde(default)]
    pub values: Values,
    /// Whether the record goes.
    #[serde(default)]
    pub drop: bool,
    prompt: Option<String>,
    chosen: Option<String>,
    rejected: Option<String>,
    response: Option<String>,
}

impl Answer {
    /// What a line says of the record that was sent as `id`.
    ///
    /// # Errors
    /// When it is no such line, or about another record.
    pub fn read(line: &[u8], id: &str) -> Result<Self, String> {
        let wrong = |message: String| {
            let text: String = String::from_utf8_lossy(line).trim_end().chars().take(200).collect();
            format!("{message}; the line is: {text}")
        };
        let answer: Answer = serde_json::from_slice(line).map_err(|error| {
            wrong(format!("expected {{\"id\": \"{id}\", ...}} and nothing else on standard output, found {error}"))
        })?;
        if answer.id != id {
            return Err(wrong(format!("expected the id \"{id}\", found \"{}\"", answer.id)));
        }
        Ok(answer)
    }

    /// The texts that take the place of the record's.
    pub fn parts(&self) -> impl Iterator<Item = (Part, &str)> {
        let parts = [
            (Part::Prompt, &self.prompt),
            (Part::Chosen, &self.chosen),
            (Part::Rejected, &self.rejected),
            (Part::Response, &self.response),
        ];
        parts.into_iter().filter_map(|(part, text)| Some((part, text.as_deref()?)))
    }
}

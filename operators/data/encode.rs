//! Rows as tokens.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use sapo_flow_engine::Prompt;
use sapo_flow_engine::record::Values;
use sapo_flow_training::text::{ChatTemplate, EncodedPair, Message, Rendered, TextTokenizer};
use serde_json::{Map, Value};

use super::Settings;
use super::example::{Columns, Example};
use super::files::{RawRow, kind};
use crate::Error;

/// Turns rows into tokens.
pub struct Encoder {
    columns: Columns,
    directory: PathBuf,
    tokenizer: TextTokenizer,
    template: Option<ChatTemplate>,
}

/// A row in tokens.
pub struct Encoded {
    /// The row.
    pub prompt: Prompt,
    /// Whether messages after the answer were left out.
    pub trailing: bool,
    /// Keys of its messages that nothing reads.
    pub unread: BTreeSet<String>,
}

impl Encoder {
    /// With the tokenizer and the chat template that the settings name.
    ///
    /// # Errors
    /// When one of them cannot be read.
    pub fn load(settings: &Settings) -> Result<Self, Error> {
        let directory = settings.tokenizer.to_path_buf();
        let tokenizer = TextTokenizer::load(&directory)?;
        let template = match settings.chat_template {
            None => ChatTemplate::load(&directory)?,
            Some(given) => {
                let source = template_source(given)?;
                Some(ChatTemplate::from_source(&source, tokenizer.special_tokens().clone())?)
            }
        };
        Ok(Encoder { columns: settings.columns.clone(), directory, tokenizer, template })
    }

    /// The tokens of a row, or why it cannot be used.
    pub fn encode(&self, index: u64, row: &RawRow) -> Result<Encoded, String> {
        let object = row.content.as_ref().map_err(Clone::clone)?;
        let mut trailing_messages = false;
        let (chosen, rejected) = match self.columns.understand(object)? {
            Example::Plain { prompt, chosen, rejected } => {
                let render = |answer: &str| Rendered::plain(&prompt, answer);
                (render(&chosen), rejected.as_deref().map(render))
            }
            Example::Chat { prompt, chosen, rejected, trailing } => {
                trailing_messages = trailing;
                let render = |answer: Message| self.render(prompt.iter().cloned().chain([answer]).collect());
                (render(chosen)?, rejected.map(render).transpose()?)
            }
        };
        let encoded = match &rejected {
            Some(rejected) => Rendered::encode_pair(&chosen, rejected, &self.tokenizer).map(
                |EncodedPair { prompt_ids, chosen_ids, rejected_ids }| (prompt_ids, chosen_ids, Some(rejected_ids)),
            ),
            None => chosen.encode(&self.tokenizer).map(|encoded| (encoded.prompt_ids, encoded.answer_ids, None)),
        };
        let (prompt_ids, chosen_ids, rejected_ids) = encoded.map_err(|error| error.to_string())?;
        let (source, values) = (String::new(), values(&self.columns.values, object)?);
        let prompt = Prompt { source, row: index, epoch: 0, prompt_ids, chosen_ids, rejected_ids, values };
        Ok(Encoded { prompt, trailing: trailing_messages, unread: self.columns.unread_keys(object) })
    }

    fn render(&self, messages: Vec<Message>) -> Result<Rendered, String> {
        let template = self.template.as_ref().ok_or_else(|| {
            format!(
                "the row is a conversation, but {} has no chat template (chat_template.jinja, or chat_template in \
                 tokenizer_config.json); give one with `chat_template`",
                self.directory.display()
            )
        })?;
        Rendered::conversation(template, &messages).map_err(|error| error.to_string())
    }
}

/// The numbers and texts of a row in these columns.
fn values(names: &[String], row: &Map<String, Value>) -> Result<Values, String> {
    let mut values = Values::new();
    for name in names {
        match row.get(name) {
            Some(Value::Bool(truth)) => values.insert(name.clone(), f64::from(*truth)),
            Some(Value::Number(number)) if number.as_f64().is_some_and(f64::is_finite) => {
                values.insert(name.clone(), number.as_f64().unwrap_or_default());
            }
            Some(Value::String(text)) => values.insert_text(name.clone(), text.clone()),
            Some(other) => return Err(format!("`{name}`: expected a number or a text, found {}", kind(other))),
            None => return Err(format!("`{name}`: expected a number or a text, found nothing")),
        }
    }
    Ok(values)
}

/// A template's text: given as it is where it holds Jinja's braces, otherwise the content of a file.
pub(super) fn template_source(given: &str) -> Result<String, Error> {
    match template_file(given) {
        Some(path) => std::fs::read_to_string(path).map_err(Error::io(path)),
        None => Ok(given.to_string()),
    }
}

/// The file that a template is given by, if it is not given as text.
pub(super) fn template_file(given: &str) -> Option<&Path> {
    let is_text = given.contains("{{") || given.contains("{%");
    (!is_text).then(|| Path::new(given))
}

#[cfg(test)]
mod tests {
    use super::values;

    #[test]
    fn numbers_and_texts_go_along() {
        let row = serde_json::from_str(r#"{"score": 2.5, "good": true, "why": "b", "list": [1]}"#).unwrap();
        let with = |names: &[&str]| values(&names.iter().map(|name| (*name).to_owned()).collect::<Vec<_>>(), &row);
        assert_eq!(with(&["score", "good"]).unwrap(), [("good".to_owned(), 1.0), ("score".to_owned(), 2.5)].into());
        assert_eq!(with(&["why"]).unwrap().text("why"), Some("b"));
        assert!(with(&["list"]).unwrap_err().contains("`list`: expected a number or a text, found"));
        assert!(with(&["rank"]).unwrap_err().contains("`rank`: expected a number or a text, found nothing"));
    }
}

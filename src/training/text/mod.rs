//! From conversations to token ids and back: the tokenizer, the chat template, and the two together.

pub mod conversation;
mod jinja;
pub mod special_tokens;
pub mod template;
pub mod tokenizer;

pub use jinja::{present, stop_the_clock};

pub use conversation::{EncodedAnswer, EncodedPair, Rendered, encode_conversation, encode_prompt};
pub use special_tokens::SpecialTokens;
pub use template::{ChatTemplate, Message};
pub use tokenizer::{TOKENIZER_FILE, TextTokenizer};

use crate::{Error, Result};
use std::path::Path;

/// Reads a JSON object that a model directory may or may not hold.
fn read_optional_object(path: &Path) -> Result<Option<serde_json::Map<String, serde_json::Value>>> {
    let Some(text) = read_optional(path)? else { return Ok(None) };
    let object = serde_json::from_str(&text)
        .map_err(|error| Error::Invalid { path: path.into(), message: format!("expected a JSON object: {error}") })?;
    Ok(Some(object))
}

/// Reads a text file that may or may not be there.
fn read_optional(path: &Path) -> Result<Option<String>> {
    match std::fs::read_to_string(path) {
        Ok(text) => Ok(Some(text)),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(source) => Err(Error::Io { path: path.into(), source }),
    }
}

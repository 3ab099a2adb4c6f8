//! The special tokens' texts, as a Hugging Face directory names them.

use super::read_optional_object;
use crate::Result;
use serde_json::Value;
use std::collections::BTreeMap;
use std::path::Path;

/// Texts of special tokens by role: `bos_token`, `eos_token`, `pad_token`, ...
///
/// Chat templates see them as variables of these names.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SpecialTokens(pub BTreeMap<String, String>);

impl SpecialTokens {
    /// Reads tokenizer_config.json and, for roles it does not name, special_tokens_map.json.
    pub fn load(dir: &Path) -> Result<Self> {
        let mut tokens = BTreeMap::new();
        for file in ["special_tokens_map.json", "tokenizer_config.json"] {
            for (role, value) in read_optional_object(&dir.join(file))?.unwrap_or_default() {
                if let (true, Some(text)) = (role.ends_with("_token"), token_text(&value)) {
                    tokens.insert(role, text.to_owned());
                }
            }
        }
        Ok(Self(tokens))
    }

    /// The text of a role's token.
    pub fn get(&self, role: &str) -> Option<&str> {
        self.0.get(role).map(String::as_str)
    }
}

/// A token is written as its text or as an object with the text under `content`.
fn token_text(value: &Value) -> Option<&str> {
    value.as_str().or_else(|| value.get("content")?.as_str())
}

//! Chat templates: Jinja programs that render a conversation into the text a model was trained on.
//!
//! Semantics are those of transformers' `apply_chat_template`; see the private module `jinja` for what that takes.

use super::{SpecialTokens, jinja, read_optional, read_optional_object};
use crate::{Error, Result};
use minijinja::{Environment, context};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use std::path::Path;

const NAME: &str = "chat_template";

/// One turn of a conversation.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Message {
    /// Who speaks: `system`, `user` or `assistant`, or what else the template knows.
    pub role: String,
    /// What is said.
    pub content: String,
}

impl Message {
    /// A message.
    pub fn new(role: impl Into<String>, content: impl Into<String>) -> Self {
        Self { role: role.into(), content: content.into() }
    }
}

/// A compiled chat template.
pub struct ChatTemplate {
    environment: Environment<'static>,
    special_tokens: SpecialTokens,
    /// More variables for the template, such as `enable_thinking` or `date_string`. A template that writes today's
    /// date (`strftime_now`) is reproducible only where such a variable fixes it, or the clock
    /// [stands](super::stop_the_clock).
    pub variables: Map<String, Value>,
}

impl ChatTemplate {
    /// Reads a model directory's template: chat_template.jinja, or `chat_template` in tokenizer_config.json, which is
    /// a text or a list of named ones, of which `default` is taken. `None` where the directory has no template.
    pub fn load(dir: &Path) -> Result<Option<Self>> {
        let file = dir.join("chat_template.jinja");
        let (path, source) = match read_optional(&file)? {
            Some(source) => (file, source),
            None => {
                let path = dir.join("tokenizer_config.json");
                let config = read_optional_object(&path)?.unwrap_or_default();
                match configured(config.get("chat_template")) {
                    Ok(None) => return Ok(None),
                    Ok(Some(source)) => (path, source.to_owned()),
                    Err(message) => return Err(Error::Invalid { path, message }),
                }
            }
        };
        match Self::from_source(&source, SpecialTokens::load(dir)?) {
            Err(Error::Template(message)) => Err(Error::Invalid { path, message }),
            template => template.map(Some),
        }
    }

    /// Compiles a template's text. The special tokens' texts are variables in it.
    pub fn from_source(source: &str, special_tokens: SpecialTokens) -> Result<Self> {
        let mut environment = jinja::environment();
        environment.add_template_owned(NAME, jinja::without_generation_tags(source)).map_err(jinja::error)?;
        Ok(Self { environment, special_tokens, variables: Map::new() })
    }

    /// Renders a conversation up to and including its last message.
    pub fn render(&self, messages: &[Message]) -> Result<String> {
        self.render_with(messages, false)
    }

    /// Renders a conversation and the opening of the assistant's next message.
    pub fn render_prompt(&self, messages: &[Message]) -> Result<String> {
        self.render_with(messages, true)
    }

    fn render_with(&self, messages: &[Message], add_generation_prompt: bool) -> Result<String> {
        let conversation = context! {
            messages => messages,
            add_generation_prompt => add_generation_prompt,
            tools => (),
            documents => (),
        };
        // The first of the merged contexts that knows a name wins.
        let variables = context! {
            ..minijinja::Value::from_serialize(&self.variables),
            ..conversation,
            ..minijinja::Value::from_serialize(&self.special_tokens.0)
        };
        let template = self.environment.get_template(NAME).map_err(jinja::error)?;
        template.render(variables).map_err(jinja::error)
    }
}

/// The template that tokenizer_config.json gives.
fn configured(value: Option<&Value>) -> std::result::Result<Option<&str>, String> {
    match value {
        None | Some(Value::Null) => Ok(None),
        Some(Value::String(source)) => Ok(Some(source)),
        Some(Value::Array(templates)) => {
            let text = |template: &'_ Value, key: &str| template.get(key).and_then(Value::as_str).map(str::to_owned);
            templates
                .iter()
                .find(|template| text(template, "name").as_deref() == Some("default"))
                .and_then(|template| template.get("template")?.as_str())
                .map(Some)
                .ok_or_else(|| {
                    let names: Vec<_> = templates.iter().filter_map(|template| text(template, "name")).collect();
                    format!("chat_template: expected a template named \"default\", found [{}]", names.join(", "))
                })
        }
        Some(other) => Err(format!("chat_template: expected a text or a list of named ones, found {other}")),
    }
}

//! What a row means: TRL's conventions, and those of the SPIN and SAPO authors.
//!
//! | columns | prompt | answer | rejected |
//! |---|---|---|---|
//! | `messages` | before the last assistant turn | the last assistant turn | |
//! | `prompt`, `chosen` (`rejected`) | `prompt` | `chosen` | `rejected` |
//! | `chosen` (`rejected`) | what both begin with | what follows | what follows |
//! | `real` (`generated`) | as `chosen` and `rejected`; an empty `generated` answer counts as none |
//!
//! `prompt`, `chosen` and `rejected` are all strings, taken as they are, or all lists of messages, which go through the
//! chat template. A string `prompt` beside whole conversations repeats their first turn and is not used, as in TRL.

use std::collections::BTreeSet;

use sapo_flow_engine::operator::ConfigIssue;
use sapo_flow_training::text::Message;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::files::kind;

/// The data's names for the columns we know; absent: the same name.
#[derive(Clone, Debug, Default, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Columns {
    /// A conversation whose last assistant turn is the answer.
    pub messages: Option<String>,
    /// The prompt: a string or a list of messages.
    pub prompt: Option<String>,
    /// The good answer: a string, or a list of messages with or without the prompt's.
    pub chosen: Option<String>,
    /// A worse answer, in the form of `chosen`.
    pub rejected: Option<String>,
    /// A conversation that ends in a person's answer.
    pub real: Option<String>,
    /// The same conversation with a model's answer.
    pub generated: Option<String>,
    /// Columns with numbers (`true` is 1, `false` 0) or texts that go along with the row: `values.NAME` in expressions.
    pub values: Vec<String>,
}

/// A row that has been understood.
#[derive(Clone, Debug, PartialEq)]
pub enum Example {
    /// Text to be used as it is.
    Plain {
        /// The prompt.
        prompt: String,
        /// The good answer.
        chosen: String,
        /// The worse answer.
        rejected: Option<String>,
    },
    /// A conversation for the chat template.
    Chat {
        /// The messages before the answer.
        prompt: Vec<Message>,
        /// The good answer.
        chosen: Message,
        /// The worse answer.
        rejected: Option<Message>,
        /// Whether messages after the answer were left out.
        trailing: bool,
    },
}

/// How a row is read.
#[derive(Clone, Copy)]
enum Way {
    Messages,
    Answers,
    Real,
}

/// A column of a row, by the name it has in the data.
#[derive(Clone, Copy)]
struct Column<'a> {
    name: &'a str,
    value: Option<&'a Value>,
}

impl Columns {
    /// Mappings that cannot go together: rows are read in one way.
    pub fn check(&self) -> Option<ConfigIssue> {
        let message = "expected names for one of: messages; prompt, chosen, rejected; real, generated";
        (self.mapped_ways().len() > 1).then(|| ConfigIssue::new("columns", message))
    }

    /// The prompt and the answers of a row.
    pub fn understand(&self, row: &Map<String, Value>) -> Result<Example, String> {
        match self.way(row)? {
            Way::Messages => {
                let column = column(row, &self.messages, "messages")?;
                split(messages(column.required()?, column.name)?, column.name)
            }
            Way::Answers => {
                let prompt = column(row, &self.prompt, "prompt")?;
                let rejected = column(row, &self.rejected, "rejected")?;
                answers(prompt, column(row, &self.chosen, "chosen")?, rejected)
            }
            Way::Real => {
                let generated = column(row, &self.generated, "generated")?;
                let generated = Column { value: generated.value.filter(|value| !ends_in_nothing(value)), ..generated };
                answers(Column { name: "prompt", value: None }, column(row, &self.real, "real")?, generated)
            }
        }
    }

    /// Keys of the row's messages that nothing reads, such as `tool_calls`: a chat template is given role and content.
    pub fn unread_keys(&self, row: &Map<String, Value>) -> BTreeSet<String> {
        let columns = [
            (&self.messages, "messages"),
            (&self.prompt, "prompt"),
            (&self.chosen, "chosen"),
            (&self.rejected, "rejected"),
            (&self.real, "real"),
            (&self.generated, "generated"),
        ];
        let lists = columns.into_iter().filter_map(|(mapped, name)| row.get(mapped.as_deref().unwrap_or(name)));
        let messages = lists.filter_map(Value::as_array).flatten().filter_map(Value::as_object);
        let given = messages.flatten().filter(|(_, value)| !value.is_null());
        given.map(|(key, _)| key.clone()).filter(|key| key != "role" && key != "content").collect()
    }

    /// As the mapping says, or else by the columns there are.
    fn way(&self, row: &Map<String, Value>) -> Result<Way, String> {
        if let Some(way) = self.mapped_ways().first() {
            return Ok(*way);
        }
        let ways = [("real", Way::Real), ("chosen", Way::Answers), ("messages", Way::Messages)];
        let found = ways.iter().find(|(name, _)| row.get(*name).is_some_and(|value| !value.is_null()));
        found.map(|(_, way)| *way).ok_or_else(|| {
            let names: Vec<String> = row.keys().map(|name| format!("`{name}`")).collect();
            format!(
                "expected `messages`, `prompt` and `chosen`, or `real`; the row has {}; name its columns under `columns`",
                if names.is_empty() { "no columns".into() } else { names.join(", ") }
            )
        })
    }

    fn mapped_ways(&self) -> Vec<Way> {
        let ways = [
            (Way::Messages, self.messages.is_some()),
            (Way::Answers, self.prompt.is_some() || self.chosen.is_some() || self.rejected.is_some()),
            (Way::Real, self.real.is_some() || self.generated.is_some()),
        ];
        ways.into_iter().filter_map(|(way, mapped)| mapped.then_some(way)).collect()
    }
}

impl<'a> Column<'a> {
    fn required(self) -> Result<&'a Value, String> {
        self.value.ok_or_else(|| format!("`{}` is missing", self.name))
    }
}

/// A column under its mapped name, which every row must then have, or under its own. Null is as absent.
fn column<'a>(row: &'a Map<String, Value>, mapped: &'a Option<String>, name: &'a str) -> Result<Column<'a>, String> {
    if let Some(mapped) = mapped
        && !row.contains_key(mapped)
    {
        return Err(format!("`{mapped}` (columns.{name}) is missing"));
    }
    let name = mapped.as_deref().unwrap_or(name);
    Ok(Column { name, value: row.get(name).filter(|value| !value.is_null()) })
}

/// A prompt with its answers, in strings or in messages.
fn answers(prompt: Column, chosen: Column, rejected: Column) -> Result<Example, String> {
    match chosen.required()? {
        Value::String(text) => {
            let rejected_text = rejected.value.map(|value| string(value, rejected.name)).transpose()?;
            match (prompt.value, &rejected_text) {
                (Some(value), _) => plain(string(value, prompt.name)?, text, rejected_text, chosen.name, rejected.name),
                (None, Some(rejected_text)) => {
                    let cut = common_prefix(text, rejected_text);
                    let worse = rejected_text[cut..].to_string();
                    plain(text[..cut].to_string(), &text[cut..], Some(worse), chosen.name, rejected.name)
                }
                (None, None) => Err(format!("`{}` is a string without `{}`", chosen.name, prompt.name)),
            }
        }
        Value::Array(_) => {
            let better = messages(chosen.required()?, chosen.name)?;
            let worse = rejected.value.map(|value| messages(value, rejected.name)).transpose()?;
            match (prompt.value, worse) {
                (Some(value @ Value::Array(_)), worse) => {
                    let answer = only_answer(better, chosen.name)?;
                    let worse = worse.map(|worse| only_answer(worse, rejected.name)).transpose()?;
                    chat(messages(value, prompt.name)?, answer, worse, false)
                }
                (_, None) => split(better, chosen.name),
                (_, Some(worse)) => {
                    let cut = common_messages(&better, &worse);
                    let prompt = better[..cut].to_vec();
                    let answer = only_answer(better[cut..].to_vec(), chosen.name)?;
                    chat(prompt, answer, Some(only_answer(worse[cut..].to_vec(), rejected.name)?), false)
                }
            }
        }
        other => Err(format!("`{}`: expected a string or a list of messages, found {}", chosen.name, kind(other))),
    }
}

/// Strings as an example; a good or a worse answer that is empty is an error.
fn plain(
    prompt: String,
    chosen: &str,
    rejected: Option<String>,
    chosen_name: &str,
    rejected_name: &str,
) -> Result<Example, String> {
    not_empty(chosen, chosen_name)?;
    rejected.as_ref().map(|text| not_empty(text, rejected_name)).transpose()?;
    Ok(Example::Plain { prompt, chosen: chosen.to_string(), rejected })
}

/// Messages as an example.
fn chat(prompt: Vec<Message>, chosen: Message, rejected: Option<Message>, trailing: bool) -> Result<Example, String> {
    if prompt.is_empty() {
        return Err("there is no message before the answer".into());
    }
    Ok(Example::Chat { prompt, chosen, rejected, trailing })
}

/// A conversation cut at its last assistant turn.
fn split(mut conversation: Vec<Message>, name: &str) -> Result<Example, String> {
    let last = conversation.iter().rposition(|message| message.role == "assistant");
    let last = last.ok_or_else(|| format!("`{name}` has no assistant turn"))?;
    let trailing = conversation.len() > last + 1;
    conversation.truncate(last + 1);
    let answer = only_answer(conversation.split_off(last), name)?;
    chat(conversation, answer, None, trailing)
}

/// The one message that an answer consists of.
fn only_answer(messages: Vec<Message>, name: &str) -> Result<Message, String> {
    let found = messages.len();
    let [answer] = <[Message; 1]>::try_from(messages)
        .map_err(|_| format!("`{name}`: expected one message after the prompt, the answer; found {found}"))?;
    if answer.role != "assistant" {
        return Err(format!("`{name}`: expected the answer to be the assistant's, found the role `{}`", answer.role));
    }
    not_empty(&answer.content, name)?;
    Ok(answer)
}

fn not_empty(answer: &str, name: &str) -> Result<(), String> {
    if answer.trim().is_empty() { Err(format!("`{name}`: the answer is empty")) } else { Ok(()) }
}

/// How many messages two conversations begin with alike, their last ones left apart.
fn common_messages(a: &[Message], b: &[Message]) -> usize {
    let alike = a.iter().zip(b).take_while(|(a, b)| a == b).count();
    alike.min(a.len().saturating_sub(1)).min(b.len().saturating_sub(1))
}

/// How many bytes two texts begin with alike, a space before the first difference left to the answers (as TRL does).
fn common_prefix(a: &str, b: &str) -> usize {
    let alike = a.char_indices().zip(b.chars()).find(|((_, a), b)| a != b);
    let cut = alike.map_or(a.len().min(b.len()), |((index, _), _)| index);
    if a[..cut].ends_with(' ') { cut - 1 } else { cut }
}

/// Whether a conversation's last message says nothing: how SPIN's data marks an answer yet to be generated.
fn ends_in_nothing(conversation: &Value) -> bool {
    match conversation {
        Value::Array(messages) => messages.last().is_none_or(|message| message.get("content") == Some(&"".into())),
        other => other == "",
    }
}

fn string(value: &Value, name: &str) -> Result<String, String> {
    let text = value.as_str().ok_or_else(|| format!("`{name}`: expected a string, found {}", kind(value)))?;
    Ok(text.to_string())
}

/// A list of messages, each with a role and a content.
fn messages(value: &Value, name: &str) -> Result<Vec<Message>, String> {
    let expected = |found| format!("`{name}`: expected a list of messages, found {found}");
    let list = value.as_array().ok_or_else(|| expected(kind(value)))?;
    if list.is_empty() {
        return Err(expected("an empty list"));
    }
    let message = |(index, value): (usize, &Value)| {
        let at = format!("{name}[{index}]");
        let object = value.as_object().ok_or_else(|| format!("`{at}`: expected a message, found {}", kind(value)))?;
        let text = |key: &str| match object.get(key) {
            Some(value) => string(value, &format!("{at}.{key}")),
            None => Err(format!("`{at}` has no `{key}`")),
        };
        Ok(Message::new(text("role")?, text("content")?))
    };
    list.iter().enumerate().map(message).collect()
}

#[cfg(test)]
mod tests;

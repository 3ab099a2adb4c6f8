//! Prompts, samples and pairs alike: what operators on any of them see of a record.
//!
//! A record has *parts*, which are token ids and, with a tokenizer, texts; and numbers by name.

use std::sync::Arc;

use sapo_flow_engine::operator::ConfigIssue;
use sapo_flow_engine::{OperatorError, Pair, PortType, Prompt, Record, Sample, TokenId, Values};
use sapo_flow_training::text::{TextTokenizer, encode_prompt};

use crate::examples::label;

/// Types of records that have parts and numbers.
pub const ITEMS: &[PortType] = &[PortType::Prompts, PortType::Samples, PortType::Pairs];

/// A part of a record.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part {
    /// The conversation before the response.
    Prompt,
    /// The better response.
    Chosen,
    /// The worse response.
    Rejected,
    /// The only response.
    Response,
}

impl Part {
    /// The parts of records of a type; a prompt or pair may lack its rejected response.
    pub fn of(port_type: PortType) -> &'static [Part] {
        match port_type {
            PortType::Prompts | PortType::Pairs => &[Part::Prompt, Part::Chosen, Part::Rejected],
            PortType::Samples => &[Part::Prompt, Part::Response],
            _ => &[],
        }
    }

    /// What its text is called.
    pub const fn name(self) -> &'static str {
        match self {
            Part::Prompt => "prompt",
            Part::Chosen => "chosen",
            Part::Rejected => "rejected",
            Part::Response => "response",
        }
    }

    /// What its tokens are called.
    pub const fn ids_name(self) -> &'static str {
        match self {
            Part::Prompt => "prompt_ids",
            Part::Chosen => "chosen_ids",
            Part::Rejected => "rejected_ids",
            Part::Response => "response_ids",
        }
    }

    /// What its number of tokens is called.
    pub const fn len_name(self) -> &'static str {
        match self {
            Part::Prompt => "prompt_len",
            Part::Chosen => "chosen_len",
            Part::Rejected => "rejected_len",
            Part::Response => "response_len",
        }
    }
}

/// A prompt, sample or pair.
#[derive(Clone, Debug, PartialEq)]
pub enum Item {
    /// Of [`PortType::Prompts`].
    Prompt(Arc<Prompt>),
    /// Of [`PortType::Samples`].
    Sample(Arc<Sample>),
    /// Of [`PortType::Pairs`].
    Pair(Arc<Pair>),
}

impl Item {
    /// The item that a record is.
    ///
    /// # Errors
    /// The record, where it is none: a retraction, as a rule.
    pub fn of(record: Record) -> Result<Self, Record> {
        match record {
            Record::Prompt(prompt) => Ok(Item::Prompt(prompt)),
            Record::Sample(sample) => Ok(Item::Sample(sample)),
            Record::Pair(pair) => Ok(Item::Pair(pair)),
            other => Err(other),
        }
    }

    /// As a record.
    pub fn into_record(self) -> Record {
        match self {
            Item::Prompt(prompt) => Record::Prompt(prompt),
            Item::Sample(sample) => Record::Sample(sample),
            Item::Pair(pair) => Record::Pair(pair),
        }
    }

    /// The type of edge it travels on.
    pub fn port_type(&self) -> PortType {
        match self {
            Item::Prompt(_) => PortType::Prompts,
            Item::Sample(_) => PortType::Samples,
            Item::Pair(_) => PortType::Pairs,
        }
    }

    /// The source (node name) of the data row it stems from.
    pub fn source(&self) -> &str {
        match self {
            Item::Prompt(prompt) => &prompt.source,
            Item::Sample(sample) => &sample.source,
            Item::Pair(pair) => &pair.source,
        }
    }

    /// The data row it stems from.
    pub fn row(&self) -> u64 {
        match self {
            Item::Prompt(prompt) => prompt.row,
            Item::Sample(sample) => sample.row,
            Item::Pair(pair) => pair.row,
        }
    }

    /// Version of the weights that generated its response, where a model of this run did.
    pub fn weights_version(&self) -> Option<u64> {
        match self {
            Item::Prompt(_) => None,
            Item::Sample(sample) => sample.weights_version,
            Item::Pair(pair) => pair.weights_version,
        }
    }

    /// Node, step and position of its making; prompts have none.
    pub fn made(&self) -> Option<(&str, u64, u32)> {
        match self {
            Item::Prompt(_) => None,
            Item::Sample(sample) => Some((&sample.origin, sample.step, sample.position)),
            Item::Pair(pair) => Some((&pair.origin, pair.step, pair.position)),
        }
    }

    /// Its numbers and texts by name.
    pub fn values(&self) -> &Values {
        match self {
            Item::Prompt(prompt) => &prompt.values,
            Item::Sample(sample) => &sample.values,
            Item::Pair(pair) => &pair.values,
        }
    }

    /// Its numbers and texts by name, to change.
    pub fn values_mut(&mut self) -> &mut Values {
        match self {
            Item::Prompt(prompt) => &mut Arc::make_mut(prompt).values,
            Item::Sample(sample) => &mut Arc::make_mut(sample).values,
            Item::Pair(pair) => &mut Arc::make_mut(pair).values,
        }
    }

    /// The tokens of a part, where it has that part.
    pub fn ids(&self, part: Part) -> Option<&[TokenId]> {
        match (self, part) {
            (Item::Prompt(prompt), Part::Prompt) => Some(&prompt.prompt_ids),
            (Item::Prompt(prompt), Part::Chosen) => Some(&prompt.chosen_ids),
            (Item::Prompt(prompt), Part::Rejected) => prompt.rejected_ids.as_deref(),
            (Item::Sample(sample), Part::Prompt) => Some(&sample.prompt_ids),
            (Item::Sample(sample), Part::Response) => Some(&sample.response_ids),
            (Item::Pair(pair), Part::Prompt) => Some(&pair.prompt_ids),
            (Item::Pair(pair), Part::Chosen) => Some(&pair.chosen_ids),
            (Item::Pair(pair), Part::Rejected) => pair.rejected_ids.as_deref(),
            _ => None,
        }
    }

    /// Replace a part. What was said of how the response came to be no longer holds, and goes.
    ///
    /// # Errors
    /// When records of this type have no such part.
    pub fn set_ids(&mut self, part: Part, ids: Vec<TokenId>) -> Result<(), OperatorError> {
        let kind = self.port_type();
        match (self, part) {
            (Item::Prompt(prompt), Part::Prompt) => Arc::make_mut(prompt).prompt_ids = ids,
            (Item::Prompt(prompt), Part::Chosen) => Arc::make_mut(prompt).chosen_ids = ids,
            (Item::Prompt(prompt), Part::Rejected) => Arc::make_mut(prompt).rejected_ids = Some(ids),
            (Item::Sample(sample), Part::Prompt) => Arc::make_mut(sample).prompt_ids = ids,
            (Item::Sample(sample), Part::Response) => {
                let sample = Arc::make_mut(sample);
                (sample.response_ids, sample.weights_version, sample.seed) = (ids, None, None);
            }
            (Item::Pair(pair), Part::Prompt) => Arc::make_mut(pair).prompt_ids = ids,
            (Item::Pair(pair), Part::Chosen) => {
                let pair = Arc::make_mut(pair);
                (pair.chosen_ids, pair.segment) = (ids, None);
            }
            (Item::Pair(pair), Part::Rejected) => {
                let pair = Arc::make_mut(pair);
                (pair.rejected_ids, pair.segment) = (Some(ids), None);
                (pair.weights_version, pair.seed) = (None, None);
            }
            _ => return Err(format!("{kind} have no `{}`", part.name()).into()),
        }
        Ok(())
    }

    /// Exchange the chosen and the rejected response. What was said of how the rejected one came to be goes.
    ///
    /// # Errors
    /// When it has not both.
    pub fn swap(&mut self) -> Result<(), OperatorError> {
        let lacking = format!("{} has no two responses to exchange", self.label());
        let (chosen, rejected) = match self {
            Item::Prompt(prompt) => {
                let prompt = Arc::make_mut(prompt);
                (&mut prompt.chosen_ids, &mut prompt.rejected_ids)
            }
            Item::Pair(pair) => {
                let pair = Arc::make_mut(pair);
                (pair.segment, pair.weights_version, pair.seed) = (None, None, None);
                (&mut pair.chosen_ids, &mut pair.rejected_ids)
            }
            Item::Sample(_) => return Err(lacking.into()),
        };
        std::mem::swap(chosen, rejected.as_mut().ok_or(lacking)?);
        Ok(())
    }

    /// How messages name it.
    pub fn label(&self) -> String {
        match self {
            Item::Prompt(prompt) => format!("row {}", prompt.row),
            Item::Sample(sample) => {
                let Sample { row, position, origin, step, .. } = &**sample;
                format!("row {row} (sample {position} of `{origin}` at step {step})")
            }
            Item::Pair(pair) => label(pair),
        }
    }
}

/// What is wrong with a name for a number, if anything: `values.NAME` must be an expression.
pub fn value_name_issue(key: &str, name: &str) -> Option<ConfigIssue> {
    let is_letter = |letter: char| letter.is_ascii_alphabetic() || letter == '_';
    let good = name.starts_with(is_letter) && name.chars().all(|letter| is_letter(letter) || letter.is_ascii_digit());
    (!good).then(|| ConfigIssue::new(key, format!("expected a name of letters, digits and `_`, found {name:?}")))
}

/// Parts as texts.
pub struct Texts {
    /// Turns tokens into text and back.
    pub tokenizer: TextTokenizer,
}

impl Texts {
    /// A part's text. A prompt's special tokens are written out, since they tell its turns apart; a response's, such as
    /// the EOS at its end, are left out.
    ///
    /// # Errors
    /// When the tokenizer does not know the tokens.
    pub fn decode(&self, part: Part, ids: &[TokenId]) -> Result<String, OperatorError> {
        Ok(match part {
            Part::Prompt => self.tokenizer.decode(ids)?,
            _ => self.tokenizer.decode_without_special_tokens(ids)?,
        })
    }

    /// A part's tokens: a prompt begins with one BOS where the model has one, a response ends in EOS.
    ///
    /// # Errors
    /// When the text is empty, or the tokenizer has no EOS.
    pub fn encode(&self, part: Part, text: &str) -> Result<Vec<TokenId>, OperatorError> {
        let mut ids = match part {
            Part::Prompt => encode_prompt(&self.tokenizer, text)?,
            _ => self.tokenizer.encode(text)?,
        };
        if text.trim().is_empty() || ids.is_empty() {
            return Err(format!("the {} is empty", part.name()).into());
        }
        if part != Part::Prompt && !ids.last().is_some_and(|last| self.tokenizer.eos_ids().contains(last)) {
            ids.push(self.tokenizer.eos_id().ok_or("the tokenizer names no EOS token")?);
        }
        Ok(ids)
    }
}

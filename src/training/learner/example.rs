//! What a learner learns from: a prompt with a better and a worse response.

use std::collections::BTreeMap;

use crate::model::Decoder;
use crate::objectives::Needs;
use crate::{Error, Result};

/// A prompt with its responses.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Example {
    /// The prompt's tokens.
    pub prompt_ids: Vec<u32>,
    /// The better response.
    pub chosen_ids: Vec<u32>,
    /// The worse response, where the objective compares two.
    pub rejected_ids: Option<Vec<u32>>,
    /// Summed log-probabilities of the chosen and the rejected response under the reference model, where the objective
    /// has one.
    pub reference: Option<(f32, f32)>,
    /// Numbers that objectives may ask for by name.
    pub numbers: BTreeMap<String, f64>,
    /// What error messages call the example.
    pub label: String,
}

impl Example {
    /// Tokens that a forward pass over prompt and responses goes through.
    pub fn tokens(&self) -> usize {
        let rejected = self.rejected_ids.as_ref().map_or(0, |ids| self.prompt_ids.len() + ids.len());
        self.prompt_ids.len() + self.chosen_ids.len() + rejected
    }

    /// Refuses tokens that are not in the vocabulary, and responses without a token to score.
    pub fn check_tokens(&self, decoder: &Decoder) -> Result<()> {
        decoder.check_ids(&self.prompt_ids).map_err(|error| self.error("prompt", error))?;
        for (name, ids) in
            [("chosen response", Some(&self.chosen_ids)), ("rejected response", self.rejected_ids.as_ref())]
        {
            let Some(ids) = ids else { continue };
            decoder.check_ids(ids).map_err(|error| self.error(name, error))?;
            if self.prompt_ids.len() + ids.len() < 2 || ids.is_empty() {
                let message = "expected tokens, and one before the first to predict it from, found too few";
                return Err(self.error(name, message));
            }
        }
        Ok(())
    }

    /// Refuses examples that lack what an objective needs.
    pub fn check_for(&self, needs: &Needs) -> Result<()> {
        if needs.rejected() && self.rejected_ids.is_none() {
            return Err(self.error("rejected response", "the objective compares responses, and there is none"));
        }
        if let Some(name) = needs.numbers.iter().find(|name| !self.numbers.contains_key(*name)) {
            let there: Vec<&str> = self.numbers.keys().map(String::as_str).collect();
            let message = format!("the objective reads it, and there is none (there is {})", there.join(", "));
            return Err(self.error(&format!("`{name}`"), message));
        }
        match self.reference {
            None if needs.reference() => {
                Err(self.error("reference", "the objective needs a reference model's log-probabilities, found none"))
            }
            Some((chosen, rejected)) if !(chosen.is_finite() && rejected.is_finite()) => {
                Err(self
                    .error("reference", format!("expected finite log-probabilities, found {chosen} and {rejected}")))
            }
            _ => Ok(()),
        }
    }

    /// Prompt and chosen response, of which the prompt is scored too or not.
    pub(super) fn chosen(&self, prompt_scored: bool) -> Sequence<'_> {
        Sequence { prompt: &self.prompt_ids, response: &self.chosen_ids, prompt_scored }
    }

    /// Prompt and rejected response.
    pub(super) fn rejected(&self) -> Option<Sequence<'_>> {
        let sequence = |response| Sequence { prompt: &self.prompt_ids, response, prompt_scored: false };
        self.rejected_ids.as_ref().map(|ids| sequence(ids))
    }

    fn error(&self, part: &str, message: impl std::fmt::Display) -> Error {
        Error::Argument(format!("example {}, {part}: {message}", self.label))
    }
}

/// A prompt and a response, which stand in one row of a batch.
#[derive(Clone, Copy)]
pub(super) struct Sequence<'a> {
    pub prompt: &'a [u32],
    pub response: &'a [u32],
    /// Whether the prompt's tokens are scored too.
    pub prompt_scored: bool,
}

impl Sequence<'_> {
    /// Tokens of prompt and response.
    pub fn len(&self) -> usize {
        self.prompt.len() + self.response.len()
    }

    /// All tokens.
    pub fn ids(&self) -> Vec<u32> {
        [self.prompt, self.response].concat()
    }

    /// Position of the first response token that can be predicted: nothing stands before the very first token.
    pub fn first_response(&self) -> usize {
        self.prompt.len().max(1)
    }

    /// Response tokens scored.
    pub fn response_tokens(&self) -> usize {
        self.len() - self.first_response()
    }

    /// Position of the first token that is scored.
    pub fn first_scored(&self) -> usize {
        if self.prompt_scored { 1 } else { self.first_response() }
    }

    /// Tokens scored.
    pub fn scored_tokens(&self) -> usize {
        self.len() - self.first_scored()
    }
}

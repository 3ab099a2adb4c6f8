//! Conversations as token ids: a prompt and the answer to learn from.
//!
//! What holds for every pair of prompt and answer given out here:
//! - The whole conversation is rendered and tokenized once, and cut where the answer begins, so that training sees the
//!   tokens that the model meets. Rendering the answer alone could insert a default system prompt into it.
//! - Where a token straddles the cut (a prompt that ends in a space, say), the two parts are tokenized apart: the prompt
//!   then has the tokens it has when a model is asked to continue it.
//! - The prompt begins with exactly what the tokenizer puts in front of a text (BOS, as a rule), whoever wrote it: the
//!   template or this module.
//! - The answer ends with exactly one end token, the first that the template wrote (what follows, such as the line
//!   break after `<|im_end|>`, is cut) or else the tokenizer's EOS.
//! - The answer is never empty.

use super::{ChatTemplate, Message, TextTokenizer};
use crate::{Error, Result};

/// A prompt and its answer in tokens.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EncodedAnswer {
    /// The conversation before the answer, the opening of the answer's turn included.
    pub prompt_ids: Vec<u32>,
    /// The answer, ending in EOS.
    pub answer_ids: Vec<u32>,
}

/// A prompt with a better and a worse answer in tokens.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EncodedPair {
    /// The conversation before the answers.
    pub prompt_ids: Vec<u32>,
    /// The better answer, ending in EOS.
    pub chosen_ids: Vec<u32>,
    /// The worse answer, ending in EOS.
    pub rejected_ids: Vec<u32>,
}

/// A conversation as text, with the place where its answer begins.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rendered {
    text: String,
    prompt_bytes: usize,
    answer: String,
}

impl Rendered {
    /// Renders a conversation. Its last message is the assistant's, and the answer.
    pub fn conversation(template: &ChatTemplate, messages: &[Message]) -> Result<Self> {
        let Some((answer, before)) = messages.split_last() else {
            return Err(Error::Argument("the conversation has no messages".into()));
        };
        if answer.role != "assistant" {
            let message = format!("the last message must be the assistant's, found the role \"{}\"", answer.role);
            return Err(Error::Argument(message));
        }
        let prompt = template.render_prompt(before)?;
        let text = template.render(messages)?;
        if !text.starts_with(&prompt) {
            return Err(Error::Template(differs(&prompt, &text)));
        }
        if text[prompt.len()..].trim().is_empty() && !answer.content.trim().is_empty() {
            return Err(Error::Template("it renders nothing of the answer".into()));
        }
        Ok(Self { text, prompt_bytes: prompt.len(), answer: answer.content.clone() })
    }

    /// Joins a prompt and an answer that need no template.
    pub fn plain(prompt: &str, answer: &str) -> Self {
        Self { text: format!("{prompt}{answer}"), prompt_bytes: prompt.len(), answer: answer.into() }
    }

    /// The text before the answer.
    pub fn prompt(&self) -> &str {
        &self.text[..self.prompt_bytes]
    }

    /// The conversation in tokens, under the guarantees at the top of this module.
    pub fn encode(&self, tokenizer: &TextTokenizer) -> Result<EncodedAnswer> {
        self.check_answer(tokenizer)?;
        let (prompt, answer) = match self.cut(tokenizer)? {
            Some(parts) => parts,
            None => self.tokenize_apart(tokenizer)?,
        };
        finish(tokenizer, prompt, answer)
    }

    /// Two answers to one prompt. Where tokenizing them with the prompt would give the prompt different tokens, prompt
    /// and answers are tokenized apart.
    pub fn encode_pair(chosen: &Self, rejected: &Self, tokenizer: &TextTokenizer) -> Result<EncodedPair> {
        if chosen.prompt() != rejected.prompt() {
            let message = "the chosen and the rejected answer belong to different prompts";
            return Err(Error::Argument(message.into()));
        }
        let mut better = chosen.encode(tokenizer).map_err(|error| of_answer("chosen", error))?;
        let mut worse = rejected.encode(tokenizer).map_err(|error| of_answer("rejected", error))?;
        if better.prompt_ids != worse.prompt_ids {
            let apart = |rendered: &Self| {
                let (prompt, answer) = rendered.tokenize_apart(tokenizer)?;
                finish(tokenizer, prompt, answer)
            };
            (better, worse) = (apart(chosen)?, apart(rejected)?);
        }
        let EncodedAnswer { prompt_ids, answer_ids: chosen_ids } = better;
        Ok(EncodedPair { prompt_ids, chosen_ids, rejected_ids: worse.answer_ids })
    }

    /// An answer must say something, and must not contain a token that would end it early.
    fn check_answer(&self, tokenizer: &TextTokenizer) -> Result<()> {
        let ends: Vec<String> = tokenizer.eos_ids().iter().filter_map(|&id| tokenizer.token(id)).collect();
        let mut said = self.answer.trim();
        while let Some(shorter) = ends.iter().find_map(|end| said.strip_suffix(end.as_str())) {
            said = shorter.trim_end();
        }
        if said.is_empty() {
            return Err(empty_answer());
        }
        match ends.iter().find(|end| said.contains(end.as_str())) {
            Some(end) => Err(Error::Argument(format!("the answer contains the end token {end} before its end"))),
            None => Ok(()),
        }
    }

    /// Tokens before and after the cut, or nothing where a token straddles it.
    fn cut(&self, tokenizer: &TextTokenizer) -> Result<Option<(Vec<u32>, Vec<u32>)>> {
        let tokens = tokenizer.encode_with_offsets(&self.text)?;
        let first = tokens.iter().position(|(_, bytes)| bytes.end > self.prompt_bytes).unwrap_or(tokens.len());
        let (prompt, answer) = tokens.split_at(first);
        if answer.iter().any(|(_, bytes)| bytes.start < self.prompt_bytes) {
            return Ok(None);
        }
        let ids = |tokens: &[(u32, _)]| tokens.iter().map(|&(id, _)| id).collect();
        Ok(Some((ids(prompt), ids(answer))))
    }

    fn tokenize_apart(&self, tokenizer: &TextTokenizer) -> Result<(Vec<u32>, Vec<u32>)> {
        let (prompt, answer) = self.text.split_at(self.prompt_bytes);
        Ok((tokenizer.encode(prompt)?, tokenizer.encode(answer)?))
    }
}

/// A conversation in tokens: the last message is the assistant's, and the answer.
pub fn encode_conversation(
    tokenizer: &TextTokenizer,
    template: &ChatTemplate,
    messages: &[Message],
) -> Result<EncodedAnswer> {
    Rendered::conversation(template, messages)?.encode(tokenizer)
}

/// A prompt to continue in tokens, with exactly one BOS where the model has one.
pub fn encode_prompt(tokenizer: &TextTokenizer, prompt: &str) -> Result<Vec<u32>> {
    Ok(with_one_beginning(tokenizer, tokenizer.encode(prompt)?))
}

fn finish(tokenizer: &TextTokenizer, prompt: Vec<u32>, mut answer: Vec<u32>) -> Result<EncodedAnswer> {
    let prompt_ids = with_one_beginning(tokenizer, prompt);
    if prompt_ids.is_empty() {
        return Err(Error::Argument("the prompt is empty, and the model has no BOS to begin with".into()));
    }
    match answer.iter().position(|id| tokenizer.eos_ids().contains(id)) {
        Some(0) => return Err(empty_answer()),
        Some(end) => answer.truncate(end + 1),
        None if answer.is_empty() => return Err(empty_answer()),
        None => answer.push(tokenizer.eos_id().ok_or_else(|| {
            Error::Argument("the model names no EOS token (tokenizer_config.json, config.json)".into())
        })?),
    }
    Ok(EncodedAnswer { prompt_ids, answer_ids: answer })
}

/// Puts BOS, or whatever else the tokenizer begins texts with, in front where it is missing, and takes it away where
/// it was written twice.
fn with_one_beginning(tokenizer: &TextTokenizer, mut ids: Vec<u32>) -> Vec<u32> {
    let leading = tokenizer.leading_ids();
    if !leading.is_empty() {
        if !ids.starts_with(leading) {
            ids.splice(..0, leading.iter().copied());
        }
        while ids[leading.len()..].starts_with(leading) {
            ids.drain(..leading.len());
        }
    }
    ids
}

fn empty_answer() -> Error {
    Error::Argument("the answer is empty".into())
}

fn of_answer(which: &str, error: Error) -> Error {
    match error {
        Error::Argument(message) => Error::Argument(format!("{which}: {message}")),
        other => other,
    }
}

/// Says where a rendered conversation leaves its own prompt.
fn differs(prompt: &str, whole: &str) -> String {
    let same: usize = prompt.chars().zip(whole.chars()).take_while(|(a, b)| a == b).map(|(a, _)| a.len_utf8()).sum();
    let excerpt = |text: &str| text[same..].chars().take(40).collect::<String>();
    format!(
        "the rendered conversation does not begin with its rendered prompt: after {same} bytes the prompt goes on with \
         {:?}, the conversation with {:?}",
        excerpt(prompt),
        excerpt(whole)
    )
}

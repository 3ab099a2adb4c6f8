//! Rewriting segments of answers with a model: what sampler and evaluator share.

use std::borrow::Cow;
use std::sync::Arc;

use sapo_flow_engine::OperatorError;
use sapo_flow_engine::operator::ConfigIssue;
use sapo_flow_engine::plan::Lengths;
use sapo_flow_engine::record::{Prompt, Segment, Values};
use sapo_flow_training::generate::{Choice, Decoding, Request, Sampling, Warpers, generate};
use sapo_flow_training::model::Compute;
use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::draws::Draws;
use crate::segments::{Truncation, bounds, fit, splice};
use crate::weights::SharedWeights;

/// How much of an answer is rewritten.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SegmentTokens {
    /// At most so many tokens, from a random start.
    AtMost(usize),
    /// The whole response, however long it becomes.
    All,
}

impl<'de> Deserialize<'de> for SegmentTokens {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        #[derive(Deserialize)]
        #[serde(untagged)]
        enum Written {
            Number(usize),
            Word(String),
        }
        match Written::deserialize(deserializer)? {
            Written::Number(tokens) => Ok(SegmentTokens::AtMost(tokens)),
            Written::Word(word) if word == "all" => Ok(SegmentTokens::All),
            Written::Word(word) => {
                Err(serde::de::Error::custom(format!("segment_tokens: expected a number or `all`, found `{word}`")))
            }
        }
    }
}

impl Serialize for SegmentTokens {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            SegmentTokens::AtMost(tokens) => serializer.serialize_u64(*tokens as u64),
            SegmentTokens::All => serializer.serialize_str("all"),
        }
    }
}

impl JsonSchema for SegmentTokens {
    fn schema_name() -> Cow<'static, str> {
        "SegmentTokens".into()
    }

    fn inline_schema() -> bool {
        true
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({"anyOf": [{"type": "integer", "minimum": 1}, {"type": "string", "enum": ["all"]}]})
    }
}

/// Defaults of the keys that operators which let a model write have in common: the SAPO authors' settings.
pub mod defaults {
    use super::SegmentTokens;
    use crate::segments::Truncation;

    /// Tokens rewritten in an answer.
    pub fn segment_tokens() -> SegmentTokens {
        SegmentTokens::AtMost(256)
    }

    /// Tokens of prompt and answer.
    pub fn max_length() -> usize {
        2048
    }

    /// Tokens of a prompt.
    pub fn max_prompt_tokens() -> usize {
        1792
    }

    /// The end of a prompt that is kept.
    pub fn truncation() -> Truncation {
        Truncation::KeepEnd
    }

    /// Softmax temperature.
    pub fn temperature() -> f64 {
        0.7
    }

    /// Likeliest tokens to draw from.
    pub fn top_k() -> usize {
        50
    }

    /// Probability of the tokens to draw from.
    pub fn top_p() -> f64 {
        0.95
    }
}

/// Which part of an answer is rewritten, and how tokens are drawn.
#[derive(Clone, Debug)]
pub struct RewriteSettings {
    /// Tokens rewritten in each answer.
    pub segment_tokens: SegmentTokens,
    /// Longest prompt and answer together, in tokens.
    pub max_length: usize,
    /// Longest prompt where both are over max_length together, in tokens.
    pub max_prompt_tokens: usize,
    /// Which end of such a prompt is kept.
    pub truncation: Truncation,
    /// Softens or sharpens the distribution.
    pub temperature: f64,
    /// Draw from the k likeliest tokens only; 0 for all.
    pub top_k: usize,
    /// Draw from the likeliest tokens with this probability together.
    pub top_p: f64,
    /// Rejected responses made for each prompt.
    pub responses_per_prompt: usize,
    /// How the work is arranged.
    pub decoding: Decoding,
}

impl RewriteSettings {
    /// What is wrong with the settings, by the keys that hold them in YAML.
    pub fn issues(&self) -> Vec<ConfigIssue> {
        let mut issues = Vec::new();
        let mut expect = |good: bool, key: &str, expected: &str, found: String| {
            if !good {
                issues.push(ConfigIssue::new(key, format!("expected {expected}, found {found}")));
            }
        };
        let no_segment = self.segment_tokens == SegmentTokens::AtMost(0);
        expect(!no_segment, "segment_tokens", "a number above 0 or `all`", "0".into());
        expect(self.responses_per_prompt > 0, "responses_per_prompt", "a number above 0", "0".into());
        let (temperature, top_p) = (self.temperature, self.top_p);
        let warm = temperature.is_finite() && temperature > 0.0;
        expect(warm, "temperature", "a finite number above 0", temperature.to_string());
        expect(top_p > 0.0 && top_p <= 1.0, "top_p", "a number above 0 and up to 1", top_p.to_string());
        let less = format!("less than max_length {}", self.max_length);
        let room = self.max_prompt_tokens < self.max_length;
        expect(room, "max_prompt_tokens", &less, self.max_prompt_tokens.to_string());
        issues
    }

    /// How tokens are chosen.
    pub fn choice(&self) -> Choice {
        let top_k = (self.top_k > 0).then_some(self.top_k);
        let top_p = (self.top_p < 1.0).then_some(self.top_p);
        Choice::Sample(Warpers { temperature: self.temperature, top_k, top_p })
    }

    /// What a pair made of this row is expected to share, for plans: up to the middle of the starts that its segment may have.
    pub fn pair(&self, row: Lengths) -> Lengths {
        let SegmentTokens::AtMost(segment) = self.segment_tokens else { return row };
        let (prompt, answer) = (row.prompt as usize, row.response as usize);
        let (_, last_start) = bounds(prompt, answer, segment, self.max_length, self.max_prompt_tokens);
        let shared = last_start as u64 / 2;
        Lengths { prompt: row.prompt + shared, shared_answer: shared, response: row.response - shared }
    }
}

/// A response to be generated: of which prompt, and in place of what.
struct Task<'a> {
    source: &'a str,
    row: u64,
    values: &'a Values,
    prompt: &'a [u32],
    answer: &'a [u32],
    start: usize,
    len: usize,
    seed: u64,
}

/// A rewritten answer.
#[derive(Clone, Debug)]
pub struct Rewritten {
    /// The source of the data row.
    pub source: String,
    /// The data row.
    pub row: u64,
    /// The prompt's numbers.
    pub values: Values,
    /// The prompt, cut where it had to be.
    pub prompt: Vec<u32>,
    /// The answer, likewise.
    pub answer: Vec<u32>,
    /// The answer with the segment rewritten.
    pub rejected: Vec<u32>,
    /// What was rewritten.
    pub segment: Segment,
    /// Seed of the segment's tokens.
    pub seed: u64,
    /// Tokens generated, those past the segment's end included.
    pub generated: usize,
}

/// Rewrite a segment of each prompt's answer, `responses_per_prompt` times each, in the order of the prompts.
///
/// # Errors
/// Those of generation.
pub fn rewrite(
    weights: &SharedWeights,
    prompts: &[Arc<Prompt>],
    settings: &RewriteSettings,
    random: &Draws,
    step: u64,
    compute: &Compute,
) -> Result<Vec<Rewritten>, OperatorError> {
    let tasks = tasks(prompts, settings, random, step);
    let request = |task: &Task| Request {
        prompt_ids: [task.prompt, &task.answer[..task.start]].concat(),
        max_new_tokens: task.len,
        seed: task.seed,
    };
    let requests: Vec<Request> = tasks.iter().map(request).collect();
    let eos_ids = &weights.decoder.config.eos_token_ids;
    let (choice, decoding) = (settings.choice(), settings.decoding);
    let sampling = Sampling { choice, eos_ids: eos_ids.clone(), compute: *compute, decoding };
    let generations = generate(&weights.decoder, &weights.parameters, &requests, &sampling)?;
    let rewritten = |(task, tokens): (&Task, &[u32])| {
        let (rejected, len, ended) = splice(task.answer, task.start, task.len, tokens, eos_ids);
        Rewritten {
            source: task.source.to_string(),
            row: task.row,
            values: task.values.clone(),
            prompt: task.prompt.to_vec(),
            answer: task.answer.to_vec(),
            rejected,
            segment: Segment { start: task.start, len, ended },
            seed: task.seed,
            generated: tokens.len(),
        }
    };
    Ok(tasks.iter().zip(generations.iter().map(|generation| generation.tokens.as_slice())).map(rewritten).collect())
}

/// What to generate at a step.
fn tasks<'a>(prompts: &'a [Arc<Prompt>], settings: &RewriteSettings, random: &Draws, step: u64) -> Vec<Task<'a>> {
    let mut tasks = Vec::new();
    let (max_length, max_prompt) = (settings.max_length, settings.max_prompt_tokens);
    for prompt in prompts {
        let (ids, answer) = fit(&prompt.prompt_ids, &prompt.chosen_ids, max_length, max_prompt, settings.truncation);
        let (len, last_start) = match settings.segment_tokens {
            SegmentTokens::All => (max_length - ids.len(), 0),
            SegmentTokens::AtMost(tokens) => {
                bounds(prompt.prompt_ids.len(), prompt.chosen_ids.len(), tokens, max_length, max_prompt)
            }
        };
        for _ in 0..settings.responses_per_prompt {
            // Numbers 2n and 2n + 1 of the step are this response's: its segment's start, its tokens' seed.
            let n = 2 * tasks.len() as u64;
            let start = random.below(step, n, last_start + 1);
            let (source, row) = (prompt.source.as_str(), prompt.row);
            let (values, seed) = (&prompt.values, random.seed(step, n + 1));
            tasks.push(Task { source, row, values, prompt: ids, answer, start, len, seed });
        }
    }
    tasks
}

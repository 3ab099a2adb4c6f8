//! `openai_judge`: scores of samples and pairs by a model behind OpenAI's HTTP interface.
//!
//! A language model as judge: MT-Bench (arXiv 2306.05685), Self-Rewarding Language Models (arXiv 2401.10020).

use std::path::PathBuf;

use regex::Regex;
use sapo_flow_engine::operator::{ConfigIssue, Connections};
use sapo_flow_engine::{
    BuildContext, Define, Inputs, Metrics, NodePlan, Operator, OperatorError, Outputs, Placement, PlanContext,
    PortSpec, PortType, Record,
};
use sapo_flow_training::text::TextTokenizer;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use crate::data::tokenizer_files;
use crate::draws::Draws;
use crate::item::{ITEMS, Item, Texts, value_name_issue};
use crate::openai::client::Client;
use crate::openai::message::MessageTemplate;
use crate::openai::{ServerConfig, check_request};

/// What happens to a record when no score can be read from the reply about it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Unreadable {
    /// The run stops, with the reply.
    Stop,
    /// The record is left out and counted.
    Drop,
}

/// What `openai_judge` takes under `with`.
#[derive(Clone, Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct OpenaiJudgeConfig {
    /// The server.
    pub server: ServerConfig,
    /// A model directory with the tokenizer that the records were made with.
    pub tokenizer: PathBuf,
    /// The question: a Jinja template over `prompt`, `response` (samples) or `chosen` and `rejected` (pairs), `values`, `row`.
    pub message: String,
    /// A system message before it.
    #[serde(default)]
    pub system: Option<String>,
    /// A regular expression that finds the score in the reply: its first group, or all of it. Absent: the first number.
    #[serde(default)]
    pub pattern: Option<String>,
    /// Where the reply is JSON, the score's place in it as a JSON pointer, such as /score.
    #[serde(default)]
    pub json: Option<String>,
    /// The name under which the score joins the record's values.
    #[serde(default = "default_name", rename = "as")]
    pub name: String,
    /// Lowest score; one below is unreadable.
    #[serde(default)]
    pub min: Option<f64>,
    /// Highest score; one above is unreadable.
    #[serde(default)]
    pub max: Option<f64>,
    /// What happens where no score can be read: stop, or drop the record.
    #[serde(default = "default_unreadable")]
    pub unreadable: Unreadable,
    /// Pairs with a score below this have their chosen and rejected responses exchanged; absent: none have.
    #[serde(default)]
    pub swap_below: Option<f64>,
    /// The judge's temperature; 0 takes the likeliest tokens.
    #[serde(default)]
    #[schemars(range(min = 0.0))]
    pub temperature: f64,
    /// Most tokens of a reply, as the server counts them.
    #[serde(default = "default_max_tokens")]
    #[schemars(range(min = 1))]
    pub max_tokens: usize,
    /// More keys for the request, such as `{response_format: {type: json_object}}` or `{top_p: 0.9}`; none that the
    /// operator's own settings stand for.
    #[serde(default)]
    pub request: Map<String, Value>,
}

fn default_name() -> String {
    "score".into()
}

fn default_unreadable() -> Unreadable {
    Unreadable::Stop
}

fn default_max_tokens() -> usize {
    256
}

/// A number, the first in a text. Its minus may be the one that typesetters use.
const NUMBER: &str = r"[-+\u{2212}]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][-+\u{2212}]?[0-9]+)?";

/// What a text says as a number.
fn number(text: &str) -> Result<f64, String> {
    text.trim().replace('\u{2212}', "-").parse().map_err(|_| format!("{text:?} is no number"))
}

/// Where the path of the server's conversations is.
const PATH: &str = "/chat/completions";

/// How a score is found in a reply.
enum Reading {
    Pattern(Regex),
    Json(String),
}

impl Reading {
    fn of(config: &OpenaiJudgeConfig) -> Result<Self, ConfigIssue> {
        match (&config.json, &config.pattern) {
            (Some(_), Some(_)) => Err(ConfigIssue::new("json", "is given along with `pattern`: leave out one of them")),
            (Some(pointer), None) if !pointer.starts_with('/') => {
                Err(ConfigIssue::new("json", format!("expected a JSON pointer such as /score, found {pointer:?}")))
            }
            (Some(pointer), None) => Ok(Reading::Json(pointer.clone())),
            (None, pattern) => {
                let pattern = pattern.as_deref().unwrap_or(NUMBER);
                let regex = Regex::new(pattern);
                regex.map(Reading::Pattern).map_err(|error| ConfigIssue::new("pattern", error.to_string()))
            }
        }
    }

    /// The score in a reply, or what is there instead.
    fn read(&self, reply: &str) -> Result<f64, String> {
        let score: f64 = match self {
            Reading::Pattern(regex) => {
                let missing = || match regex.as_str() {
                    NUMBER => "no number occurs".to_owned(),
                    pattern => format!("`{pattern}` does not occur"),
                };
                let found = regex.captures(reply).ok_or_else(missing)?;
                number(found.get(1).or(found.get(0)).map_or("", |part| part.as_str()))?
            }
            Reading::Json(pointer) => {
                let value: Value = serde_json::from_str(reply).map_err(|error| format!("it is no JSON ({error})"))?;
                match value.pointer(pointer) {
                    Some(Value::String(text)) => number(text)?,
                    Some(value) => value.as_f64().ok_or_else(|| format!("{pointer} is no number"))?,
                    None => return Err(format!("there is no {pointer}")),
                }
            }
        };
        if score.is_finite() { Ok(score) } else { Err(format!("{score} is not finite")) }
    }
}

/// See the [module](self).
pub struct OpenaiJudge {
    node: String,
    config: OpenaiJudgeConfig,
    client: Client,
    texts: Texts,
    message: MessageTemplate,
    reading: Reading,
    random: Draws,
}

impl OpenaiJudge {
    /// The body that asks about the n-th record of a step.
    fn body(&self, item: &Item, step: u64, n: u64) -> Result<Value, OperatorError> {
        let question = json!({"role": "user", "content": self.message.render(item, &self.texts)?});
        let system = self.config.system.as_ref().map(|content| json!({"role": "system", "content": content}));
        let mut body = self.config.request.clone();
        let mut set = |key: &str, value: Value| body.insert(key.to_owned(), value);
        set("model", self.config.server.model.as_str().into());
        set("messages", system.into_iter().chain([question]).collect::<Vec<_>>().into());
        set("max_tokens", self.config.max_tokens.into());
        set("temperature", self.config.temperature.into());
        set("seed", (self.random.seed(step, n) >> 33).into());
        Ok(body.into())
    }

    /// The score in a reply.
    fn score(&self, reply: &Value) -> Result<f64, String> {
        let content = reply["choices"][0]["message"]["content"].as_str();
        let shown = |text: &str| text.chars().take(300).collect::<String>();
        let content = content.ok_or_else(|| format!("the reply has no content: {}", shown(&reply.to_string())))?;
        let score = self.reading.read(content).and_then(|score| {
            let (low, high) = (self.config.min, self.config.max);
            match low.is_some_and(|low| score < low) || high.is_some_and(|high| score > high) {
                true => Err(format!("{score} is out of bounds")),
                false => Ok(score),
            }
        });
        score.map_err(|error| format!("no score can be read, since {error}: {}", shown(content)))
    }

    /// The record with its score, its responses exchanged where they are in the wrong order; whether they were.
    fn apply(&self, mut item: Item, score: f64) -> Result<(Item, bool), OperatorError> {
        let swap = self.config.swap_below.is_some_and(|least| score < least);
        if swap {
            item.swap()?;
        }
        let name = &self.config.name;
        item.values_mut().insert(name.clone(), score);
        if self.config.swap_below.is_some() {
            item.values_mut().insert(format!("{name}_swapped"), f64::from(swap));
        }
        Ok((item, swap))
    }
}

impl Operator for OpenaiJudge {
    fn step(&mut self, step: u64, mut inputs: Inputs) -> Result<Outputs, OperatorError> {
        let records: Vec<Result<Item, Record>> = inputs.take("records").into_iter().map(Item::of).collect();
        let items = records.iter().filter_map(|record| record.as_ref().ok());
        let bodies = (0..).zip(items).map(|(n, item)| self.body(item, step, n)).collect::<Result<Vec<_>, _>>()?;
        let replies = self.client.post_all(PATH, &bodies)?;
        let mut outputs = Outputs::new();
        let (mut scores, mut swapped, mut unreadable) = (Vec::new(), 0, 0);
        let mut list = replies.list.iter();
        for record in records {
            let item = match record {
                Ok(item) => item,
                Err(other) => {
                    outputs.push("records", other);
                    continue;
                }
            };
            match self.score(list.next().unwrap_or(&Value::Null)) {
                Ok(score) => {
                    let (item, swap) = self.apply(item, score)?;
                    scores.push(score);
                    swapped += u32::from(swap);
                    outputs.push("records", item.into_record());
                }
                Err(_) if self.config.unreadable == Unreadable::Drop => unreadable += 1,
                Err(error) => return Err(format!("{}: {}: {error}", self.client.url(PATH), item.label()).into()),
            }
        }
        let mut metrics = Metrics::default();
        let mut set = |name: &str, value: f64| metrics.values.insert(format!("{}/{name}", self.node), value);
        if !scores.is_empty() {
            set(&self.config.name, scores.iter().sum::<f64>() / scores.len() as f64);
        }
        if self.config.swap_below.is_some() {
            set("swapped", f64::from(swapped));
        }
        set("unreadable", f64::from(unreadable));
        set("retries", replies.retries as f64);
        outputs.push("metrics", Record::Metrics(metrics.into()));
        Ok(outputs)
    }
}

impl Define for OpenaiJudge {
    const NAME: &'static str = "openai_judge";
    const SUMMARY: &'static str = "Has a model on a server with OpenAI's HTTP interface score samples or pairs.";
    const DOCS: &'static str = "\
Asks the server one question about each record, several at a time, written by the template `message`, in which texts have \
no special tokens. The score is the first number in the reply, such as 7, -.5 or 1e-3; or what `pattern` finds; or, where \
the model answers in JSON, what stands at `json`. It joins the record's numbers as `values.score`, or under the name `as`.

With `swap_below`, a pair whose score is lower has its responses exchanged, so that the judge decides which is chosen; the \
score stays as the judge gave it, and `score_swapped` (after `as`) is 1 for such pairs, 0 for others. Retractions pass.

A request that meets a busy or failing server, or no answer in time, is made again. Each carries a seed, a function of \
(seed, node, step, record). Whether the same question gets the same reply is up to the server, and with it whether a \
resumed run is the same to the byte.

State: none. Errors: the server cannot be reached or refuses; no score in a reply, or one out of `min` and `max` \
(`unreadable: drop` leaves such records out and counts them); a pair without a rejected response that is to be swapped.
Metrics: the mean score as NODE/NAME, NODE/swapped, NODE/unreadable, NODE/retries.";
    const EXAMPLE: &'static str = "\
prompts: {op: prompt_source, with: {path: data/chat_pairs.jsonl, tokenizer: models/smollm2-135m-instruct, batch_size: 8}}
judged:
  op: openai_judge
  in: prompts.pairs
  with:
    server: {url: 'http://localhost:8000/v1', model: my-judge, api_key_env: OPENAI_API_KEY, requests_per_minute: 500}
    tokenizer: models/smollm2-135m-instruct
    message: |
      Question: {{ prompt }}
      Answer A: {{ chosen }}
      Answer B: {{ rejected }}
      How much better is A than B, from -5 to 5? Reply with a number.
    min: -5
    max: 5
    swap_below: 0
batches: {op: batcher, in: judged, with: {batch_size: 8, max_length: 2048}}
";
    const INPUTS: &'static [PortSpec] =
        &[PortSpec::new("records", ITEMS, "What to judge, all of one type.").many().honouring_retractions()];
    const OUTPUTS: &'static [PortSpec] = &[
        PortSpec::new("records", ITEMS, "The records with their scores.").following("records").passing_retractions(),
        PortSpec::new("metrics", &[PortType::Metrics], "The mean score; counts."),
    ];
    const PLACEMENT: Placement = Placement::Device;
    type Config = OpenaiJudgeConfig;

    fn check(config: &Self::Config) -> Vec<ConfigIssue> {
        let mut issues = config.server.check();
        issues.extend(check_request("request", &config.request, &["temperature"]));
        issues.extend(value_name_issue("as", &config.name));
        issues.extend(Reading::of(config).err());
        if let Err(message) = MessageTemplate::read(&config.message, None) {
            issues.push(ConfigIssue::new("message", message));
        }
        if let (Some(min), Some(max)) = (config.min, config.max)
            && min > max
        {
            issues.push(ConfigIssue::new("min", format!("expected at most max {max}, found {min}")));
        }
        issues
    }

    fn check_connections(config: &Self::Config, connections: &Connections) -> Vec<ConfigIssue> {
        let mut issues = Vec::new();
        let port_type = connections.input("records");
        if let Err(message) = MessageTemplate::read(&config.message, port_type) {
            issues.push(ConfigIssue::new("message", message));
        }
        if config.swap_below.is_some() && port_type == Some(PortType::Samples) {
            issues.push(ConfigIssue::new("swap_below", "Samples have no two responses to exchange"));
        }
        issues
    }

    fn plan(_: &Self::Config, context: &PlanContext) -> Result<NodePlan, OperatorError> {
        Ok(NodePlan { emits: context.input("records"), ..NodePlan::default() })
    }

    fn files(config: &Self::Config) -> Vec<PathBuf> {
        tokenizer_files(&config.tokenizer)
    }

    fn build(config: Self::Config, context: &BuildContext) -> Result<Self, OperatorError> {
        Ok(OpenaiJudge {
            node: context.node.into(),
            client: Client::new(&config.server)?,
            texts: Texts { tokenizer: TextTokenizer::load(&config.tokenizer)? },
            message: MessageTemplate::read(&config.message, None)?,
            reading: Reading::of(&config).map_err(|issue| issue.message)?,
            random: Draws::new(context.run.seed, context.node),
            config,
        })
    }
}

#[cfg(test)]
mod tests;

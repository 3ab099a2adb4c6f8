//! `openai_sampler`: responses to prompts from a server with OpenAI's HTTP interface, such as vLLM or llama.cpp.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Instant;

use sapo_flow_engine::operator::ConfigIssue;
use sapo_flow_engine::plan::Emits;
use sapo_flow_engine::{
    BuildContext, Define, Inputs, Metrics, NodePlan, Operator, OperatorError, Outputs, Placement, PlanContext,
    PortSpec, PortType, Prompt, Record, Retraction, Sample, TokenId,
};
use sapo_flow_training::text::TextTokenizer;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use crate::data::tokenizer_files;
use crate::draws::Draws;
use crate::item::{Item, Texts};
use crate::openai::client::Client;
use crate::openai::message::MessageTemplate;
use crate::openai::{ServerConfig, check_request};

/// How a prompt is put to the server.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum PromptAs {
    /// Its text, special tokens written out, to be completed (`/completions`).
    Text,
    /// Its token ids, to be completed: the server's model must have the same tokenizer.
    Tokens,
    /// A message of a user (`/chat/completions`), which the server renders by its own template.
    Chat,
}

/// What `openai_sampler` takes under `with`.
#[derive(Clone, Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct OpenaiSamplerConfig {
    /// The server.
    pub server: ServerConfig,
    /// A model directory with the tokenizer that the prompts were made with, and that the responses get.
    pub tokenizer: PathBuf,
    /// How a prompt is put to the server: text, tokens or chat.
    #[serde(default = "default_prompt")]
    pub prompt: PromptAs,
    /// With `prompt: chat`, the message, a Jinja template over `prompt`, `chosen`, `values` and `row`.
    #[serde(default = "default_message")]
    pub message: String,
    /// Responses to each prompt.
    #[serde(default = "default_one")]
    #[schemars(range(min = 1))]
    pub responses_per_prompt: usize,
    /// Most tokens of a response, as the server counts them.
    #[serde(default = "default_max_tokens")]
    #[schemars(range(min = 1))]
    pub max_tokens: usize,
    /// Softens (above 1) or sharpens (below 1) the model's distribution; 0 takes the likeliest tokens.
    #[serde(default = "default_temperature")]
    #[schemars(range(min = 0.0))]
    pub temperature: f64,
    /// Draw from the likeliest tokens that have this probability together; 1 for all.
    #[serde(default = "default_top_p")]
    #[schemars(extend("exclusiveMinimum" = 0, "maximum" = 1))]
    pub top_p: f64,
    /// More keys for the request, such as `{top_k: 50}` for vLLM; none that the operator's own settings stand for.
    #[serde(default)]
    pub request: Map<String, Value>,
}

fn default_prompt() -> PromptAs {
    PromptAs::Text
}

fn default_message() -> String {
    "{{ prompt }}".into()
}

fn default_one() -> usize {
    1
}

fn default_max_tokens() -> usize {
    256
}

fn default_temperature() -> f64 {
    1.0
}

fn default_top_p() -> f64 {
    1.0
}

/// See the [module](self).
pub struct OpenaiSampler {
    node: String,
    config: OpenaiSamplerConfig,
    client: Client,
    texts: Texts,
    message: MessageTemplate,
    random: Draws,
}

/// A reply's first choice.
struct Choice {
    text: String,
    /// Whether the model ended the response itself.
    ended: bool,
    /// Whether the response was cut at `max_tokens`.
    cut: bool,
}

impl OpenaiSampler {
    fn path(&self) -> &'static str {
        if self.config.prompt == PromptAs::Chat { "/chat/completions" } else { "/completions" }
    }

    /// The body that asks for the n-th response of a step.
    fn body(&self, prompt: &Arc<Prompt>, step: u64, n: u64) -> Result<Value, OperatorError> {
        let mut body = self.config.request.clone();
        let mut set = |key: &str, value: Value| body.insert(key.to_owned(), value);
        match self.config.prompt {
            PromptAs::Text => set("prompt", self.texts.tokenizer.decode(self.without_leading(prompt))?.into()),
            PromptAs::Tokens => set("prompt", json!(prompt.prompt_ids)),
            PromptAs::Chat => {
                let content = self.message.render(&Item::Prompt(prompt.clone()), &self.texts)?;
                set("messages", json!([{"role": "user", "content": content}]))
            }
        };
        set("model", self.config.server.model.as_str().into());
        set("max_tokens", self.config.max_tokens.into());
        set("temperature", self.config.temperature.into());
        set("top_p", self.config.top_p.into());
        // Servers differ in how large a seed they take: all take 31 bits.
        set("seed", (self.random.seed(step, n) >> 33).into());
        Ok(body.into())
    }

    /// The prompt's tokens less what servers put in front of a text themselves.
    fn without_leading<'p>(&self, prompt: &'p Prompt) -> &'p [TokenId] {
        let ids = &prompt.prompt_ids[..];
        ids.strip_prefix(self.texts.tokenizer.leading_ids()).unwrap_or(ids)
    }

    fn read(&self, reply: &Value) -> Result<Choice, OperatorError> {
        let choice = &reply["choices"][0];
        let text = if self.config.prompt == PromptAs::Chat { &choice["message"]["content"] } else { &choice["text"] };
        let text = text.as_str().ok_or_else(|| {
            let found: String = reply.to_string().chars().take(200).collect();
            format!("{}: expected a reply with a choice and its text, found {found}", self.client.url(self.path()))
        })?;
        let reason = choice["finish_reason"].as_str();
        Ok(Choice { text: text.to_owned(), ended: reason == Some("stop"), cut: reason == Some("length") })
    }

    /// A response's tokens; none where there is nothing to learn from: it is empty and was not ended, or was withheld.
    fn tokens(&self, choice: &Choice) -> Result<Option<Vec<TokenId>>, OperatorError> {
        let tokenizer = &self.texts.tokenizer;
        let mut ids = tokenizer.encode(&choice.text)?;
        if choice.ended && !ids.last().is_some_and(|last| tokenizer.eos_ids().contains(last)) {
            ids.push(tokenizer.eos_id().ok_or("the tokenizer names no EOS token")?);
        }
        Ok(Some(ids).filter(|ids| !ids.is_empty() && (choice.ended || choice.cut)))
    }
}

impl Operator for OpenaiSampler {
    fn step(&mut self, step: u64, mut inputs: Inputs) -> Result<Outputs, OperatorError> {
        let mut outputs = Outputs::new();
        for retraction in inputs.retractions("prompts") {
            outputs.push("samples", Record::Retraction(Retraction { port_type: PortType::Samples, ..retraction }));
        }
        let began = Instant::now();
        let prompts = inputs.prompts("prompts");
        let asked: Vec<&Arc<Prompt>> =
            prompts.iter().flat_map(|prompt| std::iter::repeat_n(prompt, self.config.responses_per_prompt)).collect();
        let bodies = (0..).zip(&asked).map(|(n, prompt)| self.body(prompt, step, n)).collect::<Result<Vec<_>, _>>()?;
        let replies = self.client.post_all(self.path(), &bodies)?;
        let (mut position, mut tokens, mut ended, mut lost) = (0, 0, 0, 0);
        for (prompt, reply) in asked.into_iter().zip(&replies.list) {
            let choice = self.read(reply)?;
            let Some(response_ids) = self.tokens(&choice)? else {
                lost += 1;
                continue;
            };
            tokens += response_ids.len();
            ended += u32::from(choice.ended);
            let sample = Sample {
                step,
                position,
                origin: self.node.clone(),
                source: prompt.source.clone(),
                row: prompt.row,
                prompt_ids: prompt.prompt_ids.clone(),
                response_ids,
                weights_version: None,
                seed: None,
                values: prompt.values.clone(),
            };
            outputs.push("samples", Record::Sample(sample.into()));
            position += 1;
        }
        let mut metrics = Metrics::default();
        let mut set = |name: &str, value: f64| metrics.values.insert(format!("{}/{name}", self.node), value);
        if position > 0 {
            set("generated_tokens", tokens as f64);
            set("ended_share", f64::from(ended) / f64::from(position));
            set("tokens/s", tokens as f64 / began.elapsed().as_secs_f64());
        }
        set("lost", f64::from(lost));
        set("retries", replies.retries as f64);
        outputs.push("metrics", Record::Metrics(metrics.into()));
        Ok(outputs)
    }
}

impl Define for OpenaiSampler {
    const NAME: &'static str = "openai_sampler";
    const SUMMARY: &'static str =
        "Has a server answer prompts: any with OpenAI's HTTP interface, such as vLLM or llama.cpp.";
    const DOCS: &'static str = "\
Asks the server for `responses_per_prompt` responses to each prompt, several requests at a time, and emits them in the \
order of the prompts. The prompt goes out as text to be completed, with its special tokens written out but for the BOS, \
which servers add themselves; as `tokens`; or as a `chat` message without special tokens. What comes back is tokenized \
anew; it gets an EOS where the server says that the model stopped, none where it was cut at `max_tokens`. Responses that \
are withheld, or empty and cut, are left out and counted.

A request that meets a busy or failing server, or no answer in time, is made again. Each carries a seed, a function of \
(seed, node, step, response). Whether the same seed gives the same text is up to the server, and with it whether a resumed \
run is the same to the byte. A prompt that is taken back takes its samples along.

State: none. Errors: the server cannot be reached, refuses (a wrong key, say), or answers something else.
Metrics: NODE/generated_tokens, NODE/ended_share, NODE/tokens/s, NODE/lost (responses left out), NODE/retries.";
    const EXAMPLE: &'static str = "\
prompts: {op: prompt_source, with: {path: data/chat.jsonl, tokenizer: models/smollm2-135m-instruct, batch_size: 8}}
candidates:
  op: openai_sampler
  in: prompts
  with:
    server: {url: 'http://localhost:8000/v1', model: my-model, concurrency: 16}
    tokenizer: models/smollm2-135m-instruct
    responses_per_prompt: 4
    max_tokens: 256
";
    const INPUTS: &'static [PortSpec] =
        &[PortSpec::new("prompts", &[PortType::Prompts], "What to answer.").many().honouring_retractions()];
    const OUTPUTS: &'static [PortSpec] = &[
        PortSpec::new("samples", &[PortType::Samples], "The server's responses.").passing_retractions(),
        PortSpec::new("metrics", &[PortType::Metrics], "Tokens, and how fast; retries."),
    ];
    const PLACEMENT: Placement = Placement::Device;
    type Config = OpenaiSamplerConfig;

    fn check(config: &Self::Config) -> Vec<ConfigIssue> {
        let mut issues = config.server.check();
        issues.extend(check_request("request", &config.request, &["temperature", "top_p"]));
        if let Err(message) = MessageTemplate::read(&config.message, Some(PortType::Prompts)) {
            issues.push(ConfigIssue::new("message", message));
        }
        if config.prompt != PromptAs::Chat && config.message != default_message() {
            issues.push(ConfigIssue::new("message", "would have no effect without `prompt: chat`"));
        }
        issues
    }

    fn plan(config: &Self::Config, context: &PlanContext) -> Result<NodePlan, OperatorError> {
        let prompts = context.input("prompts");
        let rows = prompts.rows.map(|rows| rows * config.responses_per_prompt as u64);
        Ok(NodePlan { emits: Emits { rows, ..prompts }, ..NodePlan::default() })
    }

    fn files(config: &Self::Config) -> Vec<PathBuf> {
        tokenizer_files(&config.tokenizer)
    }

    fn build(config: Self::Config, context: &BuildContext) -> Result<Self, OperatorError> {
        Ok(OpenaiSampler {
            node: context.node.into(),
            client: Client::new(&config.server)?,
            texts: Texts { tokenizer: TextTokenizer::load(&config.tokenizer)? },
            message: MessageTemplate::read(&config.message, Some(PortType::Prompts))?,
            random: Draws::new(context.run.seed, context.node),
            config,
        })
    }
}

#[cfg(test)]
mod tests;

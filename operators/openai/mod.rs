//! Servers with OpenAI's HTTP interface (vLLM, llama.cpp and many others): what the operators that ask them share.

pub mod client;
pub mod message;

use sapo_flow_engine::operator::ConfigIssue;
use schemars::JsonSchema;
use serde::Deserialize;
use serde_json::{Map, Value};

use crate::seconds::{limit_issue, wait_issue};

/// Where a server is, and how it may be used.
#[derive(Clone, Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct ServerConfig {
    /// Its address up to and including `/v1`.
    pub url: String,
    /// The model's name there.
    pub model: String,
    /// Name of the environment variable that holds the API key; absent: no key is sent. The key itself is never written.
    #[serde(default)]
    pub api_key_env: Option<String>,
    /// Requests under way at a time.
    #[serde(default = "default_concurrency")]
    #[schemars(range(min = 1, max = 1024))]
    pub concurrency: usize,
    /// Requests begun in a minute, at most; absent: no limit.
    #[serde(default)]
    pub requests_per_minute: Option<f64>,
    /// Longest wait for a reply, in seconds.
    #[serde(default = "default_timeout")]
    pub timeout_seconds: f64,
    /// How often a request is made again when the server is busy, fails, or does not answer in time.
    #[serde(default = "default_retries")]
    pub retries: u32,
    /// Wait before the first of these, in seconds; each next wait is twice as long. A server's Retry-After goes before.
    #[serde(default = "default_retry_seconds")]
    pub retry_seconds: f64,
}

fn default_concurrency() -> usize {
    8
}

fn default_timeout() -> f64 {
    120.0
}

fn default_retries() -> u32 {
    5
}

fn default_retry_seconds() -> f64 {
    0.5
}

impl ServerConfig {
    /// What is wrong with it, under the key `server`.
    pub fn check(&self) -> Vec<ConfigIssue> {
        let mut issues = Vec::new();
        let mut expect = |good: bool, key: &str, message: String| {
            if !good {
                issues.push(ConfigIssue::new(format!("server.{key}"), message));
            }
        };
        let url = &self.url;
        let has_scheme = url.starts_with("http://") || url.starts_with("https://");
        expect(has_scheme, "url", format!("expected an address such as http://localhost:8000/v1, found {url:?}"));
        expect(!self.model.is_empty(), "model", "expected the name of a model, found none".into());
        if let Some(name) = &self.api_key_env {
            let good = !name.is_empty() && name.chars().all(|letter| letter.is_ascii_alphanumeric() || letter == '_');
            // Not repeated: it may be a key, put there by mistake.
            expect(good, "api_key_env", "expected the name of an environment variable".into());
        }
        for (key, issue) in
            [("timeout_seconds", limit_issue(self.timeout_seconds)), ("retry_seconds", wait_issue(self.retry_seconds))]
        {
            expect(issue.is_none(), key, issue.unwrap_or_default());
        }
        if let Some(requests) = self.requests_per_minute {
            let good = requests > 0.0 && wait_issue(60.0 / requests).is_none();
            expect(good, "requests_per_minute", format!("expected a number above 0, found {requests}"));
        }
        issues
    }
}

/// Keys of a request that are not for the user to set, with the setting to use instead, where all operators have one.
const OWN_KEYS: [(&str, Option<&str>); 7] = [
    ("model", Some("server.model")),
    ("messages", Some("message")),
    ("prompt", None),
    ("seed", None),
    ("n", None),
    ("stream", None),
    ("max_tokens", Some("max_tokens")),
];

/// What is wrong with more keys for requests, under `key`. `settings`: those of the operator that it sends under their names.
pub fn check_request(key: &str, request: &Map<String, Value>, settings: &[&str]) -> Vec<ConfigIssue> {
    let own = |name: &str| {
        let setting = settings.iter().find(|setting| **setting == name);
        setting.map(|setting| Some(*setting)).or_else(|| Some(OWN_KEYS.iter().find(|(own, _)| *own == name)?.1))
    };
    let issue = |name: &String| {
        let instead = own(name)?.map(|setting| format!(": give `{setting}` instead")).unwrap_or_default();
        Some(ConfigIssue::new(key, format!("`{name}` is set by the operator itself{instead}")))
    };
    request.keys().filter_map(issue).collect()
}

#[cfg(test)]
#[path = "../../tests/end_to_end/server.rs"]
pub mod testing;

//! Requests to one server: several at a time, at a bounded rate, made again where that may help; replies in order.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use crossbeam::channel::{Receiver, RecvTimeoutError, bounded};
use serde_json::Value;

use super::ServerConfig;

/// Why there is no reply.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// The key's environment variable is not there.
    #[error("the environment variable {0}, which `api_key_env` names, is not set")]
    NoKey(String),
    /// The server cannot be reached, or refuses.
    #[error("{url}: {message}{tries}")]
    Request {
        /// What was asked.
        url: String,
        /// What came of it.
        message: String,
        /// How often it was tried, where more than once.
        tries: String,
    },
}

/// Longest wait that a server may ask for.
const LONGEST_WAIT: Duration = Duration::from_secs(600);
/// Largest reply, in bytes.
const MAX_REPLY_BYTES: u64 = 64 << 20;

/// A server, and the times at which it may be asked.
pub struct Client {
    agent: ureq::Agent,
    url: String,
    key: Option<String>,
    concurrency: usize,
    retries: u32,
    first_wait: Duration,
    pace: Mutex<Pace>,
}

/// Replies in the order of the requests.
#[derive(Debug, Default, PartialEq)]
pub struct Replies {
    /// One for each request.
    pub list: Vec<Value>,
    /// Requests that were made again.
    pub retries: u64,
}

/// What became of one try.
enum Trouble {
    /// It may go better next time, after such a wait where the server says so.
    Passing(String, Option<Duration>),
    /// It would be the same again.
    Lasting(String),
    /// Another request has failed for good.
    Cancelled,
}

impl Client {
    /// A client of a server; its key is read from the environment.
    ///
    /// # Errors
    /// When there is no such variable.
    pub fn new(config: &ServerConfig) -> Result<Self, Error> {
        let read = |name: &String| std::env::var(name).map_err(|_| Error::NoKey(name.clone()));
        let key = config.api_key_env.as_ref().map(read).transpose()?;
        let mut agent = ureq::Agent::config_builder()
            .timeout_global(Some(Duration::from_secs_f64(config.timeout_seconds)))
            .http_status_as_error(false)
            .max_redirects(0)
            .max_idle_connections_per_host(config.concurrency);
        if is_local(&config.url) {
            agent = agent.proxy(None);
        }
        Ok(Client {
            agent: agent.build().into(),
            url: config.url.trim_end_matches('/').to_owned(),
            key,
            concurrency: config.concurrency,
            retries: config.retries,
            first_wait: Duration::from_secs_f64(config.retry_seconds),
            pace: Mutex::new(Pace::new(config.requests_per_minute)),
        })
    }

    /// Ask at a path, once for each body.
    ///
    /// # Errors
    /// The first request's that fails for good; none is begun after it.
    pub fn post_all(&self, path: &str, bodies: &[Value]) -> Result<Replies, Error> {
        let next = AtomicUsize::new(0);
        let found: Mutex<Vec<Option<(Value, u32)>>> = Mutex::new(vec![None; bodies.len()]);
        let failure: Mutex<Option<Error>> = Mutex::new(None);
        // Disconnected when a request has failed, which ends all waits.
        let (alive, cancelled) = bounded::<()>(0);
        let alive = Mutex::new(Some(alive));
        let work = || {
            loop {
                let index = next.fetch_add(1, Ordering::Relaxed);
                let Some(body) = bodies.get(index) else { return };
                match self.post(path, body, &cancelled) {
                    Ok(reply) => lock(&found)[index] = Some(reply),
                    Err(None) => return,
                    Err(Some(error)) => {
                        lock(&failure).get_or_insert(error);
                        *lock(&alive) = None;
                        return;
                    }
                }
            }
        };
        std::thread::scope(|scope| {
            for _ in 0..self.concurrency.min(bodies.len()) {
                scope.spawn(work);
            }
        });
        if let Some(error) = lock(&failure).take() {
            return Err(error);
        }
        let found = found.into_inner().unwrap_or_else(PoisonError::into_inner);
        let mut replies = Replies::default();
        for (reply, retries) in found.into_iter().flatten() {
            replies.list.push(reply);
            replies.retries += u64::from(retries);
        }
        Ok(replies)
    }

    /// Ask once, and again as often as may be. No error where another request has failed.
    fn post(&self, path: &str, body: &Value, cancelled: &Receiver<()>) -> Result<(Value, u32), Option<Error>> {
        let url = format!("{}{path}", self.url);
        let mut retries = 0;
        loop {
            let turn = lock(&self.pace).turn(Instant::now());
            let tried = if pause(turn, cancelled) { self.try_post(&url, body) } else { Err(Trouble::Cancelled) };
            let (message, wait) = match tried {
                Ok(reply) => return Ok((reply, retries)),
                Err(Trouble::Passing(message, wait)) if retries < self.retries => (message, wait),
                Err(Trouble::Cancelled) => return Err(None),
                Err(Trouble::Passing(message, _) | Trouble::Lasting(message)) => {
                    let tries = if retries > 0 { format!(" (tried {} times)", retries + 1) } else { String::new() };
                    return Err(Some(Error::Request { url, message, tries }));
                }
            };
            let wait = wait_before(retries, self.first_wait, wait);
            tracing::info!(target: "openai", "{url}: {message}; again in {} s", wait.as_secs_f64());
            if !pause(wait, cancelled) {
                return Err(None);
            }
            retries += 1;
        }
    }

    fn try_post(&self, url: &str, body: &Value) -> Result<Value, Trouble> {
        let mut request = self.agent.post(url).header("Content-Type", "application/json");
        if let Some(key) = &self.key {
            request = request.header("Authorization", format!("Bearer {key}"));
        }
        let text = serde_json::to_vec(body).map_err(|error| Trouble::Lasting(error.to_string()))?;
        let mut response = request.send(&text[..]).map_err(|error| match error {
            ureq::Error::BadUri(_) | ureq::Error::Http(_) | ureq::Error::Tls(_) => Trouble::Lasting(error.to_string()),
            _ => Trouble::Passing(error.to_string(), None),
        })?;
        let status = response.status().as_u16();
        let header = response.headers().get("retry-after").and_then(|value| value.to_str().ok());
        let wait = header.and_then(|value| value.trim().parse().ok()).map(Duration::from_secs);
        let reply = response.body_mut().with_config().limit(MAX_REPLY_BYTES).read_to_vec();
        let reply = reply.map_err(|error| Trouble::Passing(format!("the reply broke off: {error}"), None))?;
        match status {
            200..=299 => serde_json::from_slice(&reply)
                .map_err(|error| Trouble::Lasting(format!("the reply is no JSON ({error}): {}", excerpt(&reply)))),
            408 | 409 | 425 | 429 | 500..=599 => {
                Err(Trouble::Passing(format!("status {status}: {}", said(&reply)), wait))
            }
            _ => Err(Trouble::Lasting(format!("status {status}: {}", said(&reply)))),
        }
    }

    /// The address of a path, for messages.
    pub fn url(&self, path: &str) -> String {
        format!("{}{path}", self.url)
    }
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Wait; false if something failed meanwhile.
fn pause(wait: Duration, cancelled: &Receiver<()>) -> bool {
    cancelled.recv_timeout(wait) == Err(RecvTimeoutError::Timeout)
}

/// How long to wait after so many retries: what the server says, or twice as long each time.
fn wait_before(retries: u32, first: Duration, server: Option<Duration>) -> Duration {
    server.unwrap_or_else(|| first.saturating_mul(1 << retries.min(16))).min(LONGEST_WAIT)
}

/// The message in an error's reply, or the reply.
fn said(reply: &[u8]) -> String {
    let message = serde_json::from_slice::<Value>(reply).ok().and_then(|value| {
        let error = value.get("error")?;
        error.get("message").unwrap_or(error).as_str().map(str::to_owned)
    });
    excerpt(message.as_deref().map_or(reply, str::as_bytes))
}

fn excerpt(text: &[u8]) -> String {
    let text = String::from_utf8_lossy(text);
    let mut excerpt: String = text.trim().chars().take(200).collect();
    if excerpt.is_empty() {
        excerpt.push_str("(nothing)");
    }
    excerpt
}

/// Whether an address is on this machine: proxies are for others.
fn is_local(url: &str) -> bool {
    let host = url.split_once("://").map_or(url, |(_, rest)| rest);
    ["localhost", "127.", "[::1]"].iter().any(|local| host.starts_with(local))
}

/// Turns at even distances.
#[derive(Debug)]
struct Pace {
    distance: Duration,
    next: Option<Instant>,
}

impl Pace {
    fn new(per_minute: Option<f64>) -> Self {
        Pace { distance: per_minute.map_or(Duration::ZERO, |count| Duration::from_secs_f64(60.0 / count)), next: None }
    }

    /// How long to wait for one's turn.
    fn turn(&mut self, now: Instant) -> Duration {
        let turn = self.next.map_or(now, |next| next.max(now));
        self.next = Some(turn + self.distance);
        turn - now
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::openai::testing::Server;
    use serde_json::json;

    fn ask(server: &Server, with: &str, count: usize) -> Result<Replies, Error> {
        let bodies: Vec<Value> =
            (0..count).map(|index| json!({"prompt": format!("w{index}"), "seed": 0, "max_tokens": 9})).collect();
        let server = format!("{{url: 'http://127.0.0.1:{}/v1', model: tiny, {with}}}", server.port);
        let config: ServerConfig = serde_yaml::from_str(&server).unwrap();
        Client::new(&config).and_then(|client| client.post_all("/completions", &bodies))
    }

    fn texts(replies: &Replies) -> Vec<&str> {
        replies.list.iter().map(|reply| reply["choices"][0]["text"].as_str().unwrap()).collect()
    }

    #[test]
    fn replies_are_in_order_however_they_arrive() {
        // Answers only when three are waiting, the last first.
        let server = Server::start(&["--hold", "3"]);
        let replies = ask(&server, "concurrency: 3", 6).unwrap();
        assert_eq!(texts(&replies), ["w0", "w1", "w2", "w3", "w4", "w5"]);
        assert_eq!(replies.retries, 0);
        let most = server.requests().iter().map(|request| request["in_flight"].as_u64().unwrap()).max();
        assert_eq!(most, Some(3));
    }

    #[test]
    fn what_may_pass_is_tried_again() {
        // Busy, broken, cut off, and silent for longer than the time limit.
        let server = Server::start(&["--fail", "429,500,drop,silent"]);
        let replies = ask(&server, "concurrency: 1, retry_seconds: 0, retries: 4, timeout_seconds: 3", 2).unwrap();
        assert_eq!((texts(&replies), replies.retries), (vec!["w0", "w1"], 4));
        assert_eq!(server.requests().len(), 6);
    }

    #[test]
    fn what_does_not_pass_is_told() {
        let url = |server: &Server| format!("http://127.0.0.1:{}/v1/completions", server.port);
        let server = Server::start(&["--fail", "500,500,500,500"]);
        let error = ask(&server, "retry_seconds: 0, retries: 1, concurrency: 1", 2).unwrap_err().to_string();
        assert_eq!(error, format!("{}: status 500: failing as told (tried 2 times)", url(&server)));
        // The second request was never made.
        assert_eq!(server.requests().len(), 2);

        let server = Server::start(&["--key", "right"]);
        let error = ask(&server, "retries: 9", 1).unwrap_err().to_string();
        assert_eq!(error, format!("{}: status 401: wrong key", url(&server)));

        let server = Server::start(&["--reply", "<html>"]);
        let error = ask(&server, "retries: 9", 1).unwrap_err().to_string();
        assert!(error.starts_with(&format!("{}: the reply is no JSON (", url(&server))), "{error}");
        assert!(error.ends_with("): <html>"), "{error}");

        let mut server = Server::start(&[]);
        server.stop();
        let error = ask(&server, "retry_seconds: 0, retries: 2", 1).unwrap_err().to_string();
        assert!(error.starts_with(&format!("{}: ", url(&server))) && error.ends_with("(tried 3 times)"), "{error}");

        let error = ask(&server, "api_key_env: SAPO_FLOW_NO_SUCH_KEY", 1).unwrap_err().to_string();
        assert_eq!(error, "the environment variable SAPO_FLOW_NO_SUCH_KEY, which `api_key_env` names, is not set");
    }

    #[test]
    fn waits_grow_unless_the_server_says_how_long() {
        let seconds = |retries, server: Option<u64>| {
            wait_before(retries, Duration::from_millis(500), server.map(Duration::from_secs)).as_secs_f64()
        };
        assert_eq!([0, 1, 2, 5].map(|retries| seconds(retries, None)), [0.5, 1.0, 2.0, 16.0]);
        assert_eq!(
            [seconds(4, Some(3)), seconds(0, Some(0)), seconds(30, None), seconds(0, Some(9999))],
            [3.0, 0.0, 600.0, 600.0]
        );
    }

    #[test]
    fn turns_keep_their_distance() {
        let start = Instant::now();
        let mut pace = Pace::new(Some(120.0));
        let mut turn = |after: u64| pace.turn(start + Duration::from_millis(after)).as_millis();
        // Two a second: at once, then half a second apart, and at once again after a long silence.
        assert_eq!([turn(0), turn(0), turn(100), turn(1700), turn(1800)], [0, 500, 900, 0, 400]);
        let mut free = Pace::new(None);
        assert_eq!(free.turn(start) + free.turn(start), Duration::ZERO);
    }
}

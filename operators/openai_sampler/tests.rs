//! A server of its own process answers: what is asked, and what becomes of the answers.

use sapo_flow_engine::Retracted;

use super::*;
use crate::openai::testing::Server;
use crate::testing::{Harness, tiny_tokenizer};

/// The operator over a server, with its tokenizer's directory.
fn sampler(harness: &Harness, server: &Server, with: &str, server_with: &str) -> OpenaiSampler {
    let tokenizer = tiny_tokenizer();
    harness
        .build(&format!(
            "{{server: {{url: 'http://127.0.0.1:{}/v1', model: tiny, {server_with}}}, tokenizer: '{}', {with}}}",
            server.port,
            tokenizer.path().display()
        ))
        .unwrap()
}

/// `<s> <user> hi </s> <assistant>`, or with `a` or `b` in place of `hi`.
fn prompt(row: u64, word: u32) -> Record {
    let prompt = Prompt {
        source: "data".into(),
        row,
        epoch: 0,
        prompt_ids: vec![0, 2, word, 1, 3],
        chosen_ids: vec![7, 1],
        rejected_ids: None,
        values: [("difficulty".to_owned(), 0.5)].into(),
    };
    Record::Prompt(prompt.into())
}

fn step(sampler: &mut OpenaiSampler, step: u64, prompts: Vec<Record>) -> Result<(Vec<Sample>, Outputs), OperatorError> {
    let outputs = sampler.step(step, Inputs::new(vec![("prompts", prompts)]))?;
    let sample = |(_, record): &(_, Record)| match record {
        Record::Sample(sample) => Some(Sample::clone(sample)),
        _ => None,
    };
    Ok((outputs.records.iter().filter_map(sample).collect(), outputs))
}

#[test]
fn responses_are_what_the_server_says_in_order() {
    let (harness, server) = (Harness::new(), Server::start(&["--hold", "6"]));
    let mut sampler =
        sampler(&harness, &server, "responses_per_prompt: 3, max_tokens: 2, request: {top_k: 5}", "concurrency: 6");
    let (samples, _) = step(&mut sampler, 4, vec![prompt(8, 5), prompt(9, 6)]).unwrap();
    assert_eq!(samples.len(), 6);
    for (n, sample) in samples.iter().enumerate() {
        // The rule of tests/openai_server.py: the last word 1 + seed % 3 times, of which two fit.
        let seed = Draws::new(42, "node").seed(4, n as u64) >> 33;
        let (row, word) = [(8, 5), (9, 6)][n / 3];
        let expected = [vec![word, 1], vec![word, word, 1], vec![word, word]][seed as usize % 3].clone();
        let expected = Sample {
            step: 4,
            position: n as u32,
            origin: "node".into(),
            source: "data".into(),
            row,
            prompt_ids: vec![0, 2, word, 1, 3],
            response_ids: expected,
            weights_version: None,
            seed: None,
            values: [("difficulty".to_owned(), 0.5)].into(),
        };
        assert_eq!(*sample, expected);
    }
    // Some lengths differ: the seeds reached the server.
    assert!(samples.iter().any(|sample| sample.response_ids.len() != samples[0].response_ids.len()));
    let requests = server.requests();
    let asked = requests.iter().find(|request| request["body"]["prompt"] == "<user> hi </s> <assistant>");
    let asked = asked.expect("the BOS is left to the server");
    assert_eq!((&asked["path"], &asked["key"]), (&"/v1/completions".into(), &"".into()));
    let mut body = asked["body"].clone();
    body.as_object_mut().unwrap().remove("seed");
    let expected = json!({"prompt": "<user> hi </s> <assistant>", "model": "tiny", "max_tokens": 2, "temperature": 1.0,
                          "top_p": 1.0, "top_k": 5});
    assert_eq!(body, expected);
}

#[test]
fn prompts_go_out_as_tokens_or_messages() {
    let (harness, server) = (Harness::new(), Server::start(&["--chat", "b a", "--key", env!("CARGO_MANIFEST_DIR")]));
    // Cargo sets this variable for tests; its value is the key.
    let key = "api_key_env: CARGO_MANIFEST_DIR";
    let mut tokens = sampler(&harness, &server, "prompt: tokens, max_tokens: 1", key);
    let (samples, _) = step(&mut tokens, 0, vec![prompt(8, 5)]).unwrap();
    assert_eq!(samples[0].response_ids[0], 6);
    assert_eq!(server.requests()[0]["body"]["prompt"], json!([0, 2, 5, 1, 3]));
    let mut chat = sampler(&harness, &server, "prompt: chat, message: '{{ prompt }}, please'", key);
    let (samples, _) = step(&mut chat, 0, vec![prompt(8, 5)]).unwrap();
    assert_eq!(samples[0].response_ids, [7, 6, 1]);
    let asked = &server.requests()[1];
    assert_eq!(asked["path"], "/v1/chat/completions");
    assert_eq!(asked["body"]["messages"], json!([{"role": "user", "content": "<user> hi <assistant>, please"}]));
}

#[test]
fn what_is_no_response_is_left_out_or_refused() {
    let harness = Harness::new();
    let replying = |reply: &str| {
        let server = Server::start(&["--reply", reply]);
        let mut sampler = sampler(&harness, &server, "max_tokens: 4", "concurrency: 1");
        step(&mut sampler, 0, vec![prompt(8, 5)])
    };
    for (text, reason, expected) in [
        ("a b", "stop", Some(vec![6, 7, 1])),
        ("a b", "length", Some(vec![6, 7])),
        ("", "stop", Some(vec![1])),
        ("a </s>", "stop", Some(vec![6, 1])),
        ("", "length", None),
        ("a b", "content_filter", None),
    ] {
        let reply = json!({"choices": [{"text": text, "finish_reason": reason}]}).to_string();
        let (samples, outputs) = replying(&reply).unwrap();
        assert_eq!(samples.first().map(|sample| sample.response_ids.clone()), expected, "{text:?} {reason}");
        let Some((_, Record::Metrics(metrics))) = outputs.records.last() else { panic!("no metrics") };
        assert_eq!(metrics.values["node/lost"], f64::from(u8::from(expected.is_none())));
    }
    let error = replying("{\"choices\": []}").expect_err("there is no choice").to_string();
    assert!(
        error.ends_with("/v1/completions: expected a reply with a choice and its text, found {\"choices\":[]}"),
        "{error}"
    );
}

#[test]
fn a_prompt_that_is_taken_back_takes_its_samples_along() {
    let (harness, server) = (Harness::new(), Server::start(&[]));
    let mut sampler = sampler(&harness, &server, "", "");
    let of = Retracted::Row { source: "data".into(), row: 3 };
    let retraction = Retraction { port_type: PortType::Prompts, of: of.clone(), because: Some("edited".into()) };
    let (samples, outputs) = step(&mut sampler, 2, vec![Record::Retraction(retraction)]).unwrap();
    assert!(samples.is_empty() && server.requests().is_empty());
    let Some(("samples", Record::Retraction(found))) = outputs.records.first() else { panic!("no retraction") };
    assert_eq!(*found, Retraction { port_type: PortType::Samples, of, because: Some("edited".into()) });
}

#[test]
fn settings_are_checked() {
    let issues = |with: &str| -> Vec<String> {
        let issues = OpenaiSampler::check(&serde_yaml::from_str(with).unwrap());
        issues.iter().map(|issue| format!("{}: {}", issue.key, issue.message)).collect()
    };
    assert_eq!(issues("{server: {url: 'https://host/v1', model: m}, tokenizer: t}"), [""; 0]);
    assert_eq!(
        issues(
            "{server: {url: 'host:80', model: '', api_key_env: sk-123, timeout_seconds: 0, requests_per_minute: 0},
              tokenizer: t, message: '{{ promt }}', request: {max_tokens: 9, n: 4, temperature: 0.2, top_k: 5, top_p: 0.9}}"
        ),
        [
            "server.url: expected an address such as http://localhost:8000/v1, found \"host:80\"",
            "server.model: expected the name of a model, found none",
            "server.api_key_env: expected the name of an environment variable",
            "server.timeout_seconds: expected a number of seconds above 0, found 0",
            "server.requests_per_minute: expected a number above 0, found 0",
            "request: `max_tokens` is set by the operator itself: give `max_tokens` instead",
            "request: `n` is set by the operator itself",
            "request: `temperature` is set by the operator itself: give `temperature` instead",
            "request: `top_p` is set by the operator itself: give `top_p` instead",
            "message: there is no `promt`; did you mean `prompt`?",
            "message: would have no effect without `prompt: chat`",
        ]
    );
}

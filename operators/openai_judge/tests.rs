//! A server of its own process judges by rule: what is asked, what is read, what follows.

use std::sync::Arc;

use sapo_flow_engine::{Pair, Retracted, Retraction, Sample, pipeline};

use super::*;
use crate::openai::testing::Server;
use crate::testing::{Harness, pair, tiny_tokenizer};

fn judge(server: &Server, with: &str) -> OpenaiJudge {
    let tokenizer = tiny_tokenizer();
    Harness::new()
        .build(&format!(
            "{{server: {{url: 'http://127.0.0.1:{}/v1', model: tiny, retries: 0}}, tokenizer: '{}', {with}}}",
            server.port,
            tokenizer.path().display()
        ))
        .unwrap()
}

fn sample(row: u64, response: &[u32]) -> Record {
    Record::Sample(Arc::new(Sample {
        step: 0,
        position: 0,
        origin: "made".into(),
        source: "data".into(),
        row,
        prompt_ids: vec![5],
        response_ids: response.to_vec(),
        weights_version: Some(1),
        seed: Some(2),
        values: Default::default(),
    }))
}

/// What comes out, and the metrics.
fn step(judge: &mut OpenaiJudge, records: Vec<Record>) -> Result<(Vec<Record>, Metrics), OperatorError> {
    let outputs = judge.step(3, Inputs::new(vec![("records", records)]))?;
    let mut records: Vec<Record> = outputs.records.into_iter().map(|(_, record)| record).collect();
    match records.pop() {
        Some(Record::Metrics(metrics)) => Ok((records, Metrics::clone(&metrics))),
        other => panic!("expected metrics, found {other:?}"),
    }
}

fn item(record: &Record) -> Item {
    Item::of(record.clone()).unwrap()
}

#[test]
fn samples_get_scores() {
    // The server says `Score: ` and the number of words in the message.
    let server = Server::start(&[]);
    let mut judge = judge(&server, "message: 'Is {{ response }} good for {{ prompt }}?', system: Be fair.");
    let retraction = Retraction {
        port_type: PortType::Samples,
        of: Retracted::Row { source: "data".into(), row: 0 },
        because: None,
    };
    let records = vec![sample(1, &[6, 1]), Record::Retraction(retraction.clone()), sample(2, &[6, 7, 1])];
    let (found, metrics) = step(&mut judge, records).unwrap();
    assert_eq!([0, 2].map(|index| item(&found[index]).values()["score"]), [5.0, 6.0]);
    assert!(matches!(&found[1], Record::Retraction(found) if *found == retraction));
    assert_eq!(item(&found[0]).weights_version(), Some(1));
    let expected = [("node/retries", 0.0), ("node/score", 5.5), ("node/unreadable", 0.0)];
    assert_eq!(metrics.values, expected.map(|(name, value)| (name.to_owned(), value)).into());
    let requests = server.requests();
    let asked = requests.iter().find(|request| request["body"]["messages"][1]["content"] == "Is a good for hi?");
    let asked = asked.expect("the message has no special tokens");
    assert_eq!(asked["path"], "/v1/chat/completions");
    assert_eq!(asked["body"]["messages"][0], json!({"role": "system", "content": "Be fair."}));
    assert_eq!((&asked["body"]["temperature"], &asked["body"]["max_tokens"]), (&json!(0.0), &json!(256)));
}

#[test]
fn pairs_are_put_in_the_judges_order() {
    let server = Server::start(&["--chat", "I say -%d, of 9"]);
    let mut judge = judge(&server, "message: '{{ chosen }} {{ rejected }}', swap_below: -2, as: margin");
    let mut long = pair(1, &[5], &[6, 7, 1], Some(&[7, 1]));
    (long.weights_version, long.seed) = (Some(1), Some(1));
    let short = pair(2, &[5], &[6, 1], Some(&[7, 1]));
    let (found, metrics) =
        step(&mut judge, vec![Record::Pair(long.into()), Record::Pair(short.clone().into())]).unwrap();
    let values =
        |margin: f64, swapped: f64| [("margin".to_owned(), margin), ("margin_swapped".to_owned(), swapped)].into();
    // Three words, so -3: exchanged.
    let exchanged = pair(1, &[5], &[7, 1], Some(&[6, 7, 1]));
    assert_eq!(item(&found[0]), Item::Pair(Pair { values: values(-3.0, 1.0), ..exchanged }.into()));
    assert_eq!(item(&found[1]), Item::Pair(Pair { values: values(-2.0, 0.0), ..short }.into()));
    assert_eq!((metrics.values["node/margin"], metrics.values["node/swapped"]), (-2.5, 1.0));
    let error = step(&mut judge, vec![Record::Pair(pair(4, &[5], &[6, 7, 6, 1], None).into())])
        .expect_err("no two")
        .to_string();
    assert!(error.contains("row 4 (pair 4 of `data` at step 0)"), "{error}");
}

#[test]
fn scores_are_read_as_told() {
    let reading = |reply: &str, with: &str| -> Result<f64, String> {
        let server = Server::start(&["--chat", reply]);
        let mut judge = judge(&server, &format!("message: 'a b c', {with}"));
        let found = step(&mut judge, vec![sample(7, &[6, 1])]).map_err(|error| error.to_string())?;
        Ok(found.0.first().map_or(f64::NAN, |record| item(record).values()["score"]))
    };
    assert_eq!(reading("2 of 5. Rating: [[%d]]", r"pattern: 'Rating: \[\[(\d+)\]\]'"), Ok(3.0));
    assert_eq!(reading(r#"{"verdict": {"score": 0.25}}"#, "json: /verdict/score"), Ok(0.25));
    assert_eq!(reading(r#"{"score": "-%d"}"#, "json: /score"), Ok(-3.0));
    assert_eq!(reading("[[\u{2212}%d]]", r"pattern: '\[\[(.+)\]\]'"), Ok(-3.0));
    for (reply, with, expected) in [
        ("It is good.", "{}", "no score can be read, since no number occurs: It is good."),
        ("It is good.", r"pattern: '\d'", "no score can be read, since `\\d` does not occur: It is good."),
        ("%d", "max: 2", "no score can be read, since 3 is out of bounds: 3"),
        ("%d", "json: /score", "no score can be read, since there is no /score: 3"),
        ("{", "json: /score", "no score can be read, since it is no JSON ("),
    ] {
        let with = if with == "{}" { "temperature: 0" } else { with };
        let error = reading(reply, with).unwrap_err();
        let expected = format!("/v1/chat/completions: row 7 (sample 0 of `made` at step 0): {expected}");
        assert!(error.starts_with("http://127.0.0.1:") && error.contains(&expected), "{error}");
    }
    // Left out and counted instead.
    let server = Server::start(&["--chat", "It is good."]);
    let mut judge = judge(&server, "message: 'a', unreadable: drop");
    let (found, metrics) = step(&mut judge, vec![sample(7, &[6, 1])]).unwrap();
    assert!(found.is_empty() && metrics.values["node/unreadable"] == 1.0);
}

#[test]
fn the_first_number_is_read_as_it_is_written() {
    let config = "{server: {url: 'http://h/v1', model: m}, tokenizer: t, message: a}";
    let reading = Reading::of(&serde_yaml::from_str(config).unwrap()).unwrap();
    for (reply, expected) in [
        ("-.5", -0.5),
        ("about .5 or 7", 0.5),
        ("\u{2212}3", -3.0),
        ("1e-3", 1e-3),
        ("2.5E+2.", 250.0),
        ("It is 8.", 8.0),
        ("+4/5", 4.0),
        ("-2.25", -2.25),
        ("3 eggs", 3.0),
        ("3e", 3.0),
    ] {
        assert_eq!(reading.read(reply), Ok(expected), "{reply}");
    }
}

#[test]
fn mistakes_are_found_when_a_pipeline_is_read() {
    let complaint = |with: &str| -> String {
        let text = format!(
            "version: 1\nrun: {{steps: 1}}\nnodes:\n  prompts: {{op: prompt_source, with: {{path: a, tokenizer: m, batch_size: 1}}}}
  candidates: {{op: openai_sampler, in: prompts, with: {{server: {{url: 'http://h/v1', model: m}}, tokenizer: m}}}}
  x: {{op: openai_judge, in: candidates, with: {{server: {{url: 'http://h/v1', model: m}}, tokenizer: m, {with}}}}}
  sink: {{op: metrics_sink, in: x.metrics}}\n"
        );
        let found = pipeline::parse_str("p.yaml", &text, &[], &crate::registry()).err();
        found.map_or_else(String::new, |found| found.list.iter().map(|found| found.message.clone() + "\n").collect())
    };
    assert_eq!(complaint("message: '{{ response }}'"), "");
    assert_eq!(
        complaint("message: '{{ chosen }}'"),
        "`message`: there is no `chosen`; there is row, values, prompt, response\n"
    );
    assert_eq!(complaint("message: a, swap_below: 0"), "`swap_below`: Samples have no two responses to exchange\n");
    let found = complaint("message: a, json: score, min: 2, max: 1, pattern: '('");
    assert_eq!(
        found,
        "`json`: is given along with `pattern`: leave out one of them\n`min`: expected at most max 1, found 2\n"
    );
    assert!(complaint("message: a, pattern: '('").contains("unclosed group"), "{found}");
    assert_eq!(complaint("message: a, request: {top_p: 0.9}"), "");
    assert_eq!(
        complaint("message: a, request: {messages: [], temperature: 0.2}"),
        "`request`: `messages` is set by the operator itself: give `message` instead
`request`: `temperature` is set by the operator itself: give `temperature` instead\n"
    );
}

//! Which segments are rewritten, as samples tell it.

use std::collections::BTreeSet;
use std::fs;

use serde_json::{Value, json};

use crate::workplace::{SAPO_ORPO, Workplace};

/// The SAPO authors' code forgets the draw where prompt and answer are over-long together, and rewrites one place only.
#[test]
fn the_segment_of_an_over_long_sample_starts_anywhere() {
    let here = Workplace::new();
    let words = |from: u64, count: u64| (from..from + count).map(|word| format!("w{word} ")).collect::<String>();
    let messages = json!([
        {"role": "user", "content": words(10, 30)},
        {"role": "assistant", "content": words(50, 40)},
    ]);
    here.write("chats.jsonl", &format!("{}\n", json!({"messages": messages})));
    here.pipeline("p.yaml", &SAPO_ORPO.replace("every: 2, count: 2", "every: 1, count: 1"));
    here.run("p.yaml", "out", &["steps=24"]);
    let samples = fs::read_to_string(here.path("out/samples.jsonl")).unwrap();
    let starts: Vec<u64> = samples
        .lines()
        .map(|line| serde_json::from_str::<Value>(line).unwrap()["segment"]["start"].as_u64().unwrap())
        .collect();
    // 24 tokens are left to the prompt and 24 to the answer, and 4 are rewritten: starts from 0 to 20.
    assert_eq!(starts.len(), 24);
    assert!(starts.iter().all(|start| *start <= 20), "{starts:?}");
    // Twenty-four draws of 21 that give fewer than eight different ones: less than once in a million times.
    let different = BTreeSet::from_iter(&starts);
    assert!(different.len() >= 8, "{starts:?}");
}

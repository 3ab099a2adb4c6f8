//! `prompt_source`: the order of rows, its outputs, its checks.

use super::*;
use crate::testing::{Harness, tiny_tokenizer};

/// A source over these rows, its tokenizer's directory kept until it is built.
fn source(harness: &Harness, rows: &str, with: &str) -> Result<PromptSource, OperatorError> {
    let tokenizer = tiny_tokenizer();
    let path = harness.write("rows.jsonl", rows);
    harness.build(&format!("{{path: '{path}', tokenizer: '{}', {with}}}", tokenizer.path().display()))
}

fn plain_rows(count: usize) -> String {
    "{\"prompt\": \"hi\", \"chosen\": \"a\"}\n".repeat(count)
}

fn with_rejected(count: usize) -> String {
    "{\"prompt\": \"hi\", \"chosen\": \"a\", \"rejected\": \"b\"}\n".repeat(count)
}

/// Rows and epochs of a step's prompts.
fn emitted(source: &mut PromptSource, step: u64) -> Vec<(u64, u64)> {
    let outputs = source.step(step, Inputs::default()).unwrap();
    let prompt =
        |(_, record)| if let Record::Prompt(prompt) = record { Some((prompt.row, prompt.epoch)) } else { None };
    outputs.records.into_iter().filter_map(prompt).collect()
}

#[test]
fn files_order_with_a_smaller_last_batch() {
    let harness = Harness::new();
    let mut source = source(&harness, &with_rejected(5), "batch_size: 2, shuffle: false").unwrap();
    assert_eq!(source.steps_per_epoch(), Some(3));
    assert_eq!(emitted(&mut source, 0), [(0, 0), (1, 0)]);
    assert_eq!(emitted(&mut source, 2), [(4, 0)]);
    assert_eq!(emitted(&mut source, 4), [(2, 1), (3, 1)]);
    assert_eq!(harness.notes(), ["5 rows read"]);
}

#[test]
fn every_epoch_shuffles_all_rows_and_a_step_needs_no_step_before_it() {
    let harness = Harness::new();
    let mut first = source(&harness, &with_rejected(7), "batch_size: 2").unwrap();
    let epoch = |source: &mut PromptSource, steps: std::ops::Range<u64>| -> Vec<u64> {
        steps.flat_map(|step| emitted(source, step)).map(|(row, _)| row).collect()
    };
    let (zeroth, next) = (epoch(&mut first, 0..4), epoch(&mut first, 4..8));
    assert_ne!(zeroth, next);
    for rows in [&zeroth, &next] {
        let mut sorted = rows.clone();
        sorted.sort_unstable();
        assert_eq!(sorted, Vec::from_iter(0..7));
    }
    let mut second = source(&harness, &with_rejected(7), "batch_size: 2").unwrap();
    assert_eq!(epoch(&mut second, 6..8), next[4..]);
}

#[test]
fn pairs_carry_the_rejected_answers() {
    let harness = Harness::new();
    let rows = format!("{}{}", plain_rows(1), with_rejected(1));
    let mut source = source(&harness, &rows, "batch_size: 2, shuffle: false").unwrap();
    assert_eq!(harness.notes(), ["2 rows read; 1 row without a rejected answer, which `pairs` leaves out"]);
    let outputs = source.step(1, Inputs::default()).unwrap();
    let pairs: Vec<Pair> = outputs
        .records
        .into_iter()
        .filter_map(|(port, record)| match record {
            Record::Pair(pair) if port == "pairs" => Some(Pair::clone(&pair)),
            _ => None,
        })
        .collect();
    let expected = Pair {
        step: 1,
        position: 1,
        origin: "node".into(),
        source: "node".into(),
        ..crate::testing::pair(1, &[0, 5], &[6, 1], Some(&[7, 1]))
    };
    assert_eq!(pairs, [expected]);
}

#[test]
fn pairs_without_rejected_answers_are_an_error() {
    let error = source(&Harness::new(), &plain_rows(2), "batch_size: 2").err().unwrap();
    assert!(error.to_string().starts_with("`pairs` is used, but no row has a rejected answer"), "{error}");
}

#[test]
fn a_resumed_run_needs_the_same_data() {
    let harness = Harness::new();
    let directory = harness.checkpoint();
    source(&harness, &with_rejected(2), "batch_size: 2").unwrap().snapshot(&directory).unwrap();
    source(&harness, &with_rejected(2), "batch_size: 2").unwrap().restore(&directory).unwrap();
    let error = source(&harness, &with_rejected(3), "batch_size: 2").unwrap().restore(&directory).unwrap_err();
    assert!(error.to_string().contains("rows.jsonl has changed"), "{error}");
    let limited = source(&harness, &with_rejected(2), "batch_size: 2, limit: 1").unwrap().restore(&directory);
    assert!(limited.unwrap_err().to_string().contains("other tokens"));
}

#[test]
fn the_plan_counts_rows_without_a_tokenizer() {
    let harness = Harness::new();
    let path = harness.write("rows.jsonl", &plain_rows(9));
    let with = format!("{{path: ['{path}'], tokenizer: nowhere, batch_size: 3, hold_out_every: 4}}");
    let config: Config = serde_yaml::from_str(&with).unwrap();
    let run = sapo_flow_engine::RunSettings::default();
    let context = PlanContext { node: "node", run: &run, steps: None, retained_versions: 1, inputs: Vec::new() };
    let plan = PromptSource::plan(&config, &context).unwrap();
    assert_eq!(plan.steps_per_epoch, Some(3));
    assert_eq!(plan.notes, ["7 rows, before any are dropped or skipped"]);
}

#[test]
fn ranges_are_checked() {
    let with = "{path: [], tokenizer: t, batch_size: 0, max_prompt_tokens: 0, limit: 0, hold_out_every: 1, \
                columns: {real: r, chosen: c}}";
    let config: Config = serde_yaml::from_str(with).unwrap();
    let keys: Vec<String> = PromptSource::check(&config).into_iter().map(|issue| issue.key).collect();
    assert_eq!(keys, ["columns", "batch_size", "max_prompt_tokens", "limit", "hold_out_every", "path"]);
}

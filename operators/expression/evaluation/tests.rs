//! `map`, `filter` and `score` on small records, and on the golden models.

use std::sync::Arc;

use sapo_flow_engine::{Define, Operator, Outputs, Pair, Retracted, Retraction, Sample, Segment, pipeline};

use super::*;
use crate::filter::Filter;
use crate::map::Map;
use crate::score::Score;
use crate::testing::{Harness, golden_path, pair, tiny_tokenizer, token_ids};

/// An operator built from these settings, of which only `connected` inputs are there, and started.
fn started<D: Define>(harness: &Harness, with: &str) -> D {
    let mut operator: D = harness.build(with).unwrap();
    operator.start(Inputs::default()).unwrap();
    operator
}

fn step(operator: &mut dyn Operator, step: u64, records: Vec<Record>) -> Result<Outputs, OperatorError> {
    operator.step(step, Inputs::new(vec![("records", records)]))
}

fn items(outputs: &Outputs) -> Vec<Item> {
    let records = outputs.records.iter().filter(|(port, _)| *port == "records");
    records.filter_map(|(_, record)| Item::of(record.clone()).ok()).collect()
}

fn metric(outputs: &Outputs, name: &str) -> f64 {
    let of = |(_, record): &(_, Record)| match record {
        Record::Metrics(metrics) => metrics.values.get(name).copied(),
        _ => None,
    };
    outputs.records.iter().find_map(of).unwrap_or_else(|| panic!("no metric {name}"))
}

fn retraction() -> Record {
    let of = Retracted::Row { source: "data".into(), row: 1 };
    Record::Retraction(Retraction { port_type: PortType::Pairs, of, because: None })
}

#[test]
fn filters_keep_what_their_expression_says() {
    let harness = Harness::new();
    let mut filter: Filter = started(&harness, "{where: 'has_rejected && chosen_len - rejected_len >= step - 1'}");
    let pairs =
        [pair(0, &[5], &[6, 1], Some(&[7, 1])), pair(1, &[5], &[6, 7, 1], Some(&[7, 1])), pair(2, &[5], &[6, 1], None)];
    let mut records: Vec<Record> = pairs.map(|pair| Record::Pair(pair.into())).into();
    records.insert(1, retraction());
    let kept = |outputs: &Outputs| items(outputs).iter().map(Item::row).collect::<Vec<_>>();
    let first = step(&mut filter, 1, records.clone()).unwrap();
    assert_eq!(kept(&first), [0, 1]);
    assert_eq!((metric(&first, "node/kept"), metric(&first, "node/dropped")), (2.0, 1.0));
    // Retractions pass, in their place.
    assert!(
        matches!(&first.records[1], ("records", Record::Retraction(found)) if found.of == Retracted::Row { source: "data".into(), row: 1 })
    );
    assert_eq!(kept(&step(&mut filter, 2, records).unwrap()), [1]);
}

#[test]
fn maps_set_numbers_texts_and_tokens() {
    let (harness, tokenizer) = (Harness::new(), tiny_tokenizer());
    let mut map: Map = started(
        &harness,
        &format!(
            "{{tokenizer: '{}', set: {{prompt: prompt, chosen: 'chosen + \" b\"', rejected_ids: '[7] + rejected_ids', \
             long: chosen_len > 2, ratio: chosen_len / rejected_len}}}}",
            tokenizer.path().display()
        ),
    );
    // A prompt that the tokenizer would write otherwise: its text stays, so its tokens do.
    let mut given = pair(3, &[5, 0, 5], &[6, 1], Some(&[7, 7, 7, 1]));
    given.segment = Some(Segment { start: 0, len: 1, ended: false });
    (given.weights_version, given.seed) = (Some(4), Some(5));
    let outputs = step(&mut map, 0, vec![Record::Pair(given.clone().into())]).unwrap();
    let mut expected = pair(3, &[5, 0, 5], &[6, 7, 1], Some(&[7, 7, 7, 7, 1]));
    expected.values = [("long".to_owned(), 0.0), ("ratio".to_owned(), 0.5)].into();
    assert_eq!(items(&outputs), [Item::Pair(expected.into())]);
    assert_eq!((metric(&outputs, "node/long"), metric(&outputs, "node/ratio")), (0.0, 0.5));

    let mut empty: Map = started(&harness, "{set: {chosen_ids: '[]'}}");
    let error = step(&mut empty, 0, vec![Record::Pair(given.into())]).expect_err("nothing is left").to_string();
    assert_eq!(error, "row 3 (pair 3 of `data` at step 0): the chosen is empty");
}

#[test]
fn texts_of_records_can_be_filtered_on_and_set() {
    let harness = Harness::new();
    let given = |row: u64, category: &str, score: f64| {
        let mut pair = pair(row, &[5], &[6, 1], None);
        pair.values = [("score".to_owned(), score)].into();
        pair.values.insert_text("category".into(), category.into());
        Record::Pair(pair.into())
    };
    let mut filter: Filter =
        started(&harness, "{where: 'values.category == \"math\" && values.score > 0.5 || \"good\" in values'}");
    let records = vec![given(0, "math", 0.9), given(1, "code", 0.9), given(2, "math", 0.1)];
    let kept = items(&step(&mut filter, 0, records).unwrap());
    assert_eq!(kept.iter().map(Item::row).collect::<Vec<_>>(), [0]);
    let mut map: Map = started(&harness, "{set: {category: 'values.category.to_upper()', kind: '`a` + \"b\"'}}");
    let set = step(&mut map, 0, vec![given(0, "math", 0.9)]).unwrap();
    let values = items(&set)[0].values().clone();
    assert_eq!(
        (values.text("category"), values.text("kind"), values.get("score")),
        (Some("MATH"), Some("ab"), Some(&0.9))
    );
    // Whether a number or a text comes is for the data to say.
    let mut wrong: Filter = started(&harness, "{where: values.category > 1}");
    let error = step(&mut wrong, 0, vec![given(0, "math", 0.9)]).expect_err("a text is no number").to_string();
    assert!(error.contains("`>` does not work on (text, number)"), "{error}");
}

#[test]
fn a_record_that_an_expression_cannot_take_ends_the_step() {
    let harness = Harness::new();
    // Two rows are fine, then one has no score, and one would be worked on for ever.
    let mut score: Score = started(&harness, "{score: 'while row == 7 { } values.known * 2', as: twice}");
    let with = |row: u64, known: Option<f64>| {
        let values = known.map(|known| ("known".to_owned(), known)).into_iter().collect();
        Record::Pair(Pair { values, ..pair(row, &[5], &[6, 1], None) }.into())
    };
    let good = step(&mut score, 0, vec![with(0, Some(1.5)), with(1, Some(-0.5))]).unwrap();
    assert_eq!(items(&good).iter().map(|item| item.values()["twice"]).collect::<Vec<_>>(), [3.0, -1.0]);
    let summary = ["node/twice", "node/twice_min", "node/twice_max"].map(|name| metric(&good, name));
    assert_eq!(summary, [1.0, -1.0, 3.0]);
    for (record, expected) in [
        (
            with(2, None),
            "row 2 (pair 2 of `data` at step 0): `score`: at column 27: there is no `known`; the record's values are: none",
        ),
        (
            with(7, Some(1.0)),
            "row 7 (pair 7 of `data` at step 0): `score`: at column 11: stopped after 1000000 operations",
        ),
    ] {
        let error = step(&mut score, 0, vec![record]).expect_err(expected).to_string();
        assert!(error.starts_with(expected), "{error}");
    }
}

#[test]
fn scores_are_the_log_probabilities_of_the_golden_models() {
    let models = std::fs::read_dir(golden_path("models")).unwrap().map(|entry| entry.unwrap().path());
    let mut compared = 0;
    for directory in models {
        let expected: serde_json::Value =
            serde_json::from_slice(&std::fs::read(directory.join("expected.json")).unwrap()).unwrap();
        let expected = &expected["step"];
        let given: Vec<Pair> = (0..)
            .zip(expected["pairs"].as_array().unwrap())
            .map(|(row, given)| {
                let ids = |name: &str| token_ids(&given[name]);
                pair(row, &ids("prompt_ids"), &ids("chosen_ids"), Some(&ids("rejected_ids")))
            })
            .collect();
        let harness = Harness::new();
        let pairs: Vec<Record> = given.iter().map(|pair| Record::Pair(Arc::new(pair.clone()))).collect();
        let sample = |pair: &Pair| Sample {
            step: 0,
            position: 0,
            origin: "made".into(),
            source: "data".into(),
            row: pair.row,
            prompt_ids: pair.prompt_ids.clone(),
            response_ids: pair.chosen_ids.clone(),
            weights_version: None,
            seed: None,
            values: Default::default(),
        };
        let samples: Vec<Record> = given.iter().map(|pair| Record::Sample(sample(pair).into())).collect();
        // Means over the pairs: ORPO's are per token, DPO's summed.
        let (orpo, dpo) = (&expected["orpo_reference"]["metrics"], &expected["dpo_reference"]["metrics"]);
        for (formula, records, expected) in [
            ("chosen_avg_logps", &pairs, &orpo["logps/chosen"]),
            ("rejected_avg_logps", &pairs, &orpo["logps/rejected"]),
            ("avg_logps", &samples, &orpo["logps/chosen"]),
            ("chosen_logps", &pairs, &dpo["logps/real"]),
            ("rejected_logps", &pairs, &dpo["logps/generated"]),
            ("logps", &samples, &dpo["logps/real"]),
        ] {
            let with = format!("{{score: {formula}, model: '{}', device: cpu, batch_size: 1}}", directory.display());
            let mut score: Score = started(&harness, &with);
            let found = metric(&step(&mut score, 0, records.clone()).unwrap(), "node/score");
            let expected = expected.as_f64().unwrap_or_else(|| panic!("{formula}: no number in the golden data"));
            let close = (found - expected).abs() <= 1e-5 * expected.abs().max(1.0);
            assert!(close, "{}, {formula}: expected {expected}, found {found}", directory.display());
            compared += 1;
        }
    }
    assert!(compared >= 6);
}

/// A pipeline with a node `x` of this operator and these settings, after `prompts.pairs`.
fn pipeline_with(op: &str, input: &str, with: &str) -> String {
    format!(
        "version: 1\nrun: {{steps: 1}}\nnodes:\n  prompts: {{op: prompt_source, with: {{path: a, tokenizer: m, batch_size: 1}}}}
  learner: {{op: preference_learner, in: batches, with: {{model: m, objective: orpo, learning_rate: 1.0}}}}
  batches: {{op: batcher, in: prompts.pairs, with: {{batch_size: 1, max_length: 8}}}}
  x: {{op: {op}, in: {{{input}}}, with: {with}}}\n  sink: {{op: metrics_sink, in: [learner.metrics, x.metrics]}}\n"
    )
}

/// The only complaint about such a pipeline, with what it underlines.
fn complaint(op: &str, input: &str, with: &str) -> (String, String) {
    match pipeline::parse_str("p.yaml", &pipeline_with(op, input, with), &[], &crate::registry()) {
        Ok(_) => Default::default(),
        Err(found) => {
            assert_eq!(found.list.len(), 1, "{found}");
            assert_eq!(found.list[0].line, 7, "{found}");
            let told = &found.list[0];
            let help = told.help.as_ref().map(|help| format!(" ({help})")).unwrap_or_default();
            let underlined = told.source_line.chars().skip(told.column - 1).take(told.width).collect();
            (format!("{}{help}", told.message), underlined)
        }
    }
}

/// A list of settings and how the complaint about them begins; nothing where they are good.
fn check(op: &str, input: &str, cases: &[(&str, &str)]) {
    for (with, expected) in cases {
        let (found, _) = complaint(op, input, with);
        assert!(if expected.is_empty() { found.is_empty() } else { found.starts_with(expected) }, "{with}: {found}");
    }
}

const PAIRS: &str = "records: prompts.pairs";

#[test]
fn mistakes_in_filters_are_found_when_a_pipeline_is_read() {
    check(
        "filter",
        PAIRS,
        &[
            ("{where: chosen_len > 3}", ""),
            ("{where: chosn_len > 3}", "`where`: unknown name `chosn_len` (did you mean `chosen_len`?)"),
            // A name of samples, which pairs do not have.
            ("{where: response_len > 3}", "`where`: unknown name `response_len`"),
            ("{where: chosen_len}", "`where`: expected true or false, found the number 3"),
            ("{where: 'chosen == \"\"'}", "`tokenizer` of `x`: is needed, since `where` reads the text `chosen`"),
            ("{where: row > 1, tokenizer: m}", "`tokenizer`: would have no effect: no expression reads or sets a text"),
        ],
    );
}

#[test]
fn mistakes_are_underlined_where_they_stand() {
    for (with, expected) in [
        ("{where: row > 1 && chosn_len > 3}", "chosn_len"),
        ("{where: 'row > 1 && chosn_len > 3'}", "chosn_len"),
        ("{where: \"source == \\\"a\\\" && chosn_len > 3\"}", "chosn_len"),
        ("{where: row > 1 && source == 3}", "=="),
    ] {
        let (message, underlined) = complaint("filter", PAIRS, with);
        assert_eq!(underlined.chars().next(), expected.chars().next(), "{with}: {message}: {underlined}");
        assert!(!message.contains("column"), "{with}: {message}");
    }
    // Over several lines of the file.
    let folded = "{where: row > 1\n      && chosn_len > 3}";
    let found = pipeline::parse_str("p.yaml", &pipeline_with("filter", PAIRS, folded), &[], &crate::registry());
    let found = found.err().expect("an unknown name").list.remove(0);
    assert_eq!((found.line, found.column, found.width), (8, 10, 9), "{found}");
}

#[test]
fn mistakes_in_maps_are_found_when_a_pipeline_is_read() {
    let not_ids = "`set.chosen_ids`: expected a list of token ids, found the number 3";
    check(
        "map",
        PAIRS,
        &[
            ("{set: {}}", "`set`: expected names with expressions, found none"),
            ("{set: {row: '1'}}", "`row` follows from the record, and cannot be set"),
            ("{set: {good: chosen_len >}}", "`set.good`: "),
            ("{set: {response_ids: '[1]'}}", "`set.response_ids`: Pairs have no `response`"),
            ("{set: {prompt: \"3\"}}", "`set.prompt`: expected a text, found the number 3"),
            ("{set: {chosen_ids: chosen_len}}", not_ids),
        ],
    );
}

#[test]
fn log_probabilities_need_one_model() {
    let both = "records: prompts.pairs, weights: {from: learner.weights, feedback: {max_staleness: 0}}";
    let needs = "in `x`: log-probabilities need a model: give `model`, or connect `weights`";
    let idle = "in `x`: `in: {weights: ...}` would have no effect: no expression reads log-probabilities";
    check("score", PAIRS, &[("{score: chosen_logps}", needs), ("{score: chosen_logps, model: m}", "")]);
    for (op, with) in [("score", "score: chosen_len"), ("filter", "where: row > 1"), ("map", "set: {a: '1'}")] {
        for (key, setting) in [("model", "m"), ("device", "cpu"), ("batch_size", "2")] {
            let expected = format!("`{key}`: would have no effect: no expression reads log-probabilities");
            check(op, PAIRS, &[(&format!("{{{with}, {key}: {setting}}}"), &expected)]);
        }
    }
    check(
        "score",
        both,
        &[
            ("{score: chosen_logps}", ""),
            ("{score: chosen_logps, model: m}", "`model`: is given, but weights arrive too: leave out one of them"),
            ("{score: chosen_len}", idle),
            ("{score: chosen_logps, batch_size: 2}", ""),
            ("{score: row, as: a-b}", "`as`: expected a name of letters, digits and `_`, found \"a-b\""),
        ],
    );
}

//! `tests` in pipelines: what they run, what they compare, and what is wrong with them.

use std::sync::Arc;

use sapo_flow_engine::pipeline::{self, Case};
use sapo_flow_engine::{
    BuildContext, Define, Inputs, Metrics, Operator, OperatorError, OperatorSpec, Outputs, PortSpec, PortType, Record,
    Registry,
};

use crate::toy::{Nothing, registry};

/// Passes on the pairs whose row is even, and counts all; fails at row 13.
struct Even {
    seen: u64,
}

impl Operator for Even {
    fn step(&mut self, _: u64, mut inputs: Inputs) -> Result<Outputs, OperatorError> {
        let mut outputs = Outputs::new();
        for pair in inputs.pairs("pairs") {
            if pair.row == 13 {
                return Err("unlucky row 13".into());
            }
            self.seen += 1;
            if pair.row.is_multiple_of(2) {
                outputs.push("pairs", Record::Pair(pair));
            }
        }
        let values = [("seen".to_owned(), self.seen as f64)].into();
        outputs.push("metrics", Record::Metrics(Arc::new(Metrics { values })));
        Ok(outputs)
    }
}

impl Define for Even {
    const NAME: &'static str = "even";
    const SUMMARY: &'static str = "Passes on even rows.";
    const DOCS: &'static str = "";
    const EXAMPLE: &'static str = "";
    const INPUTS: &'static [PortSpec] = &[PortSpec::new("pairs", &[PortType::Pairs], "rows").many()];
    const OUTPUTS: &'static [PortSpec] = &[
        PortSpec::new("pairs", &[PortType::Pairs], "even rows"),
        PortSpec::new("metrics", &[PortType::Metrics], "seen: how many came"),
    ];
    type Config = Nothing;

    fn build(_: Nothing, _: &BuildContext) -> Result<Self, OperatorError> {
        Ok(Even { seen: 0 })
    }
}

/// Two filters in a row behind a sampler; `{tests}` are at line 16.
fn pipeline(tests: &str) -> String {
    format!(
        r#"version: 1
params: {{limit: 3}}
run: {{steps: 10}}
operators:
  twice:
    inputs: {{pairs: rows}}
    outputs: {{pairs: second.pairs, first: first.pairs}}
    nodes: {{first: {{op: even, in: pairs}}, second: {{op: even, in: first}}}}
nodes:
  prompts: {{op: prompt_source, with: {{path: rows.jsonl, batch_size: "${{limit}}"}}}}
  segments: {{op: segment_sampler, in: {{prompts: prompts, weights: learner.weights}}}}
  even: {{op: even, in: segments}}
  filter: {{op: twice, in: segments}}
  batches: {{op: batcher, in: filter}}
  learner: {{op: learner, in: {{batches: {{from: batches, feedback: {{max_staleness: 0}}}}}}, with: {{objective: orpo}}}}
tests:
{tests}"#
    )
}

fn cases(tests: &str) -> Result<Vec<Case>, Vec<String>> {
    let registry: Registry = registry().with(OperatorSpec::of::<Even>());
    pipeline::tests("p.yaml", &pipeline(tests), &[], &registry).map_err(|wrong| {
        wrong.list.iter().map(|found| format!("{}:{} {}", found.line, found.column, found.message)).collect()
    })
}

/// What is not as expected, by line and column.
fn failures(tests: &str) -> Vec<String> {
    let cases = cases(tests).unwrap_or_else(|wrong| panic!("{wrong:#?}"));
    assert!(!cases.is_empty());
    let verdicts = cases.into_iter().map(|case| case.run().expect("there is room for it"));
    verdicts
        .flat_map(|verdict| verdict.failures.list)
        .map(|found| format!("{}:{} {}", found.line, found.column, found.message))
        .collect()
}

#[test]
fn what_is_as_expected_passes() {
    // Rows 0..3 at step 0, then 3 and 4: of these 0, 2 and 4 are even, and 3 and 5 had come.
    let passed = r#"
- name: steps
  feed: {segments: [[{}, {}, {}], [{}, {}]]}
  expect:
    even: [[{row: 0}, {row: 2}], [{row: 4, step: 1, position: 1, origin: segments}]]
    even.metrics: [{seen: 3}, {seen: {min: 4.5, max: 5}}]
- name: all records
  feed: {segments: [[{row: 8, chosen_ids: [5, 6], values: {score: 0.3}}], [], [{row: 7}]]}
  expect:
    even:
      count: 1
      each: {chosen_ids: [5, {min: 6}], rejected_ids: {length: 1, contains: 3}, segment: null}
      any: {row: {one_of: [8, 9], not: 9}, values: {score: {approx: 0.1, within: 0.21}}}
      no: {row: 7}
- name: parameters are filled in
  params: {limit: 2}
  feed: {segments: [[{}, {}, {}]]}
  expect: {even: {count: "${limit}"}}
- name: the node inside a composite is fed by the output that names it
  feed: {filter.first: [{row: 4}]}
  expect: {filter: [{row: 4}], filter/second.metrics: [{seen: 1}]}
- name: a failure
  feed: {segments: [[], {row: 13}]}
  fails: {node: even, step: 1, message: {contains: unlucky}}
"#;
    assert_eq!(failures(passed), [""; 0]);
}

#[test]
fn what_is_not_as_expected_is_told_where_it_is_written() {
    let failed = r#"
- name: a value
  feed: {segments: [[{row: 2}, {row: 4}]]}
  expect:
    even: [[{row: 2}, {row: 5}]]
    even.metrics: [{sean: 2}]
- name: too many
  feed: {segments: [[{}, {}, {}]]}
  expect:
    even: [[{row: 0}]]
- name: predicates
  feed: {segments: [[{row: 2}]]}
  expect:
    even:
      count: {min: 2}
      each: {row: {max: 1}, chosen_ids: {contains: 9}}
      any: {row: 3}
      no: {row: 2}
- name: nothing to compare
  feed: {segments: [[{row: 1}]]}
  expect: {even: {each: {row: 1}}}
- name: no failure
  feed: {segments: [{row: 1}]}
  fails: {node: even}
- name: an unexpected failure
  feed: {segments: [{row: 13}]}
  expect: {even: {count: 0}}
"#;
    assert_eq!(
        failures(failed),
        [
            "21:29 expected `even at step 0 (2).row` to be 5, found 4",
            "22:27 `even.metrics at step 0` has no `sean`",
            "26:12 expected `even` to emit 1 record at step 0, found 2: \
             {\"step\":0,\"position\":0,\"origin\":\"segments\",\"source\":\"segments\",\"row\":0,\"prompt_ids\":[1],\"chosen_ids\":[2],\
             \"rejected_ids\":[3],\"segment\":null,\"weights_version\":null,\"seed\":null,\"values\":{}}, \
             {\"step\":0,\"position\":2,\"origin\":\"segments\",\"source\":\"segments\",\"row\":2,\"prompt_ids\":[1],\"chosen_ids\":[2],\
             \"rejected_ids\":[3],\"segment\":null,\"weights_version\":null,\"seed\":null,\"values\":{}}",
            "31:15 expected `the number of records of even` to be at least 2, found 1",
            "32:20 expected `even at step 0.row` to be at most 1, found 2",
            "32:42 expected `even at step 0.chosen_ids` to be something that contains this, found [2]",
            "33:7 none of the 1 record of `even` is like this",
            "34:7 `even at step 0` is like this: {\"step\":0,\"position\":0,\"origin\":\"segments\",\"source\":\"segments\",\"row\":2,\
             \"prompt_ids\":[1],\"chosen_ids\":[2],\"rejected_ids\":[3],\"segment\":null,\"weights_version\":null,\
             \"seed\":null,\"values\":{}}",
            "37:19 `even` emitted nothing: there was nothing to compare",
            "38:3 expected a failure, and the run ended well",
            "41:3 the run failed: node `even` at step 0: unlucky row 13",
        ]
    );
}

#[test]
fn a_misspelt_name_does_not_pass_where_something_must_not_be() {
    let misspelt = r#"
- name: metrics
  feed: {segments: [[{row: 2}], [{row: 4}]]}
  expect: {even.metrics: {no: {sean: 2}}}
- name: values
  feed: {segments: [[{row: 2, values: {score: 0.5}}, {row: 4}]]}
  expect: {even: {no: {values: {scor: 3}}}}
- name: what no record has may be written of a field that records can have
  feed: {segments: [[{row: 2, values: {score: 0.5}}, {row: 4}]]}
  expect: {even: {no: {values: {score: 3}, row: 5}, each: {row: {not: 3}}}}
- name: nothing was taken back
  feed: {segments: [[{row: 2}]]}
  expect: {even: {no: {retract: {row: 2}}}}
"#;
    assert_eq!(failures(misspelt), ["20:38 `even.metrics` has no `sean`", "23:39 `even.values` has no `scor`",]);
}

#[test]
fn mistakes_in_tests_are_errors_with_places() {
    let wrong = r#"
- name: names
  params: {limits: 2}
  feed: {segmants: [[{}]], segments: [[{raw: 1, chosen_ids: text}]]}
  expect: {even.pears: {count: 1}, learner: [], even: {eech: {}, each: {rows: 1, row: {most: 1}}}}
- name: what is expected
  feed: {segments: [[{}]]}
  expect: {}
- name: lengths
  feed: {segments: [[{}], [{}]]}
  expect: {even: [[]]}
- name: nothing depends on it
  feed: {prompts: [[{}]]}
  expect: {batches: {count: 0}}
  steps: 0
- name: weights
  feed: {learner: [[{}]], filter/first: [[{}]]}
  expect: {filter/first: {count: 0}}
- name: lengths
  feed: {segments: [[{}]]}
  fails: {nod: even}
- nam: x
"#;
    let found = cases(wrong).err().expect("they are wrong");
    for expected in [
        "19:12 the pipeline has no parameter `limits`",
        "24:3 this test expects nothing",
        "27:12 the test has 2 steps, and 1 are listed here",
        "31:10 `steps` is a number from 1 to 10000, found the number 0",
        "33:10 `learner` carries Weights, which cannot be fed",
        "35:3 two tests are named `lengths`",
        "38:3 a test has a `name`",
    ] {
        assert!(found.iter().any(|line| line == expected), "{expected}: {found:#?}");
    }
    for expected in [
        "20:10 there is no node `segmants`",
        "20:41 unknown key `raw`",
        "20:61 `chosen_ids` must be a list, each item an integer, found the text \"text\"",
        "21:12 `even` (even) has no output `pears`",
        "21:56 unknown key `eech` in what is expected of `even`",
        "21:73 there is no field `rows` in `even`",
        "21:88 `most` says nothing about `even.row`",
    ] {
        assert!(found.iter().any(|line| line == expected), "{expected}: {found:#?}");
    }
    let lines: Vec<usize> = found.iter().map(|line| line.split(':').next().unwrap().parse().unwrap()).collect();
    assert!(lines.is_sorted(), "{found:#?}");
    // A feed that names no node is no lack of steps.
    let found = cases("- name: x\n  feed: {segmants: [[{}]]}\n  expect: {even: {count: 0}}\n").err();
    let of_tests: Vec<String> =
        found.expect("it is wrong").into_iter().filter(|line| line > &"17".to_owned()).collect();
    assert_eq!(of_tests, ["18:10 there is no node `segmants`"]);
}

#[test]
fn runs_and_their_records_do_not_know_the_tests() {
    let registry = registry().with(OperatorSpec::of::<Even>());
    let text = pipeline("- name: evens\n  feed: {segments: [[{}]]}\n  expect: {even: {count: 1}}\n");
    let graph = pipeline::parse_str("p.yaml", &text, &[], &registry).map_err(|wrong| wrong.to_string()).unwrap();
    assert!(graph.resolved.get("tests").is_none() && graph.resolved.get("nodes").is_some());
    assert!(!pipeline::expand("p.yaml", &text, &[], &registry).unwrap().contains("evens"));
    let broken = text.replace("even: {count", "evn: {count");
    let refused = pipeline::parse_str("p.yaml", &broken, &[], &registry).err().expect("a test names no node");
    assert!(refused.to_string().contains("there is no node `evn`"), "{refused}");
    assert!(refused.to_string().contains("did you mean `even`?"), "{refused}");
    assert!(refused.to_string().contains("in the test `evens`"), "{refused}");
}

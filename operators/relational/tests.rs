//! Relational operators in pipelines: what a script of insertions and retractions makes of them, by hand.

use std::fs;
use std::sync::Arc;

use sapo_flow_engine::pipeline;
use sapo_flow_engine::record::Change;
use sapo_flow_engine::relation::{Arrival, Relation};
use sapo_flow_engine::runtime::checkpoint::LoadedCheckpoint;
use sapo_flow_engine::runtime::{RunOptions, run};
use sapo_flow_engine::{
    BuildContext, Define, Inputs, Operator, OperatorError, OperatorSpec, Outputs, PortSpec, PortType, Record, Registry,
    Retracted, Retraction,
};

use super::script::{Nothing, Recorder, Scripted};
use super::window::Window;
use super::{Relational, retraction_of};
use crate::testing::{Harness, pair};

fn registry() -> Registry {
    crate::registry().with(OperatorSpec::of::<Scripted>()).with(OperatorSpec::of::<Recorder>())
}

/// Run a pipeline whose node `seen` records, with a checkpoint at every step; and once more from each checkpoint, and with
/// two workers, which must give the same.
fn run_all_ways(nodes: &str) -> Result<String, String> {
    let text = format!("version: 1\nrun: {{steps: 6, checkpoint: {{every: 1, keep: 9}}}}\nnodes:\n{nodes}\n");
    let graph = pipeline::parse_str("p.yaml", &text, &[], &registry()).map_err(|errors| errors.to_string())?;
    let directory = tempfile::tempdir().unwrap();
    let path = |name: &str| {
        fs::create_dir_all(directory.path().join(name)).unwrap();
        directory.path().join(name)
    };
    let go = |options: RunOptions| {
        let seen = options.run_directory.join("seen");
        run(&graph, options).map_err(|error| error.to_string()).map(|_| fs::read_to_string(seen).unwrap())
    };
    let whole = go(RunOptions::new(path("whole")))?;
    let two = go(RunOptions { workers: 2, ..RunOptions::new(path("two")) })?;
    assert_eq!(two, whole, "two workers");
    for step in 1..6 {
        let checkpoint = directory.path().join(format!("whole/checkpoints/step-{step:08}"));
        let checkpoint = LoadedCheckpoint::load(&checkpoint, &graph).map_err(|error| error.to_string())?;
        let resumed = go(RunOptions { resume: Some(checkpoint), ..RunOptions::new(path(&format!("from-{step}"))) })?;
        assert_eq!(resumed, whole, "resumed at step {step}");
    }
    Ok(whole)
}

/// The script of most tests. At step 0 three samples of row 1, and one of row 2; and so on.
fn script(name: &str, steps: &[&str]) -> String {
    format!("  {name}: {{op: script, with: {{steps: {steps:?}}}}}\n")
}

#[track_caller]
fn assert_seen(nodes: &[&str], expected: &[&str]) {
    let seen = run_all_ways(&nodes.concat()).unwrap();
    let lines: Vec<&str> = seen.lines().map(|line| line.split_once(": ").unwrap().1).collect();
    assert_eq!(lines, expected);
}

#[test]
fn best_and_worst_of_the_newest_candidates() {
    // Row 1 has 11 (0.5) and 12 (0.1); then 13 (0.9) displaces the best. With 14 the oldest of four, 11, is no candidate,
    // which changes nothing; with 15 neither is 12, so that 14 is the worst. Then 13 is taken back, and 12 is one of the
    // newest three again. Row 2 has a pair once its scores differ. New pairs come in the order in which their chosen
    // samples arrived.
    let nodes = [
        &script(
            "s",
            &["+1:11=0.5 +1:12=0.1 +2:21=1", "+1:13=0.9 +2:22=1", "+1:14=0.2", "+1:15=0.3", "-1.0 +2:23=0", "-2"],
        ),
        "  pairs: {op: best_worst, in: s.samples, with: {score: values.score, candidates: 3}}\n",
        "  seen: {op: recorder, in: pairs}",
    ];
    assert_seen(
        &nodes,
        &[
            "+1:11>12@0#pairs.0.0",
            "-pairs.0.0 +1:13>12@0#pairs.1.0",
            "",
            "-pairs.1.0 +1:13>14@2#pairs.3.0",
            "-pairs.3.0! +2:21>23@4#pairs.4.0 +1:15>12@0#pairs.4.1",
            "-pairs.4.0!",
        ],
    );
}

#[test]
fn the_displaced_pair_leaves_the_replay_buffer() {
    // The buffer draws all it holds, first in, first out, so that the newest pair of row 1 is what comes.
    let nodes = [
        &script("s", &["+1:11=0.5 +1:12=0.1", "", "+1:13=0.9", "", "-1", ""]),
        "  pairs: {op: best_worst, in: s.samples, with: {score: values.score, candidates: 3}}\n",
        "  replay: {op: replay_buffer, in: pairs, with: {draws: 1, sampling: uniform}}\n",
        "  seen: {op: recorder, in: replay}",
    ];
    let (old, new) = ("+1:11>12@0#pairs.0.0", "+1:13>12@0#pairs.2.0");
    assert_seen(&nodes, &[old, old, new, new, "", ""]);
}

#[test]
fn distinct_passes_the_first_and_its_successor() {
    let nodes = [
        &script("s", &["+1:7=0 +2:7=0 +3:8=0", "+4:8=0", "-1", "-2", "-4", "+5:7=0"]),
        "  once: {op: distinct, in: s.pairs, with: {by: [chosen]}}\n",
        "  seen: {op: recorder, in: once}",
    ];
    assert_seen(&nodes, &["+1:7>0#s.0.0 +3:8>0#s.0.2", "", "-s.0.0! +2:7>0#s.0.1", "-s.0.1!", "", "+5:7>0#s.5.0"]);
}

#[test]
fn prompts_are_taken_back_by_row_once_none_is_left() {
    // Row 1 comes at steps 0 and 1: what leaves the window at step 2 is one occurrence of two.
    let nodes = [
        &script("s", &["+1:7=0 +2:7=0", "+1:7=0", "", "", "-1", ""]),
        "  recent: {op: window, in: s.prompts, with: {steps: 2}}\n",
        "  seen: {op: recorder, in: recent}",
    ];
    assert_seen(&nodes, &["+1:7(score=0) +2:7(score=0)", "+1:7(score=0)", "-2", "-1", "", ""]);
}

#[test]
fn a_window_forgets_what_was_taken_back_before() {
    let nodes = [
        &script("s", &["+1:7=0 +2:8=0", "-0.0", "", "+3:9=0", "", "-3"]),
        "  recent: {op: window, in: s.samples, with: {steps: 3}}\n",
        "  seen: {op: recorder, in: recent}",
    ];
    assert_seen(&nodes, &["+1:7(score=0) +2:8(score=0)", "-s.0.0!", "", "-s.0.1 +3:9(score=0)", "", "-s.3.0!"]);
}

#[test]
fn the_top_of_all_and_of_each_group() {
    let steps = ["+1:11=0.5 +1:12=-2 +2:21=0.5", "+2:22=3", "+1:13=0.5", "-1.0", "-1", ""];
    // Equal scores: the first to arrive.
    let all = [
        &script("s", &steps),
        "  top: {op: top_k, in: s.samples, with: {k: 2, score: values.score}}\n",
        "  seen: {op: recorder, in: top}",
    ];
    assert_seen(
        &all,
        &["+1:11(score=0.5) +2:21(score=0.5)", "-s.0.2 +2:22(score=3)", "", "-s.1.0! +2:21(score=0.5)", "-s.0.0!", ""],
    );
    let lowest = [
        &script("s", &steps),
        "  top: {op: top_k, in: s.samples, with: {k: 1, score: values.score, keep: lowest, by: row}}\n",
        "  seen: {op: recorder, in: top}",
    ];
    assert_seen(&lowest, &["+1:12(score=-2) +2:21(score=0.5)", "", "", "", "-s.0.1!", ""]);
}

#[test]
fn counts_go_with_the_first_of_each_key() {
    let nodes = [
        &script("s", &["+1:7=0 +1:8=0 +2:7=0", "+2:9=0", "", "-0.0", "-2", ""]),
        "  counts: {op: count_by, in: s.samples, with: {by: row}}\n",
        "  seen: {op: recorder, in: counts}",
    ];
    assert_seen(
        &nodes,
        &[
            "+1:7(count=2,score=0) +2:7(count=1,score=0)",
            "-s.0.2 +2:7(count=2,score=0)",
            "",
            "-s.0.0! +1:8(count=1,score=0)",
            "-s.0.2!",
            "",
        ],
    );
}

#[test]
fn joins_follow_both_sides() {
    let nodes = [
        &script("good", &["+1:11=0", "", "+2:21=0", "", "-1", ""]),
        &script("bad", &["", "+1:12=0 +1:13=0", "", "+2:22=0", "", "-1.1"]),
        "  pairs: {op: join, in: {chosen: good.prompts, rejected: bad.samples}, with: {by: prompt}}\n",
        "  seen: {op: recorder, in: pairs}",
    ];
    assert_seen(
        &nodes,
        &["", "+1:11>12@1#pairs.1.0 +1:11>13@1#pairs.1.1", "", "+2:21>22@3#pairs.3.0", "-pairs.1.0! -pairs.1.1!", ""],
    );
}

#[test]
fn semijoin_and_antijoin_divide_the_records() {
    let (records, keys) = (
        script("s", &["+1:11=0 +2:21=0", "+1:12=0", "", "", "+2:22=0", ""]),
        script("k", &["+9:11=0", "", "+2:5=0 +2:6=0", "-2.0", "-2.1", ""]),
    );
    let sources = [records, keys].concat();
    let semijoin = "  kept: {op: semijoin, in: {records: s.samples, keys: k.pairs}, with: {by: prompt}}\n";
    let seen = "  seen: {op: recorder, in: kept}";
    let zero = |word: &str| format!("{word}(score=0)");
    let (one, two, three, four) = (zero("+1:11"), zero("+2:21"), zero("+1:12"), zero("+2:22"));
    assert_seen(&[&sources, semijoin, seen], &["", "", &two, "", "-s.0.1", ""]);
    let antijoin = semijoin.replace("semijoin", "antijoin");
    let both = format!("{one} {two}");
    let back = format!("{two} {four}");
    assert_seen(&[&sources, &antijoin, seen], &[&both, &three, "-s.0.1", "", &back, ""]);
    // By different fields: the response of one is the chosen answer of the other.
    let other =
        "  kept: {op: semijoin, in: {records: s.samples, keys: k.pairs}, with: {by: response, keys_by: chosen}}\n";
    assert_seen(&[&sources, other, seen], &[&one, "", "", "", "", ""]);
}

#[test]
fn windows_bound_what_comes_after_them() {
    let nodes = [
        &script("s", &["+1:11=0.9 +1:12=0.1", "+1:13=0.5", "", "+1:14=0.2", "", ""]),
        "  recent: {op: window, in: s.samples, with: {steps: 2}}\n",
        "  pairs: {op: best_worst, in: recent, with: {score: values.score, candidates: 9}}\n",
        "  seen: {op: recorder, in: pairs}",
    ];
    // At step 2 only 13 is left; at step 3 it leaves as 14 comes.
    assert_seen(&nodes, &["+1:11>12@0#pairs.0.0", "", "-pairs.0.0", "", "", ""]);
}

#[test]
fn feedback_edges_reach_a_relation_late_and_through_checkpoints() {
    let nodes = [
        &script("s", &["+1:11=0", "+2:21=0", "-1", "+3:31=0", "", ""]),
        "  once: {op: distinct, in: {records: {from: s.samples, feedback: {max_staleness: 1}}}, with: {by: row}}\n",
        "  seen: {op: recorder, in: once}",
    ];
    assert_seen(&nodes, &["", "", "+1:11(score=0)", "+2:21(score=0)", "-s.0.0!", "+3:31(score=0)"]);
}

#[test]
fn what_a_record_lacks_is_an_error_with_its_name() {
    let nodes = |with: &str, steps: &[&str]| {
        [
            script("s", steps),
            format!("  top: {{op: top_k, in: s.samples, with: {{{with}}}}}\n  seen: {{op: recorder, in: top}}"),
        ]
        .concat()
    };
    let error = run_all_ways(&nodes("k: 1, score: values.score", &["+1:1=1", "+2:2=-"])).unwrap_err();
    let expected =
        "node `top` at step 1: row 2 of `s` (sample 0 of `s` at step 1) has no values.score, which `score` names";
    assert_eq!(error, expected);
    let error = run_all_ways(&nodes("k: 1, score: values.score", &["+1:1=NaN"])).unwrap_err();
    assert!(error.ends_with("has values.score NaN, which `score` names"), "{error}");
    let error = run_all_ways(&nodes("k: 1, score: row", &[])).unwrap_err();
    assert!(error.contains("expected values.NAME, a number, found `row`"), "{error}");
    let error = run_all_ways(&nodes("k: 1, score: values.score, by: chosen", &[])).unwrap_err();
    assert!(error.contains("Samples, which `records` takes, have no `chosen`"), "{error}");
    let error = run_all_ways(&nodes("k: 1, score: score", &[])).unwrap_err();
    assert!(error.contains("or values.NAME, found `score`"), "{error}");
}

#[test]
fn retractions_do_not_end_where_they_have_no_effect() {
    let nodes = [
        &script("s", &[]),
        "  recent: {op: window, in: s.pairs, with: {steps: 2}}\n",
        "  samples: {op: plain, in: recent}",
    ];
    let text = format!("version: 1\nrun: {{steps: 1}}\nnodes:\n{}\n", nodes.concat());
    let registry = registry().with(OperatorSpec::of::<Plain>());
    let error = pipeline::parse_str("p.yaml", &text, &[], &registry).err().unwrap().to_string();
    let expected = "`recent.records` may take back what it emitted, but the input `pairs` of `samples` (plain) cannot";
    assert!(error.contains(expected), "{error}");
}

/// Numbers of elements that come or go, as the dataflow of a window gives them: each element is a result, too.
fn changes(numbers: std::ops::Range<u32>, diff: i64) -> Vec<Record> {
    let element = |index| Arrival { step: 0, port: 0, index }.to_numbers().to_vec();
    numbers.map(|index| Record::Change(Change { element: element(index), diff })).collect()
}

/// Every retraction against every element would be 2,500,000,000 comparisons.
#[test]
fn many_rows_taken_back_at_once_are_told_with_what_led_to_it() {
    const ROWS: u32 = 50_000;
    let mut window: Relational<Window> = Harness::new().build("{steps: 9}").unwrap();
    let pair = |row| Record::Pair(Arc::new(pair(row, &[1], &[2], None)));
    let step = |records, numbers, diff| {
        let changes = changes(numbers, diff);
        Inputs::new(vec![("records", records), (Relation::ELEMENTS, changes.clone()), (Relation::RESULTS, changes)])
    };
    // The last one stays.
    window.step(0, step((0..=ROWS).map(|row| pair(row.into())).collect(), 0..ROWS + 1, 1)).unwrap();
    let taken_back = |of, because: Option<&str>| {
        Record::Retraction(Retraction { port_type: PortType::Pairs, of, because: because.map(Into::into) })
    };
    let row = |row: u32| Retracted::Row { source: "data".into(), row: row.into() };
    let mut retractions: Vec<Record> = (0..ROWS).map(|number| taken_back(row(number), Some("row"))).collect();
    // Of two the later one counts, and one that says nothing does not.
    let record = retraction_of(&pair(1)).unwrap();
    retractions.extend([taken_back(record, Some("record")), taken_back(row(2), None)]);
    let outputs = window.step(1, step(retractions, 0..ROWS, -1)).unwrap();
    let told: Vec<Record> =
        outputs.records.into_iter().filter(|(port, _)| *port == "records").map(|(_, of)| of).collect();
    assert_eq!(told.len(), ROWS as usize);
    let because: Vec<&str> = told
        .iter()
        .map(|told| match told {
            Record::Retraction(Retraction { because: Some(because), .. }) => because.as_str(),
            other => panic!("{other:?}"),
        })
        .collect();
    assert_eq!(because[..3], ["row", "record", "row"]);
    assert!(because[3..].iter().all(|because| *because == "row"));
    assert_eq!((window.live.len(), window.alike.len(), window.elements.len()), (1, 1, 1));
}

/// Takes pairs and knows nothing of retractions.
struct Plain;

impl Operator for Plain {
    fn step(&mut self, _: u64, _: Inputs) -> Result<Outputs, OperatorError> {
        Ok(Outputs::new())
    }
}

impl Define for Plain {
    const NAME: &'static str = "plain";
    const SUMMARY: &'static str = "";
    const DOCS: &'static str = "";
    const EXAMPLE: &'static str = "";
    const INPUTS: &'static [PortSpec] = &[PortSpec::new("pairs", &[PortType::Pairs], "")];
    const OUTPUTS: &'static [PortSpec] = &[];
    type Config = Nothing;

    fn build(_: Nothing, _: &BuildContext) -> Result<Self, OperatorError> {
        Ok(Plain)
    }
}

//! `sweep` in pipelines: which combinations there are, and what is wrong with them.

use sapo_flow_engine::pipeline::{self, Sweep};

use crate::toy::{LOOP, registry};

fn read(block: &str, overrides: &[(&str, &str)]) -> Result<Sweep, Vec<String>> {
    let overrides: Vec<_> = overrides.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect();
    pipeline::sweep("p.yaml", &format!("{LOOP}{block}"), &overrides, &registry()).map_err(|wrong| {
        wrong
            .list
            .iter()
            .map(|found| format!("{}:{}:{} {}", found.file, found.line, found.column, found.message))
            .collect()
    })
}

/// `ema_decay=0.5 max_staleness=1` for each combination.
fn combinations(block: &str, overrides: &[(&str, &str)]) -> Vec<String> {
    let sweep = read(block, overrides).unwrap_or_else(|wrong| panic!("{wrong:#?}"));
    let text = |(name, value): &(String, serde_yaml::Value)| {
        format!("{name}={}", serde_yaml::to_string(value).unwrap().trim())
    };
    sweep.combinations.iter().map(|c| c.params.iter().map(text).collect::<Vec<_>>().join(" ")).collect()
}

#[test]
fn every_value_meets_every_other() {
    let block =
        "sweep:\n  grid: {ema_decay: [0.25, 0.5]}\n  list: [{max_staleness: 0}, {max_staleness: 1}]\n  seeds: [3, 1]\n";
    assert_eq!(
        combinations(block, &[]),
        [
            "max_staleness=0 ema_decay=0.25",
            "max_staleness=0 ema_decay=0.5",
            "max_staleness=1 ema_decay=0.25",
            "max_staleness=1 ema_decay=0.5",
        ]
    );
    let sweep = read(block, &[]).ok().unwrap();
    assert_eq!(sweep.seeds, [3, 1]);
    let decay = |index: usize| {
        let graph = &sweep.combinations[index].graph;
        graph.nodes.iter().find(|node| node.name == "ema").unwrap().config["decay"].as_f64()
    };
    assert_eq!((decay(0), decay(1)), (Some(0.25), Some(0.5)));
}

#[test]
fn the_command_line_goes_before_the_file() {
    let block = "sweep: {grid: {ema_decay: [0.25, 0.5], max_staleness: [0, 1]}}\n";
    assert_eq!(
        combinations(block, &[("ema_decay", "0.1, 0.2"), ("max_staleness", "2")]),
        ["ema_decay=0.1", "ema_decay=0.2"]
    );
    let sweep = read(block, &[("max_staleness", "2")]).ok().unwrap();
    assert_eq!(sweep.fixed, [("max_staleness".to_owned(), 2.into())]);
    // An entry of a list is all of its values together.
    let list = "sweep: {list: [{ema_decay: 0.25}, {ema_decay: 0.5}]}\n";
    let refused = read(list, &[("ema_decay", "0.1")]).err().unwrap();
    assert_eq!(refused, ["p.yaml:18:17 `ema_decay` has its values in the list of `sweep`, and is -S ema_decay=0.1"]);
    assert_eq!(combinations("", &[("ema_decay", "0.1,0.2,0.3")]).len(), 3);
    assert_eq!(combinations("", &[]), [""]);
}

#[test]
fn what_a_sweep_gives_to_a_text_is_text() {
    let text = LOOP.replace("params:", "params:\n  tag: a").replace("rows.jsonl", "\"${tag}\"");
    let given = [("tag".to_owned(), "true, 0.10, b".to_owned())];
    let sweep = pipeline::sweep("p.yaml", &text, &given, &registry()).unwrap();
    let paths = sweep.combinations.iter().map(|found| found.graph.nodes[0].config["path"].as_str().unwrap().to_owned());
    assert_eq!(paths.collect::<Vec<_>>(), ["true", "0.10", "b"]);
    let params = sweep.combinations.iter().map(|found| found.params[0].1.as_str().unwrap().to_owned());
    assert_eq!(params.collect::<Vec<_>>(), ["true", "0.10", "b"]);
    let given = [("tag".to_owned(), "1".to_owned())];
    assert_eq!(pipeline::sweep("p.yaml", &text, &given, &registry()).unwrap().fixed, [("tag".to_owned(), "1".into())]);
}

#[test]
fn mistakes_in_sweeps_are_errors_with_places() {
    // LOOP has 17 lines.
    let wrong = |block: &str| read(block, &[]).err().unwrap_or_else(|| panic!("{block} is not right"));
    assert_eq!(
        wrong("sweep: {grid: {ema_dekay: [0.5, 0.6]}}\n"),
        ["p.yaml:18:16 the pipeline has no parameter `ema_dekay`"]
    );
    // A name that is not there hides no value that is wrong.
    assert_eq!(
        wrong("sweep: {grid: {ema_decay: [0.5, 2.5]}, list: [{max_stalenes: 1}, {max_staleness: 2}]}\n"),
        [
            "p.yaml:16:53 `decay`: must be at least 0 and below 1",
            "p.yaml:18:48 the pipeline has no parameter `max_stalenes`"
        ]
    );
    assert_eq!(
        wrong("sweep: {grid: {ema_decay: 0.5}, seed: [1]}\n"),
        [
            "p.yaml:18:27 expected a list of values for `ema_decay`, found the number 0.5",
            "p.yaml:18:33 unknown key `seed` in `sweep`"
        ]
    );
    // What one value breaks is told once, and at that value.
    assert_eq!(
        wrong("sweep: {grid: {ema_decay: [0.5, 2.5], max_staleness: [0, 1]}}\n"),
        ["p.yaml:16:53 `decay`: must be at least 0 and below 1"]
    );
    assert_eq!(
        wrong("sweep: {grid: {ema_decay: [0.5, 0.5]}, seeds: [1, 1]}\n"),
        ["p.yaml:18:51 the seed 1 is given twice"]
    );
    assert_eq!(
        wrong("sweep: {grid: {ema_decay: [0.5, 0.5]}}\n"),
        ["p.yaml:18:33 the sweep has this combination of values twice"]
    );
    assert_eq!(
        wrong("sweep: {grid: {ema_decay: [0.5, 0.6]}, list: [{ema_decay: 0.1}]}\n"),
        ["p.yaml:18:48 `ema_decay` is in the grid and in the list"]
    );
    let refused = pipeline::parse_str("p.yaml", &format!("{LOOP}sweep: {{grad: {{}}}}\n"), &[], &registry()).err();
    assert!(refused.expect("a run reads it, too").to_string().contains("did you mean `grid`?"));
}

//! Parameters: types, overrides, mistakes.

use crate::toy::{LOOP, complaints, read, read_with};

fn with_params(params: &str, path: &str, batch_size: &str) -> String {
    format!(
        "version: 1\nparams: {params}\nrun: {{steps: 1}}\nnodes:\n  prompts: {{op: prompt_source, with: {{path: {path}, batch_size: {batch_size}}}}}\n"
    )
}

#[test]
fn a_reference_alone_keeps_its_type_and_prints_within_text() {
    let text = with_params(
        r#"{n: 3, x: 0.5, on: true, dir: data, both: "${dir}/${n}", list: ["${n}", b]}"#,
        r#""${both}-${x}-${on}-$${n}""#,
        r#""${n}""#,
    );
    let text =
        text.replace("path:", "columns: \"${columns}\", path:").replace("list: [\"${n}\"", "columns: [\"c${n}\"");
    let config = read(&text).unwrap().nodes[0].config.clone();
    assert_eq!(config["path"], "data/3-0.5-true-${n}");
    assert_eq!(config["batch_size"], 3);
    assert_eq!(config["columns"], serde_yaml::from_str::<serde_yaml::Value>("[c3, b]").unwrap());
}

#[test]
fn a_value_cannot_change_the_structure() {
    let text = with_params(r#"{p: "a}, op: learner, x: {y"}"#, "\"${p}\"", "1");
    assert_eq!(read(&text).unwrap().nodes[0].config["path"], "a}, op: learner, x: {y");
}

#[test]
fn overrides_keep_the_type_of_the_default() {
    let text = with_params("{n: 3, p: a}", "\"${p}\"", "\"${n}\"");
    let config = read_with(&text, &[("n", "5"), ("p", "007")]).unwrap().nodes[0].config.clone();
    assert_eq!(config["batch_size"], 5);
    assert_eq!(config["path"], "007");
    let graph = read_with(LOOP, &[("ema_decay", "0")]).unwrap();
    assert_eq!(graph.nodes[5].config["decay"], 0);

    let refused = read_with(&text, &[("n", "0.5")]).err().unwrap();
    assert_eq!(
        refused.to_string(),
        "\
error: `n` must be an integer, found `0.5`
 --> command line:1:6
  |
1 | -S n=0.5
  |      ^^^ expected an integer
  = note: its default, the number 3, is at p.yaml:2:13"
    );
    assert_eq!(
        read_with(LOOP, &[("ema_decay", "half")]).err().unwrap().list[0].message,
        "`ema_decay` must be a number, found `half`"
    );
}

#[test]
fn unknown_overrides_are_errors() {
    let refused = read_with(LOOP, &[("ema_decay", "0.5"), ("ema_dekay", "0.9"), ("ema_decay", "0.1")]).err().unwrap();
    assert_eq!(
        refused.to_string(),
        "\
error: the pipeline has no parameter `ema_dekay`
 --> command line:2:4
  |
2 | -S ema_dekay=0.9
  |    ^^^^^^^^^
  = help: did you mean `ema_decay`?

error: the parameter `ema_decay` is overridden twice
 --> command line:3:4
  |
3 | -S ema_decay=0.1
  |    ^^^^^^^^^"
    );
}

#[test]
fn an_override_out_of_range_is_blamed_where_it_is_used() {
    let text = with_params("{n: 3}", "a", "\"${n}\"");
    let refused = read_with(&text, &[("n", "0")]).err().unwrap();
    assert_eq!(
        refused.to_string(),
        "\
error: `batch_size` must be at least 1, found 0
 --> p.yaml:5:60
  |
5 |   prompts: {op: prompt_source, with: {path: a, batch_size: \"${n}\"}}
  |                                                            ^^^^^^ must be at least 1
  = note: `${n}` is the number 0"
    );
}

#[test]
fn bad_references_are_errors() {
    let text = with_params("{name: x, a: \"${b}\", b: \"${a}\", list: [1]}", "\"${nam}\"", "1");
    assert_eq!(
        complaints(&text),
        [
            "2:10 the parameter `name` is not used",
            "2:19 parameters refer to each other: a -> b -> a",
            "2:41 the parameter `list` is not used",
            "5:45 there is no parameter `nam`",
        ]
    );
    assert_eq!(
        complaints(&with_params("{list: [1]}", "\"a${list}\"", "\"${list\"")),
        ["5:45 `${list}` within text must be a single value", "5:69 `${` in \"${list\" is not closed by `}`",]
    );
    assert_eq!(
        complaints(&with_params("{9a: 1}", "a", "1")),
        ["2:10 `9a` is no name for a parameter", "2:10 the parameter `9a` is not used"]
    );
}

#[test]
fn unused_parameters_are_warned_of() {
    let graph = read(&LOOP.replace("${ema_decay}", "0.5").replace("\"0.5\"", "0.5")).unwrap();
    assert_eq!(
        graph.warnings.to_string(),
        "\
warning: the parameter `ema_decay` is not used
 --> p.yaml:3:3
  |
3 |   ema_decay: 0.5
  |   ^^^^^^^^^
  = help: write `${ema_decay}` where its value belongs, or remove it"
    );
}

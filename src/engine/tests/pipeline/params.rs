//! Parameters: types, overrides, mistakes.

use sapo_flow_engine::pipeline::Severity;

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
fn overrides_are_yaml() {
    let text = with_params("{n: 3, p: a}", "\"${p}\"", "\"${n}\"");
    let config = read_with(&text, &[("n", "5"), ("p", "\"7\"")]).unwrap().nodes[0].config.clone();
    assert_eq!(config["batch_size"], 5);
    assert_eq!(config["path"], "7");
    assert_eq!(read_with(LOOP, &[("ema_decay", "0")]).unwrap().nodes[5].config["decay"], 0);
    // A key that takes a number or a word: the parameter says that it may be either.
    let either = LOOP
        .replace("params:", "params:\n  tokens: {default: 8, type: [integer, text]}")
        .replace("    in:\n", "    with: {segment_tokens: \"${tokens}\"}\n    in:\n");
    assert_eq!(read_with(&either, &[("tokens", "all")]).unwrap().nodes[1].config["segment_tokens"], "all");
    let refused = read_with(&text, &[("p", "[")]).err().unwrap();
    assert_eq!((refused.list[0].line, refused.list[0].column), (1, 6));
    assert!(refused.list[0].message.starts_with("this is not YAML: "), "{refused}");
    let refused = read_with(&text, &[("p", "{1: 2}")]).err().unwrap();
    assert_eq!(refused.list[0].message, "keys are text, and tags have no meaning here");
}

#[test]
fn a_plain_parameter_has_the_type_of_its_default() {
    let text = with_params("{n: 3, p: a, x: 0.5, on: true, any: , list: [a]}", "\"${p}\"", "\"${n}\"");
    let text = text.replace("path: ", "columns: \"${list}\", path: ");
    let refused = |name: &str, value: &str| {
        let wrong = read_with(&text, &[(name, value)]).err().unwrap();
        wrong.list.into_iter().find(|found| found.severity == Severity::Error).unwrap()
    };
    let whole = refused("n", "half").to_string();
    let refused = |name: &str, value: &str| refused(name, value).message;
    assert_eq!(refused("n", "half"), "`n` must be a number, found the text \"half\"");
    assert_eq!(refused("x", "true"), "`x` must be a number, found `true`");
    assert_eq!(refused("on", "1"), "`on` must be `true` or `false`, found the number 1");
    assert_eq!(refused("p", "[a, b]"), "`p` must be text, found a list");
    // A whole number may be replaced by any: here it is the key that wants a whole one.
    assert_eq!(refused("n", "2.5"), "`batch_size` must be an integer, found the number 2.5");
    assert_eq!(read_with(&text, &[("x", "1"), ("any", "[1]"), ("list", "[]")]).unwrap().params["x"], 1);
    assert_eq!(
        whole,
        "\
error: `n` must be a number, found the text \"half\"
 --> command line:1:6
  |
1 | -S n=half
  |      ^^^^ expected a number
  = note: its default is the number 3: p.yaml:2:13
  = help: a parameter that takes several types says so: `type: [integer, text]`"
    );
}

#[test]
fn what_is_given_to_a_text_is_text() {
    let text = with_params("{p: a}", "\"x-${p}\"", "1");
    let path = |text: &str, value: &str| read_with(text, &[("p", value)]).unwrap().nodes[0].config["path"].clone();
    for value in ["true", "1e3", "0.10", "null", "007", "#5"] {
        assert_eq!(path(&text, value), format!("x-{value}"));
    }
    assert_eq!(path(&text, "\"1\""), "x-1");
    assert_eq!(path(&text, ""), "x-");
    let chosen = text.replace("{p: a}", "{p: {default: a, choices: [a, \"1\"]}}");
    assert_eq!(path(&chosen, "1"), "x-1");
    // Of other types, nothing is no value.
    let number = with_params("{n: 3}", "a", "\"${n}\"");
    let refused = read_with(&number, &[("n", "")]).err().unwrap();
    assert_eq!(refused.list[0].message, "`n` is given no value");
    // In the file, quotes tell.
    assert_eq!(
        complaints(&text.replace("{p: a}", "{p: {default: 7, type: text}}"))[0],
        "2:23 `p` must be text, found the number 7"
    );
}

#[test]
fn a_parameter_can_take_several_types() {
    let text = with_params("{n: {default: 3, type: [integer, text], min: 1}}", "a", "\"${n}\"");
    assert_eq!(read_with(&text, &[("n", "4")]).unwrap().params["n"], 4);
    let message = |text: &str, value: &str| read_with(text, &[("n", value)]).err().unwrap().list[0].message.clone();
    assert_eq!(message(&text, "all"), "`batch_size` must be an integer, found the text \"all\"");
    assert_eq!(message(&text, "0"), "`n` must be at least 1, found 0");
    assert_eq!(message(&text, "[]"), "`n` must be an integer or text, found an empty list");
    let chosen = text.replace("type: [integer, text], min: 1", "choices: [3, all]");
    assert_eq!(message(&chosen, "4"), "`n` must be `3` or `all`, found the number 4");
    assert_eq!(
        complaints(&text.replace("text]", "word]"))[0],
        "2:42 `type` must be `integer`, `number`, `text`, `boolean`, `list` or `mapping`, found the text \"word\""
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
  = note: `${n}` (-S n=0) is the number 0"
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

#[test]
fn a_parameter_that_is_spelled_out_is_held_to_it() {
    let text = with_params(
        "{n: {default: 3, min: 1, max: 9, description: rows}, p: {type: text, choices: [a, b], default: a}}",
        "\"${p}\"",
        "\"${n}\"",
    );
    assert_eq!(read(&text).unwrap().nodes[0].config["batch_size"], 3);
    assert_eq!(read_with(&text, &[("n", "9"), ("p", "b")]).unwrap().nodes[0].config["path"], "b");
    let refused = |name: &str, value: &str| read_with(&text, &[(name, value)]).err().unwrap().list[0].clone();
    assert_eq!(refused("n", "10").message, "`n` must be at most 9, found 10");
    assert_eq!((refused("n", "10").file.as_str(), refused("n", "10").column), ("command line", 6));
    assert_eq!(refused("n", "2.5").message, "`n` must be an integer, found the number 2.5");
    assert_eq!(refused("p", "c").message, "`p` must be `a` or `b`, found the text \"c\"");
    // A default is held to its declaration, too.
    assert_eq!(complaints(&text.replace("default: 3", "default: 0"))[0], "2:23 `n` must be at least 1, found 0");
    assert_eq!(
        complaints(&text.replace("type: text", "type: string"))[0],
        "2:72 `type` must be `integer`, `number`, `text`, `boolean`, `list` or `mapping`, found the text \"string\""
    );
    assert_eq!(complaints(&text.replace("min:", "mim:"))[0], "2:26 unknown key `mim` in the parameter `n`");
}

#[test]
fn a_parameter_without_a_default_must_be_given() {
    let text = with_params("{n: {type: integer}, p: a}", "\"${p}\"", "\"${n}\"");
    assert_eq!(complaints(&text), ["2:10 the parameter `n` has no value"]);
    assert_eq!(read_with(&text, &[("n", "4")]).unwrap().nodes[0].config["batch_size"], 4);
}

#[test]
fn environment_variables_are_declared() {
    let with_env = |env: &str, path: &str| {
        format!("env: {env}\n{}", with_params("{p: a}", path, "1")).replace("path: ", "columns: [\"${p}\"], path: ")
    };
    // cargo sets this one for tests.
    let path = |text: &str| read(text).map_err(|e| e.to_string()).unwrap().nodes[0].config["path"].clone();
    assert_eq!(path(&with_env("{CARGO_PKG_NAME: x}", "\"${env.CARGO_PKG_NAME}\"")), "sapo-flow-engine");
    assert_eq!(path(&with_env("{SAPO_FLOW_UNSET: x}", "\"${env.SAPO_FLOW_UNSET}/y\"")), "x/y");
    assert_eq!(
        complaints(&with_env("{SAPO_FLOW_UNSET: }", "\"${env.SAPO_FLOW_UNSET}\"")),
        ["1:7 the environment variable `SAPO_FLOW_UNSET` is not set, and has no default"]
    );
    let undeclared = complaints(&with_env("{CARGO_PKG_NAME: x}", "\"${env.HOME}\""));
    assert_eq!(undeclared[0], "1:7 the environment variable `CARGO_PKG_NAME` is not used");
    assert!(undeclared[1].ends_with("the environment variable `HOME` is not declared"), "{undeclared:?}");
    assert_eq!(
        complaints(&with_env("{CARGO_PKG_NAME: [1]}", "\"${env.CARGO_PKG_NAME}\""))[0],
        "1:23 the default of `CARGO_PKG_NAME` must be a single value, found a list"
    );
}

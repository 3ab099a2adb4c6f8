//! Chat templates render as transformers renders them.
//!
//! `more_chat_templates.json` beside this file has the golden file's form and was rendered by transformers 5.23.

use crate::golden;
use sapo_flow_training::Error;
use sapo_flow_training::text::{ChatTemplate, Message, SpecialTokens};
use serde_json::{Value, json};
use std::collections::BTreeMap;

#[test]
fn renders_the_golden_conversations() {
    check_all(&golden::json("chat_templates.json"));
}

#[test]
fn renders_what_newer_templates_ask_of_jinja() {
    let cases = serde_json::from_str(include_str!("more_chat_templates.json")).expect("the file is JSON");
    check_all(&cases);
}

fn check_all(cases: &Value) {
    let cases = cases.as_array().expect("a list of cases");
    assert!(!cases.is_empty());
    let wrong: Vec<_> = cases.iter().filter_map(|case| check(case).err()).collect();
    assert!(wrong.is_empty(), "{} of {} cases differ:\n{}", wrong.len(), cases.len(), wrong.join("\n"));
}

fn check(case: &Value) -> Result<(), String> {
    let text = |key: &str| case[key].as_str().unwrap_or_default().to_owned();
    let special_tokens = ["bos_token", "eos_token"].map(|role| (role.to_owned(), text(role)));
    let messages: Vec<Message> = serde_json::from_value(case["messages"].clone()).map_err(|error| error.to_string())?;
    let template = ChatTemplate::from_source(&text("template"), SpecialTokens(BTreeMap::from(special_tokens)))
        .map_err(|error| format!("{}: {error}", text("template_name")))?;
    let rendered = match case["add_generation_prompt"].as_bool() {
        Some(true) => template.render_prompt(&messages),
        _ => template.render(&messages),
    };
    let agrees = match (&rendered, case.get("error").and_then(Value::as_str)) {
        (Ok(rendered), None) => *rendered == text("rendered"),
        (Err(Error::Template(message)), Some(expected)) => message == expected,
        _ => false,
    };
    let expected = case.get("error").unwrap_or(&case["rendered"]);
    if agrees { Ok(()) } else { Err(format!("{}: expected {expected}, found {rendered:?}", text("template_name"))) }
}

#[test]
fn a_directory_gives_its_default_template() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let write = |name: &str, text: &str| std::fs::write(dir.path().join(name), text).expect("the file is written");
    let render = || {
        let template = ChatTemplate::load(dir.path()).expect("the template loads").expect("there is a template");
        template.render(&[Message::new("user", "hi")]).expect("the template renders")
    };
    assert!(ChatTemplate::load(dir.path()).expect("an empty directory is fine").is_none());

    let named = json!({"bos_token": {"content": "<s>"}, "chat_template": [
        {"name": "tool_use", "template": "tools"},
        {"name": "default", "template": "{{ bos_token }}{{ messages[0].content }}"},
    ]});
    write("tokenizer_config.json", &named.to_string());
    assert_eq!(render(), "<s>hi");

    write("tokenizer_config.json", r#"{"chat_template": "{{ bos_token }}one {{ messages[0].role }}"}"#);
    write("special_tokens_map.json", r#"{"bos_token": "<bos>"}"#);
    assert_eq!(render(), "<bos>one user");

    write("chat_template.jinja", "a file of its own\n");
    assert_eq!(render(), "a file of its own");
}

#[test]
fn a_malformed_template_is_an_error_that_names_its_file() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    std::fs::write(dir.path().join("chat_template.jinja"), "{% for %}").expect("the file is written");
    let message = ChatTemplate::load(dir.path()).err().expect("the template is malformed").to_string();
    assert!(message.contains("chat_template.jinja") && message.contains("syntax error"), "{message}");
}

#[test]
fn variables_reach_the_template_and_win() {
    let mut template = ChatTemplate::from_source("{{ date_string }} {{ eos_token }}", SpecialTokens::default())
        .expect("the template compiles");
    template.variables.insert("date_string".into(), json!("26 Jul 2024"));
    template.variables.insert("eos_token".into(), json!("<e>"));
    assert_eq!(template.render(&[]).expect("the template renders"), "26 Jul 2024 <e>");
}

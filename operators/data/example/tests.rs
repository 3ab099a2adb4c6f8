//! `example`: what rows mean, and why some cannot be used.

use super::*;

fn understand(columns: &str, row: &str) -> Result<Example, String> {
    let columns: Columns = serde_yaml::from_str(columns).unwrap();
    columns.understand(&serde_json::from_str(row).unwrap())
}

fn user(text: &str) -> Message {
    Message::new("user", text)
}

fn assistant(text: &str) -> Message {
    Message::new("assistant", text)
}

fn chat_of(prompt: &[Message], chosen: &str, rejected: Option<&str>) -> Result<Example, String> {
    let rejected = rejected.map(assistant);
    Ok(Example::Chat { prompt: prompt.to_vec(), chosen: assistant(chosen), rejected, trailing: false })
}

fn plain_of(prompt: &str, chosen: &str, rejected: Option<&str>) -> Result<Example, String> {
    let rejected = rejected.map(Into::into);
    Ok(Example::Plain { prompt: prompt.into(), chosen: chosen.into(), rejected })
}

const U: &str = r#"{"role": "user", "content": "u"}"#;
const A: &str = r#"{"role": "assistant", "content": "a"}"#;
const B: &str = r#"{"role": "assistant", "content": "b"}"#;
const EMPTY: &str = r#"{"role": "assistant", "content": ""}"#;

#[test]
fn a_conversation_is_cut_at_its_last_assistant_turn() {
    let row = format!("{{\"messages\": [{U}, {A}, {U}, {B}]}}");
    assert_eq!(understand("{}", &row), chat_of(&[user("u"), assistant("a"), user("u")], "b", None));
    let row = format!("{{\"messages\": [{U}, {A}, {U}]}}");
    let expected = Example::Chat { prompt: vec![user("u")], chosen: assistant("a"), rejected: None, trailing: true };
    assert_eq!(understand("{}", &row), Ok(expected));
}

#[test]
fn explicit_prompts() {
    let row = r#"{"prompt": "p", "chosen": "c", "rejected": "r"}"#;
    assert_eq!(understand("{}", row), plain_of("p", "c", Some("r")));
    assert_eq!(understand("{}", r#"{"prompt": "p", "chosen": "c"}"#), plain_of("p", "c", None));
    let row = format!("{{\"prompt\": [{U}], \"chosen\": [{A}], \"rejected\": [{B}]}}");
    assert_eq!(understand("{}", &row), chat_of(&[user("u")], "a", Some("b")));
}

#[test]
fn a_mapping_names_columns() {
    let row = r#"{"question": "p", "answer": "c", "real": 1, "wrong": null}"#;
    let columns = "{prompt: question, chosen: answer, rejected: wrong}";
    assert_eq!(understand(columns, row), plain_of("p", "c", None));
    let error = understand("{prompt: question, chosen: reply}", row).unwrap_err();
    assert_eq!(error, "`reply` (columns.chosen) is missing");
    let mixed: Columns = serde_yaml::from_str("{prompt: question, messages: m}").unwrap();
    assert_eq!(mixed.check().unwrap().key, "columns");
    assert!(serde_yaml::from_str::<Columns>("{question: prompt}").is_err());
}

/// TRL's documented example of extract_prompt, in messages and in text.
#[test]
fn an_implicit_prompt_is_the_common_prefix() {
    let row = format!("{{\"prompt\": \"u\", \"chosen\": [{U}, {A}], \"rejected\": [{U}, {B}]}}");
    assert_eq!(understand("{}", &row), chat_of(&[user("u")], "a", Some("b")));
    let row = r#"{"chosen": "The sky is blue.", "rejected": "The sky is green."}"#;
    assert_eq!(understand("{}", row), plain_of("The sky is", " blue.", Some(" green.")));
    let row = format!("{{\"chosen\": [{U}, {A}], \"rejected\": [{U}, {A}]}}");
    assert_eq!(understand("{}", &row), chat_of(&[user("u")], "a", Some("a")));
    let row = format!("{{\"chosen\": [{U}, {A}, {U}, {A}], \"rejected\": [{U}, {B}, {U}, {B}]}}");
    let error = understand("{}", &row).unwrap_err();
    assert_eq!(error, "`chosen`: expected one message after the prompt, the answer; found 3");
}

#[test]
fn real_and_generated() {
    let row = format!("{{\"real\": [{U}, {A}], \"generated\": [{U}, {B}]}}");
    assert_eq!(understand("{}", &row), chat_of(&[user("u")], "a", Some("b")));
    for generated in [format!("[{U}, {EMPTY}]"), "[]".into(), "null".into()] {
        let row = format!("{{\"real\": [{U}, {A}, {U}, {B}], \"generated\": {generated}}}");
        assert_eq!(understand("{}", &row), chat_of(&[user("u"), assistant("a"), user("u")], "b", None));
    }
}

#[test]
fn what_cannot_be_used_says_why() {
    let cases = [
        (
            "{}",
            "expected `messages`, `prompt` and `chosen`, or `real`; the row has no columns; name its columns \
                under `columns`",
        ),
        (r#"{"prompt": "p", "chosen": " "}"#, "`chosen`: the answer is empty"),
        (r#"{"prompt": "p", "chosen": "c", "rejected": ""}"#, "`rejected`: the answer is empty"),
        (r#"{"prompt": "p", "chosen": 3}"#, "`chosen`: expected a string or a list of messages, found a number"),
        (r#"{"prompt": [], "chosen": "c"}"#, "`prompt`: expected a string, found a list"),
        (r#"{"chosen": "c"}"#, "`chosen` is a string without `prompt`"),
        (r#"{"messages": []}"#, "`messages`: expected a list of messages, found an empty list"),
        (r#"{"messages": "hi"}"#, "`messages`: expected a list of messages, found a string"),
        (r#"{"messages": ["hi"]}"#, "`messages[0]`: expected a message, found a string"),
        (r#"{"messages": [{"role": "user"}]}"#, "`messages[0]` has no `content`"),
        (r#"{"messages": [{"role": 1, "content": ""}]}"#, "`messages[0].role`: expected a string, found a number"),
        (r#"{"messages": [{"role": "user", "content": "u"}]}"#, "`messages` has no assistant turn"),
        (r#"{"messages": [{"role": "assistant", "content": "a"}]}"#, "there is no message before the answer"),
    ];
    for (row, reason) in cases {
        assert_eq!(understand("{}", row), Err(reason.to_string()), "{row}");
    }
    let row = format!("{{\"messages\": [{U}, {EMPTY}]}}");
    assert_eq!(understand("{}", &row), Err("`messages`: the answer is empty".into()));
    let row = format!("{{\"prompt\": [{U}], \"chosen\": [{U}]}}");
    assert!(understand("{}", &row).unwrap_err().contains("found the role `user`"));
}

#[test]
fn keys_of_messages_that_nothing_reads_are_named() {
    let keys = |columns: &str, row: &str| -> Vec<String> {
        let columns: Columns = serde_yaml::from_str(columns).unwrap();
        columns.unread_keys(&serde_json::from_str(row).unwrap()).into_iter().collect()
    };
    let call = r#"{"role": "assistant", "content": "a", "tool_calls": [1], "name": "b", "thinking": null}"#;
    assert_eq!(keys("{}", &format!("{{\"messages\": [{U}, {call}]}}")), ["name", "tool_calls"]);
    assert_eq!(keys("{messages: m}", &format!("{{\"m\": [{call}], \"other\": [{U}]}}")), ["name", "tool_calls"]);
    assert!(keys("{}", &format!("{{\"messages\": [{U}, {A}], \"id\": 3}}")).is_empty());
    assert!(keys("{}", r#"{"prompt": "p", "chosen": "c"}"#).is_empty());
}

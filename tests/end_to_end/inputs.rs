//! What a run reads: files by pattern, tokenizers and chat templates, each in the manifest with its hash.

use std::fs;

use chrono::Timelike;
use serde_json::Value;

use crate::workplace::{SAPO_ORPO, Workplace};

#[test]
fn files_found_by_pattern_and_templates_are_in_the_manifest() {
    let here = Workplace::new();
    for copy in ["held-0.jsonl", "held-1.jsonl"] {
        fs::copy(here.path("heldout.jsonl"), here.path(copy)).unwrap();
    }
    here.write("short.jinja", "{% for m in messages %}{{ m.content }} {% endfor %}");
    let given = "path: 'held-*.jsonl', chat_template: short.jinja";
    here.pipeline("p.yaml", &SAPO_ORPO.replace("path: heldout.jsonl", given));
    here.run("p.yaml", "out", &["steps=2"]);
    let manifest: Value = serde_json::from_slice(&fs::read(here.path("out/manifest.json")).unwrap()).unwrap();
    let files: Vec<&String> = manifest["files"].as_object().unwrap().keys().collect();
    let expected = [
        "chats.jsonl",
        "held-0.jsonl",
        "held-1.jsonl",
        "model/config.json",
        "model/generation_config.json",
        "model/model.safetensors",
        "model/tokenizer.json",
        "model/tokenizer_config.json",
        "short.jinja",
    ];
    assert_eq!(files, expected);

    // A template that has changed is refused as data is, by the source that is given one as well.
    here.pipeline("q.yaml", &SAPO_ORPO.replace("path: chats.jsonl", "path: chats.jsonl, chat_template: short.jinja"));
    here.run("q.yaml", "other", &["steps=4"]);
    here.write("short.jinja", "{% for m in messages %}{{ m.role }} {{ m.content }} {% endfor %}");
    let said = here.sapo_flow(&["run", "--resume", "other"]);
    assert_eq!(said.code, Some(1));
    assert!(said.stderr.contains("short.jinja has changed since the run began"), "{}", said.stderr);
}

/// A template that writes the date has that of the run's beginning, also when the run goes on later.
#[test]
fn the_clock_of_chat_templates_stands() {
    let here = Workplace::new();
    let text =
        "{% for m in messages %}{{ m.content }} {% if strftime_now('%S') | int is odd %}odd{% endif %} {% endfor %}";
    here.write("clock.jinja", text);
    let dated = SAPO_ORPO.replace("path: chats.jsonl", "path: chats.jsonl, chat_template: clock.jinja");
    here.pipeline("p.yaml", &dated);
    let expected = here.run("p.yaml", "out", &["steps=6"]);
    let manifest: Value = serde_json::from_slice(&fs::read(here.path("out/manifest.json")).unwrap()).unwrap();
    let began = manifest["processes"][0]["started"].as_str().unwrap();
    let began = chrono::DateTime::parse_from_rfc3339(began).unwrap();
    // As if it had been killed after its first checkpoint, and went on in a second that the template tells apart.
    let first = fs::read_dir(here.path("out/checkpoints")).unwrap().map(|entry| entry.unwrap().file_name());
    let first = first.filter(|name| name.to_string_lossy().starts_with("step-")).min().unwrap();
    fs::write(here.path("out/checkpoints/latest"), first.as_encoded_bytes()).unwrap();
    while chrono::Utc::now().second() % 2 == began.second() % 2 {
        std::thread::sleep(std::time::Duration::from_millis(50));
    }
    let said = here.sapo_flow(&["run", "--resume", "out"]);
    assert_eq!(said.code, Some(0), "{}", said.stderr);
    here.results("out").assert_same(&expected, "a run that went on later");
}

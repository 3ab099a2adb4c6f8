//! What a run reads: files by pattern, tokenizers and chat templates, each in the manifest with its hash.

use std::fs;

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

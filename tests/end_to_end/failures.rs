//! What goes wrong ends the run with exit code 1, and is said: the node, the step, the file, the reason.

use std::fs;

use serde_json::Value;

use crate::workplace::{SAPO_ORPO, Workplace};

/// ORPO on pairs: nothing is generated.
const ORPO: &str = "
  prompts: {op: prompt_source, with: {path: pairs.jsonl, tokenizer: model, batch_size: 4, shuffle: false}}
  batches: {op: batcher, in: prompts.pairs, with: {batch_size: 2, max_length: 48}}
  learner:
    op: preference_learner
    in: batches.batches
    with: {model: model, objective: orpo, learning_rate: 1e-3}
  metrics: {op: metrics_sink, in: learner.metrics}
  policy: {op: checkpoint, in: learner.weights, with: {every: 2}}
";

/// Run `p.yaml`, which fails; what it said.
fn failing(here: &Workplace, overrides: &[&str]) -> String {
    let mut arguments = vec!["run", "p.yaml", "--run-dir", "out"];
    overrides.iter().for_each(|value| arguments.extend(["-S", value]));
    let said = here.sapo_flow(&arguments);
    assert_eq!((said.code, said.stdout.as_str()), (Some(1), ""), "{}", said.stderr);
    assert!(!said.stderr.contains("panicked"), "{}", said.stderr);
    said.stderr
}

#[track_caller]
fn says(stderr: &str, text: &str) {
    assert!(stderr.contains(text), "{text} is not in: {stderr}");
}

#[test]
fn a_missing_model_is_named() {
    let here = Workplace::new();
    here.pipeline("p.yaml", &ORPO.replace("{model: model,", "{model: elsewhere,"));
    let stderr = failing(&here, &[]);
    says(&stderr, "node `learner`: elsewhere: No such file or directory");
}

#[test]
fn a_model_without_its_weights_is_named() {
    let here = Workplace::new();
    here.pipeline("p.yaml", ORPO);
    fs::remove_file(here.path("model/model.safetensors")).unwrap();
    let stderr = failing(&here, &[]);
    says(&stderr, "node `learner`: model: expected weights in model.safetensors");
}

#[test]
fn a_broken_row_is_named() {
    let here = Workplace::new();
    here.pipeline("p.yaml", SAPO_ORPO);
    let rows = fs::read_to_string(here.path("chats.jsonl")).unwrap();
    let mut lines: Vec<&str> = rows.lines().collect();
    lines[4] = "{\"messages\": [{\"role\": \"user\"";
    here.write("chats.jsonl", &lines.join("\n"));
    let stderr = failing(&here, &[]);
    says(&stderr, "node `prompts`: ");
    says(&stderr, "chats.jsonl:5: ");
    says(&stderr, "EOF while parsing");
}

#[test]
fn a_row_that_does_not_fit_is_named_at_its_step() {
    let here = Workplace::new();
    here.pipeline("p.yaml", ORPO);
    let long = "w10 ".repeat(60);
    let row = format!("{{\"prompt\": \"{long}\", \"chosen\": \"w11\", \"rejected\": \"w12\"}}\n");
    here.write("pairs.jsonl", &format!("{}{row}", fs::read_to_string(here.path("pairs.jsonl")).unwrap()));
    // Eight rows before it, four a step.
    let stderr = failing(&here, &[]);
    says(&stderr, "node `batches` at step 2: row 8 (pair from `prompts`, step 2): its prompt alone has ");
}

#[test]
fn a_directory_that_cannot_be_written_is_named() {
    let here = Workplace::new();
    // A name that no file system takes.
    let name = "policy".repeat(50);
    here.pipeline("p.yaml", &ORPO.replace("  policy:", &format!("  {name}:")));
    let stderr = failing(&here, &[]);
    says(&stderr, &format!("node `{name}` at step 1: out/{name}: File name too long"));
}

/// Make the first weights of the model NaN.
fn poison(here: &Workplace) {
    let path = here.path("model/model.safetensors");
    let mut bytes = fs::read(&path).unwrap();
    let header = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    let description: Value = serde_json::from_slice(&bytes[8..8 + header]).unwrap();
    let begin = description["model.norm.weight"]["data_offsets"][0].as_u64().unwrap() as usize;
    bytes[8 + header + begin..][..4].copy_from_slice(&f32::NAN.to_le_bytes());
    fs::write(path, bytes).unwrap();
}

#[test]
fn a_loss_that_is_not_finite_stops_the_run_with_its_pairs() {
    let here = Workplace::new();
    here.pipeline("p.yaml", ORPO);
    poison(&here);
    let stderr = failing(&here, &[]);
    says(&stderr, "node `learner` at step 0: ");
    says(&stderr, "its pairs are in out/learner-failed-at-step-0.json");
    let failure: Value =
        serde_json::from_slice(&fs::read(here.path("out/learner-failed-at-step-0.json")).unwrap()).unwrap();
    assert_eq!((&failure["node"], &failure["step"]), (&"learner".into(), &0.into()));
    let pairs: Vec<&Value> =
        failure["batches"].as_array().unwrap().iter().flat_map(|batch| batch["pairs"].as_array().unwrap()).collect();
    let rows: Vec<u64> = pairs.iter().filter_map(|pair| pair["row"].as_u64()).collect();
    assert_eq!(rows, [0, 1, 2, 3]);
    assert!(pairs.iter().all(|pair| !pair["chosen_ids"].as_array().unwrap().is_empty()));
    // A model that is broken is no pair's fault: all are to blame, and can be read.
    let blamed = failure["blamed"].as_array().unwrap();
    let labels: Vec<&str> = blamed.iter().filter_map(|pair| pair["label"].as_str()).collect();
    let expected = [0, 1, 2, 3].map(|row| format!("row {row} (pair {row} of `prompts` at step 0)"));
    assert_eq!(labels, expected);
    assert!(labels.iter().all(|label| stderr.contains(label)), "{stderr}");
    let written: Value =
        serde_json::from_str(fs::read_to_string(here.path("pairs.jsonl")).unwrap().lines().next().unwrap()).unwrap();
    for (text, content) in
        [("prompt", &written["prompt"]), ("chosen", &written["chosen"]), ("rejected", &written["rejected"])]
    {
        let (text, content) = (blamed[0][text].as_str().unwrap(), content[0]["content"].as_str().unwrap());
        assert!(text.contains(content), "{content} is not in {text}");
    }
}

#[test]
fn a_model_that_is_not_finite_generates_nothing() {
    let here = Workplace::new();
    poison(&here);
    here.pipeline("p.yaml", SAPO_ORPO);
    says(&failing(&here, &[]), "node `evaluation`: the model's logits are not finite (row 0 of 3)");
    fs::remove_dir_all(here.path("out")).unwrap();

    let evaluation = SAPO_ORPO.find("  evaluation:\n").unwrap()..SAPO_ORPO.find("  policy:").unwrap();
    let mut nodes = SAPO_ORPO.to_owned();
    nodes.replace_range(evaluation, "");
    here.pipeline("p.yaml", &nodes.replace(", evaluation.metrics", ""));
    for max_staleness in ["max_staleness=0", "max_staleness=2"] {
        let stderr = failing(&here, &[max_staleness]);
        says(&stderr, "node `segments` at step 0: the model's logits are not finite (row 0 of 3)");
        fs::remove_dir_all(here.path("out")).unwrap();
    }
}

#[test]
fn an_update_that_diverges_stops_the_run() {
    let here = Workplace::new();
    here.pipeline("p.yaml", &ORPO.replace("learning_rate: 1e-3", "learning_rate: 1e38, optimizer: sgd"));
    let stderr = failing(&here, &[]);
    says(&stderr, "node `learner` at step 1: ");
    assert!(here.path("out/learner-failed-at-step-1.json").exists());
    // What came before is kept.
    assert_eq!(here.metrics("out").len(), 1);
}

/// DPO whose reference is refreshed, or could be.
const REFRESHED: &str = "
  prompts: {op: prompt_source, with: {path: pairs.jsonl, tokenizer: model, batch_size: 4}}
  batches: {op: batcher, in: prompts.pairs, with: {batch_size: 2, max_length: 48}}
  reference:
    op: reference
    in: {batches: batches.batches, weights: {from: ema, feedback: {max_staleness: 0}}}
    with: {model: model, refresh_every: 2}
  learner: {op: preference_learner, in: reference, with: {model: model, objective: dpo, learning_rate: 1e-3}}
  ema: {op: ema, in: learner.weights, with: {decay: 0.5}}
  metrics: {op: metrics_sink, in: learner.metrics}
  policy: {op: checkpoint, in: learner.weights}
";

#[test]
fn what_no_run_could_do_is_invalid() {
    let here = Workplace::new();
    here.pipeline("p.yaml", REFRESHED);
    assert_eq!(here.sapo_flow(&["validate", "p.yaml"]).code, Some(0));
    let feedback = ", weights: {from: ema, feedback: {max_staleness: 0}}";
    let two = "{op: metrics_sink, in: [learner.metrics, second.metrics]}
  second: {op: preference_learner, in: reference, with: {model: model, objective: dpo, learning_rate: 1e-3}}";
    for (whole, part, complaint) in [
        (feedback, "", "is set, but `in: {weights: ...}` is not connected"),
        (
            ", refresh_every: 2",
            "",
            "is not set, so that what is connected with `in: {weights: ...}` would have no effect",
        ),
        (
            "refresh_every: 2",
            "refresh_every: 2, device: gpuu",
            "device `gpuu`: expected `auto`, `cpu`, `cuda` or `cuda:N`",
        ),
        ("learning_rate: 1e-3", "learning_rate: 1e-3, device: 'cuda:'", "device `cuda:`: expected `auto`"),
        ("learning_rate: 1e-3", "learning_rate: 0", "expected a finite number above 0, found 0"),
        ("{op: metrics_sink, in: learner.metrics}", two, "`learner` and `second` report the same names"),
        (
            "{op: checkpoint, in: learner.weights}",
            "{op: checkpoint, in: learner.weights, with: {keep: 3}}",
            "has no effect",
        ),
    ] {
        assert!(REFRESHED.contains(whole), "{whole}");
        here.pipeline("p.yaml", &REFRESHED.replace(whole, part));
        let said = here.sapo_flow(&["validate", "p.yaml"]);
        assert_eq!(said.code, Some(78), "{part}: {}", said.stderr);
        says(&said.stderr, complaint);
    }
    // Whether there is such a device, only the machine that runs the pipeline knows.
    here.pipeline("p.yaml", &REFRESHED.replace("refresh_every: 2", "refresh_every: 2, device: 'cuda:4096'"));
    assert_eq!(here.sapo_flow(&["validate", "p.yaml"]).code, Some(0));
    says(&failing(&here, &[]), "node `reference`: device `cuda:4096`: ");
}

//! The directories that a run writes are models: complete, and the program reads them itself.

use std::fs;

use serde_json::Value;

use crate::workplace::{SAPO_ORPO, Workplace};

/// A checkpoint's weights lie in directories that other programs load, as the models do that a run writes.
#[test]
fn checkpoints_hold_models() {
    let here = Workplace::new();
    let reference = "batches.batches, weights: {from: ema, feedback: {max_staleness: 1}}}
    with: {model: model, refresh_every: 2}";
    let nodes = SAPO_ORPO
        .replace("in: batches.batches\n", "in: reference\n")
        .replace("objective: orpo", "objective: dpo")
        .replace(
            "  ema: {op",
            &format!("  reference:\n    op: reference\n    in: {{batches: {reference}\n  ema: {{op"),
        );
    here.pipeline("p.yaml", &nodes);
    here.run("p.yaml", "out", &["steps=8", "max_staleness=1"]);
    let nodes = "out/checkpoints/step-00000006/nodes";
    let read = |path: &str| fs::read(here.path(path)).unwrap();
    // As written by the nodes after 5 updates and at the end: the same weights are the same file.
    for (model, versions) in [("learner/learner", None), ("ema", Some([5, 6])), ("reference/model", None)] {
        let directories = match versions {
            Some(versions) => versions.map(|version| format!("{nodes}/{model}/version-{version}")).to_vec(),
            None => vec![format!("{nodes}/{model}")],
        };
        for directory in directories {
            for unchanged in ["tokenizer.json", "tokenizer_config.json"] {
                assert!(
                    read(&format!("{directory}/{unchanged}")) == read(&format!("model/{unchanged}")),
                    "{directory}"
                );
            }
            for described in ["config.json", "generation_config.json"] {
                let read = |path: String| -> Value { serde_json::from_slice(&read(&path)).unwrap() };
                assert_eq!(read(format!("{directory}/{described}")), read(format!("out/policy/final/{described}")));
            }
            let arguments =
                ["generate", "--model", &directory, "--prompt", "w20", "--max-tokens", "2", "--device", "cpu"];
            let said = here.sapo_flow(&arguments);
            assert_eq!(said.code, Some(0), "{directory}: {}", said.stderr);
        }
    }
    assert!(
        read(&format!("{nodes}/ema/version-5/model.safetensors"))
            != read(&format!("{nodes}/ema/version-6/model.safetensors"))
    );
}

#[test]
fn evaluations_and_what_was_answered_are_kept() {
    let here = Workplace::new();
    here.pipeline("p.yaml", SAPO_ORPO);
    let said = here.sapo_flow(&["run", "p.yaml", "--run-dir", "out", "--quiet"]);
    assert_eq!((said.code, said.stderr.as_str()), (Some(0), ""));
    let kept: Value = serde_json::from_slice(&fs::read(here.path("out/evaluations.json")).unwrap()).unwrap();
    let versions: Vec<u64> = kept.as_array().unwrap().iter().filter_map(|one| one["version"].as_u64()).collect();
    assert_eq!(versions, [0, 5, 10, 15, 16]);
    for evaluation in kept.as_array().unwrap() {
        assert!(evaluation["values"]["eval_nll"].as_f64().is_some_and(|nll| nll > 0.0), "{evaluation}");
        let [shown] = evaluation["shown"].as_array().unwrap().as_slice() else { panic!("{evaluation}") };
        // The template's own words are special tokens: what is shown is what people wrote.
        let row = fs::read_to_string(here.path("heldout.jsonl")).unwrap();
        let row: Value = serde_json::from_str(row.lines().next().unwrap()).unwrap();
        assert_eq!(shown["prompt"], row["messages"][0]["content"]);
        assert!(shown["answer"].as_str().is_some_and(|text| text.split_whitespace().count() <= 4), "{shown}");
    }
}

#[test]
fn saved_models_can_be_used() {
    let here = Workplace::new();
    here.pipeline("p.yaml", SAPO_ORPO);
    let said = here.sapo_flow(&["run", "p.yaml", "--run-dir", "out"]);
    assert_eq!(said.code, Some(0), "{}", said.stderr);
    // The table at the end: before and after, time by node, the models and the run.
    for shown in [
        "evaluation                    before  after 16 updates\n",
        "held-out NLL (nats a token)",
        "held-out accuracy",
        "held-out margin",
        "of the run\n",
        "model  out/average/final\nmodel  out/policy/final\nrun    out\n",
    ] {
        assert!(said.stdout.contains(shown), "{shown}: {}", said.stdout);
    }

    for model in ["out/policy/final", "out/policy/checkpoint-15", "out/average/final"] {
        let mut names: Vec<String> = fs::read_dir(here.path(model))
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        let expected =
            ["config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"];
        assert_eq!(names, expected, "{model}");
        for unchanged in ["tokenizer.json", "tokenizer_config.json", "generation_config.json"] {
            let read = |directory: &str| -> Value {
                serde_json::from_slice(&fs::read(here.path(directory).join(unchanged)).unwrap()).unwrap()
            };
            assert_eq!(read(model), read("model"), "{model}/{unchanged}");
        }
    }

    let answer = |model: &str| {
        let said = here.sapo_flow(&[
            "generate",
            "--model",
            model,
            "--message",
            "user=w20 w30",
            "--temperature",
            "0",
            "--max-tokens",
            "6",
            "--device",
            "cpu",
        ]);
        assert_eq!(said.code, Some(0), "{model}: {}", said.stderr);
        said.stdout
    };
    let trained = answer("out/policy/final");
    assert!(trained.split_whitespace().all(|word| word.starts_with('w') || word == "<unk>"), "{trained}");

    // A run can begin where another ended.
    here.write(
        "next.yaml",
        &fs::read_to_string(here.path("p.yaml")).unwrap().replace("model: model,", "model: out/policy/final,"),
    );
    let next = here.run("next.yaml", "next", &["steps=3"]);
    let first = &here.results("out").metrics[0];
    assert_ne!(next.metrics[0]["loss"], first["loss"]);
    assert_eq!(next.metrics.len(), 3);
}

//! The directories that a run writes are models: complete, and the program reads them itself.

use std::fs;

use serde_json::Value;

use crate::workplace::{SAPO_ORPO, Workplace};

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

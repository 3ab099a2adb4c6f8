//! The pipelines that ship train, with the settings that they carry for small machines; the ablations sweep.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

use crate::workplace::Workplace;

/// The overrides on the line that `make run` passes on.
fn small_machine(pipeline: &str) -> Vec<&str> {
    let line =
        pipeline.lines().find_map(|line| line.strip_prefix("# small machine: ")).expect("a small machine's line");
    line.split_whitespace().filter(|word| *word != "-S").collect()
}

/// The algorithms that there are.
const SHIPPED: [&str; 14] = [
    "cpo",
    "dpo",
    "kto",
    "online_dpo",
    "orpo",
    "sapo_async",
    "sapo_dpo",
    "sapo_onpolicy",
    "sapo_orpo",
    "sft",
    "simpo",
    "spin",
    "sppo",
    "tpo",
];

#[test]
fn shipped_pipelines_train() {
    let here = Workplace::new();
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("pipelines");
    let mut trained = BTreeSet::new();
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.extension().is_none_or(|extension| extension != "yaml") {
            continue;
        }
        let (text, name) =
            (fs::read_to_string(&path).unwrap(), path.file_stem().unwrap().to_string_lossy().into_owned());
        let data = if text.contains("chat_pairs.jsonl") { "data=pairs.jsonl" } else { "data=chats.jsonl" };
        let mut overrides = small_machine(&text);
        overrides.extend(["model=model", data, "heldout=heldout.jsonl"]);
        // Tests run side by side: one thread each.
        let library = Path::new(env!("CARGO_MANIFEST_DIR")).join("operators");
        let text = text.replace("include: ../operators", &format!("include: {}", library.display()));
        here.write("p.yaml", &text.replacen("\nrun:\n", "\nrun:\n  threads: 1\n", 1));
        let mut arguments = vec!["run", "p.yaml", "--run-dir", &name];
        overrides.iter().for_each(|value| arguments.extend(["-S", value]));
        let said = here.sapo_flow(&arguments);
        assert_eq!(said.code, Some(0), "{name}: {}", said.stderr);
        assert!(!said.stderr.contains("warning"), "{name}: {}", said.stderr);
        assert!(said.stdout.contains("held-out NLL"), "{name}: {}", said.stdout);

        let metrics = here.metrics(&name);
        assert!(!metrics.is_empty() && metrics.iter().all(|step| step["loss"].is_number()), "{name}: {metrics:?}");
        let saved = here.path(&name).join("model/final/model.safetensors");
        assert!(fs::read(saved).unwrap() != fs::read(here.path("model/model.safetensors")).unwrap(), "{name}");
        trained.insert(name);
    }
    assert_eq!(trained, BTreeSet::from(SHIPPED.map(str::to_owned)));
}

/// What to try in each ablation, where that is not what it says itself.
const TRIED: &[(&str, &str)] = &[("ema_decay", "ema_decay=0,0.5"), ("segment_length", "segment_tokens=2,all")];

#[test]
fn shipped_ablations_sweep() {
    let here = Workplace::new();
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut swept = 0;
    for entry in fs::read_dir(root.join("pipelines/ablations")).unwrap() {
        let path = entry.unwrap().path();
        let (text, name) =
            (fs::read_to_string(&path).unwrap(), path.file_stem().unwrap().to_string_lossy().into_owned());
        let whole = here.sapo_flow(&["sweep", path.to_str().unwrap(), "--dry-run"]);
        let runs: Vec<&str> = whole.stdout.lines().collect();
        assert!(runs.len() > 6 && runs.iter().rev().skip(1).all(|run| run.contains(",seed=4")), "{name}: {whole:?}");
        assert!(text.contains(&format!("{} runs of 220 steps", runs.len() - 1)), "{name}: {runs:?}");

        let seeds = "seeds: [42, 43, 44]";
        assert!(text.contains(seeds));
        let text =
            text.replace(seeds, "seeds: [42]").replace("../../operators", root.join("operators").to_str().unwrap());
        here.write("p.yaml", &text);
        let tried = TRIED.iter().filter(|(file, _)| *file == name).map(|(_, tried)| *tried);
        let own = tried.chain([
            "model=model",
            "data=chats.jsonl",
            "heldout=heldout.jsonl",
            "epochs=3",
            "warmup_steps=1",
            "learning_rate=1e-2",
        ]);
        let own: Vec<&str> = own.collect();
        let is_own = |word: &&str| own.iter().any(|value| value.split('=').next() == word.split('=').next());
        let small = small_machine(&text).into_iter().filter(|word| !is_own(word));
        let mut arguments = vec!["sweep", "p.yaml", "--sweep-dir", &name, "--jobs", "2"];
        own.iter().copied().chain(small).for_each(|value| arguments.extend(["-S", value]));
        let said = here.sapo_flow(&arguments);
        assert_eq!(said.code, Some(0), "{name}: {}", said.stderr);
        let table = here.sapo_flow(&["runs", "table", &name, "--format", "json"]);
        let table: serde_json::Value = serde_json::from_str(&table.stdout).unwrap();
        assert_eq!(table.as_array().unwrap().len(), 2, "{name}: {table}");
        assert!(table[0]["metrics"]["eval_nll"]["mean"] != table[1]["metrics"]["eval_nll"]["mean"], "{name}: {table}");
        swept += 1;
    }
    assert_eq!(swept, 5);
}

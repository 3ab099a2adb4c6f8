//! The pipelines that ship train, with the settings that they carry for small machines.

use std::fs;
use std::path::Path;

use crate::workplace::Workplace;

/// The overrides on the line that `make run` passes on.
fn small_machine(pipeline: &str) -> Vec<&str> {
    let line =
        pipeline.lines().find_map(|line| line.strip_prefix("# small machine: ")).expect("a small machine's line");
    line.split_whitespace().filter(|word| *word != "-S").collect()
}

#[test]
fn shipped_pipelines_train() {
    let here = Workplace::new();
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("pipelines");
    let mut trained = 0;
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        let (text, name) =
            (fs::read_to_string(&path).unwrap(), path.file_stem().unwrap().to_string_lossy().into_owned());
        let data = if text.contains("chat_pairs.jsonl") { "data=pairs.jsonl" } else { "data=chats.jsonl" };
        let mut overrides = small_machine(&text);
        overrides.extend(["model=model", data, "heldout=heldout.jsonl"]);
        // Tests run side by side: one thread each.
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
        trained += 1;
    }
    assert!(trained >= 6);
}

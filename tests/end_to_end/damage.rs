//! A damaged checkpoint is refused by the name of the file, and the run's directory stays as it is.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use crate::workplace::{SAPO_ORPO, Workplace};

/// All files below a directory, with their contents.
fn contents(directory: &Path) -> BTreeMap<String, Vec<u8>> {
    let mut files = BTreeMap::new();
    let mut folders = vec![directory.to_owned()];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                folders.push(path);
            } else {
                files.insert(path.display().to_string(), fs::read(&path).unwrap());
            }
        }
    }
    files
}

/// The run in `out` cannot be resumed, for this reason, and stays as it is.
#[track_caller]
fn refused(here: &Workplace, because: &str) {
    let before = contents(&here.path("out"));
    let said = here.sapo_flow(&["run", "--resume", "out"]);
    assert_eq!((said.code, said.stdout.as_str()), (Some(1), ""), "{}", said.stderr);
    assert!(said.stderr.contains(because), "{}", said.stderr);
    assert!(contents(&here.path("out")) == before, "something was changed");
}

#[test]
fn damaged_checkpoints_are_refused_by_name() {
    let here = Workplace::new();
    here.pipeline("p.yaml", SAPO_ORPO);
    let expected = here.run("p.yaml", "out", &["max_staleness=1"]);
    let checkpoint = here.path("out/checkpoints/step-00000015");

    let refused = |because: &str| refused(&here, because);
    let damage = |file: &str, change: &dyn Fn(&mut Vec<u8>), because: &str| {
        let path = checkpoint.join(file);
        let whole = fs::read(&path).unwrap();
        let mut damaged = whole.clone();
        change(&mut damaged);
        assert_ne!(damaged, whole);
        fs::write(&path, damaged).unwrap();
        refused(&format!("out/checkpoints/step-00000015/{file}: {because}"));
        fs::write(&path, whole).unwrap();
    };
    let cut = |bytes: &mut Vec<u8>| bytes.truncate(bytes.len() / 2);
    let flip = |bytes: &mut Vec<u8>| *bytes.last_mut().unwrap() ^= 1;
    let edit = |from: &'static str, to: &'static str| {
        move |bytes: &mut Vec<u8>| *bytes = String::from_utf8_lossy(bytes).replacen(from, to, 1).into_bytes()
    };
    let altered = "truncated or altered: SHA-256";
    damage("nodes/learner/learner/model.safetensors", &cut, altered);
    damage("nodes/learner/learner/model.safetensors", &flip, altered);
    damage("nodes/learner/learner/optimizer.safetensors", &flip, altered);
    damage("nodes/replay/entries.json", &edit("\"drawn\":", "\"drawn\": "), altered);
    damage("nodes/metrics/metrics_sink.json", &edit("\"steps\": 0", "\"steps\": 1"), altered);
    damage("in_flight.json", &edit("\"version\":1", "\"version\":2"), altered);
    damage("manifest.json", &cut, "EOF while parsing");
    damage("manifest.json", &edit("\"step\": 15", "\"step\": 14"), "it is of step 14");
    damage("manifest.json", &edit("\"format\": 2", "\"format\": 3"), "format 2 expected, 3 found");

    let optimizer = checkpoint.join("nodes/learner/learner/optimizer.safetensors");
    fs::rename(&optimizer, here.path("aside")).unwrap();
    refused("nodes/learner/learner/optimizer.safetensors: No such file");
    fs::rename(here.path("aside"), &optimizer).unwrap();
    fs::write(checkpoint.join("nodes/learner/more"), "x").unwrap();
    refused("nodes/learner/more: not part of the checkpoint's manifest");
    fs::remove_file(checkpoint.join("nodes/learner/more")).unwrap();

    // A sink's file that lost lines which the checkpoint counts on.
    let metrics = fs::read(here.path("out/metrics.jsonl")).unwrap();
    fs::write(here.path("out/metrics.jsonl"), &metrics[..100]).unwrap();
    let said = here.sapo_flow(&["run", "--resume", "out"]);
    assert_eq!(said.code, Some(1));
    assert!(
        said.stderr.contains("node `metrics`: cannot resume: out/metrics.jsonl has 100 bytes, but had "),
        "{}",
        said.stderr
    );
    fs::write(here.path("out/metrics.jsonl"), &metrics).unwrap();

    assert_eq!(here.sapo_flow(&["run", "--resume", "out"]).code, Some(0));
    expected.assert_same(&here.results("out"), "repaired");
}

#[test]
fn a_run_goes_on_from_the_newest_checkpoint_that_is_there_or_names_the_others() {
    let here = Workplace::new();
    here.pipeline("p.yaml", SAPO_ORPO);
    let expected = here.run("p.yaml", "out", &[]);
    let checkpoints = here.path("out/checkpoints");
    let refused = |because: &str| refused(&here, because);
    let goes_on_from = |step: u64| {
        let said = here.sapo_flow(&["run", "--resume", "out"]);
        assert_eq!(said.code, Some(0), "{}", said.stderr);
        assert!(said.stderr.contains(&format!("training from step {step}: 16 steps")), "{}", said.stderr);
        expected.assert_same(&here.results("out"), "from a checkpoint");
    };
    // As a kill leaves it between the two.
    fs::remove_file(checkpoints.join("latest")).unwrap();
    goes_on_from(15);
    fs::write(checkpoints.join("latest"), "step-00000015").unwrap();
    fs::write(checkpoints.join("step-00000015/in_flight.json"), "{").unwrap();
    refused("in_flight.json: truncated or altered");
    refused("seem whole: step-00000012; to go on from one of them, write its name into out/checkpoints/latest");

    fs::write(checkpoints.join("latest"), "step-00000012\n").unwrap();
    goes_on_from(12);
}

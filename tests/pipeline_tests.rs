//! `sapo-flow test`: the tests in the pipelines that ship, and what the verb says of others.

use std::fs;
use std::path::Path;
use std::process::Command;

/// Two batchers in a row are no pipeline that learns, but one that can be tested.
const PIPELINE: &str = "version: 1
params: {batch_size: 2}
run: {steps: 1, device: cpu}
nodes:
  prompts: {op: prompt_source, with: {path: rows.jsonl, tokenizer: model, batch_size: 2}}
  batches: {op: batcher, in: prompts, with: {batch_size: \"${batch_size}\", max_length: 16}}
  metrics: {op: metrics_sink, in: batches.metrics}
";

const PASSES: &str = "  - name: two fit into one batch
    feed: {prompts: [[{}, {}]]}
    expect: {batches: {count: 1}}
";

const FAILS: &str = "  - name: two fit into < one > batch
    params: {batch_size: 1}
    feed: {prompts: [[{}, {}]]}
    expect: {batches: {count: 1}}
";

fn sapo_flow(directory: &Path, arguments: &[&str]) -> (Option<i32>, String, String) {
    let mut command = Command::new(env!("CARGO_BIN_EXE_sapo-flow"));
    let output = command.current_dir(directory).args(arguments).env_remove("RUST_LOG").output().unwrap();
    let text = |bytes| String::from_utf8(bytes).unwrap();
    (output.status.code(), text(output.stdout), text(output.stderr))
}

/// All files of that kind below a folder.
fn files(folder: &Path, extension: &str) -> Vec<String> {
    let mut found = Vec::new();
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            found.extend(files(&path, extension));
        } else if path.extension().is_some_and(|other| other == extension) {
            found.push(path.to_str().unwrap().to_owned());
        }
    }
    found.sort();
    found
}

#[test]
fn the_tests_of_shipped_pipelines_pass() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let pipelines = files(&root.join("pipelines"), "yaml");
    let with_tests = pipelines.iter().filter(|path| fs::read_to_string(path).unwrap().contains("\ntests:\n")).count();
    assert!(with_tests >= 6);
    let arguments: Vec<&str> = std::iter::once("test").chain(pipelines.iter().map(String::as_str)).collect();
    let (code, stdout, stderr) = sapo_flow(root, &arguments);
    assert_eq!(code, Some(0), "{stdout}\n{stderr}");
    let passed = stdout.lines().filter(|line| line.starts_with("  ok  ")).count();
    assert!(passed >= with_tests, "{stdout}");
    assert!(stdout.ends_with(&format!("\n{passed} passed, 0 failed\n")), "{stdout}");
}

#[test]
fn failures_are_told_in_text_and_xml() {
    let here = tempfile::tempdir().unwrap();
    fs::write(here.path().join("p.yaml"), format!("{PIPELINE}tests:\n{PASSES}{FAILS}")).unwrap();
    fs::write(here.path().join("ok.yaml"), format!("{PIPELINE}tests:\n{PASSES}")).unwrap();
    let (code, stdout, stderr) = sapo_flow(here.path(), &["test", "p.yaml", "ok.yaml", "--junit", "out/junit.xml"]);
    assert_eq!(code, Some(1), "{stdout}\n{stderr}");
    assert_eq!(stderr, "error: 1 test failed\n");
    assert!(stdout.ends_with("2 passed, 1 failed\n"), "{stdout}");
    let expected = "error: expected `the number of records of batches` to be 1, found 2\n  --> p.yaml:15:31\n";
    assert!(stdout.contains(expected), "{stdout}");

    let xml = fs::read_to_string(here.path().join("out/junit.xml")).unwrap();
    assert!(xml.contains("<testsuite name=\"p.yaml\" tests=\"2\" skipped=\"0\" errors=\"0\" failures=\"1\">"), "{xml}");
    assert!(xml.contains("name=\"two fit into &lt; one &gt; batch\" classname=\"p.yaml\""), "{xml}");
    assert!(xml.contains("<failure message=\"expected `the number of records of batches` to be 1, found 2\""), "{xml}");
    assert!(
        xml.contains("<testsuite name=\"ok.yaml\" tests=\"1\" skipped=\"0\" errors=\"0\" failures=\"0\">"),
        "{xml}"
    );

    let (code, stdout, _) = sapo_flow(here.path(), &["test", "ok.yaml", "-S", "batch_size=1"]);
    assert_eq!(code, Some(1), "what the command line gives holds in tests: {stdout}");
}

#[test]
fn what_cannot_be_tested_is_no_success() {
    let here = tempfile::tempdir().unwrap();
    let write = |name: &str, tests: &str| fs::write(here.path().join(name), format!("{PIPELINE}{tests}")).unwrap();
    write("none.yaml", "");
    write("wrong.yaml", &format!("tests:\n{}", PASSES.replace("batches: {count", "batchs: {count")));
    write("ok.yaml", &format!("tests:\n{PASSES}"));
    let (code, _, stderr) = sapo_flow(here.path(), &["test", "none.yaml"]);
    assert_eq!(code, Some(1));
    assert!(stderr.contains("there are no tests"), "{stderr}");
    let (code, stdout, stderr) = sapo_flow(here.path(), &["test", "wrong.yaml", "ok.yaml", "--junit", "junit.xml"]);
    assert_eq!(code, Some(78));
    assert!(stderr.contains("there is no node `batchs`") && stderr.contains("did you mean `batches`?"), "{stderr}");
    assert!(stdout.ends_with("1 passed, 0 failed, 1 pipeline invalid\n"), "{stdout}");
    assert!(fs::read_to_string(here.path().join("junit.xml")).unwrap().contains("errors=\"1\""));
    // Mistakes in tests are those of the pipeline: `validate` tells them, too.
    assert_eq!(sapo_flow(here.path(), &["validate", "wrong.yaml"]).0, Some(78));
    assert_eq!(sapo_flow(here.path(), &["test", "not_there.yaml"]).0, Some(1));
}

//! What holds for the repository as a whole: sizes, headers, boundaries, and documents that agree with the program.

use std::fs;
use std::path::{Path, PathBuf};

use sapo_flow_engine::{docs, pipeline};

/// Files over 400 lines, each with its reason.
const LONG_FILES: &[(&str, &str)] = &[("tests/cli.rs", "a test a verb, on the same workplace")];

/// Functions over 60 lines, each with its reason.
const LONG_FUNCTIONS: &[(&str, &str)] = &[
    ("render_node", "one timely operator, from ports to schedule: the pieces share everything"),
    ("read", "src/training/gguf/config.rs: a list of keys"),
    ("convert", "src/training/gguf/tokenizer.rs: a list of keys"),
    ("saved_models_can_be_used", "one run, looked at from several sides"),
];

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn read(path: impl AsRef<Path>) -> String {
    fs::read_to_string(root().join(path)).expect("the file is there, as text")
}

/// Files with this extension below a folder, as paths from the root.
fn files(folder: &str, extension: &str) -> Vec<PathBuf> {
    let mut found = Vec::new();
    let mut folders = vec![root().join(folder)];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(folder).expect("the folder is there") {
            let path = entry.expect("it can be read").path();
            if path.is_dir() {
                folders.push(path);
            } else if path.extension().is_some_and(|found| found == extension) {
                found.push(path.strip_prefix(root()).expect("it is below the root").to_owned());
            }
        }
    }
    found.sort();
    found
}

fn sources() -> Vec<PathBuf> {
    ["src", "operators", "tests", "examples"].iter().flat_map(|folder| files(folder, "rs")).collect()
}

/// Functions of a file with their lengths in lines. rustfmt has put the closing brace below the first letter, and likewise the
/// parenthesis of a declaration without a body.
fn functions(text: &str) -> Vec<(String, usize)> {
    let lines: Vec<&str> = text.lines().collect();
    let mut functions = Vec::new();
    for (start, line) in lines.iter().enumerate().filter(|(_, line)| !line.ends_with(';')) {
        let code = line.trim_start();
        let Some(at) = code.find("fn ").filter(|at| code[..*at].split(' ').all(is_modifier)) else { continue };
        let name = code[at + 3..].split(['(', '<']).next().unwrap_or_default();
        let indent = &line[..line.len() - code.len()];
        let ends = |line: &str| {
            line.strip_prefix(indent).is_some_and(|rest| rest == "}" || rest.starts_with(')') && rest.ends_with(';'))
        };
        let length = lines[start..].iter().position(|line| ends(line)).unwrap_or(0) + 1;
        functions.push((name.to_owned(), length));
    }
    functions
}

fn is_modifier(word: &str) -> bool {
    word.is_empty() || word.starts_with("pub") || ["const", "unsafe", "extern"].contains(&word)
}

#[test]
fn files_and_functions_say_what_they_are_and_are_short() {
    let mut complaints = Vec::new();
    for path in sources() {
        let (name, text) = (path.display().to_string(), read(&path));
        if !text.starts_with("//! ") {
            complaints.push(format!("{name} does not open with `//!`"));
        }
        if text.lines().count() > 400 && !LONG_FILES.iter().any(|(file, _)| *file == name) {
            complaints.push(format!("{name} has over 400 lines"));
        }
        for (function, lines) in functions(&text) {
            if lines > 60 && !LONG_FUNCTIONS.iter().any(|(long, _)| *long == function) {
                complaints.push(format!("{name}: {function} has {lines} lines"));
            }
        }
    }
    assert!(complaints.is_empty(), "{}", complaints.join("\n"));
}

#[test]
fn pipelines_are_valid_and_say_what_they_need() {
    let registry = sapo_flow_operators::registry();
    for path in files("pipelines", "yaml") {
        let graph = pipeline::load(&root().join(&path), &[], &registry);
        let graph = graph.unwrap_or_else(|diagnostics| panic!("{diagnostics}"));
        assert!(graph.warnings.list.is_empty(), "{}", graph.warnings);
        let text = read(&path);
        for part in ["# Purpose: ", "# Command: ", "# Hardware: ", "# Time: ", "# small machine: "] {
            assert!(text.lines().any(|line| line.starts_with(part)), "{} has no `{part}`", path.display());
        }
    }
}

#[test]
fn examples_say_what_they_need() {
    for path in files("examples", "yaml") {
        let text = read(&path);
        for part in ["# Purpose: ", "# Command: ", "# Hardware: ", "# Time: "] {
            assert!(text.lines().any(|line| line.starts_with(part)), "{} has no `{part}`", path.display());
        }
    }
}

#[test]
fn no_exemption_outlives_its_need() {
    let sources: Vec<(String, String)> =
        sources().iter().map(|path| (path.display().to_string(), read(path))).collect();
    for (name, _) in LONG_FILES {
        let file = sources.iter().find(|(file, _)| file == name);
        assert!(file.is_some_and(|(_, text)| text.lines().count() > 400), "{name} needs no exemption");
    }
    for (name, _) in LONG_FUNCTIONS {
        let mut long = sources.iter().flat_map(|(_, text)| functions(text)).filter(|(_, lines)| *lines > 60);
        assert!(long.any(|(function, _)| function == *name), "{name} needs no exemption");
    }
}

#[test]
fn crates_keep_their_boundaries() {
    for (manifest, absent) in [
        ("src/engine/Cargo.toml", ["tch", "torch-sys", "sapo-flow-training", "sapo-flow-operators"]),
        ("src/training/Cargo.toml", ["timely", "differential-dataflow", "sapo-flow-engine", "sapo-flow-operators"]),
    ] {
        for name in absent {
            assert!(!read(manifest).lines().any(|line| line.starts_with(name)), "{manifest} names {name}");
        }
    }
}

#[test]
fn nothing_names_a_machine() {
    let mut paths = sources();
    paths.extend(files("pipelines", "yaml"));
    paths.extend(files("scripts", "py"));
    paths.extend(["README.md", "ARCHITECTURE.md", "CHANGELOG.md", "Makefile", ".ci/run"].map(PathBuf::from));
    for path in paths {
        let text = read(&path);
        for folder in ["root", "home", "work", "tmp", "mnt", "Users"] {
            assert!(!text.contains(&format!("/{folder}/")), "{} names a path below /{folder}", path.display());
        }
    }
}

/// What stands between `<!-- NAME:begin -->` and `<!-- NAME:end -->` in the README must be this. With UPDATE=1 in the
/// environment it becomes so.
fn assert_in_readme(name: &str, expected: &str) {
    let readme = read("README.md");
    let (begin, end) = (format!("<!-- {name}:begin -->\n"), format!("<!-- {name}:end -->"));
    let (before, rest) = readme.split_once(&begin).expect("the README has the mark");
    let (found, after) = rest.split_once(&end).expect("the README has the mark");
    if found == expected {
        return;
    }
    assert!(
        std::env::var_os("UPDATE").is_some(),
        "the README's {name} differ from the program's; `UPDATE=1 cargo test --test tidy` writes them anew"
    );
    fs::write(root().join("README.md"), format!("{before}{begin}{expected}{end}{after}")).expect("it can be written");
}

#[test]
fn the_readme_agrees_with_the_program() {
    let registry = sapo_flow_operators::registry();
    assert_in_readme("operators", &docs::operators_table(&registry));
    assert_in_readme("objectives", &sapo_flow_operators::objectives::table());
    let graph = pipeline::load(&root().join("pipelines/sapo_orpo.yaml"), &[], &registry).expect("it is valid");
    assert_in_readme("graph", &format!("```mermaid\n{}```\n", graph.to_mermaid()));
}

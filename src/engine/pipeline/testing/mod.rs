//! `tests` in a pipeline: records for some of its nodes, and what others are to emit.
//!
//! A feed stands for an output: the node is replaced by one that emits the records written. All that leads from there
//! to the outputs of which something is expected runs as it does in the pipeline, at steps 0, 1, 2, ...
//!
//! | module | what it holds |
//! |---|---|
//! | `case` | one test, read |
//! | `records` | records as they are written in tests |
//! | `predicate` | what is expected of a value |
//! | `expectation` | what is expected of an output |
//! | `graph` | the part of the graph that a test runs |

use std::time::{Duration, Instant};

use serde_json::json;

use self::case::CaseReader;
use self::expectation::Expectation;
use self::predicate::Predicate;
use super::diagnostic::{Diagnostic, Diagnostics, Report, Span};
use super::document::{self, check_keys};
use super::overrides::{self, Override};
use super::yaml::{Content, Yaml};
use crate::graph::Graph;
use crate::operator::Registry;
use crate::runtime::{self, RunError, RunOptions};

mod case;
mod expectation;
mod graph;
mod predicate;
mod records;

/// The keys of a test.
const KEYS: [&str; 6] = ["name", "params", "steps", "feed", "expect", "fails"];

/// One of a pipeline's tests, ready to be run.
pub struct Case {
    /// Its name.
    pub name: String,
    span: Span,
    graph: Graph,
    expected: Expected,
    report: Report,
}

enum Expected {
    Outputs(Vec<Expectation>),
    /// A failure like this.
    Failure(Predicate),
}

/// How a test ended.
pub struct Verdict {
    /// What was not as expected; nothing in a test that passed.
    pub failures: Diagnostics,
    /// How long it took.
    pub took: Duration,
}

/// The tests of a pipeline, and what is wrong with them. Where the pipeline itself is not right, there is no graph to hold
/// them against: then it is only how they are written.
pub(super) fn read(root: &Yaml, source: &Source, registry: &Registry, is_right: bool) -> (Vec<Case>, Vec<Diagnostic>) {
    let mut report = source.report();
    let mut wrong = Vec::new();
    let mut cases: Vec<Case> = Vec::new();
    let mut names: Vec<(String, Span)> = Vec::new();
    let Some(tests) = root.get("tests") else { return (cases, wrong) };
    let Content::Sequence(items) = &tests.value.content else {
        let message = format!("`tests` is a list, found {}", tests.value.found());
        report.error(tests.value.span, message).help("write `- name: ...`, with `feed` and `expect`");
        return (cases, report.finish().list);
    };
    for item in items {
        let Some(name) = name_of(item, &mut report) else { continue };
        if let Some((_, first)) = names.iter().find(|(other, _)| *other == name) {
            let note = format!("the first one is at {}", report.place(*first));
            report.error(item.span, format!("two tests are named `{name}`")).note(note);
            continue;
        }
        names.push((name.clone(), item.span));
        if !is_right {
            let mut report = source.report();
            check_keys(item, &KEYS, &format!("the test `{name}`"), &mut report);
            wrong.extend(told_of(&name, report).list);
            continue;
        }
        match read_case(&name, item, root, source, registry) {
            Ok(case) => cases.push(case),
            Err(diagnostics) => wrong.extend(diagnostics.list),
        }
    }
    wrong.extend(report.finish().list);
    (cases, wrong)
}

/// The text of a pipeline and what the command line gives it.
pub(super) struct Source<'a> {
    pub name: &'a str,
    pub text: &'a str,
    pub overrides: &'a [(String, String)],
}

impl Source<'_> {
    /// Nothing found yet.
    pub fn report(&self) -> Report {
        Report::new(self.name, self.text, self.overrides)
    }
}

fn name_of(item: &Yaml, report: &mut Report) -> Option<String> {
    if !matches!(item.content, Content::Mapping(_)) {
        report.error(item.span, format!("a test is a mapping, found {}", item.found()));
        return None;
    }
    let Some(name) = item.get("name") else {
        report.error(item.span, "a test has a `name`").label("needs `name`: what is tested");
        return None;
    };
    match name.value.as_str() {
        Some(text) if !text.is_empty() => Some(text.to_owned()),
        _ => {
            report.error(name.value.span, format!("the name of a test is text, found {}", name.value.found()));
            None
        }
    }
}

fn read_case(name: &str, item: &Yaml, root: &Yaml, source: &Source, registry: &Registry) -> Result<Case, Diagnostics> {
    let mut report = source.report();
    let before = overrides::from_command_line(source.overrides, &mut report);
    check_keys(item, &KEYS, &format!("the test `{name}`"), &mut report);
    let params = params_of(item, &before, &mut report);
    let mut lowered = document::lower(root, &params, registry, &mut report);
    if lowered.is_none() {
        // With values that cannot be, the rest of the test is read against the pipeline as it is.
        lowered = document::lower(root, &before, registry, &mut source.report());
    }
    let Some(mut lowered) = lowered else { return Err(told_of(name, report)) };
    report.set_context(&[]);
    let filled = lowered.params.fill(item, &mut report);
    let mut reader = CaseReader { lowered: &lowered, registry, report: &mut report };
    let case = reader.read(name, &filled);
    match case {
        Some((graph, expected)) if !report.has_errors() => {
            // Warnings about the pipeline are told with the pipeline.
            Ok(Case { name: name.to_owned(), span: item.span, graph, expected, report: report.take().1 })
        }
        _ => Err(told_of(name, report)),
    }
}

/// What is wrong, with the test that shows it. Warnings are those of the pipeline.
fn told_of(name: &str, report: Report) -> Diagnostics {
    let mut diagnostics = report.finish();
    diagnostics.list.retain(|found| found.severity == super::Severity::Error);
    diagnostics.list.iter_mut().for_each(|found| found.notes.push(format!("in the test `{name}`")));
    diagnostics
}

fn params_of(item: &Yaml, before: &[Override], report: &mut Report) -> Vec<Override> {
    let Some(params) = item.get("params") else { return before.to_vec() };
    if !matches!(params.value.content, Content::Mapping(_)) {
        report.error(params.value.span, format!("`params` is a mapping, found {}", params.value.found()));
    }
    overrides::from_entries(params.value.entries(), before, report)
}

impl Case {
    /// Run it.
    ///
    /// # Errors
    /// When there is no room for the files of its run.
    pub fn run(mut self) -> std::io::Result<Verdict> {
        let began = Instant::now();
        let directory = tempfile::tempdir()?;
        let outcome = runtime::run(&self.graph, RunOptions::new(directory.path()));
        match (&self.expected, outcome) {
            (Expected::Failure(predicate), Err(error)) => {
                let mut found = Vec::new();
                predicate.check(&told(&error), "the failure", &mut found);
                tell(found, &mut self.report);
            }
            (Expected::Failure(_), Ok(_)) => {
                self.report.error(self.span, "expected a failure, and the run ended well");
            }
            (Expected::Outputs(_), Err(error)) => {
                self.report.error(self.span, format!("the run failed: {error}"));
            }
            (Expected::Outputs(expectations), Ok(_)) => {
                for (index, expectation) in expectations.iter().enumerate() {
                    match graph::read_captured(directory.path(), index) {
                        Ok(emitted) => tell(expectation.check(&emitted), &mut self.report),
                        Err(error) => {
                            self.report.error(expectation.span, format!("cannot read what was emitted: {error}"));
                        }
                    }
                }
            }
        }
        Ok(Verdict { failures: self.report.finish(), took: began.elapsed() })
    }
}

fn tell(found: Vec<predicate::Mismatch>, report: &mut Report) {
    for mismatch in found {
        let diagnostic = report.error(mismatch.span, mismatch.message);
        diagnostic.help = mismatch.help;
    }
}

/// What a failure says, in the form that expectations are written in.
fn told(error: &RunError) -> serde_json::Value {
    match error {
        RunError::Node { node, step, message } => json!({"node": node, "step": step, "message": message}),
        other => json!({"message": other.to_string()}),
    }
}

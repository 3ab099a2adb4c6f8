//! What a test expects of an output: the records of each step, or what holds of all of them.

use serde_json::{Value as Json, json};

use super::predicate::{Mismatch, Predicate, Reader};
use super::records;
use crate::pipeline::diagnostic::{Report, Span};
use crate::pipeline::document::check_keys;
use crate::pipeline::yaml::{Content, Yaml};
use crate::record::{PortType, Record};

/// What is expected of one output.
pub(super) struct Expectation {
    /// The output as written.
    pub name: String,
    pub span: Span,
    /// Outputs of nodes in the sub-graph, by index of node and port; several where a composite's output has several.
    pub outputs: Vec<(usize, usize)>,
    checks: Checks,
}

enum Checks {
    /// A step an entry; None where anything may be emitted.
    Steps(Vec<Option<Expected>>),
    /// Of all records of the test.
    Whole(Vec<(Span, Whole)>),
}

/// The records of one step, in order.
struct Expected {
    span: Span,
    records: Vec<Predicate>,
}

enum Whole {
    Count(Predicate),
    Each(Predicate),
    Any(Predicate),
    No(Predicate),
}

impl Expectation {
    /// Read what stands under an output that carries `kind`.
    pub fn read(
        name: &str,
        span: Span,
        outputs: Vec<(usize, usize)>,
        kind: PortType,
        yaml: &Yaml,
        report: &mut Report,
    ) -> Self {
        let schema = records::schema(kind);
        let reader = Reader { root: &schema };
        let mut record = |yaml: &Yaml, report: &mut Report| {
            if !matches!(yaml.content, Content::Mapping(_)) {
                report.error(yaml.span, format!("a record of {kind} is a mapping, found {}", yaml.found()));
            }
            if matches!(&yaml.content, Content::Mapping(entries) if entries.is_empty()) && kind == PortType::Metrics {
                report.error(yaml.span, "this expects nothing of the metrics").help("name some, with their values");
            }
            reader.read(&schema, yaml, name, report)
        };
        let checks = match &yaml.content {
            Content::Sequence(steps) => {
                let read_step = |step: &Yaml, report: &mut Report| match &step.content {
                    _ if step.is_null() => None,
                    Content::Sequence(items) => {
                        let records = items.iter().map(|item| record(item, report)).collect();
                        Some(Expected { span: step.span, records })
                    }
                    _ => Some(Expected { span: step.span, records: vec![record(step, report)] }),
                };
                let steps: Vec<Option<Expected>> = steps.iter().map(|step| read_step(step, report)).collect();
                if steps.iter().all(Option::is_none) {
                    report.error(yaml.span, format!("this expects nothing of `{name}`"));
                }
                Checks::Steps(steps)
            }
            Content::Mapping(_) => Checks::Whole(whole(name, yaml, &mut record, report)),
            _ => {
                report
                    .error(yaml.span, format!("expected a list of steps, or a mapping, found {}", yaml.found()))
                    .help("write the records of each step, as in `[[{row: 0}], []]`, or `{count: 1, each: {row: 0}}`");
                Checks::Whole(Vec::new())
            }
        };
        Expectation { name: name.to_owned(), span, outputs, checks }
    }

    /// How many steps it lists.
    pub fn steps(&self) -> Option<u64> {
        match &self.checks {
            Checks::Steps(steps) => Some(steps.len() as u64),
            Checks::Whole(_) => None,
        }
    }

    /// What about these records, a step an entry, is not as expected.
    pub fn check(&self, emitted: &[Vec<Record>]) -> Vec<Mismatch> {
        let emitted: Vec<Vec<Json>> = emitted.iter().map(|step| step.iter().map(records::fields).collect()).collect();
        let mut found = Vec::new();
        match &self.checks {
            Checks::Steps(steps) => {
                for (step, (expected, records)) in steps.iter().zip(&emitted).enumerate() {
                    if let Some(expected) = expected {
                        self.check_step(step, expected, records, &mut found);
                    }
                }
            }
            Checks::Whole(checks) => {
                for (span, check) in checks {
                    self.check_whole(*span, check, &emitted, &mut found);
                }
            }
        }
        found
    }

    fn check_step(&self, step: usize, expected: &Expected, records: &[Json], found: &mut Vec<Mismatch>) {
        if expected.records.len() != records.len() {
            let (name, count) = (&self.name, records_of(expected.records.len()));
            let message = format!("expected `{name}` to emit {count} at step {step}, found {}", told(records));
            found.push(Mismatch { span: expected.span, message, help: None });
            return;
        }
        for (position, (predicate, record)) in expected.records.iter().zip(records).enumerate() {
            let name = self.record_name(step, position, records.len());
            predicate.check(record, &name, found);
            predicate.check_names(&[record], &name, false, found);
        }
    }

    fn check_whole(&self, span: Span, check: &Whole, emitted: &[Vec<Json>], found: &mut Vec<Mismatch>) {
        let name = &self.name;
        let all: Vec<(usize, usize, usize, &Json)> = emitted
            .iter()
            .enumerate()
            .flat_map(|(step, records)| {
                records.iter().enumerate().map(move |(position, record)| (step, position, records.len(), record))
            })
            .collect();
        if all.is_empty() && !matches!(check, Whole::Count(_)) {
            let message = format!("`{name}` emitted nothing: there was nothing to compare");
            found.push(Mismatch { span, message, help: None });
            return;
        }
        let records: Vec<&Json> = all.iter().map(|(.., record)| *record).collect();
        match check {
            Whole::Count(_) => {}
            Whole::Each(predicate) | Whole::Any(predicate) => predicate.check_names(&records, name, false, found),
            Whole::No(predicate) => predicate.check_names(&records, name, true, found),
        }
        match check {
            Whole::Count(predicate) => {
                predicate.check(&json!(all.len()), &format!("the number of records of {name}"), found);
            }
            Whole::Each(predicate) => {
                for (step, position, of, record) in all {
                    predicate.check(record, &self.record_name(step, position, of), found);
                }
            }
            Whole::Any(predicate) => {
                if !all.iter().any(|(.., record)| predicate.holds(record)) {
                    let message = format!("none of the {} of `{name}` is like this", records_of(all.len()));
                    found.push(Mismatch { span, message, help: None });
                }
            }
            Whole::No(predicate) => {
                if let Some((step, position, of, record)) = all.iter().find(|(.., record)| predicate.holds(record)) {
                    let which = self.record_name(*step, *position, *of);
                    found.push(Mismatch { span, message: format!("`{which}` is like this: {record}"), help: None });
                }
            }
        }
    }

    /// `replay.pairs at step 1`, with its position where the step has several.
    fn record_name(&self, step: usize, position: usize, of: usize) -> String {
        let position = if of == 1 { String::new() } else { format!(" ({})", position + 1) };
        format!("{} at step {step}{position}", self.name)
    }
}

fn whole(
    name: &str,
    yaml: &Yaml,
    record: &mut dyn FnMut(&Yaml, &mut Report) -> Predicate,
    report: &mut Report,
) -> Vec<(Span, Whole)> {
    check_keys(yaml, &["count", "each", "any", "no"], &format!("what is expected of `{name}`"), report);
    let mut checks = Vec::new();
    for entry in yaml.entries() {
        let check = match entry.key.as_str() {
            "count" => {
                let schema = json!({"type": "integer", "minimum": 0});
                Whole::Count(Reader { root: &schema }.read(&schema, &entry.value, "count", report))
            }
            "each" => Whole::Each(record(&entry.value, report)),
            "any" => Whole::Any(record(&entry.value, report)),
            "no" => Whole::No(record(&entry.value, report)),
            _ => continue,
        };
        if entry.key != "count" && matches!(&entry.value.content, Content::Mapping(entries) if entries.is_empty()) {
            report.error(entry.value.span, format!("`{}: {{}}` expects nothing of `{name}`", entry.key));
        }
        checks.push((entry.key_span, check));
    }
    if yaml.entries().is_empty() {
        report
            .error(yaml.span, format!("this expects nothing of `{name}`"))
            .help("write `count`, `each`, `any` or `no`, or a list of steps");
    }
    checks
}

fn records_of(count: usize) -> String {
    format!("{count} record{}", if count == 1 { "" } else { "s" })
}

/// How many, and which.
fn told(records: &[Json]) -> String {
    const SHOWN: usize = 3;
    let shown: Vec<String> = records.iter().take(SHOWN).map(Json::to_string).collect();
    match records.len() {
        0 => "none".to_owned(),
        count if count > SHOWN => format!("{count}, the first of them {}", shown.join(", ")),
        count => format!("{count}: {}", shown.join(", ")),
    }
}

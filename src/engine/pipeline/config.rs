//! The `with` block of a node: against the schema of its operator's config, and before the operator's own eyes.

use serde_yaml::Value;

use super::diagnostic::Report;
use super::placed;
use super::scaffold_text::example_settings;
use super::schema::Validator;
use super::wiring::Draft;
use super::yaml::{Content, Entry, Yaml};
use crate::operator::{ConfigIssue, OperatorSpec};

/// The `with` block against the operator's schema, and the operator's own check, of which as much as can be told without the
/// keys that the schema complains about. Whether neither has any complaint.
pub(crate) fn check(op: &OperatorSpec, draft: &Draft, report: &mut Report) -> bool {
    let before = report.errors();
    let schema = (op.config_schema)().to_value();
    let nothing = Yaml::new(draft.op_span, Content::Mapping(Vec::new()));
    let (with, key) = match &draft.with {
        Some(entry) => (&entry.value, entry.key_span),
        None => (&nothing, draft.op_span),
    };
    if !matches!(with.content, Content::Mapping(_) | Content::Invalid) {
        report.error(key, format!("`with` is a mapping, found {}", with.found()));
        return false;
    }
    let validator = Validator { root: &schema };
    validator.check(with, "", key, report);
    if report.errors() == before && !contains_invalid(with) {
        report_issues(draft, (op.check)(&with.to_value()), report);
        return report.errors() == before;
    }
    report_issues(draft, issues_without_bad_keys(op, with, &validator), report);
    false
}

/// What the operator says of the keys that are right. Those that are not are left out, and those that are required and not
/// there come from its example; what it says of either is not meant for the user.
fn issues_without_bad_keys(op: &OperatorSpec, with: &Yaml, validator: &Validator) -> Vec<ConfigIssue> {
    let span = with.span;
    let mapping = |entries: Vec<Entry>| Yaml::new(span, Content::Mapping(entries));
    let nothing = validator.complaints(validator.root, &mapping(Vec::new()));
    let is_right = |entry: &Entry| {
        let unknown = Entry { value: Yaml::new(span, Content::Invalid), ..entry.clone() };
        // Without a look at its value; what is missing beside it is told in both.
        let bare = validator.complaints(validator.root, &mapping(vec![unknown]));
        let own = validator.complaints(validator.root, &mapping(vec![entry.clone()]));
        bare <= nothing && own <= bare && !contains_invalid(&entry.value)
    };
    let (right, bad): (Vec<Entry>, Vec<Entry>) = with.entries().iter().cloned().partition(is_right);
    let mut left_out: Vec<String> = bad.into_iter().map(|entry| entry.key).collect();
    let Value::Mapping(mut given) = mapping(right).to_value() else { return Vec::new() };
    let example = example_settings(op, op.example).ok().flatten().unwrap_or_default();
    for key in validator.root["required"].as_array().into_iter().flatten().filter_map(|key| key.as_str()) {
        if !given.contains_key(key) {
            left_out.push(key.to_owned());
            if let Some(value) = example.get(key) {
                given.insert(key.into(), value.clone());
            }
        }
    }
    let of_left_out = |issue: &ConfigIssue| {
        issue.key.is_empty() || left_out.iter().any(|key| mentions(&issue.key, key) || mentions(&issue.message, key))
    };
    let mut issues = (op.check)(&Value::Mapping(given));
    issues.retain(|issue| !of_left_out(issue));
    issues
}

/// Whether a word stands in a text by itself.
fn mentions(text: &str, word: &str) -> bool {
    text.split(|c: char| !c.is_alphanumeric() && c != '_').any(|other| other == word)
}

/// Errors for what an operator has to say of its `with` block, each at its key.
pub(crate) fn report_issues(draft: &Draft, issues: Vec<ConfigIssue>, report: &mut Report) {
    let nothing = Yaml::new(draft.op_span, Content::Mapping(Vec::new()));
    let (with, key) = match &draft.with {
        Some(entry) => (&entry.value, entry.key_span),
        None => (&nothing, draft.op_span),
    };
    for issue in issues {
        placed::report(&draft.name, with, key, issue, report);
    }
}

/// Whether something in it has been found wrong.
pub(crate) fn contains_invalid(yaml: &Yaml) -> bool {
    match &yaml.content {
        Content::Invalid => true,
        Content::Sequence(items) => items.iter().any(contains_invalid),
        Content::Mapping(entries) => entries.iter().any(|entry| contains_invalid(&entry.value)),
        Content::Scalar(_) => false,
    }
}

//! What operators say of their settings, shown at its place: at a key, within the text there, or in a file that it names.

use std::path::Path;

use super::diagnostic::{Report, Span};
use super::schema::blame;
use super::yaml::{self, Content, Yaml};
use crate::operator::ConfigIssue;

/// Report an issue with a node's `with` block, whose own key is at `key`.
pub(crate) fn report(node: &str, with: &Yaml, key: Span, issue: ConfigIssue, report: &mut Report) {
    if let Some((path, inner)) = issue.file.as_deref()
        && in_file(path, inner, with, &issue, report)
    {
        return;
    }
    let last = issue.key.rsplit('.').next().unwrap_or_default();
    let found = look_up(with, &issue.key);
    let place = issue.place.and_then(|place| within(report, found?, place));
    // Where the caret stands at the mistake, the message need not say where it is.
    let text = if place.is_some() || issue.place.is_none() { issue.message.clone() } else { in_words(&issue) };
    let named = if text.contains(last) { text.clone() } else { format!("`{}`: {text}", issue.key) };
    let diagnostic = match (found, place) {
        (_, Some(span)) => report.error(span, named),
        (Some(yaml), None) => blame(report, yaml, named),
        (None, None) if issue.key.is_empty() => report.error(key, format!("in `{node}`: {text}")),
        (None, None) => report.error(key, format!("`{}` of `{node}`: {text}", issue.key)),
    };
    if let Some((path, inner)) = issue.file.map(|file| *file) {
        diagnostic.note(format!("this is about `{inner}` in {}", path.display()));
    }
    if let Some(help) = issue.help {
        diagnostic.help(help);
    }
}

/// Report an issue with a file at its place there; false where the file cannot be read as YAML.
fn in_file(path: &Path, inner: &str, with: &Yaml, issue: &ConfigIssue, report: &mut Report) -> bool {
    let name = path.display().to_string();
    let Ok(text) = std::fs::read_to_string(path) else { return false };
    let mut scratch = Report::new(&name, &text, &[]);
    let Some(root) = yaml::parse(0, &mut scratch) else { return false };
    let source = report.source(&name, &text);
    let found = look_up(&root, inner).unwrap_or(&root);
    let place = issue.place.and_then(|place| within(&scratch, found, place));
    let message = if place.is_some() || issue.place.is_none() { issue.message.clone() } else { in_words(issue) };
    let message = if inner.is_empty() { message } else { format!("`{inner}`: {message}") };
    let used = look_up(with, &issue.key).map(|yaml| report.place(yaml.span));
    let diagnostic = report.error(Span { source, ..place.unwrap_or(found.span) }, message);
    if let Some(used) = used {
        diagnostic.note(format!("`{}` names this file at {used}", issue.key));
    }
    if let Some(help) = &issue.help {
        diagnostic.help(help.clone());
    }
    true
}

fn in_words(issue: &ConfigIssue) -> String {
    ConfigIssue { help: None, ..issue.clone() }.to_string()
}

/// The value at a dotted key, in which numbers count the items of lists; where the end of it is missing, what is there.
fn look_up<'a>(yaml: &'a Yaml, key: &str) -> Option<&'a Yaml> {
    let part = |yaml: &'a Yaml, part: &str| match &yaml.content {
        Content::Sequence(items) => items.get(part.parse::<usize>().ok()?),
        _ => yaml.get(part).map(|entry| &entry.value),
    };
    let mut parts = key.split('.');
    let mut found = part(yaml, parts.next()?)?;
    for name in parts {
        match part(found, name) {
            Some(inner) => found = inner,
            None => break,
        }
    }
    Some(found)
}

/// Where a place of a text, by line and column from 1, stands in the file that has the text as a YAML scalar, plain, quoted,
/// or folded. None where it cannot be told: the text was put together from parameters.
fn within(report: &Report, yaml: &Yaml, (line, column): (usize, usize)) -> Option<Span> {
    let value = yaml.as_str().filter(|_| yaml.origin.is_none() && yaml.span.line > 0)?;
    let lines: Vec<&str> = value.split('\n').collect();
    let before: String = lines.iter().take(line - 1).copied().collect();
    let in_line = lines.get(line - 1).copied().unwrap_or_default();
    let is_letter = |letter: &char| !letter.is_whitespace();
    let passed = before.chars().chain(in_line.chars().take(column.saturating_sub(1))).filter(is_letter).count();
    // Folding moves blanks alone, so that letters tell where one is.
    let mut written = Letters::new(report.text(yaml.span.source), yaml.span);
    let mut after = None;
    for (index, letter) in value.chars().filter(is_letter).enumerate() {
        let place = written.next().filter(|(found, _)| *found == letter)?.1;
        if index == passed {
            let word = |letter: &char| letter.is_alphanumeric() || *letter == '_';
            let width = in_line
                .chars()
                .skip(column.saturating_sub(1))
                .skip_while(|c| c.is_whitespace())
                .take_while(word)
                .count();
            return Some(Span { width: width.max(1), ..place });
        }
        after = Some(Span { column: place.column + 1, ..place });
    }
    after
}

/// The letters of a YAML scalar as it is written, each with its place; blanks are left out.
struct Letters<'a> {
    lines: Vec<&'a str>,
    place: Span,
    quote: Option<char>,
}

impl<'a> Letters<'a> {
    fn new(text: &'a str, span: Span) -> Self {
        let lines: Vec<&str> = text.lines().collect();
        let mut letters = Letters { lines, place: Span { width: 1, ..span }, quote: None };
        match letters.here() {
            Some(quote @ ('"' | '\'')) => {
                letters.quote = Some(quote);
                letters.place.column += 1;
            }
            // The text of a block begins in the line after its sign.
            Some('|' | '>') => letters.place = Span { line: span.line + 1, column: 1, ..letters.place },
            _ => {}
        }
        letters
    }

    fn line(&self) -> Option<&'a str> {
        self.lines.get(self.place.line - 1).copied()
    }

    fn here(&self) -> Option<char> {
        self.line()?.chars().nth(self.place.column - 1)
    }

    fn ahead(&self) -> Option<char> {
        self.line()?.chars().nth(self.place.column)
    }
}

impl Iterator for Letters<'_> {
    type Item = (char, Span);

    fn next(&mut self) -> Option<Self::Item> {
        loop {
            let place = self.place;
            let Some(letter) = self.here() else {
                self.line()?;
                self.place = Span { line: place.line + 1, column: 1, ..place };
                continue;
            };
            let escaped = match (self.quote, letter, self.ahead()) {
                (Some('\''), '\'', Some('\'')) => Some('\''),
                (Some('"'), '\\', Some(next @ ('"' | '\\' | '/'))) => Some(next),
                (Some('"'), '\\', Some('n' | 't' | 'r' | ' ')) => Some(' '),
                // The blank that a line ending in a backslash leaves out, and escapes by number, which nobody writes in formulas.
                (Some('"'), '\\', None) => Some(' '),
                (Some('"'), '\\', Some(_)) => return None,
                _ => None,
            };
            self.place.column += if escaped.is_some() { 2 } else { 1 };
            let letter = escaped.unwrap_or(letter);
            if !letter.is_whitespace() {
                return Some((letter, place));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Line and column at which `within` finds a place of the text under `key`.
    fn place(text: &str, at: (usize, usize)) -> Option<(usize, usize, usize)> {
        let mut report = Report::new("p.yaml", text, &[]);
        let root = yaml::parse(0, &mut report).expect("a test's own YAML");
        let found = within(&report, look_up(&root, "with.key").expect("it has the key"), at)?;
        Some((found.line, found.column, found.width))
    }

    #[test]
    fn places_within_scalars_are_found_where_they_are_written() {
        // Plain, and at the end.
        assert_eq!(place("with:\n  key: a + bcd\n", (1, 5)), Some((2, 12, 3)));
        assert_eq!(place("with: {key: a +}\n", (1, 4)), Some((1, 16, 1)));
        // Folded: the text is one line.
        assert_eq!(place("with:\n  key: >-\n    a +\n    bcd\n", (1, 5)), Some((4, 5, 3)));
        assert_eq!(place("with:\n  key: a +\n    bcd\n", (1, 5)), Some((3, 5, 3)));
        // Kept: two lines.
        assert_eq!(place("with:\n  key: |\n    a +\n      bcd - e\n", (2, 9)), Some((4, 13, 1)));
        // Quoted, with escapes before the place.
        assert_eq!(place("with: {key: \"a == \\\"x\\\" + bcd\"}\n", (1, 12)), Some((1, 27, 3)));
        assert_eq!(place("with: {key: 'a + ''x'' + bcd'}\n", (1, 11)), Some((1, 26, 3)));
    }
}

//! What is wrong with a pipeline, and where: collected, sorted, and shown with the line it is about.

use std::fmt;

use super::suggest::{closest, one_of};

/// How bad it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Severity {
    /// The pipeline cannot run.
    Error,
    /// The pipeline runs, though perhaps not as meant.
    Warning,
}

/// One thing that is wrong.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Diagnostic {
    /// How bad it is.
    pub severity: Severity,
    /// What is wrong, in one line.
    pub message: String,
    /// The file, or `command line` for an override.
    pub file: String,
    /// Line, from 1; 0 where there is none to show.
    pub line: usize,
    /// Column in characters, from 1.
    pub column: usize,
    /// Characters to underline; at least 1.
    pub width: usize,
    /// The text of the line.
    pub source_line: String,
    /// What stands beside the underline: what was expected.
    pub label: String,
    /// Further facts.
    pub notes: Vec<String>,
    /// What to do about it.
    pub help: Option<String>,
}

impl Diagnostic {
    pub(super) fn label(&mut self, label: impl Into<String>) -> &mut Self {
        self.label = label.into();
        self
    }

    pub(super) fn note(&mut self, note: impl Into<String>) -> &mut Self {
        self.notes.push(note.into());
        self
    }

    pub(super) fn help(&mut self, help: impl Into<String>) -> &mut Self {
        self.help = Some(help.into());
        self
    }

    /// Help with a name that is none of `candidates`: the nearest, or all of them where none is near.
    pub(super) fn suggest<S: AsRef<str>>(&mut self, word: &str, candidates: &[S]) -> &mut Self {
        match closest(word, candidates.iter().map(AsRef::as_ref)) {
            Some(name) => self.help(format!("did you mean `{name}`?")),
            None if candidates.is_empty() => self,
            None => self.help(format!("there is {}", one_of(candidates).replace(" or ", " and "))),
        }
    }
}

impl fmt::Display for Diagnostic {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let severity = if self.severity == Severity::Error { "error" } else { "warning" };
        write!(f, "{severity}: {}", self.message)?;
        let number = if self.line == 0 { String::new() } else { self.line.to_string() };
        let margin = " ".repeat(number.len());
        if self.line > 0 {
            write!(f, "\n{margin}--> {}:{}:{}", self.file, self.line, self.column)?;
            let indent: String =
                self.source_line.chars().take(self.column - 1).map(|c| if c == '\t' { '\t' } else { ' ' }).collect();
            write!(f, "\n{margin} |\n{number} | {}", self.source_line)?;
            write!(f, "\n{margin} | {indent}{} {}", "^".repeat(self.width), self.label)?;
        }
        for note in &self.notes {
            write!(f, "\n{margin} = note: {note}")?;
        }
        if let Some(help) = &self.help {
            write!(f, "\n{margin} = help: {help}")?;
        }
        Ok(())
    }
}

/// Everything that is wrong with one pipeline, in the order of the file.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Diagnostics {
    /// The findings.
    pub list: Vec<Diagnostic>,
}

impl Diagnostics {
    /// Whether any is an error.
    pub fn has_errors(&self) -> bool {
        self.errors() > 0
    }

    /// How many are errors.
    pub fn errors(&self) -> usize {
        self.list.iter().filter(|diagnostic| diagnostic.severity == Severity::Error).count()
    }

    /// How many are warnings.
    pub fn warnings(&self) -> usize {
        self.list.len() - self.errors()
    }

    pub(super) fn unreadable(file: &str, error: &std::io::Error) -> Self {
        let mut report = Report::new(file, "", &[]);
        report.list.push(report.diagnostic(Severity::Error, Span::default(), format!("cannot read `{file}`: {error}")));
        report.finish()
    }
}

impl fmt::Display for Diagnostics {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, diagnostic) in self.list.iter().enumerate() {
            let separator = if index == 0 { "" } else { "\n\n" };
            // An empty label leaves a blank at the end of its line.
            let text = diagnostic.to_string();
            let lines: Vec<&str> = text.lines().map(str::trim_end).collect();
            write!(f, "{separator}{}", lines.join("\n"))?;
        }
        Ok(())
    }
}

impl std::error::Error for Diagnostics {}

/// A stretch of one of the sources.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Span {
    /// 0: the pipeline file; 1: the command line, where override n is line n.
    pub source: usize,
    /// First line, from 1; 0: nowhere.
    pub line: usize,
    /// First column in characters, from 1.
    pub column: usize,
    /// Characters; what goes past the end of the line is not shown.
    pub width: usize,
}

/// Collects diagnostics while the stages run.
pub(crate) struct Report {
    sources: Vec<(String, Vec<String>)>,
    list: Vec<Diagnostic>,
    text: String,
}

impl Report {
    pub fn new(file: &str, text: &str, overrides: &[(String, String)]) -> Self {
        let lines = text.lines().map(str::to_owned).collect();
        let command_line = overrides.iter().map(|(name, value)| format!("-S {name}={value}")).collect();
        Report {
            sources: vec![(file.to_owned(), lines), ("command line".to_owned(), command_line)],
            list: Vec::new(),
            text: text.to_owned(),
        }
    }

    /// The pipeline's text.
    pub fn text(&self) -> &str {
        &self.text
    }

    /// Report an error.
    pub fn error(&mut self, span: Span, message: impl Into<String>) -> &mut Diagnostic {
        self.push(Severity::Error, span, message.into())
    }

    /// Report something that may be meant.
    pub fn warning(&mut self, span: Span, message: impl Into<String>) -> &mut Diagnostic {
        self.push(Severity::Warning, span, message.into())
    }

    /// How many errors there are so far.
    pub fn errors(&self) -> usize {
        self.list.iter().filter(|diagnostic| diagnostic.severity == Severity::Error).count()
    }

    pub fn has_errors(&self) -> bool {
        self.errors() > 0
    }

    /// Where a span is, for a note about another one.
    pub fn place(&self, span: Span) -> String {
        format!("{}:{}:{}", self.sources[span.source].0, span.line, span.column)
    }

    /// All findings, those of the file before those of the command line, each by line and column.
    pub fn finish(mut self) -> Diagnostics {
        self.list.sort_by_key(|diagnostic| {
            (diagnostic.file == self.sources[1].0, diagnostic.line, diagnostic.column, diagnostic.severity as u8)
        });
        Diagnostics { list: self.list }
    }

    fn push(&mut self, severity: Severity, span: Span, message: String) -> &mut Diagnostic {
        let diagnostic = self.diagnostic(severity, span, message);
        self.list.push(diagnostic);
        self.list.last_mut().expect("one was just pushed")
    }

    fn diagnostic(&self, severity: Severity, span: Span, message: String) -> Diagnostic {
        let (file, lines) = &self.sources[span.source];
        let source_line = span.line.checked_sub(1).and_then(|index| lines.get(index)).cloned().unwrap_or_default();
        let rest = (source_line.chars().count() + 1).saturating_sub(span.column);
        Diagnostic {
            severity,
            message,
            file: file.clone(),
            line: span.line,
            column: span.column.max(1),
            width: span.width.min(rest).max(1),
            source_line,
            label: String::new(),
            notes: Vec::new(),
            help: None,
        }
    }
}

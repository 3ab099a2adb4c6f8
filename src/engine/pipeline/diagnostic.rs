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
    /// The line, with a mark under what it is about.
    fn excerpt(&self) -> String {
        let number = self.line.to_string();
        let margin = " ".repeat(number.len());
        let indent: String =
            self.source_line.chars().take(self.column - 1).map(|c| if c == '\t' { '\t' } else { ' ' }).collect();
        let marks = "^".repeat(self.width);
        format!("{number} | {}\n{margin} | {indent}{marks} {}", self.source_line, self.label)
    }

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

    /// Whether another says the same of the same place.
    pub(super) fn tells_what(&self, other: &Diagnostic) -> bool {
        (&self.file, self.line, self.column, &self.message) == (&other.file, other.line, other.column, &other.message)
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
            write!(f, "\n{margin} |\n{}", self.excerpt())?;
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
        report.error(Span::default(), format!("cannot read `{file}`: {error}"));
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
    /// 0: the pipeline file; 1: the command line, where override n is line n; others: included files.
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
    sources: Vec<Source>,
    list: Vec<Diagnostic>,
    /// For each of the list, the uses of composite operators it was found in.
    contexts: Vec<Vec<String>>,
    context: Vec<String>,
}

struct Source {
    name: String,
    text: String,
}

impl Report {
    pub fn new(file: &str, text: &str, overrides: &[(String, String)]) -> Self {
        let command_line: Vec<String> =
            overrides.iter().map(|(name, value)| format!("-S {name}={value}").replace('\n', " ")).collect();
        let source = |name: &str, text: String| Source { name: name.to_owned(), text };
        Report {
            sources: vec![source(file, text.to_owned()), source("command line", command_line.join("\n"))],
            list: Vec::new(),
            contexts: Vec::new(),
            context: Vec::new(),
        }
    }

    /// All findings, as [`finish`](Self::finish) tells them, and the sources.
    pub fn take(self) -> (Diagnostics, Self) {
        let empty = self.without_findings();
        (self.finish(), empty)
    }

    /// The same sources, of which nothing is said.
    pub fn without_findings(&self) -> Self {
        let sources = self.sources.iter().map(|s| Source { name: s.name.clone(), text: s.text.clone() }).collect();
        Report { sources, list: Vec::new(), contexts: Vec::new(), context: Vec::new() }
    }

    /// Add an included file; the result stands for it in spans.
    pub fn add_source(&mut self, name: &str, text: &str) -> usize {
        self.sources.push(Source { name: name.to_owned(), text: text.to_owned() });
        self.sources.len() - 1
    }

    /// The source of that name, added where it is not there.
    pub fn source(&mut self, name: &str, text: &str) -> usize {
        let there = self.sources.iter().position(|source| source.name == name);
        there.unwrap_or_else(|| self.add_source(name, text))
    }

    /// The text of a source.
    pub fn text(&self, source: usize) -> &str {
        &self.sources[source].text
    }

    /// The name of a source.
    pub fn name(&self, source: usize) -> &str {
        &self.sources[source].name
    }

    /// From now on, what is found was found in these uses of composite operators.
    pub fn set_context(&mut self, uses: &[String]) {
        self.context = uses.to_vec();
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

    /// What was reported last, for more to be said about it.
    ///
    /// # Panics
    /// Where nothing has been.
    pub fn last_error(&mut self) -> &mut Diagnostic {
        self.list.last_mut().expect("something was reported")
    }

    /// Where a span is, for a note about another one.
    pub fn place(&self, span: Span) -> String {
        format!("{}:{}:{}", self.sources[span.source].name, span.line, span.column)
    }

    /// A note about another place: what it says, where that is, and the line.
    pub fn note_at(&self, note: &str, span: Span) -> String {
        let there = self.diagnostic(Severity::Error, span, String::new());
        format!("{note} at {}\n{}", self.place(span), there.excerpt())
    }

    /// All findings, those of the pipeline before those of included files and of the command line, each by line and
    /// column. What was found in several uses of one definition is told once, with all of them.
    pub fn finish(self) -> Diagnostics {
        self.finish_with(Vec::new())
    }

    /// The same, together with what others have found.
    pub fn finish_with(self, others: Vec<Diagnostic>) -> Diagnostics {
        let rank = |diagnostic: &Diagnostic| match self.sources.iter().position(|s| s.name == diagnostic.file) {
            Some(1) => usize::MAX,
            Some(source) => source,
            None => 0,
        };
        let mut list: Vec<Diagnostic> = Vec::new();
        for (diagnostic, context) in self.list.into_iter().zip(self.contexts) {
            let same = |other: &&mut Diagnostic| !context.is_empty() && other.tells_what(&diagnostic);
            match list.iter_mut().find(same) {
                Some(told) => {
                    let more = context.into_iter().filter(|note| !told.notes.contains(note)).collect::<Vec<_>>();
                    told.notes.extend(more);
                }
                None => {
                    let notes = [diagnostic.notes.as_slice(), &context].concat();
                    list.push(Diagnostic { notes, ..diagnostic });
                }
            }
        }
        for other in others {
            // What is wrong with the pipeline itself shows in its tests and in its sweep as well.
            match list.iter_mut().find(|told| told.tells_what(&other)) {
                Some(told) => {
                    let more = other.notes.into_iter().filter(|note| !told.notes.contains(note)).collect::<Vec<_>>();
                    told.notes.extend(more);
                }
                None => list.push(other),
            }
        }
        list.sort_by_key(|diagnostic| {
            (rank(diagnostic), diagnostic.line, diagnostic.column, diagnostic.severity as u8)
        });
        Diagnostics { list }
    }

    fn push(&mut self, severity: Severity, span: Span, message: String) -> &mut Diagnostic {
        let diagnostic = self.diagnostic(severity, span, message);
        self.contexts.push(self.context.clone());
        self.list.push(diagnostic);
        self.list.last_mut().expect("one was just pushed")
    }

    fn diagnostic(&self, severity: Severity, span: Span, message: String) -> Diagnostic {
        let source = &self.sources[span.source];
        let line = span.line.checked_sub(1).and_then(|index| source.text.lines().nth(index));
        let source_line = line.unwrap_or_default().to_owned();
        let rest = (source_line.chars().count() + 1).saturating_sub(span.column);
        Diagnostic {
            severity,
            message,
            file: source.name.clone(),
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

//! What is wrong with a node's settings, as its operator says it.

use std::fmt;
use std::path::PathBuf;

/// Something wrong with a value under `with` that its type alone cannot tell.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ConfigIssue {
    /// The key under `with`, dotted where nested.
    pub key: String,
    /// What was expected and what was found.
    pub message: String,
    /// What may have been meant.
    pub help: Option<String>,
    /// Line and column, from 1, of the text at the key: where the mistake is within it.
    pub place: Option<(usize, usize)>,
    /// Where the key names a file with the mistake in it: the file, and the key there.
    pub file: Option<Box<(PathBuf, String)>>,
}

impl ConfigIssue {
    /// An issue with the value at `key`.
    pub fn new(key: impl Into<String>, message: impl Into<String>) -> Self {
        ConfigIssue { key: key.into(), message: message.into(), help: None, place: None, file: None }
    }

    /// At this place of the text at the key: line and column, from 1.
    pub fn within(self, line: usize, column: usize) -> Self {
        ConfigIssue { place: Some((line, column)), ..self }
    }
}

impl fmt::Display for ConfigIssue {
    /// What is wrong and where within its text, without the key.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.place {
            None => {}
            Some((1, column)) => write!(f, "at column {column}: ")?,
            Some((line, column)) => write!(f, "at line {line}, column {column}: ")?,
        }
        write!(f, "{}", self.message)?;
        self.help.as_ref().map_or(Ok(()), |help| write!(f, " ({help})"))
    }
}

//! What was read of a data set, and what was left out.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

/// What was read and what was left out, in rows.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Report {
    /// Rows read of the part asked for.
    pub read: usize,
    /// Dropped: the prompt is longer than `max_prompt_tokens`.
    pub too_long: usize,
    /// Left out under `on_error: skip`: file, line and reason of each.
    pub skipped: Vec<String>,
    /// Used, but with messages after the last assistant turn, which are not.
    pub trailing: usize,
    /// Used, but with messages that have these keys, which nothing reads; rows by key.
    pub unread: BTreeMap<String, usize>,
}

/// Most problems that one message lists.
const SHOWN: usize = 10;

impl Report {
    /// The report in words, a sentence for each thing worth knowing.
    pub fn sentences(&self) -> Vec<String> {
        let mut sentences = vec![format!("{} read", rows(self.read))];
        if self.too_long > 0 {
            sentences.push(format!("{} dropped: prompt over max_prompt_tokens", rows(self.too_long)));
        }
        if let Some(first) = self.skipped.first() {
            sentences.push(format!("{} skipped that cannot be used, the first: {first}", rows(self.skipped.len())));
        }
        if self.trailing > 0 {
            sentences.push(format!("messages after the last assistant turn, in {}, are not used", rows(self.trailing)));
        }
        for (key, count) in &self.unread {
            sentences.push(format!("`{key}` of messages, in {}, is not used", rows(*count)));
        }
        sentences
    }
}

/// `1 row`, `2 rows`.
pub fn rows(count: usize) -> String {
    format!("{count} row{}", if count == 1 { "" } else { "s" })
}

/// The error of rows that cannot be used.
pub(super) fn unusable(problems: &[String]) -> String {
    let mut message = format!("{} cannot be used (on_error: skip leaves them out):", rows(problems.len()));
    for problem in problems.iter().take(SHOWN) {
        message.push_str("\n  ");
        message.push_str(problem);
    }
    if problems.len() > SHOWN {
        message.push_str(&format!("\n  and {} more", problems.len() - SHOWN));
    }
    message
}

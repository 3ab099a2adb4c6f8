//! What was read of a data set, and what was left out.

/// What was read and what was left out, in rows.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Report {
    /// Rows read of the part asked for.
    pub read: usize,
    /// Dropped: the prompt is longer than `max_prompt_tokens`.
    pub too_long: usize,
    /// Left out under `on_error: skip`: file, line and reason of each.
    pub skipped: Vec<String>,
    /// Used, but with messages after the last assistant turn, which are not.
    pub trailing: usize,
}

/// Most problems that one message lists.
const SHOWN: usize = 10;

impl Report {
    /// The report in words, a sentence for each thing worth knowing.
    pub fn sentences(&self) -> Vec<String> {
        let mut sentences = vec![format!("{} rows read", self.read)];
        if self.too_long > 0 {
            sentences.push(format!("{} rows dropped: prompt over max_prompt_tokens", self.too_long));
        }
        if let Some(first) = self.skipped.first() {
            sentences.push(format!("{} rows skipped that cannot be used, the first: {first}", self.skipped.len()));
        }
        if self.trailing > 0 {
            sentences.push(format!("{} rows go on after the last assistant turn; that is not used", self.trailing));
        }
        sentences
    }
}

/// The error of rows that cannot be used.
pub(super) fn unusable(problems: &[String]) -> String {
    let mut message = format!("{} rows cannot be used (on_error: skip leaves them out):", problems.len());
    for problem in problems.iter().take(SHOWN) {
        message.push_str("\n  ");
        message.push_str(problem);
    }
    if problems.len() > SHOWN {
        message.push_str(&format!("\n  and {} more", problems.len() - SHOWN));
    }
    message
}

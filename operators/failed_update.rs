//! What is kept of an update whose loss or gradient is not finite: its pairs, which of them are to blame, and what these
//! say.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use sapo_flow_engine::OperatorError;
use sapo_flow_engine::record::{Batch, Pair, TokenId};
use sapo_flow_training::Error;
use sapo_flow_training::text::TextTokenizer;
use serde::Serialize;

use crate::examples::label;

/// An update that failed.
pub struct FailedUpdate<'a> {
    /// The learner's node.
    pub node: &'a str,
    /// The step.
    pub step: u64,
    /// Directory of the model, which may hold a tokenizer.
    pub model: &'a Path,
    /// What it learned from.
    pub batches: &'a [Arc<Batch>],
}

/// The file.
#[derive(Serialize)]
struct Page<'a> {
    node: &'a str,
    step: u64,
    error: String,
    /// The pairs to blame; all, where it cannot be told.
    blamed: Vec<Blamed>,
    batches: &'a [Arc<Batch>],
}

/// A pair to blame, with its texts where the model has a tokenizer that can be read.
#[derive(Serialize)]
struct Blamed {
    label: String,
    prompt: Option<String>,
    chosen: Option<String>,
    rejected: Option<String>,
}

impl FailedUpdate<'_> {
    /// Write all of it next to the run's other files; the file.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub fn write(&self, run_directory: &Path, error: &Error) -> Result<PathBuf, OperatorError> {
        let labels: &[String] = if let Error::NonFinite { examples, .. } = error { examples } else { &[] };
        // The run has failed already: a tokenizer that cannot be read is no reason to say less.
        let tokenizer = TextTokenizer::load(self.model).ok();
        let pairs = self.batches.iter().flat_map(|batch| &batch.pairs);
        let blamed = pairs.map(|pair| blamed(pair, tokenizer.as_ref())).filter(|pair| labels.contains(&pair.label));
        let (node, step, batches) = (self.node, self.step, self.batches);
        let page = Page { node, step, error: error.to_string(), blamed: blamed.collect(), batches };
        let path = run_directory.join(format!("{}-failed-at-step-{step}.json", node.replace('/', "-")));
        fs::write(&path, serde_json::to_vec_pretty(&page)?)?;
        Ok(path)
    }
}

fn blamed(pair: &Pair, tokenizer: Option<&TextTokenizer>) -> Blamed {
    let text = |ids: &[TokenId]| tokenizer?.decode(ids).ok();
    Blamed {
        label: label(pair),
        prompt: text(&pair.prompt_ids),
        chosen: text(&pair.chosen_ids),
        rejected: pair.rejected_ids.as_deref().and_then(text),
    }
}

//! How much a model prefers chosen answers to rejected ones: the training crate alone, without pipelines.
//!
//! ```sh
//! cargo run --release --example score_pairs -- models/smollm2-135m-instruct pairs.jsonl
//! ```
//!
//! Each line of the file is `{"prompt": "...", "chosen": "...", "rejected": "..."}`, texts as they are.

use std::path::Path;

use sapo_flow_training::device;
use sapo_flow_training::learner::{Example, score};
use sapo_flow_training::model::{Compute, Model};
use sapo_flow_training::text::{Rendered, TextTokenizer};
use serde::Deserialize;
use tch::Kind;

#[derive(Deserialize)]
struct Row {
    prompt: String,
    chosen: String,
    rejected: String,
}

/// Log-probabilities per token, in nats, of the chosen and the rejected answer of each line of a file.
pub fn score_file(model: &Path, file: &Path) -> anyhow::Result<Vec<(f32, f32)>> {
    let tokenizer = TextTokenizer::load(model)?;
    let model = Model::load(model, device::parse("auto")?, Kind::Float)?;
    let mut examples = Vec::new();
    for line in std::fs::read_to_string(file)?.lines() {
        let row: Row = serde_json::from_str(line)?;
        let render = |answer| Rendered::plain(&row.prompt, answer);
        let pair = Rendered::encode_pair(&render(&row.chosen), &render(&row.rejected), &tokenizer)?;
        examples.push(Example {
            prompt_ids: pair.prompt_ids,
            chosen_ids: pair.chosen_ids,
            rejected_ids: Some(pair.rejected_ids),
            label: format!("line {}", examples.len() + 1),
            ..Example::default()
        });
    }
    let scores = score(&model.decoder, &model.parameters, &examples, &Compute::new(Kind::Float), 8)?;
    let both = scores.iter().filter_map(|score| Some((score.chosen.mean(), score.rejected?.mean())));
    Ok(both.collect())
}

fn main() -> anyhow::Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [model, file] = &arguments[..] else { anyhow::bail!("usage: score_pairs MODEL FILE.jsonl") };
    let scores = score_file(Path::new(model), Path::new(file))?;
    for (chosen, rejected) in &scores {
        println!("chosen {chosen:.4}  rejected {rejected:.4}  margin {:.4}", chosen - rejected);
    }
    let preferred = scores.iter().filter(|(chosen, rejected)| chosen > rejected).count();
    println!("{preferred} of {} chosen answers are preferred", scores.len());
    Ok(())
}

//! A program of your own with one operator more than `sapo-flow` has: `short_answers` lets prompts with short answers
//! pass.
//!
//! ```sh
//! cargo run --release --example custom_operator -- pipeline.yaml runs/mine
//! ```
//!
//! In the pipeline: `short: {op: short_answers, in: prompts, with: {max_tokens: 64}}`.

use std::path::Path;

use sapo_flow_engine::runtime::{self, RunOptions, RunReport};
use sapo_flow_engine::{
    BuildContext, Define, Inputs, Operator, OperatorError, OperatorSpec, Outputs, PortSpec, PortType, Record, pipeline,
};
use schemars::JsonSchema;
use serde::Deserialize;

/// What `short_answers` takes under `with`.
#[derive(Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// Longest answer that passes, in tokens.
    max_tokens: usize,
}

/// Lets prompts with short answers pass.
pub struct ShortAnswers(Config);

impl Operator for ShortAnswers {
    fn step(&mut self, _step: u64, mut inputs: Inputs) -> Result<Outputs, OperatorError> {
        let mut outputs = Outputs::new();
        for prompt in
            inputs.prompts("prompts").into_iter().filter(|prompt| prompt.chosen_ids.len() <= self.0.max_tokens)
        {
            outputs.push("prompts", Record::Prompt(prompt));
        }
        Ok(outputs)
    }
}

impl Define for ShortAnswers {
    const NAME: &'static str = "short_answers";
    const SUMMARY: &'static str = "Lets prompts with short answers pass.";
    const DOCS: &'static str = "Prompts whose answers are longer than `max_tokens` are dropped. State: none.";
    const EXAMPLE: &'static str = "short: {op: short_answers, in: prompts, with: {max_tokens: 64}}";
    const INPUTS: &'static [PortSpec] = &[PortSpec::new("prompts", &[PortType::Prompts], "Any prompts.")];
    const OUTPUTS: &'static [PortSpec] = &[PortSpec::new("prompts", &[PortType::Prompts], "Those that pass.")];
    type Config = Config;

    fn build(config: Config, _: &BuildContext) -> Result<Self, OperatorError> {
        Ok(ShortAnswers(config))
    }
}

/// Run a pipeline that may use `short_answers`, and write into a directory.
pub fn run(pipeline: &Path, run_directory: &Path) -> anyhow::Result<RunReport> {
    let registry = sapo_flow_operators::registry().with(OperatorSpec::of::<ShortAnswers>());
    let graph = pipeline::load(pipeline, &[], &registry)?;
    std::fs::create_dir_all(run_directory)?;
    Ok(runtime::run(&graph, RunOptions::new(run_directory))?)
}

fn main() -> anyhow::Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [pipeline, run_directory] = &arguments[..] else {
        anyhow::bail!("usage: custom_operator PIPELINE RUN_DIRECTORY");
    };
    let report = run(Path::new(pipeline), Path::new(run_directory))?;
    println!("{} steps done, in {run_directory}", report.steps_done);
    Ok(())
}

//! The command line as types.

use std::path::PathBuf;

use clap::{Args as ClapArgs, Parser, Subcommand, ValueEnum};

const EXIT_CODES: &str = "\
Exit codes: 0 done, 1 failed, 2 wrong usage, 78 invalid pipeline, 130 interrupted: after a checkpoint, or at once
by a second Ctrl-C.
RUST_LOG=debug shows what goes on inside.";

const SCHEMA: &str = "\
Editors with yaml-language-server complete and check pipelines that begin with the line

  # yaml-language-server: $schema=PATH";

/// Trains language models from preferences, as dataflow graphs written in YAML.
#[derive(Debug, Parser)]
#[command(name = "sapo-flow", version, about, after_help = EXIT_CODES)]
pub struct Args {
    /// What to do.
    #[command(subcommand)]
    pub verb: Verb,
}

/// What to do.
#[derive(Debug, Subcommand)]
pub enum Verb {
    /// Run a pipeline
    Run(RunArgs),
    /// Run a pipeline with several values for its parameters, and several seeds
    Sweep(SweepArgs),
    /// List, show and compare runs
    Runs(RunsArgs),
    /// Check pipelines, and tell everything that is wrong with them
    Validate(ValidateArgs),
    /// Run the tests that stand in pipelines
    Test(TestArgs),
    /// Print a pipeline flat, with where each of its values came from
    Expand(ExpandArgs),
    /// Draw a pipeline's graph
    Graph(GraphArgs),
    /// List the operators, or tell everything about one
    Operators(OperatorsArgs),
    /// Print a first pipeline of these operators, with those that they need
    New(NewArgs),
    /// Print the JSON Schema of pipelines, for editors
    #[command(after_help = SCHEMA)]
    Schema,
    /// Import a GGUF file as a Hugging Face model directory
    Import(ImportArgs),
    /// Let a model continue a text or answer a chat
    Generate(GenerateArgs),
}

/// Values for a pipeline's parameters.
#[derive(Debug, ClapArgs)]
pub struct Overrides {
    /// Give a parameter of the pipeline another value (YAML); may be repeated
    #[arg(short = 'S', long = "set", value_name = "NAME=VALUE", value_parser = name_and_value)]
    pub overrides: Vec<(String, String)>,
}

/// `sapo-flow run`
#[derive(Debug, ClapArgs)]
#[command(after_help = "\
A run writes into a new directory: the resolved pipeline, a manifest, and what its operators write.

  sapo-flow run p.yaml -S learning_rate=1e-6    with another value for a parameter
  sapo-flow run p.yaml --dry-run                only tell what would be done
  sapo-flow run p.yaml --trace trace.json       with a timeline to look at in https://ui.perfetto.dev
  sapo-flow run p.yaml --resume                 go on with the latest run of this pipeline
  sapo-flow run --resume runs/p-20250101T120000Z    go on with that run")]
pub struct RunArgs {
    /// The pipeline; with `--resume RUN_DIR` it may be left out
    pub pipeline: Option<PathBuf>,
    #[command(flatten)]
    pub overrides: Overrides,
    /// Go on from the newest checkpoint of a run directory, or of the pipeline's latest run
    #[arg(long, value_name = "RUN_DIR", num_args = 0..=1, default_missing_value = "latest")]
    pub resume: Option<PathBuf>,
    /// Write into this directory, which must be new or empty [default: a new one named after pipeline and time]
    #[arg(long, value_name = "DIR", conflicts_with_all = ["resume", "dry_run"])]
    pub run_dir: Option<PathBuf>,
    /// Only tell what would be done: graph, steps, and an estimate of memory
    #[arg(long, conflicts_with = "resume")]
    pub dry_run: bool,
    /// Seed of every random draw, instead of the one in the pipeline's `run` block
    #[arg(long, value_name = "N", conflicts_with = "resume")]
    pub seed: Option<u64>,
    /// Threads for tensor work, where the pipeline's `run` block says nothing of them; else OMP_NUM_THREADS, or all cores
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..), conflicts_with = "resume")]
    pub threads: Option<u16>,
    /// Write a timeline of the run, too: when each node worked, for Perfetto or chrome://tracing
    #[arg(long, value_name = "FILE", conflicts_with = "dry_run")]
    pub trace: Option<PathBuf>,
    /// Show nothing but errors
    #[arg(short, long)]
    pub quiet: bool,
}

/// `sapo-flow sweep`
#[derive(Debug, ClapArgs)]
#[command(after_help = "\
Every combination of the values is a run of its own, in a directory named after them. What each comes to is shown at the
end; `sapo-flow runs table DIR` shows it again.

  sapo-flow sweep p.yaml                                   the `sweep` block of the pipeline
  sapo-flow sweep p.yaml -S ema_decay=0.25,0.5 --repeat 3  two values, each with three seeds
  sapo-flow sweep --resume runs/p-sweep-20250101T120000Z   what is not finished of that sweep")]
pub struct SweepArgs {
    /// The pipeline
    #[arg(required_unless_present = "resume")]
    pub pipeline: Option<PathBuf>,
    /// Give a parameter these values in turn, or one value in all runs (YAML); may be repeated
    #[arg(short = 'S', long = "set", value_name = "NAME=VALUE,..", value_parser = name_and_value, conflicts_with = "resume")]
    pub overrides: Vec<(String, String)>,
    /// Run each combination with this many seeds: the pipeline's, and those after it
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..=1000), conflicts_with = "resume")]
    pub repeat: Option<u64>,
    /// Runs at a time; they share the processors
    #[arg(short, long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..))]
    pub jobs: u16,
    /// Write into this directory, which must be new or empty [default: a new one named after pipeline and time]
    #[arg(long, value_name = "DIR", conflicts_with_all = ["resume", "dry_run"])]
    pub sweep_dir: Option<PathBuf>,
    /// Go on with a sweep: what is finished stays, what was interrupted or failed goes on from its newest checkpoint
    #[arg(long, value_name = "SWEEP_DIR", conflicts_with = "pipeline")]
    pub resume: Option<PathBuf>,
    /// Only tell which runs there would be
    #[arg(long, conflicts_with = "resume")]
    pub dry_run: bool,
}

/// `sapo-flow runs`
#[derive(Debug, ClapArgs)]
pub struct RunsArgs {
    /// What to tell
    #[command(subcommand)]
    pub verb: RunsVerb,
}

/// What to tell of runs.
#[derive(Debug, Subcommand)]
pub enum RunsVerb {
    /// List runs
    Ls(RunsLsArgs),
    /// Tell everything about a run
    Show(RunsShowArgs),
    /// Compare two runs: what differs in parameters and pipeline, and what they came to
    Diff(RunsDiffArgs),
    /// Compare finished runs: mean and standard deviation over those that differ in nothing but their seed
    Table(RunsTableArgs),
}

/// `sapo-flow runs ls`
#[derive(Debug, ClapArgs)]
pub struct RunsLsArgs {
    /// Run directories, sweeps, or directories of these
    #[arg(default_value = "runs")]
    pub directories: Vec<PathBuf>,
    /// How to write it
    #[arg(long, value_enum, default_value_t)]
    pub format: PageFormat,
}

/// `sapo-flow runs show`
#[derive(Debug, ClapArgs)]
pub struct RunsShowArgs {
    /// The run directory
    pub run: PathBuf,
    /// How to write it
    #[arg(long, value_enum, default_value_t)]
    pub format: PageFormat,
}

/// `sapo-flow runs diff`
#[derive(Debug, ClapArgs)]
pub struct RunsDiffArgs {
    /// A run directory
    pub first: PathBuf,
    /// Another one
    pub second: PathBuf,
    /// How to write it
    #[arg(long, value_enum, default_value_t)]
    pub format: PageFormat,
}

/// `sapo-flow runs table`
#[derive(Debug, ClapArgs)]
pub struct RunsTableArgs {
    /// Run directories, sweeps, or directories of these
    #[arg(default_value = "runs")]
    pub directories: Vec<PathBuf>,
    /// A metric to show, its last value; may be repeated [default: loss, and eval_nll, eval_accuracy, eval_margin]
    #[arg(short, long = "metric", value_name = "NAME")]
    pub metrics: Vec<String>,
    /// How to write it
    #[arg(long, value_enum, default_value_t)]
    pub format: PageFormat,
}

/// `sapo-flow validate`
#[derive(Debug, ClapArgs)]
pub struct ValidateArgs {
    /// The pipelines
    #[arg(required = true)]
    pub pipelines: Vec<PathBuf>,
    #[command(flatten)]
    pub overrides: Overrides,
}

/// `sapo-flow test`
#[derive(Debug, ClapArgs)]
pub struct TestArgs {
    /// The pipelines
    #[arg(required = true)]
    pub pipelines: Vec<PathBuf>,
    #[command(flatten)]
    pub overrides: Overrides,
    /// Write the results as JUnit XML, too
    #[arg(long, value_name = "FILE")]
    pub junit: Option<PathBuf>,
}

/// `sapo-flow expand`
#[derive(Debug, ClapArgs)]
pub struct ExpandArgs {
    /// The pipeline
    pub pipeline: PathBuf,
    #[command(flatten)]
    pub overrides: Overrides,
}

/// `sapo-flow graph`
#[derive(Debug, ClapArgs)]
pub struct GraphArgs {
    /// The pipeline
    pub pipeline: PathBuf,
    #[command(flatten)]
    pub overrides: Overrides,
    /// The language to draw it in
    #[arg(long, value_enum, default_value_t)]
    pub format: GraphFormat,
}

/// Languages that graphs are drawn in.
#[derive(Clone, Copy, Debug, Default, ValueEnum)]
pub enum GraphFormat {
    /// Mermaid, which GitHub shows in markdown
    #[default]
    Mermaid,
    /// Graphviz
    Dot,
}

/// `sapo-flow operators`
#[derive(Debug, ClapArgs)]
pub struct OperatorsArgs {
    /// The operator to tell everything about
    pub name: Option<String>,
    /// The composite operators that this pipeline defines or includes, instead of the built-in ones
    #[arg(long, value_name = "FILE")]
    pub pipeline: Option<PathBuf>,
    /// How to write it
    #[arg(long, value_enum, default_value_t)]
    pub format: PageFormat,
}

/// Forms of reference pages.
#[derive(Clone, Copy, Debug, Default, ValueEnum)]
pub enum PageFormat {
    /// For a terminal
    #[default]
    Text,
    /// For a page
    Markdown,
    /// For programs; with the JSON Schema of `with`
    Json,
}

/// `sapo-flow new`
#[derive(Debug, ClapArgs)]
pub struct NewArgs {
    /// Operators in the order that records go through them, such as `prompt_source,segment_sampler,replay_buffer`
    #[arg(required = true, value_delimiter = ',')]
    pub operators: Vec<String>,
}

/// `sapo-flow import`
#[derive(Debug, ClapArgs)]
pub struct ImportArgs {
    /// The GGUF file
    pub gguf: PathBuf,
    /// The directory to make; must be new or empty
    pub out_dir: PathBuf,
    /// Type of the weights written
    #[arg(long, value_enum, default_value_t)]
    pub dtype: DtypeArg,
}

/// `sapo-flow generate`
#[derive(Debug, ClapArgs)]
#[command(group(clap::ArgGroup::new("input").required(true).args(["prompt", "messages", "chat"])))]
pub struct GenerateArgs {
    /// The model: a Hugging Face directory
    #[arg(long, value_name = "DIR")]
    pub model: PathBuf,
    /// A text to continue, as it is
    #[arg(long, value_name = "TEXT")]
    pub prompt: Option<String>,
    /// A chat message, such as `user=Hello`; may be repeated
    #[arg(long = "message", value_name = "ROLE=CONTENT", value_parser = name_and_value)]
    pub messages: Vec<(String, String)>,
    /// A JSON file with a list of messages, each with `role` and `content`; `-` reads from standard input
    #[arg(long, value_name = "FILE")]
    pub chat: Option<PathBuf>,
    /// Most tokens to generate
    #[arg(long, value_name = "N", default_value_t = 256)]
    pub max_tokens: usize,
    /// Softmax temperature; 0 always takes the likeliest token, without draws
    #[arg(long, default_value_t = 0.7)]
    pub temperature: f64,
    /// Draw from the k likeliest tokens; 0 from all [default: 50]
    #[arg(long, value_name = "K")]
    pub top_k: Option<usize>,
    /// Draw from the likeliest tokens that make up this probability [default: 0.95]
    #[arg(long, value_name = "P")]
    pub top_p: Option<f64>,
    /// Seed of the draws [default: 42]
    #[arg(long)]
    pub seed: Option<u64>,
    /// `auto`, `cpu`, `cuda` or `cuda:N`
    #[arg(long, default_value = "auto")]
    pub device: String,
    /// Type to compute in
    #[arg(long, value_enum, default_value_t)]
    pub dtype: DtypeArg,
}

/// Types of numbers.
#[derive(Clone, Copy, Debug, Default, ValueEnum)]
pub enum DtypeArg {
    /// 32 bits
    #[default]
    Float32,
    /// 16 bits
    Bfloat16,
}

fn name_and_value(text: &str) -> Result<(String, String), String> {
    match text.split_once('=') {
        Some((name, value)) if !name.is_empty() => Ok((name.to_owned(), value.to_owned())),
        _ => Err("expected NAME=VALUE".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Args::command().debug_assert();
    }

    #[test]
    fn a_value_may_contain_an_equals_sign() {
        assert_eq!(name_and_value("a=b=c"), Ok(("a".to_owned(), "b=c".to_owned())));
        assert_eq!(name_and_value("a="), Ok(("a".to_owned(), String::new())));
        assert!(name_and_value("=b").is_err());
        assert!(name_and_value("ab").is_err());
    }
}

//! Verbs, exit codes, and what is shown while they work.
//!
//! | module | what it holds |
//! |---|---|
//! | [`args`] | the command line as types |
//! | [`run`], [`validate`], [`mod@test`], [`expand`], [`graph`], [`operators`], [`import`], [`generate`] | a verb each |
//! | [`plan`] | what a run would do: `run --dry-run` |
//! | [`sweep`], [`runs`] | many runs: made, listed, compared |
//! | [`directory`], [`lock`], [`manifest`] | the run directory, whose it is, and how its results came to be |
//! | [`settings`] | pipelines' settings by key, and where two differ |
//! | [`progress`], [`report`] | what is shown during a run, and after it |
//! | [`trace`] | when each node worked: `run --trace` |
//! | [`terminal`] | where text goes, so that log lines and progress bars do not mix |

use std::process::ExitCode;

use clap::Parser;
use sapo_flow_engine::pipeline::Diagnostics;

mod args;
mod directory;
mod expand;
mod generate;
mod graph;
mod import;
mod lock;
mod manifest;
mod operators;
mod plan;
mod progress;
mod report;
mod run;
mod runs;
mod settings;
mod sweep;
mod terminal;
mod test;
mod trace;
mod validate;

use args::{Args, Verb};

/// Why a verb did not do what it was asked for. Each has an exit code.
pub enum Failure {
    /// Something went wrong: 1.
    Failed(anyhow::Error),
    /// The command line makes no sense: 2. (clap exits with 2 itself.)
    Usage(String),
    /// A pipeline is invalid, and its findings have been shown: 78.
    Invalid,
    /// Interrupted after a checkpoint: 130, as where a second Ctrl-C ends the process itself.
    Interrupted,
}

impl<E: Into<anyhow::Error>> From<E> for Failure {
    fn from(error: E) -> Self {
        Failure::Failed(error.into())
    }
}

/// What a verb comes to.
pub type Outcome = Result<(), Failure>;

/// Run the program.
pub fn main() -> ExitCode {
    let args = Args::parse();
    terminal::start_logging();
    let outcome = match args.verb {
        Verb::Run(args) => run::run(args),
        Verb::Validate(args) => validate::validate(&args),
        Verb::Sweep(args) => sweep::sweep(&args),
        Verb::Runs(args) => runs::runs(&args),
        Verb::Test(args) => test::test(&args),
        Verb::Expand(args) => expand::expand(&args),
        Verb::Graph(args) => graph::graph(&args),
        Verb::Operators(args) => operators::operators(&args),
        Verb::New(args) => operators::new(&args),
        Verb::Schema => operators::schema(),
        Verb::Import(args) => import::import(&args),
        Verb::Generate(args) => generate::generate(&args),
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(Failure::Failed(error)) if terminal::is_broken_pipe(&error) => ExitCode::SUCCESS,
        Err(Failure::Failed(error)) => {
            terminal::message(&format!("error: {}", explained(&error)));
            ExitCode::from(1)
        }
        Err(Failure::Usage(message)) => {
            terminal::message(&format!("error: {message}\n\nFor more information, try '--help'."));
            ExitCode::from(2)
        }
        Err(Failure::Invalid) => ExitCode::from(78),
        Err(Failure::Interrupted) => ExitCode::from(130),
    }
}

/// An error with its causes. Some messages, such as those of files, tell their cause themselves: it is not told again.
fn explained(error: &anyhow::Error) -> String {
    let mut told: Vec<String> = Vec::new();
    for cause in error.chain().map(ToString::to_string) {
        if !told.last().is_some_and(|before| before.ends_with(&cause)) {
            told.push(cause);
        }
    }
    told.join(": ")
}

/// Show the findings about a pipeline.
fn show(diagnostics: &Diagnostics) {
    if !diagnostics.list.is_empty() {
        terminal::message(&format!("{diagnostics}\n"));
    }
}

/// `1 step`, `2 steps`.
fn count(number: usize, word: &str) -> String {
    format!("{number} {word}{}", if number == 1 { "" } else { "s" })
}

#[cfg(test)]
mod tests {
    use anyhow::Context;
    use sapo_flow_training::Error;

    use super::*;

    #[test]
    fn a_cause_is_told_once() {
        let missing = || std::io::Error::from_raw_os_error(libc::ENOENT);
        let said = "No such file or directory (os error 2)";
        let file = Error::io("a".as_ref())(missing());
        assert_eq!(explained(&file.into()), format!("a: {said}"));
        let file: anyhow::Result<()> = Err(Error::io("a".as_ref())(missing()).into());
        assert_eq!(explained(&file.context("no run").unwrap_err()), format!("no run: a: {said}"));
        let plain: anyhow::Result<()> = Err(missing().into());
        assert_eq!(explained(&plain.context("cannot read a").unwrap_err()), format!("cannot read a: {said}"));
    }
}

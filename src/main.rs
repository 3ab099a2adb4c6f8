//! The command line of sapo-flow.

use std::process::ExitCode;

mod cli;

fn main() -> ExitCode {
    cli::main()
}

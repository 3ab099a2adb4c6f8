//! The command line of sapo-flow.

use std::process::ExitCode;

mod cli;

/// glibc's allocator is set up for libtorch (see `device::keep_memory`), with one arena that threads would wait for: tokenizing,
/// which allocates for every word, was slower on two threads than on one.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> ExitCode {
    cli::main()
}

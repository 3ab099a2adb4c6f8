//! Where text goes: results to standard output, the rest to standard error, around any progress bar.

use std::io::{self, IsTerminal, Write};
use std::sync::LazyLock;

use indicatif::MultiProgress;
use tracing_subscriber::EnvFilter;

/// Draws progress bars at the bottom of standard error, and nothing where that is no terminal.
pub static BARS: LazyLock<MultiProgress> = LazyLock::new(MultiProgress::new);

/// Whether people watch standard error.
pub fn is_watched() -> bool {
    io::stderr().is_terminal()
}

/// A result, on standard output.
pub fn print(text: &str) -> io::Result<()> {
    BARS.suspend(|| {
        let mut stdout = io::stdout().lock();
        stdout.write_all(text.as_bytes())?;
        if !text.ends_with('\n') {
            stdout.write_all(b"\n")?;
        }
        stdout.flush()
    })
}

/// A line for people, on standard error.
pub fn message(text: &str) {
    // Standard error may be closed; there is nowhere left to say so.
    let _ = BARS.suspend(|| writeln!(io::stderr().lock(), "{text}"));
}

/// Whether the reader of our output has gone, as `head` does: no reason to complain.
pub fn is_broken_pipe(error: &anyhow::Error) -> bool {
    error.downcast_ref::<io::Error>().is_some_and(|error| error.kind() == io::ErrorKind::BrokenPipe)
}

/// Log to standard error: warnings, or what RUST_LOG asks for. A filter that cannot be read is complained of, and does not
/// hold.
pub fn start_logging() {
    let asked = std::env::var(EnvFilter::DEFAULT_ENV).unwrap_or_default();
    let filter = match EnvFilter::try_new(if asked.trim().is_empty() { "warn" } else { &asked }) {
        Ok(filter) => filter,
        Err(error) => {
            message(&format!("warning: RUST_LOG=`{asked}` is no filter ({error}): warnings are logged, as without it"));
            EnvFilter::new("warn")
        }
    };
    tracing_subscriber::fmt().with_env_filter(filter).with_writer(|| LogWriter).with_ansi(is_watched()).init();
}

struct LogWriter;

impl Write for LogWriter {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        BARS.suspend(|| io::stderr().lock().write_all(bytes))?;
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        io::stderr().flush()
    }
}

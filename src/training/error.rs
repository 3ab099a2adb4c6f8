//! What can go wrong in the training core.

use std::path::PathBuf;

/// An error of the training core.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A file could not be read or written.
    #[error("{path}: {source}", path = path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// A file does not hold what it should.
    #[error("{path}: {message}", path = path.display())]
    Invalid {
        /// The file.
        path: PathBuf,
        /// What was expected and what was found.
        message: String,
    },
    /// A chat template is malformed, or refuses a conversation.
    #[error("chat template: {0}")]
    Template(String),
    /// libtorch refused an operation.
    #[error(transparent)]
    Torch(#[from] tch::TchError),
    /// A value passed in is unusable.
    #[error("{0}")]
    Argument(String),
}

/// The training core's result.
pub type Result<T> = std::result::Result<T, Error>;

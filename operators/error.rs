//! What can go wrong in an operator.

use std::path::{Path, PathBuf};

/// An error of the operators.
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
    /// A data set cannot be used.
    #[error("{0}")]
    Data(String),
    /// A record that arrived cannot be used.
    #[error("{0}")]
    Input(String),
    /// What a checkpoint holds does not fit what is there now.
    #[error("cannot resume: {0}")]
    Restore(String),
    /// The training core refused.
    #[error(transparent)]
    Training(#[from] sapo_flow_training::Error),
}

impl Error {
    /// For `map_err`: an I/O error with its file.
    pub fn io(path: &Path) -> impl FnOnce(std::io::Error) -> Error {
        let path = path.to_path_buf();
        move |source| Error::Io { path, source }
    }
}

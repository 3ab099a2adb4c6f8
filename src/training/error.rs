//! What can go wrong in the training core.

use std::fmt;
use std::path::{Path, PathBuf};

use tch::TchError;

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
    /// A model of a kind that is not built here.
    #[error("{path}: architecture `{found}` is not supported; supported: {supported}", path = path.display())]
    Architecture {
        /// The model's config.json.
        path: PathBuf,
        /// What it says.
        found: String,
        /// The architectures there are.
        supported: String,
    },
    /// A checkpoint's tensors are not those of its architecture.
    #[error("{path}: the tensors are not those that config.json asks for{differences}", path = path.display())]
    Tensors {
        /// The model directory.
        path: PathBuf,
        /// All that differs.
        differences: TensorDifferences,
    },
    /// libtorch refused an operation. Made with `from`, which leaves the frames of its stack out.
    #[error(transparent)]
    Torch(TchError),
    /// A training step gave a number that is not finite. No weight was changed, unless gradients were released: then the
    /// loss is known before any is, and the gradients' norm only after.
    #[error("step {step}: the {what} is not finite, with examples {}", examples.join(", "))]
    NonFinite {
        /// The step, counted from 0.
        step: u64,
        /// The number: the loss, or the gradients' norm.
        what: &'static str,
        /// Labels of the examples that are to blame; of all, where it cannot be told.
        examples: Vec<String>,
    },
    /// A value passed in is unusable.
    #[error("{0}")]
    Argument(String),
}

/// Where a checkpoint's tensors differ from what the architecture needs.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct TensorDifferences {
    /// Needed, but in no file.
    pub missing: Vec<String>,
    /// In a file, but of no use to the architecture.
    pub unexpected: Vec<String>,
    /// Name, expected shape and shape found.
    pub shapes: Vec<(String, Vec<i64>, Vec<i64>)>,
}

impl TensorDifferences {
    /// Whether there is no difference.
    pub fn is_empty(&self) -> bool {
        self.missing.is_empty() && self.unexpected.is_empty() && self.shapes.is_empty()
    }
}

impl fmt::Display for TensorDifferences {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (title, names) in [("missing", &self.missing), ("unexpected", &self.unexpected)] {
            if !names.is_empty() {
                write!(f, "\n  {title} ({}): {}", names.len(), some(names).join(", "))?;
                if names.len() > SHOWN {
                    f.write_str(", ...")?;
                }
            }
        }
        for (name, expected, found) in some(&self.shapes) {
            write!(f, "\n  {name}: expected shape {expected:?}, found {found:?}")?;
        }
        if self.shapes.len() > SHOWN {
            write!(f, "\n  and {} more of other shapes", self.shapes.len() - SHOWN)?;
        }
        Ok(())
    }
}

/// Differences of a sort that are listed: where a model is another one nearly all tensors differ.
const SHOWN: usize = 20;

fn some<T>(all: &[T]) -> &[T] {
    &all[..all.len().min(SHOWN)]
}

impl Error {
    /// An [`Error::Io`] about `path`, for `map_err`.
    pub fn io(path: &Path) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.to_path_buf();
        move |source| Error::Io { path, source }
    }

    /// An [`Error::Invalid`] about `path`.
    pub fn invalid(path: &Path, message: impl Into<String>) -> Self {
        Error::Invalid { path: path.to_path_buf(), message: message.into() }
    }
}

impl From<TchError> for Error {
    fn from(error: TchError) -> Self {
        Error::Torch(match error {
            TchError::Torch(text) => TchError::Torch(without_frames(&text).to_owned()),
            other => other,
        })
    }
}

/// What libtorch says of an error, without the C++ frames that it appends: they mean nothing to who reads of a run.
fn without_frames(text: &str) -> &str {
    let end = text.find("Exception raised from").unwrap_or(text.len());
    text[..end].trim_end()
}

/// The training core's result.
pub type Result<T> = std::result::Result<T, Error>;

#[cfg(test)]
mod tests {
    use tch::{Device, Kind, Tensor};

    use super::Error;

    #[test]
    fn an_error_of_libtorch_has_no_frames() {
        let refused = Tensor::zeros([2, 3], (Kind::Float, Device::Cpu)).f_view([7]).unwrap_err();
        assert!(refused.to_string().contains("Exception raised from"), "else there is nothing to cut: {refused}");
        let error = Error::from(refused);
        for text in [error.to_string(), format!("{error:?}")] {
            assert!(text.contains("shape '[7]' is invalid for input of size 6"), "{text}");
            assert!(!text.contains("Exception raised") && !text.contains("frame #") && !text.contains('\n'), "{text}");
        }
    }
}

//! The lock of a run directory: one process at a time works on a run, and others can see whether one does.

use std::fs::{File, OpenOptions, TryLockError};
use std::io::ErrorKind;
use std::path::Path;

use anyhow::{Context, bail};

/// Hidden, since it says nothing to people.
pub const FILE: &str = ".lock";

/// Held while a process works on a run, or a sweep. The system gives it up when the process ends, however it ends.
#[derive(Debug)]
pub struct Lock {
    _file: File,
}

/// Take the lock of a directory.
///
/// # Errors
/// When another process has it.
pub fn take(directory: &Path) -> anyhow::Result<Lock> {
    let path = directory.join(FILE);
    let open = OpenOptions::new().create(true).write(true).truncate(false).open(&path);
    let file = open.with_context(|| format!("cannot make {}", path.display()))?;
    match file.try_lock() {
        Ok(()) => Ok(Lock { _file: file }),
        Err(TryLockError::WouldBlock) => bail!("another process is at work on {}", directory.display()),
        Err(TryLockError::Error(error)) => Err(error).with_context(|| format!("cannot lock {}", path.display())),
    }
}

/// Whether a process works on a directory.
pub fn is_taken(directory: &Path) -> anyhow::Result<bool> {
    let path = directory.join(FILE);
    let file = match File::open(&path) {
        Ok(file) => file,
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(false),
        Err(error) => return Err(error).with_context(|| format!("cannot read {}", path.display())),
    };
    match file.try_lock_shared() {
        Ok(()) => Ok(false),
        Err(TryLockError::WouldBlock) => Ok(true),
        Err(TryLockError::Error(error)) => Err(error).with_context(|| format!("cannot lock {}", path.display())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_directory_is_locked_for_as_long_as_the_lock_lives() {
        let directory = tempfile::tempdir().unwrap();
        assert!(!is_taken(directory.path()).unwrap());
        let lock = take(directory.path()).unwrap();
        assert!(is_taken(directory.path()).unwrap());
        let refused = take(directory.path()).unwrap_err().to_string();
        assert_eq!(refused, format!("another process is at work on {}", directory.path().display()));
        drop(lock);
        assert!(!is_taken(directory.path()).unwrap());
        take(directory.path()).unwrap();
    }
}

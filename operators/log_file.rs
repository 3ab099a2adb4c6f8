//! Files a sink appends to, which a resumed run cuts back to where its checkpoint was taken.

use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::{Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use crate::Error;

/// A file that only grows, except on resuming.
#[derive(Debug)]
pub struct LogFile {
    path: PathBuf,
    file: File,
}

impl LogFile {
    /// Open `path` for this process alone: emptied in a fresh run, as it is in a resumed one. Makes its directory.
    pub fn open(path: PathBuf, resumed: bool) -> Result<Self, Error> {
        if let Some(parent) = path.parent() {
            fs::create_dir_all(parent).map_err(Error::io(parent))?;
        }
        let open = OpenOptions::new().create(true).write(true).truncate(false).open(&path);
        let mut file = open.map_err(Error::io(&path))?;
        match file.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => {
                let message = format!(
                    "{}: another sink writes this file (give each its own `file`), or another process is at work on \
                     this run",
                    path.display()
                );
                return Err(Error::Input(message));
            }
            Err(TryLockError::Error(source)) => return Err(Error::Io { path, source }),
        }
        if !resumed {
            file.set_len(0).map_err(Error::io(&path))?;
        }
        file.seek(SeekFrom::End(0)).map_err(Error::io(&path))?;
        Ok(LogFile { path, file })
    }

    /// Append bytes.
    pub fn append(&mut self, bytes: &[u8]) -> Result<(), Error> {
        self.file.write_all(bytes).map_err(Error::io(&self.path))
    }

    /// Make what was written safe on disk; its length in bytes.
    pub fn sync(&mut self) -> Result<u64, Error> {
        self.file.sync_data().map_err(Error::io(&self.path))?;
        self.length()
    }

    /// Cut the file back to `length` bytes, the state of a checkpoint.
    pub fn cut_back(&mut self, length: u64) -> Result<(), Error> {
        let found = self.length()?;
        if found < length {
            let path = self.path.display();
            let message = format!("{path} has {found} bytes, but had {length} when the checkpoint was taken");
            return Err(Error::Restore(message));
        }
        self.file.set_len(length).map_err(Error::io(&self.path))?;
        self.file.seek(SeekFrom::Start(length)).map_err(Error::io(&self.path))?;
        Ok(())
    }

    fn length(&self) -> Result<u64, Error> {
        Ok(self.file.metadata().map_err(Error::io(&self.path))?.len())
    }
}

/// What is wrong with a `file` key: it must be a plain name inside the run directory.
pub fn check_file_name(file: &str) -> Option<String> {
    let plain = Path::new(file).file_name().is_some_and(|name| name == file);
    (!plain).then(|| format!("expected a file name inside the run directory, found `{file}`"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_resumed_run_goes_on_from_the_cut() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("log/a.jsonl");
        let mut log = LogFile::open(path.clone(), false).unwrap();
        log.append(b"one\n").unwrap();
        assert_eq!(log.sync().unwrap(), 4);
        log.append(b"two\n").unwrap();
        drop(log);
        let mut log = LogFile::open(path.clone(), true).unwrap();
        log.cut_back(4).unwrap();
        log.append(b"three\n").unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"one\nthree\n");
        assert!(log.cut_back(11).unwrap_err().to_string().contains("has 10 bytes, but had 11"));
        drop(log);
        LogFile::open(path.clone(), false).unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"");
    }

    #[test]
    fn two_sinks_cannot_share_a_file() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("a.jsonl");
        let _first = LogFile::open(path.clone(), false).unwrap();
        let error = LogFile::open(path, false).unwrap_err();
        assert!(error.to_string().contains("another sink writes this file"), "{error}");
    }

    #[test]
    fn a_file_name_stays_in_the_run_directory() {
        assert_eq!(check_file_name("metrics.jsonl"), None);
        for wrong in ["", "..", "a/b", "/a", "a/"] {
            assert!(check_file_name(wrong).is_some(), "{wrong}");
        }
    }
}

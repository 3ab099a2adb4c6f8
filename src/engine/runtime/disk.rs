//! Files that are on the disk when they are said to be, and their hashes.

use std::fs;
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};

use sha2::{Digest, Sha256};

/// Files below a directory, as relative paths with `/`, sorted.
///
/// # Errors
/// When a directory cannot be read.
pub fn files_under(directory: &Path) -> io::Result<Vec<String>> {
    let mut files = Vec::new();
    let mut folders = vec![PathBuf::new()];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(directory.join(&folder))? {
            let entry = entry?;
            let path = folder.join(entry.file_name());
            if entry.file_type()?.is_dir() {
                folders.push(path);
            } else {
                files.push(path.to_string_lossy().replace('\\', "/"));
            }
        }
    }
    files.sort();
    Ok(files)
}

/// The SHA-256, in hexadecimal, of a file whose bytes are on disk afterwards.
///
/// # Errors
/// When it cannot be read or synced.
pub fn sync_and_hash(path: &Path) -> io::Result<String> {
    let file = fs::File::open(path)?;
    file.sync_all()?;
    Ok(length_and_sha256(file)?.1)
}

/// The number of bytes that there are to read, and their SHA-256 in hexadecimal.
///
/// # Errors
/// When they cannot be read.
pub fn length_and_sha256(mut reader: impl Read) -> io::Result<(u64, String)> {
    let mut hasher = Sha256::new();
    let mut buffer = vec![0; 1 << 20];
    let mut bytes = 0;
    loop {
        match reader.read(&mut buffer) {
            Ok(0) => break Ok((bytes, hex(&hasher.finalize()))),
            Ok(read) => {
                bytes += read as u64;
                hasher.update(&buffer[..read]);
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => break Err(error),
        }
    }
}

/// The SHA-256 of bytes, in hexadecimal.
pub fn sha256(bytes: &[u8]) -> String {
    hex(&Sha256::digest(bytes))
}

/// Write a file whose bytes are on disk afterwards.
///
/// # Errors
/// When it cannot be written or synced.
pub fn write_synced(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let mut file = fs::File::create(path)?;
    file.write_all(bytes)?;
    file.sync_all()
}

/// Make the names of all files and directories below a directory durable, the innermost first.
///
/// # Errors
/// When a directory cannot be read or synced.
pub fn sync_directories(root: &Path) -> io::Result<()> {
    for entry in fs::read_dir(root)? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            sync_directories(&entry.path())?;
        }
    }
    sync_directory(root)
}

/// Make a directory's own entries durable: the names in it, and renames.
///
/// # Errors
/// When it cannot be opened or synced.
pub fn sync_directory(path: &Path) -> io::Result<()> {
    fs::File::open(path)?.sync_all()
}

/// Bytes in hexadecimal.
pub fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The SHA-256 of "abc" in FIPS 180-2, appendix B.1.
    #[test]
    fn hashes_are_sha256() {
        let expected = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad";
        assert_eq!(sha256(b"abc"), expected);
        assert_eq!(length_and_sha256(&b"abc"[..]).unwrap(), (3, expected.to_owned()));
        // Over several reads.
        let long = vec![7; (2 << 20) + 1];
        assert_eq!(length_and_sha256(&long[..]).unwrap(), (long.len() as u64, sha256(&long)));
    }
}

//! Data files: found, read row by row, counted, hashed.
//!
//! JSON Lines (`.jsonl`, `.ndjson`), JSON (`.json`: one array of rows, or JSON Lines under that name) and Parquet.

use std::fs::File;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::SystemTime;

use sapo_flow_engine::runtime::disk::length_and_sha256;
use serde_json::{Map, Value};

use super::parquet_rows;
use crate::Error;

/// A row as it stands in its file.
#[derive(Clone, Debug, PartialEq)]
pub struct RawRow {
    /// The file.
    pub path: Arc<Path>,
    /// The line it begins on, from 1; in Parquet its number, from 1.
    pub line: u64,
    /// Its columns, or why it has none.
    pub content: Result<Map<String, Value>, String>,
}

/// The kinds of data files.
#[derive(Clone, Copy)]
enum Format {
    Lines,
    Array,
    Parquet,
}

/// The files that paths and glob patterns name, in the order given; those of one pattern in alphabetical order.
pub fn resolve(paths: &[String]) -> Result<Vec<PathBuf>, Error> {
    let mut files = Vec::new();
    for path in paths {
        if Path::new(path).is_file() {
            files.push(PathBuf::from(path));
            continue;
        }
        if Path::new(path).is_dir() {
            return Err(Error::Data(format!(
                "{path} is a directory; name a file, or a pattern such as {path}/*.jsonl"
            )));
        }
        let found = glob::glob(path).map_err(|error| Error::Data(format!("{path}: not a pattern: {error}")))?;
        let before = files.len();
        for file in found {
            let file = file.map_err(|error| Error::Data(error.to_string()))?;
            if file.is_file() {
                files.push(file);
            }
        }
        if files.len() == before {
            return Err(Error::Data(format!("{path}: no such file, and no file matches it as a pattern")));
        }
    }
    if files.is_empty() {
        return Err(Error::Data("`path` names no file".into()));
    }
    Ok(files)
}

/// Rows of a file, read as they are asked for.
pub type Rows = Box<dyn Iterator<Item = Result<RawRow, Error>>>;

/// All rows of a file. A row that cannot be read is among them, with the reason.
pub fn rows(path: &Path) -> Result<Rows, Error> {
    match format(path)? {
        Format::Lines => line_rows(path),
        Format::Array => Ok(Box::new(read_array(path)?.into_iter().map(Ok))),
        Format::Parquet => parquet_rows::rows(path),
    }
}

/// The number of rows in a file.
pub fn count(path: &Path) -> Result<u64, Error> {
    match format(path)? {
        Format::Lines => {
            let mut rows = 0;
            for line in lines(path)? {
                rows += u64::from(!is_blank(&line.map_err(Error::io(path))?));
            }
            Ok(rows)
        }
        Format::Array => Ok(read_array(path)?.len() as u64),
        Format::Parquet => parquet_rows::count(path),
    }
}

/// What tells that a file has changed without reading it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Stamp {
    /// Its length.
    pub bytes: u64,
    /// When it was written to last, where that is known.
    pub modified: Option<SystemTime>,
}

impl Stamp {
    /// Of a file as it is.
    ///
    /// # Errors
    /// When there is none.
    pub fn of(path: &Path) -> std::io::Result<Self> {
        let metadata = path.metadata()?;
        Ok(Stamp { bytes: metadata.len(), modified: metadata.modified().ok() })
    }
}

/// The stamps of files.
pub fn stamps(paths: &[PathBuf]) -> Result<Vec<Stamp>, Error> {
    paths.iter().map(|path| Stamp::of(path).map_err(Error::io(path))).collect()
}

/// SHA-256 of a file's bytes, in hexadecimal.
pub fn sha256(path: &Path) -> Result<String, Error> {
    let hashed = File::open(path).and_then(length_and_sha256);
    Ok(hashed.map_err(Error::io(path))?.1)
}

fn format(path: &Path) -> Result<Format, Error> {
    let extension = path.extension().unwrap_or_default().to_string_lossy().to_ascii_lowercase();
    match extension.as_str() {
        "jsonl" | "ndjson" => Ok(Format::Lines),
        "json" => Ok(if begins_with_bracket(path)? { Format::Array } else { Format::Lines }),
        "parquet" => Ok(Format::Parquet),
        _ => Err(Error::Data(format!("{}: expected a .jsonl, .ndjson, .json or .parquet file", path.display()))),
    }
}

fn begins_with_bracket(path: &Path) -> Result<bool, Error> {
    for line in lines(path)? {
        let line = line.map_err(Error::io(path))?;
        if let Some(first) = without_mark(&line).iter().find(|byte| !byte.is_ascii_whitespace()) {
            return Ok(*first == b'[');
        }
    }
    Ok(false)
}

fn lines(path: &Path) -> Result<std::io::Split<BufReader<File>>, Error> {
    Ok(BufReader::new(File::open(path).map_err(Error::io(path))?).split(b'\n'))
}

/// Without the byte order mark that some editors put in front of a file.
fn without_mark(bytes: &[u8]) -> &[u8] {
    bytes.strip_prefix(b"\xef\xbb\xbf").unwrap_or(bytes)
}

pub(super) fn is_blank(line: &[u8]) -> bool {
    without_mark(line).iter().all(u8::is_ascii_whitespace)
}

fn line_rows(path: &Path) -> Result<Rows, Error> {
    let shared: Arc<Path> = path.into();
    let row = move |(number, line): (u64, std::io::Result<Vec<u8>>)| match line.map_err(Error::io(&shared)) {
        Ok(line) if is_blank(&line) => None,
        Ok(line) => Some(Ok(RawRow { path: shared.clone(), line: number, content: parse_line(&line) })),
        Err(error) => Some(Err(error)),
    };
    Ok(Box::new((1..).zip(lines(path)?).filter_map(row)))
}

/// A line of a JSON Lines file as columns, or why it is none.
pub fn parse_line(line: &[u8]) -> Result<Map<String, Value>, String> {
    serde_json::from_slice(without_mark(line)).map_err(|error| broken(&error)).and_then(object)
}

/// The elements of a JSON array, parsed one by one so that each has its line. What follows a broken one is lost.
fn read_array(path: &Path) -> Result<Vec<RawRow>, Error> {
    let bytes = std::fs::read(path).map_err(Error::io(path))?;
    let shared: Arc<Path> = path.into();
    let mut rows = Vec::new();
    let mut rest = skip_blank(without_mark(&bytes));
    let mut line = 1 + newlines(&bytes[..bytes.len() - rest.len()]);
    let skip = |rest: &mut &[u8], count: usize, line: &mut u64| {
        let after = skip_blank(&rest[count..]);
        *line += newlines(&rest[..rest.len() - after.len()]);
        *rest = after;
    };
    let mut push = |line, content| rows.push(RawRow { path: shared.clone(), line, content });
    skip(&mut rest, 1, &mut line);
    while rest.first() != Some(&b']') {
        let mut values = serde_json::Deserializer::from_slice(rest).into_iter::<Value>();
        match values.next() {
            Some(Ok(value)) => push(line, object(value)),
            Some(Err(error)) => {
                push(line, Err(format!("{}; the rest of the file is not read", broken(&error))));
                return Ok(rows);
            }
            None => {
                push(line, Err("the file ends inside its array".into()));
                return Ok(rows);
            }
        }
        let parsed = values.byte_offset();
        skip(&mut rest, parsed, &mut line);
        match rest.first() {
            Some(b',') => skip(&mut rest, 1, &mut line),
            Some(b']') => {}
            _ => {
                push(line, Err("expected `,` or `]` after a row; the rest of the file is not read".into()));
                return Ok(rows);
            }
        }
    }
    skip(&mut rest, 1, &mut line);
    if !rest.is_empty() {
        push(line, Err("expected nothing after the array".into()));
    }
    Ok(rows)
}

fn skip_blank(bytes: &[u8]) -> &[u8] {
    bytes.trim_ascii_start()
}

fn newlines(bytes: &[u8]) -> u64 {
    bytes.iter().filter(|byte| **byte == b'\n').count() as u64
}

fn object(value: Value) -> Result<Map<String, Value>, String> {
    match value {
        Value::Object(object) => Ok(object),
        other => Err(format!("expected an object, found {}", kind(&other))),
    }
}

/// A JSON error without serde_json's own line, which counts from the row.
fn broken(error: &serde_json::Error) -> String {
    let text = error.to_string();
    let reason = text.split(" at line ").next().unwrap_or(&text);
    format!("not JSON: {reason} (column {})", error.column())
}

/// What a JSON value is, in words.
pub fn kind(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "a boolean",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "a list",
        Value::Object(_) => "an object",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rows_of(name: &str, content: &[u8]) -> Vec<(u64, Result<Value, String>)> {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join(name);
        std::fs::write(&path, content).unwrap();
        let rows = Vec::from_iter(rows(&path).unwrap().map(Result::unwrap));
        assert_eq!(count(&path).unwrap(), rows.len() as u64);
        rows.into_iter().map(|row| (row.line, row.content.map(Value::Object))).collect()
    }

    fn row(text: &str) -> Result<Value, String> {
        Ok(serde_json::from_str(text).unwrap())
    }

    #[test]
    fn json_lines() {
        let content = b"\xef\xbb\xbf{\"a\": 1}\r\n\n  \n{\"b\"\n[1]\n{\"c\": 2}";
        let rows = rows_of("a.jsonl", content);
        assert_eq!(rows.iter().map(|(line, _)| *line).collect::<Vec<_>>(), [1, 4, 5, 6]);
        assert_eq!(rows[0].1, row("{\"a\": 1}"));
        assert_eq!(rows[1].1, Err("not JSON: EOF while parsing an object (column 4)".into()));
        assert_eq!(rows[2].1, Err("expected an object, found a list".into()));
        assert_eq!(rows[3].1, row("{\"c\": 2}"));
        assert!(
            rows_of("b.jsonl", b"{\"a\": \"\xff\"}\n")[0]
                .1
                .as_ref()
                .unwrap_err()
                .starts_with("not JSON: invalid unicode")
        );
    }

    #[test]
    fn a_json_array_keeps_lines() {
        let rows = rows_of("a.json", b"\n[\n  {\"a\":\n 1},\n  7, {\"b\": 2}\n]\n");
        assert_eq!(
            rows,
            [(3, row("{\"a\": 1}")), (5, Err("expected an object, found a number".into())), (5, row("{\"b\": 2}")),]
        );
        assert_eq!(rows_of("b.json", b"[]"), []);
        assert_eq!(rows_of("lines.json", b"{\"a\": 1}\n{\"a\": 2}\n").len(), 2);
    }

    #[test]
    fn a_broken_array_ends_with_the_reason() {
        let reason = |content: &[u8]| {
            let (line, last) = rows_of("a.json", content).pop().unwrap();
            format!("{line}: {}", last.unwrap_err())
        };
        let lost = "the rest of the file is not read";
        assert_eq!(reason(b"[{\"a\": 1}\n {}]"), format!("2: expected `,` or `]` after a row; {lost}"));
        assert_eq!(reason(b"[{},\n{\"a\"}]"), format!("2: not JSON: expected `:` (column 5); {lost}"));
        assert_eq!(reason(b"[{},\n"), "2: the file ends inside its array");
        assert_eq!(reason(b"[{}] x"), "1: expected nothing after the array");
    }

    #[test]
    fn files_globs_and_what_is_neither() {
        let directory = tempfile::tempdir().unwrap();
        let at = |name: &str| directory.path().join(name).display().to_string();
        for name in ["b.jsonl", "a.jsonl", "[x].jsonl", "c.txt"] {
            std::fs::write(at(name), "").unwrap();
        }
        let found = |paths: &[&str]| {
            let paths: Vec<String> = paths.iter().map(|name| at(name)).collect();
            let files = resolve(&paths).map_err(|error| error.to_string())?;
            Ok::<_, String>(Vec::from_iter(files.iter().map(|file| file.file_name().unwrap().display().to_string())))
        };
        assert_eq!(found(&["b.jsonl", "?.jsonl"]).unwrap(), ["b.jsonl", "a.jsonl", "b.jsonl"]);
        assert_eq!(found(&["[x].jsonl"]).unwrap(), ["[x].jsonl"]);
        assert!(found(&["no*.jsonl"]).unwrap_err().ends_with("no such file, and no file matches it as a pattern"));
        assert!(found(&[""]).unwrap_err().contains("is a directory"));
        let error = rows(Path::new(&at("c.txt"))).err().unwrap().to_string();
        assert!(error.ends_with("expected a .jsonl, .ndjson, .json or .parquet file"), "{error}");
    }

    /// The SHA-256 of "abc" in FIPS 180-2, appendix B.1.
    #[test]
    fn hashes_are_sha256() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("abc");
        std::fs::write(&path, "abc").unwrap();
        let expected = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad";
        assert_eq!(sha256(&path).unwrap(), expected);
    }
}

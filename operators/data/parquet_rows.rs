//! Parquet files as rows of JSON values.

use std::fs::File;
use std::path::Path;
use std::sync::Arc;

use parquet::errors::ParquetError;
use parquet::file::reader::{FileReader, SerializedFileReader};
use parquet::record::{Field, Row};
use serde_json::{Map, Value};

use super::files::{RawRow, Rows};
use crate::Error;

/// All rows of a file.
pub fn rows(path: &Path) -> Result<Rows, Error> {
    let shared: Arc<Path> = path.into();
    let row = move |(number, row): (u64, Result<Row, ParquetError>)| {
        let content = Ok(object(row.map_err(broken(&shared))?));
        Ok(RawRow { path: shared.clone(), line: number, content })
    };
    Ok(Box::new((1..).zip(open(path)?).map(row)))
}

/// The number of rows in a file, from its footer.
pub fn count(path: &Path) -> Result<u64, Error> {
    Ok(open(path)?.metadata().file_metadata().num_rows() as u64)
}

fn open(path: &Path) -> Result<SerializedFileReader<File>, Error> {
    let file = File::open(path).map_err(Error::io(path))?;
    SerializedFileReader::new(file).map_err(broken(path))
}

fn broken(path: &Path) -> impl Fn(ParquetError) -> Error {
    let path = path.display().to_string();
    move |error| Error::Data(format!("{path}: {error}"))
}

fn object(row: Row) -> Map<String, Value> {
    row.into_columns().into_iter().map(|(name, field)| (name, value(&field))).collect()
}

/// A field as JSON: text, lists and structs as they are, numbers as numbers, everything else as its text.
fn value(field: &Field) -> Value {
    match field {
        Field::Null => Value::Null,
        Field::Str(text) => text.clone().into(),
        Field::Group(row) => object(row.clone()).into(),
        Field::ListInternal(list) => list.elements().iter().map(value).collect(),
        other => {
            let text = other.to_string();
            serde_json::from_str(&text).unwrap_or(Value::String(text))
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn fixture(name: &str) -> std::path::PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR")).join("data/fixtures").join(name)
    }

    /// Written by pyarrow 26 from the rows below, with Snappy.
    #[test]
    fn nested_columns_and_nulls() {
        let path = fixture("messages.parquet");
        let turn = |role: &str, content: &str| json!({"role": role, "content": content});
        let expected = [
            json!({"id": 1, "score": 0.5, "messages": [turn("user", "hi"), turn("assistant", "a b")], "source": "x"}),
            json!({"id": 2, "score": null, "source": null, "messages": [
                turn("user", "a"), turn("assistant", "b"), turn("user", "b"), turn("assistant", "a \"é\"\n"),
            ]}),
            json!({"id": 3, "score": 2.0, "messages": null, "source": "y"}),
        ];
        let rows = Vec::from_iter(rows(&path).unwrap().map(Result::unwrap));
        assert_eq!(rows.iter().map(|row| row.line).collect::<Vec<_>>(), [1, 2, 3]);
        let rows: Vec<Value> = rows.into_iter().map(|row| Value::Object(row.content.unwrap())).collect();
        assert_eq!(rows, expected);
        assert_eq!(count(&path).unwrap(), 3);
    }

    /// Written by pyarrow 26, with Zstandard.
    #[test]
    fn zstandard() {
        let first = rows(&fixture("pairs.zstd.parquet")).unwrap().next().unwrap().unwrap();
        let row = Value::Object(first.content.unwrap());
        assert_eq!(row, json!({"question": "hi", "answer": "a"}));
    }

    #[test]
    fn a_broken_file_is_named() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("a.parquet");
        std::fs::write(&path, "PAR1 is not enough").unwrap();
        let error = rows(&path).err().unwrap().to_string();
        assert!(error.contains("a.parquet: "), "{error}");
    }
}

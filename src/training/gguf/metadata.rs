//! A GGUF file's header: keys with values of known types, and where its tensors lie.

use crate::{Error, Result};
use candle_core::Device;
use candle_core::quantized::gguf_file::{Content, Value};
use std::fmt::Display;
use std::io::{Read, Seek};
use std::path::{Path, PathBuf};

/// The header. Every accessor's error names the file and the key.
pub struct Metadata {
    path: PathBuf,
    content: Content,
}

impl Metadata {
    /// Reads the header.
    pub fn read(path: &Path, reader: &mut (impl Read + Seek)) -> Result<Self> {
        let content = Content::read(reader)
            .map_err(|error| Error::Invalid { path: path.into(), message: format!("not a GGUF file: {error}") })?;
        Ok(Self { path: path.into(), content })
    }

    /// Names and shapes of the tensors, sorted by name; the slowest dimension comes first.
    pub fn tensors(&self) -> Vec<(&str, &[usize], String)> {
        let infos = self.content.tensor_infos.iter();
        let mut tensors: Vec<_> =
            infos.map(|(name, info)| (name.as_str(), info.shape.dims(), format!("{:?}", info.ggml_dtype))).collect();
        tensors.sort_unstable();
        tensors
    }

    /// Whether the file has a tensor.
    pub fn has_tensor(&self, name: &str) -> bool {
        self.content.tensor_infos.contains_key(name)
    }

    /// Reads one tensor and dequantises it.
    pub fn tensor(&self, reader: &mut (impl Read + Seek), name: &str) -> Result<candle_core::Tensor> {
        self.content
            .tensor(reader, name, &Device::Cpu)
            .and_then(|tensor| tensor.dequantize(&Device::Cpu))
            .map_err(|error| self.error(format!("tensor {name}: {error}")))
    }

    /// A value, or an error that says it is missing.
    pub fn need<'a, T>(&'a self, key: &str, get: impl Fn(&'a Self, &str) -> Result<Option<T>>) -> Result<T> {
        get(self, key)?.ok_or_else(|| self.error(format!("{key} is missing")))
    }

    /// A text.
    pub fn text(&self, key: &str) -> Result<Option<&str>> {
        self.get(key, "a text", |value| value.to_string().ok().map(String::as_str))
    }

    /// A flag.
    pub fn flag(&self, key: &str) -> Result<Option<bool>> {
        self.get(key, "true or false", |value| value.to_bool().ok())
    }

    /// A count or an id.
    pub fn number(&self, key: &str) -> Result<Option<usize>> {
        self.get(key, "a whole number", whole_number)
    }

    /// A real number: the shortest decimal that its 32 bits stand for (1e-5, not 9.99999974e-6).
    pub fn real(&self, key: &str) -> Result<Option<f64>> {
        self.get(key, "a number", |value| match value {
            Value::F32(number) => number.to_string().parse().ok(),
            Value::F64(number) => Some(*number),
            _ => None,
        })
    }

    /// A list of texts.
    pub fn texts(&self, key: &str) -> Result<Option<Vec<&str>>> {
        self.list(key, "a list of texts", |value| value.to_string().ok().map(String::as_str))
    }

    /// A list of whole numbers.
    pub fn numbers(&self, key: &str) -> Result<Option<Vec<usize>>> {
        self.list(key, "a list of whole numbers", whole_number)
    }

    /// A list of 32-bit real numbers.
    pub fn reals(&self, key: &str) -> Result<Option<Vec<f32>>> {
        self.list(key, "a list of numbers", |value| value.to_f32().ok())
    }

    /// An error about this file.
    pub fn error(&self, message: impl Display) -> Error {
        Error::Invalid { path: self.path.clone(), message: message.to_string() }
    }

    fn list<'a, T>(
        &'a self,
        key: &str,
        expected: &str,
        item: impl Fn(&'a Value) -> Option<T>,
    ) -> Result<Option<Vec<T>>> {
        self.get(key, expected, |value| value.to_vec().ok()?.iter().map(&item).collect())
    }

    fn get<'a, T>(&'a self, key: &str, expected: &str, cast: impl Fn(&'a Value) -> Option<T>) -> Result<Option<T>> {
        let Some(value) = self.content.metadata.get(key) else { return Ok(None) };
        let found = || format!("{key}: expected {expected}, found the type {:?}", value.value_type());
        cast(value).map(Some).ok_or_else(|| self.error(found()))
    }
}

fn whole_number(value: &Value) -> Option<usize> {
    let signed = |number: i64| usize::try_from(number).ok();
    match *value {
        Value::I8(number) => signed(number.into()),
        Value::I16(number) => signed(number.into()),
        Value::I32(number) => signed(number.into()),
        Value::I64(number) => signed(number),
        ref other => usize::try_from(other.to_u64().ok()?).ok(),
    }
}

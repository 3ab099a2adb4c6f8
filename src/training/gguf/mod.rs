//! Imports a GGUF file as a Hugging Face directory: weights, configuration, tokenizer and chat template.
//!
//! candle-core reads the file and dequantises. The format is specified in ggml's `docs/gguf.md`; names and layouts are
//! those of llama.cpp's `convert_hf_to_gguf.py`, undone.

mod config;
mod metadata;
mod rope;
mod tensors;
mod tokenizer;

use crate::{Error, Result};
use config::Config;
use metadata::Metadata;
use serde_json::Value;
use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::BufReader;
use std::path::{Path, PathBuf};

/// The number format of the imported weights.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum WeightType {
    /// 32 bits: the dequantised values as they are.
    #[default]
    Float32,
    /// 16 bits: the dequantised values rounded to the nearest.
    BFloat16,
}

/// What was imported.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ImportSummary {
    /// The directory written.
    pub directory: PathBuf,
    /// The Hugging Face model type: `llama`, `mistral`, `qwen2` or `qwen3`.
    pub model_type: String,
    /// Number of weights.
    pub parameters: u64,
    /// Number of tensors by their type in the GGUF file.
    pub tensor_types: BTreeMap<String, usize>,
    /// Number of tokens.
    pub vocabulary: usize,
    /// Whether the file had a chat template.
    pub has_chat_template: bool,
}

/// Imports `path` into the new directory `out_dir`, which then loads here and in transformers.
///
/// The directory appears once it is complete: it is written beside its final place and renamed.
pub fn import(path: &Path, out_dir: &Path, weight_type: WeightType) -> Result<ImportSummary> {
    if fs::read_dir(out_dir).is_ok_and(|mut entries| entries.next().is_some()) {
        let message = "expected a new or empty directory to import into, found files in it".to_owned();
        return Err(Error::Invalid { path: out_dir.into(), message });
    }
    let file = File::open(path).map_err(|source| Error::Io { path: path.into(), source })?;
    let mut reader = BufReader::new(file);
    let metadata = Metadata::read(path, &mut reader)?;
    let config = Config::read(&metadata, &mut reader)?;
    let plan = tensors::plan(&metadata, &config)?;
    let tokenizer = tokenizer::convert(&metadata, config.context_length)?;

    let partial = partial_directory(out_dir)?;
    let written = |name: &str| partial.join(name);
    let mut complete = || -> Result<()> {
        write_json(&written("config.json"), &config.to_json(&tokenizer.ids, weight_type))?;
        write_json(&written("generation_config.json"), &tokenizer.generation_config())?;
        write_json(&written("tokenizer.json"), &tokenizer.file)?;
        write_json(&written("tokenizer_config.json"), &tokenizer.config)?;
        tensors::write(&metadata, &mut reader, &plan, weight_type, &written("model.safetensors"))?;
        fs::rename(&partial, out_dir).map_err(|source| Error::Io { path: out_dir.into(), source })
    };
    let result = complete();
    if result.is_err() {
        // The error that stopped the import is the one to report; the next import removes what is left here.
        let _ = fs::remove_dir_all(&partial);
    }
    result?;

    Ok(ImportSummary {
        directory: out_dir.into(),
        model_type: config.model_type.into(),
        parameters: plan.iter().map(|entry| entry.shape.iter().product::<usize>() as u64).sum(),
        tensor_types: tensors::count_types(&metadata),
        vocabulary: tokenizer.vocabulary,
        has_chat_template: tokenizer.config.get("chat_template").is_some(),
    })
}

/// An empty directory beside `out_dir`. What an interrupted import left there is removed.
fn partial_directory(out_dir: &Path) -> Result<PathBuf> {
    let Some(name) = out_dir.file_name() else {
        let message = "expected the name of a directory to import into".to_owned();
        return Err(Error::Invalid { path: out_dir.into(), message });
    };
    let mut partial_name = name.to_owned();
    partial_name.push(".partial");
    let partial = out_dir.with_file_name(partial_name);
    let failed = |source| Error::Io { path: partial.clone(), source };
    if partial.exists() {
        fs::remove_dir_all(&partial).map_err(failed)?;
    }
    fs::create_dir_all(&partial).map_err(failed)?;
    Ok(partial)
}

fn write_json(path: &Path, value: &Value) -> Result<()> {
    let text = format!("{value:#}\n");
    fs::write(path, text).map_err(|source| Error::Io { path: path.into(), source })
}

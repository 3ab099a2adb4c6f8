//! A model in a Hugging Face directory: configuration, weights, and the files that go with them.

use std::path::Path;
use std::sync::Arc;

use serde_json::{Map, Value};
use tch::{Device, Kind};

use super::config::{CONFIG_FILE, GENERATION_CONFIG_FILE};
use super::{Decoder, ModelConfig};
use crate::parameters::{ParameterSet, WEIGHTS_FILE};
use crate::text::{TOKENIZER_FILE, TextTokenizer};
use crate::{Error, Result};

/// Files of a model directory that training does not change.
const COMPANIONS: [&str; 9] = [
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
];

/// A model's weights with everything needed to use and save them.
#[derive(Debug)]
pub struct Model {
    /// The architecture.
    pub decoder: Arc<Decoder>,
    /// The weights.
    pub parameters: ParameterSet,
    /// Tokenizer and chat template.
    pub files: SourceFiles,
}

/// The tokenizer's and chat template's files of a model directory, kept in memory: a run can save its model even if the
/// directory it came from is gone by then.
#[derive(Clone, Debug, Default)]
pub struct SourceFiles {
    /// Names and contents.
    pub files: Vec<(String, Vec<u8>)>,
}

impl Model {
    /// Loads a model directory onto a device, with weights as `kind`. What ends its responses is what ends its data's
    /// answers: the EOS of its tokenizer, where there is one, besides those that its configuration names.
    pub fn load(directory: &Path, device: Device, kind: Kind) -> Result<Self> {
        let mut config = ModelConfig::load(directory)?;
        config.eos_token_ids = eos_token_ids(directory, &config)?;
        let decoder = Decoder::new(config, device)?;
        let parameters = ParameterSet::load(directory, &decoder.expected_parameters(), device, kind)?;
        Ok(Model { decoder: Arc::new(decoder), parameters, files: SourceFiles::load(directory)? })
    }

    /// Saves a directory that transformers loads as it is, with weights as `kind`.
    pub fn save(&self, directory: &Path, kind: Kind) -> Result<()> {
        save(directory, &self.decoder.config, &self.parameters, &self.files, kind)
    }
}

/// Saves a model directory that transformers loads as it is, with weights as `kind`. The directory is made if need be;
/// files in it that have the same names are replaced.
pub fn save(
    directory: &Path,
    config: &ModelConfig,
    parameters: &ParameterSet,
    files: &SourceFiles,
    kind: Kind,
) -> Result<()> {
    std::fs::create_dir_all(directory).map_err(Error::io(directory))?;
    parameters.write(&directory.join(WEIGHTS_FILE), Some(kind))?;
    save_description(directory, config, files, kind)
}

/// Writes what makes a directory with weights of type `kind` one that transformers loads: configurations, tokenizer and
/// chat template.
pub fn save_description(directory: &Path, config: &ModelConfig, files: &SourceFiles, kind: Kind) -> Result<()> {
    write_json(&directory.join(CONFIG_FILE), config.to_json(kind))?;
    let generation = config.generation.clone().unwrap_or_else(|| generation_config(config));
    write_json(&directory.join(GENERATION_CONFIG_FILE), generation)?;
    for (name, content) in &files.files {
        let path = directory.join(name);
        std::fs::write(&path, content).map_err(Error::io(&path))?;
    }
    Ok(())
}

impl SourceFiles {
    /// Reads those of the files that `directory` has.
    pub fn load(directory: &Path) -> Result<Self> {
        let paths = COMPANIONS.iter().map(|name| (name, directory.join(name))).filter(|(_, path)| path.exists());
        let read = |(name, path): (&&str, std::path::PathBuf)| {
            let content = std::fs::read(&path).map_err(Error::io(&path))?;
            Ok((name.to_string(), content))
        };
        Ok(SourceFiles { files: paths.map(read).collect::<Result<_>>()? })
    }
}

/// Every token that ends a response, the tokenizer's own EOS first.
fn eos_token_ids(directory: &Path, config: &ModelConfig) -> Result<Vec<u32>> {
    if !directory.join(TOKENIZER_FILE).exists() {
        return Ok(config.eos_token_ids.clone());
    }
    let ids = TextTokenizer::load(directory)?.eos_ids().to_vec();
    match ids.iter().find(|id| i64::from(**id) >= config.vocab_size) {
        // The configuration's own are checked before: it is the tokenizer's, which ends every answer of the data.
        Some(id) => {
            let message = format!("`vocab_size`: expected more than {id}, the end token of {TOKENIZER_FILE}");
            let found = format!("{message}, found {}", config.vocab_size);
            Err(Error::invalid(&directory.join(CONFIG_FILE), found))
        }
        None => Ok(ids),
    }
}

/// A generation_config.json for a model that came without one.
fn generation_config(config: &ModelConfig) -> Map<String, Value> {
    let tokens = ["bos_token_id", "eos_token_id", "pad_token_id"];
    tokens.iter().filter_map(|key| Some((key.to_string(), config.raw.get(*key)?.clone()))).collect()
}

fn write_json(path: &Path, object: Map<String, Value>) -> Result<()> {
    let text = serde_json::to_string_pretty(&object).map_err(|error| Error::invalid(path, error.to_string()))? + "\n";
    std::fs::write(path, text).map_err(Error::io(path))
}

//! Which files hold a model directory's weights, and which tensors its index says that each has.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use super::WEIGHTS_FILE;
use crate::{Error, Result};

const INDEX_FILE: &str = "model.safetensors.index.json";

/// Files of weights, with their index where there is one.
pub(super) struct WeightFiles {
    pub paths: Vec<PathBuf>,
    index: Option<Index>,
}

/// An index file and what it says: by a tensor's name, the file that has it.
struct Index {
    path: PathBuf,
    weight_map: BTreeMap<String, String>,
}

impl WeightFiles {
    /// One file.
    pub fn one(path: &Path) -> Self {
        WeightFiles { paths: vec![path.to_path_buf()], index: None }
    }

    /// Those of a model directory.
    pub fn of(directory: &Path) -> Result<Self> {
        let single = directory.join(WEIGHTS_FILE);
        let path = directory.join(INDEX_FILE);
        if single.exists() {
            return Ok(Self::one(&single));
        }
        if !path.exists() {
            return Err(Error::invalid(
                directory,
                format!("expected weights in {WEIGHTS_FILE} or {INDEX_FILE}, found none"),
            ));
        }
        #[derive(serde::Deserialize)]
        struct Content {
            weight_map: BTreeMap<String, String>,
        }
        let text = std::fs::read_to_string(&path).map_err(Error::io(&path))?;
        let Content { weight_map } =
            serde_json::from_str(&text).map_err(|error| Error::invalid(&path, error.to_string()))?;
        let names: BTreeSet<&String> = weight_map.values().collect();
        let paths = names.into_iter().map(|name| directory.join(name)).collect();
        Ok(WeightFiles { paths, index: Some(Index { path, weight_map }) })
    }

    /// Refuses an index that does not name the file in which a tensor is: files of two models may be mixed up.
    pub fn check(&self, name: &str, found: &Path) -> Result<()> {
        let Some(index) = &self.index else { return Ok(()) };
        let said = index.weight_map.get(name);
        let file = found.file_name().unwrap_or_default().to_string_lossy();
        if said.is_some_and(|said| index.path.with_file_name(said) == found) {
            return Ok(());
        }
        let said = said.map_or("nothing", String::as_str);
        Err(Error::invalid(&index.path, format!("`weight_map.{name}`: expected {file}, which has it, found {said}")))
    }

    /// The error of a tensor that is in two files: which one is meant cannot be told.
    pub fn stands_twice(&self, name: &str, first: &Path, second: &Path) -> Error {
        let expected = "expected in one file";
        Error::invalid(second, format!("tensor `{name}`: {expected}, found in {} as well", first.display()))
    }
}

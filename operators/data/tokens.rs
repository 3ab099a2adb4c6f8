//! Tokenized rows: in memory, or in a file that later runs find.
//!
//! The file is in the safetensors format, so that other programs can look at it:
//!
//! | tensor | dtype | shape | content |
//! |---|---|---|---|
//! | `ids` | U32 | (tokens,) | rows one after the other: prompt, chosen and, where there is one, rejected answer |
//! | `index` | U64 | (rows, 6) | of each row: its number in the data, its first token in `ids`, how many tokens its prompt, chosen and rejected answer have ([`NONE`] without one), the end of its values |
//! | `values` | U8 | (bytes,) | the rows' values, each a JSON object, or nothing where a row has none |
//! | `about` | U8 | (bytes,) | [`About`] in JSON |
//!
//! Rows are read when they are asked for: memory does not grow with the data.

use std::fs::File;
use std::io::{BufWriter, Seek, SeekFrom, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use safetensors::tensor::Metadata;
use sapo_flow_engine::Prompt;
use serde::{Deserialize, Serialize};
use serde_json::json;
use tempfile::NamedTempFile;

use super::report::Report;
use crate::Error;

/// Bytes in front of the first tensor: the header's length and the header, filled up with spaces.
const HEADER: u64 = 4096;
/// Numbers of a row in the index.
const COLUMNS: usize = 6;
/// In place of a number of tokens: there is no such answer.
const NONE: u64 = u64::MAX;

/// The rows of a data set that can be used, in the order of its files.
#[derive(Debug)]
pub enum Tokens {
    /// All in memory.
    Memory(Vec<Arc<Prompt>>),
    /// In a file.
    File(Box<TokenFile>),
}

impl Tokens {
    /// How many rows there are.
    pub fn len(&self) -> usize {
        match self {
            Tokens::Memory(rows) => rows.len(),
            Tokens::File(file) => file.rows,
        }
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// A row; epoch 0.
    ///
    /// # Errors
    /// When the file cannot be read, or is damaged.
    ///
    /// # Panics
    /// When `index` is not below [`len`](Self::len).
    pub fn row(&self, index: usize) -> Result<Arc<Prompt>, Error> {
        match self {
            Tokens::Memory(rows) => Ok(rows[index].clone()),
            Tokens::File(file) => file.row(index).map(Arc::new),
        }
    }

    /// All rows.
    ///
    /// # Errors
    /// As for [`row`](Self::row).
    pub fn all(&self) -> Result<Vec<Arc<Prompt>>, Error> {
        (0..self.len()).map(|index| self.row(index)).collect()
    }

    /// How many rows have a rejected answer.
    pub fn with_rejected(&self) -> usize {
        match self {
            Tokens::Memory(rows) => rows.iter().filter(|row| row.rejected_ids.is_some()).count(),
            Tokens::File(file) => file.about.with_rejected,
        }
    }
}

/// What a file says of its rows as a whole.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct About {
    /// What was left out when they were read.
    pub report: Report,
    /// [`TokensDigest`](super::identity::TokensDigest) of all rows.
    pub digest: String,
    /// How many have a rejected answer.
    pub with_rejected: usize,
}

/// A file of tokenized rows, open for reading.
#[derive(Debug)]
pub struct TokenFile {
    path: PathBuf,
    file: File,
    rows: usize,
    about: About,
    /// Where the tensors begin.
    ids: u64,
    index: u64,
    values: u64,
}

impl TokenFile {
    /// Opens a file that a [`Writer`] has finished.
    ///
    /// # Errors
    /// When there is none, or it is something else, or a part is missing.
    pub fn open(path: &Path) -> Result<Self, Error> {
        let file = File::open(path).map_err(Error::io(path))?;
        let broken = |what: &str| Error::Data(format!("{}: not a file of tokenized rows: {what}", path.display()));
        let mut header = vec![0; HEADER as usize];
        file.read_exact_at(&mut header, 0).map_err(Error::io(path))?;
        let metadata: Metadata = serde_json::from_slice(&header[8..]).map_err(|error| broken(&error.to_string()))?;
        let tensor = |name: &str| metadata.info(name).ok_or_else(|| broken(&format!("`{name}` is missing")));
        let begin = |name: &str| Ok::<u64, Error>(HEADER + tensor(name)?.data_offsets.0 as u64);
        let (from, to) = tensor("about")?.data_offsets;
        if file.metadata().map_err(Error::io(path))?.len() != HEADER + to as u64 {
            return Err(broken("its length is not what its header says"));
        }
        let mut about = vec![0; to - from];
        file.read_exact_at(&mut about, HEADER + from as u64).map_err(Error::io(path))?;
        let about = serde_json::from_slice(&about).map_err(|error| broken(&error.to_string()))?;
        let rows = tensor("index")?.shape.first().copied().unwrap_or_default();
        let (ids, index, values) = (begin("ids")?, begin("index")?, begin("values")?);
        Ok(TokenFile { path: path.to_owned(), rows, about, ids, index, values, file })
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// What is known of all rows.
    pub fn about(&self) -> &About {
        &self.about
    }

    fn row(&self, index: usize) -> Result<Prompt, Error> {
        assert!(index < self.rows, "row {index} of {}", self.rows);
        let [number, first, prompt, chosen, rejected, values_end] = self.entry(index)?;
        let values_start = if index == 0 { 0 } else { self.entry(index - 1)?[COLUMNS - 1] };
        let lengths = [prompt, chosen, if rejected == NONE { 0 } else { rejected }];
        let mut bytes = vec![0; 4 * lengths.iter().sum::<u64>() as usize];
        self.read(&mut bytes, self.ids + 4 * first)?;
        let mut ids = bytes.chunks_exact(4).map(|id| u32::from_le_bytes([id[0], id[1], id[2], id[3]]));
        let mut part = |length: u64| Vec::from_iter(ids.by_ref().take(length as usize));
        let (prompt_ids, chosen_ids, rejected_ids) = (part(lengths[0]), part(lengths[1]), part(lengths[2]));
        let mut values = vec![0; (values_end - values_start) as usize];
        self.read(&mut values, self.values + values_start)?;
        let values = match values.is_empty() {
            true => Default::default(),
            false => serde_json::from_slice(&values)
                .map_err(|error| Error::Data(format!("{}: values of row {number}: {error}", self.path.display())))?,
        };
        let rejected_ids = (rejected != NONE).then_some(rejected_ids);
        Ok(Prompt { source: String::new(), row: number, epoch: 0, prompt_ids, chosen_ids, rejected_ids, values })
    }

    fn entry(&self, index: usize) -> Result<[u64; COLUMNS], Error> {
        let mut bytes = [[0; 8]; COLUMNS];
        self.read(bytes.as_flattened_mut(), self.index + (8 * COLUMNS * index) as u64)?;
        Ok(bytes.map(u64::from_le_bytes))
    }

    fn read(&self, bytes: &mut [u8], at: u64) -> Result<(), Error> {
        self.file.read_exact_at(bytes, at).map_err(Error::io(&self.path))
    }
}

/// Takes rows, into memory or into a file.
pub enum Writer {
    /// Into memory.
    Memory(Vec<Arc<Prompt>>),
    /// Into a file.
    File(Box<FileWriter>),
}

impl Writer {
    /// Takes rows.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub fn add(&mut self, rows: Vec<Prompt>) -> Result<(), Error> {
        match self {
            Writer::Memory(all) => all.extend(rows.into_iter().map(Arc::new)),
            Writer::File(file) => file.add(&rows).map_err(Error::io(&file.path))?,
        }
        Ok(())
    }

    /// The rows. A file appears under its name only now, whole.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub fn finish(self, report: &Report, digest: &str) -> Result<Tokens, Error> {
        match self {
            Writer::Memory(rows) => Ok(Tokens::Memory(rows)),
            Writer::File(file) => {
                let path = file.path.clone();
                let (report, digest, with_rejected) = (report.clone(), digest.to_owned(), file.with_rejected);
                file.finish(&About { report, digest, with_rejected }).map_err(Error::io(&path))?;
                Ok(Tokens::File(Box::new(TokenFile::open(&path)?)))
            }
        }
    }
}

/// A file under way: tokens go to it at once, what is small is kept for its end.
pub struct FileWriter {
    path: PathBuf,
    file: BufWriter<NamedTempFile>,
    tokens: u64,
    index: Vec<u8>,
    values: Vec<u8>,
    with_rejected: usize,
}

impl FileWriter {
    /// Begins a file, in a folder that is made where it is missing.
    ///
    /// # Errors
    /// When the folder cannot be written to.
    pub fn begin(path: &Path) -> std::io::Result<Self> {
        let folder = path.parent().unwrap_or(Path::new(""));
        std::fs::create_dir_all(folder)?;
        let mut file = BufWriter::new(NamedTempFile::new_in(folder)?);
        file.write_all(&[0; HEADER as usize])?;
        let (index, values) = (Vec::new(), Vec::new());
        Ok(FileWriter { path: path.to_owned(), file, tokens: 0, index, values, with_rejected: 0 })
    }

    fn add(&mut self, rows: &[Prompt]) -> std::io::Result<()> {
        for row in rows {
            if !row.values.is_empty() {
                serde_json::to_writer(&mut self.values, &row.values)?;
            }
            let rejected = row.rejected_ids.as_ref();
            let [prompt, chosen] = [&row.prompt_ids, &row.chosen_ids].map(|ids| ids.len() as u64);
            let rejected_length = rejected.map_or(NONE, |ids| ids.len() as u64);
            let entry = [row.row, self.tokens, prompt, chosen, rejected_length, self.values.len() as u64];
            self.index.extend(entry.iter().flat_map(|number| number.to_le_bytes()));
            for id in [&row.prompt_ids, &row.chosen_ids].into_iter().chain(rejected).flatten() {
                self.file.write_all(&id.to_le_bytes())?;
                self.tokens += 1;
            }
            self.with_rejected += usize::from(rejected.is_some());
        }
        Ok(())
    }

    fn finish(mut self, about: &About) -> std::io::Result<()> {
        if self.tokens % 2 == 1 {
            // The index begins at a multiple of its numbers' size, as readers that map the file expect.
            self.file.write_all(&[0; 4])?;
            self.tokens += 1;
        }
        let about = serde_json::to_vec(about)?;
        let parts = [&self.index, &self.values, &about];
        parts.iter().try_for_each(|part| self.file.write_all(part))?;
        let rows = self.index.len() / (8 * COLUMNS);
        let mut end = 0;
        let mut tensor = |dtype: &str, shape: &[u64], bytes: u64| {
            let begin = end;
            end += bytes;
            json!({"dtype": dtype, "shape": shape, "data_offsets": [begin, end]})
        };
        let bytes_of = |part: &[u8]| part.len() as u64;
        let header = json!({
            "ids": tensor("U32", &[self.tokens], 4 * self.tokens),
            "index": tensor("U64", &[rows as u64, COLUMNS as u64], bytes_of(&self.index)),
            "values": tensor("U8", &[bytes_of(&self.values)], bytes_of(&self.values)),
            "about": tensor("U8", &[bytes_of(&about)], bytes_of(&about)),
        });
        let length = HEADER - 8;
        self.file.seek(SeekFrom::Start(0))?;
        self.file.write_all(&length.to_le_bytes())?;
        write!(self.file, "{:width$}", header.to_string(), width = length as usize)?;
        let file = self.file.into_inner().map_err(|error| error.into_error())?;
        file.as_file().sync_all()?;
        file.persist(&self.path).map_err(|error| error.error)?;
        Ok(())
    }
}

#[cfg(test)]
mod tests;

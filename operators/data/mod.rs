//! Data sets: files of rows, read, understood as prompts with answers, and tokenized.
//!
//! [`files`] finds and reads files, [`example`] tells what a row means, `encode` makes tokens of it, [`shuffle`] orders
//! rows. [`load`] reads, understands and encodes, or finds the tokens that an earlier run has `kept` of the same data.
//! [`follow`] watches files while they are edited, and [`recording`] keeps what was seen.

mod encode;
pub mod example;
pub mod files;
pub mod follow;
mod identity;
mod kept;
mod parquet_rows;
pub mod recording;
mod report;
pub mod shuffle;
mod tokens;

use std::path::{Path, PathBuf};
use std::sync::Arc;

use sapo_flow_engine::Prompt;
use sapo_flow_engine::plan::Lengths;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::Error;
pub use encode::Encoder;
pub use example::Columns;
use files::{RawRow, Stamp};
pub use identity::Identity;
use identity::TokensDigest;
use report::unusable;
pub use report::{Report, rows};
pub use tokens::Tokens;
use tokens::{About, FileWriter, TokenFile, Writer};

/// One path or several.
#[derive(Clone, Debug, Deserialize, JsonSchema)]
#[serde(untagged, expecting = "expected a path or a list of paths")]
pub enum Paths {
    /// A file, or a glob pattern.
    One(String),
    /// Files and glob patterns, read in this order.
    Many(Vec<String>),
}

impl Paths {
    /// As a list.
    pub fn as_slice(&self) -> &[String] {
        match self {
            Paths::One(path) => std::slice::from_ref(path),
            Paths::Many(paths) => paths,
        }
    }
}

/// What happens when a row cannot be used.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum OnError {
    /// The run stops, with file, line and reason.
    #[default]
    Stop,
    /// The row is left out and counted.
    Skip,
}

/// Which rows to read.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub enum Part {
    /// All.
    All,
    /// All but every n-th: of each n rows the first n - 1.
    Training {
        /// n.
        hold_out_every: u64,
    },
    /// Every n-th: of each n rows the last.
    HeldOut {
        /// n.
        hold_out_every: u64,
    },
}

impl Part {
    /// Whether the row belongs to this part.
    pub fn contains(self, row: u64) -> bool {
        match self {
            Part::All => true,
            Part::Training { hold_out_every } => row % hold_out_every != hold_out_every - 1,
            Part::HeldOut { hold_out_every } => row % hold_out_every == hold_out_every - 1,
        }
    }
}

/// What to read, and how.
#[derive(Clone, Debug)]
pub struct Settings<'a> {
    /// Files and glob patterns.
    pub paths: &'a Paths,
    /// The data's names for the columns we know.
    pub columns: &'a Columns,
    /// A directory with a tokenizer, of a Hugging Face model as a rule.
    pub tokenizer: &'a Path,
    /// A chat template, or the path of one, in place of the tokenizer's.
    pub chat_template: Option<&'a str>,
    /// Rows with more prompt tokens are dropped.
    pub max_prompt_tokens: Option<usize>,
    /// Which rows to read.
    pub part: Part,
    /// How many of them to read at most, the first ones.
    pub limit: Option<usize>,
    /// What happens when a row cannot be used.
    pub on_error: OnError,
}

/// A data set that has been read.
#[derive(Debug)]
pub struct Loaded {
    /// The rows that can be used, in the order of the files.
    pub rows: Tokens,
    /// What was left out.
    pub report: Report,
    /// Where the rows were found in tokens, or are kept for later runs, or why they cannot be.
    pub kept: Option<String>,
    /// What a resumed run compares.
    pub identity: Identity,
}

/// Rows that are in memory as text at a time. As parsed JSON they take several times as much as their tokens.
const ROWS_AT_A_TIME: usize = 4096;

/// Read, understand and tokenize a data set, or find it as an earlier run left it.
///
/// # Errors
/// When a file cannot be read or changes meanwhile, the tokenizer cannot be loaded, or a row cannot be used and `on_error`
/// is `stop`.
pub fn load(settings: &Settings) -> Result<Loaded, Error> {
    load_with(settings, kept::folder().as_deref(), kept::LEAST_BYTES)
}

/// [`load`] with the folder for tokens and the bytes of data from which on they are kept.
fn load_with(settings: &Settings, folder: Option<&Path>, least_bytes: u64) -> Result<Loaded, Error> {
    let paths = files::resolve(settings.paths.as_slice())?;
    let stamps = files::stamps(&paths)?;
    let digests =
        paths.iter().map(|path| Ok((path.clone(), files::sha256(path)?))).collect::<Result<Vec<_>, Error>>()?;
    let large = stamps.iter().map(|stamp| stamp.bytes).sum::<u64>() >= least_bytes;
    let all = settings.limit.is_none_or(|limit| limit >= ROWS_AT_A_TIME);
    let place = folder.filter(|_| large && all).map(|folder| kept::place(folder, settings, &digests)).transpose()?;
    if let Some(found) = place.as_ref().and_then(|place| TokenFile::open(place).ok()) {
        let kept = format!("tokens of an earlier run over the same data: {}", found.path().display());
        let About { report, digest, .. } = found.about().clone();
        let identity = Identity { files: digests, tokens: digest };
        return Ok(Loaded { rows: Tokens::File(Box::new(found)), report, kept: Some(kept), identity });
    }
    let file = place.as_ref().and_then(|place| FileWriter::begin(place).ok());
    let in_memory = || Writer::Memory(Vec::new());
    let writer = file.map_or_else(in_memory, |file| Writer::File(Box::new(file)));
    let (filled, lost) = match fill(settings, &paths, &stamps, writer) {
        // A cache that cannot be written to, or is full, must not keep a run from starting.
        Err(Failure::Cache(error)) => (fill(settings, &paths, &stamps, in_memory()), Some(error)),
        filled => (filled, None),
    };
    let (rows, report, digest) = filled.map_err(|(Failure::Data(error) | Failure::Cache(error))| error)?;
    if rows.is_empty() {
        return Err(none_usable(&paths, &report));
    }
    let kept = match &rows {
        Tokens::Memory(_) => lost.map(|error| format!("tokens cannot be kept for later runs: {error}")),
        Tokens::File(file) => Some(format!("tokens kept for later runs: {}", file.path().display())),
    };
    Ok(Loaded { rows, report, kept, identity: Identity { files: digests, tokens: digest } })
}

/// Why rows could not be taken in.
enum Failure {
    /// The data cannot be used.
    Data(Error),
    /// The file for their tokens cannot be written.
    Cache(Error),
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        Failure::Data(error)
    }
}

/// Read the selected rows into a writer: those that can be used, what was left out, and the digest of the tokens. `stamps`:
/// those of the files before.
fn fill(
    settings: &Settings,
    paths: &[PathBuf],
    stamps: &[Stamp],
    mut writer: Writer,
) -> Result<(Tokens, Report, String), Failure> {
    let mut digest = TokensDigest::default();
    let report = read(settings, paths, |rows| {
        rows.iter().for_each(|row| digest.add(row));
        writer.add(rows).map_err(Failure::Cache)
    })?;
    if files::stamps(paths)? != stamps {
        return Err(Error::Data(format!("{}: changed while it was read", names(paths))).into());
    }
    let digest = digest.finish();
    let rows = writer.finish(&report, &digest).map_err(Failure::Cache)?;
    Ok((rows, report, digest))
}

/// Understand and tokenize the selected rows, some at a time; those that can be used go to `take`.
fn read<E: From<Error>>(
    settings: &Settings,
    paths: &[PathBuf],
    mut take: impl FnMut(Vec<Prompt>) -> Result<(), E>,
) -> Result<Report, E> {
    let encoder = Encoder::load(settings)?;
    let mut encoding = Encoding::begin(settings, &encoder);
    let of_file = |path: &PathBuf| files::rows(path).unwrap_or_else(|error| Box::new(std::iter::once(Err(error))));
    let mut rows = (0..)
        .zip(paths.iter().flat_map(of_file))
        .filter(|(index, row)| row.is_err() || settings.part.contains(*index))
        .take(settings.limit.unwrap_or(usize::MAX));
    loop {
        let some = rows.by_ref().take(ROWS_AT_A_TIME).map(|(index, row)| Ok((index, row?)));
        let some = some.collect::<Result<Vec<_>, Error>>()?;
        if some.is_empty() {
            return Ok(encoding.finish()?);
        }
        take(encoding.add(&some))?;
    }
}

/// Understand and tokenize numbered rows; those that can be used, in order, and what was left out.
///
/// # Errors
/// When a row cannot be used and `on_error` is `stop`.
pub fn encode(
    settings: &Settings,
    encoder: &Encoder,
    selected: &[(u64, RawRow)],
) -> Result<(Vec<Arc<Prompt>>, Report), Error> {
    let mut encoding = Encoding::begin(settings, encoder);
    let prompts = encoding.add(selected);
    Ok((prompts.into_iter().map(Arc::new).collect(), encoding.finish()?))
}

/// Rows that become tokens, some at a time.
struct Encoding<'a> {
    settings: &'a Settings<'a>,
    encoder: &'a Encoder,
    report: Report,
}

impl<'a> Encoding<'a> {
    fn begin(settings: &'a Settings<'a>, encoder: &'a Encoder) -> Self {
        Encoding { settings, encoder, report: Report::default() }
    }

    /// Those of the rows that can be used.
    fn add(&mut self, rows: &[(u64, RawRow)]) -> Vec<Prompt> {
        let max_prompt_tokens = self.settings.max_prompt_tokens.unwrap_or(usize::MAX);
        let results = in_parallel(rows, |(index, row)| self.encoder.encode(*index, row));
        self.report.read += rows.len();
        let mut prompts = Vec::with_capacity(rows.len());
        for ((_, row), result) in rows.iter().zip(results) {
            match result {
                Err(reason) => self.report.skipped.push(format!("{}:{}: {reason}", row.path.display(), row.line)),
                Ok(encoded) if encoded.prompt.prompt_ids.len() > max_prompt_tokens => self.report.too_long += 1,
                Ok(encoded) => {
                    self.report.trailing += usize::from(encoded.trailing);
                    encoded.unread.into_iter().for_each(|key| *self.report.unread.entry(key).or_default() += 1);
                    prompts.push(encoded.prompt);
                }
            }
        }
        prompts
    }

    fn finish(self) -> Result<Report, Error> {
        if self.settings.on_error == OnError::Stop && !self.report.skipped.is_empty() {
            return Err(Error::Data(unusable(&self.report.skipped)));
        }
        Ok(self.report)
    }
}

/// The files of a model directory that decide what text becomes which tokens: also which of them ends an answer.
const TOKENIZER_FILES: [&str; 6] = [
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "config.json",
    "generation_config.json",
];

/// Those of these files that are there.
pub fn tokenizer_files(directory: &Path) -> Vec<PathBuf> {
    TOKENIZER_FILES.iter().map(|name| directory.join(name)).filter(|path| path.is_file()).collect()
}

/// All files that decide what a data set comes to: those of the data that can be found, of the tokenizer, and of a chat
/// template given by path. What is missing is an error when the data is read.
pub fn all_files(paths: &Paths, tokenizer: &Path, chat_template: Option<&str>) -> Vec<PathBuf> {
    let mut found = files::resolve(paths.as_slice()).unwrap_or_default();
    found.extend(text_files(tokenizer, chat_template));
    found
}

/// The files that decide what a data set's text becomes which tokens.
pub fn text_files(tokenizer: &Path, chat_template: Option<&str>) -> Vec<PathBuf> {
    let template = chat_template.and_then(encode::template_file).map(Path::to_path_buf);
    tokenizer_files(tokenizer).into_iter().chain(template.filter(|path| path.is_file())).collect()
}

/// Rows of a part of the data, counted without tokenizing anything.
pub fn count(paths: &Paths, part: Part, limit: Option<usize>) -> Result<u64, Error> {
    let mut rows = 0;
    for path in files::resolve(paths.as_slice())? {
        rows += files::count(&path)?;
    }
    let selected = (0..rows).filter(|row| part.contains(*row)).count();
    Ok(selected.min(limit.unwrap_or(usize::MAX)) as u64)
}

/// Rows that plans look at, the first ones, and the largest data set in bytes that is read for them.
const SAMPLED_ROWS: usize = 256;
const SAMPLED_BYTES: u64 = 1 << 28;

/// Tokens of the first rows, for plans; none where that cannot be told quickly.
///
/// # Errors
/// Those of the data that these rows alone make certain.
pub fn sample(settings: &Settings) -> Result<Arc<[Lengths]>, Error> {
    let paths = files::resolve(settings.paths.as_slice())?;
    let bytes: u64 = paths.iter().filter_map(|path| Some(path.metadata().ok()?.len())).sum();
    if bytes > SAMPLED_BYTES {
        return Ok(Arc::default());
    }
    let limit = settings.limit.map_or(SAMPLED_ROWS, |limit| limit.min(SAMPLED_ROWS));
    let first = Settings { limit: Some(limit), ..settings.clone() };
    let mut rows = Vec::new();
    let take = |some| {
        rows.extend(some);
        Ok(())
    };
    match read(&first, &paths, take) {
        // That none of the first rows can be used says nothing of later ones; a broken one stops the run.
        Ok(report) if rows.is_empty() => {
            let all = count(settings.paths, settings.part, settings.limit)? <= limit as u64;
            return if all { Err(none_usable(&paths, &report)) } else { Ok(Arc::default()) };
        }
        Ok(_) => {}
        Err(error @ Error::Data(_)) => return Err(error),
        // A plan can be made before the tokenizer is there.
        Err(_) => return Ok(Arc::default()),
    }
    let lengths = |row: &Prompt| {
        let [prompt, response] = [&row.prompt_ids, &row.chosen_ids].map(|ids| ids.len() as u64);
        Lengths { prompt, shared_answer: 0, response }
    };
    Ok(rows.iter().map(lengths).collect())
}

/// Every item's result, in order, worked out on all cores.
fn in_parallel<T: Sync, R: Send>(items: &[T], work: impl Fn(&T) -> R + Sync) -> Vec<R> {
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    let share = items.len().div_ceil(threads).max(1);
    let work = &work;
    std::thread::scope(|scope| {
        let spawn = |part| scope.spawn(move || Vec::from_iter(<[T]>::iter(part).map(work)));
        let handles: Vec<_> = items.chunks(share).map(spawn).collect();
        let join = |handle: std::thread::ScopedJoinHandle<'_, Vec<R>>| {
            handle.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        };
        handles.into_iter().flat_map(join).collect()
    })
}

fn none_usable(paths: &[PathBuf], report: &Report) -> Error {
    Error::Data(format!("{}: no row can be used: {}", names(paths), report.sentences().join("; ")))
}

fn names(paths: &[PathBuf]) -> String {
    paths.iter().map(|path| path.display().to_string()).collect::<Vec<_>>().join(", ")
}

#[cfg(test)]
mod tests;

//! Where tokenized rows are kept for later runs, and under which name.
//!
//! The name is a digest of all that decides the tokens, so that a file found under it need not be checked against the data.

use std::path::{Path, PathBuf};

use sapo_flow_engine::runtime::disk::sha256;
use sapo_flow_training::text;
use serde::Serialize;

use super::{Columns, OnError, Part, Settings, TOKENIZER_FILES, encode, files};
use crate::Error;

/// To be raised when the same data gives other tokens, or files have another format.
const FORMAT: u32 = 1;

/// Bytes of data from which on its tokens are kept. Less is tokenized in a second or two.
pub const LEAST_BYTES: u64 = 16 << 20;

/// The files of a tokenizer that may hold a chat template.
const TEMPLATE_FILES: [&str; 2] = ["tokenizer_config.json", "chat_template.jinja"];

/// Everything that the tokens of a data set depend on.
#[derive(Serialize)]
struct Key<'a> {
    format: u32,
    program: &'static str,
    files: &'a [(PathBuf, String)],
    tokenizer: Vec<(&'static str, String)>,
    chat_template: Option<String>,
    /// The day, where a template asks for it.
    day: Option<String>,
    columns: &'a Columns,
    max_prompt_tokens: Option<usize>,
    part: Part,
    limit: Option<usize>,
    on_error: OnError,
}

/// The folder for tokenized rows: in `$SAPO_FLOW_CACHE`, or in `sapo-flow` of the user's cache folder. None where
/// `$SAPO_FLOW_CACHE` is empty, or there is no such folder.
pub fn folder() -> Option<PathBuf> {
    let variable = |name| std::env::var_os(name).map(PathBuf::from);
    let given = variable("SAPO_FLOW_CACHE");
    let of_user = || {
        let absolute = variable("XDG_CACHE_HOME").filter(|path| path.is_absolute());
        Some(absolute.or_else(|| Some(variable("HOME")?.join(".cache")))?.join("sapo-flow"))
    };
    let folder = given.or_else(of_user)?;
    (!folder.as_os_str().is_empty()).then(|| folder.join("tokens"))
}

/// The file for the rows that `settings` select from files with these digests.
///
/// # Errors
/// When a file that decides the tokens cannot be read.
pub fn place(folder: &Path, settings: &Settings, digests: &[(PathBuf, String)]) -> Result<PathBuf, Error> {
    let there = TOKENIZER_FILES.iter().filter(|name| settings.tokenizer.join(name).is_file());
    let tokenizer = there.map(|name| Ok((*name, files::sha256(&settings.tokenizer.join(name))?)));
    let chat_template = settings.chat_template.map(encode::template_source).transpose()?;
    let asks = |text: &str| text.contains("strftime_now");
    let of_model = |name: &&str| std::fs::read_to_string(settings.tokenizer.join(name)).is_ok_and(|text| asks(&text));
    let dated = chat_template.as_deref().map_or_else(|| TEMPLATE_FILES.iter().any(of_model), asks);
    let key = Key {
        format: FORMAT,
        program: env!("CARGO_PKG_VERSION"),
        files: digests,
        tokenizer: tokenizer.collect::<Result<_, Error>>()?,
        chat_template,
        day: dated.then(|| text::present().format("%F").to_string()),
        columns: settings.columns,
        max_prompt_tokens: settings.max_prompt_tokens,
        part: settings.part,
        limit: settings.limit,
        on_error: settings.on_error,
    };
    let key = serde_json::to_vec(&key).map_err(|error| Error::Data(error.to_string()))?;
    Ok(folder.join(sha256(&key)).with_extension("safetensors"))
}

//! A Hugging Face tokenizer with its special tokens.
//!
//! Nothing here adds a special token behind the caller's back: [`TextTokenizer::encode`] gives the tokens of the text
//! alone, and [`TextTokenizer::leading_ids`] says what the tokenizer's post-processor would have put in front.

use super::{SpecialTokens, read_optional_object};
use crate::{Error, Result};
use serde_json::Value;
use std::ops::Range;
use std::path::Path;
use tokenizers::{AddedToken, PostProcessorWrapper, Tokenizer};

/// The file that holds a tokenizer.
pub const TOKENIZER_FILE: &str = "tokenizer.json";

/// Turns text into token ids and back.
pub struct TextTokenizer {
    inner: Tokenizer,
    special_tokens: SpecialTokens,
    bos_id: Option<u32>,
    pad_id: Option<u32>,
    eos_ids: Vec<u32>,
    leading_ids: Vec<u32>,
}

impl TextTokenizer {
    /// Reads tokenizer.json, tokenizer_config.json, special_tokens_map.json and the token ids in config.json and
    /// generation_config.json of a Hugging Face directory. Only the first must be there.
    pub fn load(dir: &Path) -> Result<Self> {
        let path = dir.join(TOKENIZER_FILE);
        let invalid = |message: String| Error::Invalid { path: path.clone(), message };
        // The library panics on some malformed files that it opens by path; read the bytes first for a clear error.
        let bytes = std::fs::read(&path).map_err(|source| Error::Io { path: path.clone(), source })?;
        let mut inner = Tokenizer::from_bytes(bytes).map_err(|error| invalid(format!("not a tokenizer: {error}")))?;
        inner.with_padding(None);
        inner.with_truncation(None).map_err(|error| invalid(error.to_string()))?;

        let special_tokens = SpecialTokens::load(dir)?;
        register(&mut inner, &special_tokens).map_err(|error| invalid(error.to_string()))?;
        let config = read_optional_object(&dir.join("config.json"))?.unwrap_or_default();
        let generation = read_optional_object(&dir.join("generation_config.json"))?.unwrap_or_default();
        let tokenizer_config = read_optional_object(&dir.join("tokenizer_config.json"))?.unwrap_or_default();

        let of_role = |role: &str| match special_tokens.get(role) {
            None => Ok(None),
            Some(text) => match inner.token_to_id(text) {
                None => Err(invalid(format!("the {role} \"{text}\" is not in the vocabulary"))),
                id => Ok(id),
            },
        };
        let bos_id = of_role("bos_token")?.or_else(|| ids(config.get("bos_token_id")).next());
        // A padding token that the vocabulary lacks is common, and never used: padding is masked.
        let pad_id = of_role("pad_token").unwrap_or(None).or_else(|| ids(config.get("pad_token_id")).next());
        let mut eos_ids = Vec::from_iter(of_role("eos_token")?);
        for id in ids(config.get("eos_token_id")).chain(ids(generation.get("eos_token_id"))) {
            if !eos_ids.contains(&id) {
                eos_ids.push(id);
            }
        }
        let leading_ids = match tokenizer_config.get("add_bos_token").and_then(Value::as_bool) {
            Some(adds) => bos_id.filter(|_| adds).into_iter().collect(),
            None => leading_ids(&inner).map_err(|error| invalid(error.to_string()))?,
        };
        // Besides special tokens, a post-processor trims white space off the offsets that we cut by.
        inner.with_post_processor(None::<PostProcessorWrapper>);
        Ok(Self { inner, special_tokens, bos_id, pad_id, eos_ids, leading_ids })
    }

    /// The text's token ids. Special tokens written out in the text become themselves; none are added.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>> {
        Ok(self.encoding(text)?.get_ids().to_vec())
    }

    /// The text's token ids, each with the bytes of the text it covers.
    pub fn encode_with_offsets(&self, text: &str) -> Result<Vec<(u32, Range<usize>)>> {
        let encoding = self.encoding(text)?;
        let offsets = encoding.get_offsets().iter().map(|&(start, end)| start..end);
        Ok(encoding.get_ids().iter().copied().zip(offsets).collect())
    }

    /// The ids' text with special tokens written out.
    pub fn decode(&self, ids: &[u32]) -> Result<String> {
        self.inner.decode(ids, false).map_err(|error| Error::Argument(format!("cannot decode token ids: {error}")))
    }

    /// The ids' text with special tokens left out.
    pub fn decode_without_special_tokens(&self, ids: &[u32]) -> Result<String> {
        self.inner.decode(ids, true).map_err(|error| Error::Argument(format!("cannot decode token ids: {error}")))
    }

    /// Texts of the special tokens by role.
    pub fn special_tokens(&self) -> &SpecialTokens {
        &self.special_tokens
    }

    /// The token a text begins with, where the model has one.
    pub fn bos_id(&self) -> Option<u32> {
        self.bos_id
    }

    /// The token that ends an answer: the tokenizer's own EOS, or else the first that the model's configuration names.
    pub fn eos_id(&self) -> Option<u32> {
        self.eos_ids.first().copied()
    }

    /// Every token that ends an answer, the tokenizer's own EOS first.
    pub fn eos_ids(&self) -> &[u32] {
        &self.eos_ids
    }

    /// The padding token, where the model has one.
    pub fn pad_id(&self) -> Option<u32> {
        self.pad_id
    }

    /// What the tokenizer puts in front of every text: BOS, as a rule, or nothing.
    pub fn leading_ids(&self) -> &[u32] {
        &self.leading_ids
    }

    /// A token's text, special tokens included.
    pub fn token(&self, id: u32) -> Option<String> {
        self.inner.id_to_token(id)
    }

    /// The id of a token's text, special tokens included.
    pub fn token_id(&self, token: &str) -> Option<u32> {
        self.inner.token_to_id(token)
    }

    /// One more than the highest token id is at most this many.
    pub fn vocab_size(&self) -> usize {
        self.inner.get_vocab_size(true)
    }

    fn encoding(&self, text: &str) -> Result<tokenizers::Encoding> {
        self.inner
            .encode(text, false)
            .map_err(|error| Error::Argument(format!("cannot tokenize {}: {error}", excerpt(text))))
    }
}

/// Makes special tokens that are merely part of the vocabulary match as a whole, as transformers does on loading.
fn register(tokenizer: &mut Tokenizer, special_tokens: &SpecialTokens) -> tokenizers::Result<()> {
    let added = tokenizer.get_added_tokens_decoder();
    let missing: Vec<_> = special_tokens
        .0
        .values()
        .filter(|text| tokenizer.token_to_id(text).is_some_and(|id| !added.contains_key(&id)))
        .map(|text| AddedToken::from(text.clone(), true))
        .collect();
    tokenizer.add_special_tokens(missing).map(drop)
}

/// What the post-processor puts in front of a text's own tokens.
fn leading_ids(tokenizer: &Tokenizer) -> tokenizers::Result<Vec<u32>> {
    let bare = tokenizer.encode("a", false)?;
    let processed = tokenizer.encode("a", true)?;
    let own = bare.get_ids();
    let start = processed.get_ids().windows(own.len().max(1)).position(|window| window == own).unwrap_or(0);
    Ok(processed.get_ids()[..start].to_vec())
}

/// Token ids given as one number or a list of them.
fn ids(value: Option<&Value>) -> impl Iterator<Item = u32> + '_ {
    let values = match value {
        Some(Value::Array(values)) => values.as_slice(),
        Some(value) => std::slice::from_ref(value),
        None => &[],
    };
    values.iter().filter_map(|value| u32::try_from(value.as_u64()?).ok())
}

/// The beginning of a text, quoted, for messages.
fn excerpt(text: &str) -> String {
    match text.char_indices().nth(60) {
        Some((end, _)) => format!("{:?}...", &text[..end]),
        None => format!("{text:?}"),
    }
}

//! The tokenizer: GGUF's vocabulary as tokenizer.json and tokenizer_config.json.
//!
//! A GGUF file holds tokens, merges or scores, and the *name* of the way text is split before merging. What the names
//! stand for is llama.cpp's `llama-vocab.cpp`; here are the tokenizer.json files that those names were given for.

use super::metadata::Metadata;
use crate::Result;
use serde_json::{Value, json};
use std::collections::HashMap;

/// Llama 3's split: contractions, words, up to three digits, punctuation, line breaks.
const LLAMA3: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";

/// Qwen 2's split: Llama 3's with single digits.
const QWEN2: &str =
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";

/// Mistral's split: words also break where lower case turns to upper case.
const TEKKEN: &str = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+";

/// A token that means something to the model and is not text (`llama_token_type`).
const CONTROL: usize = 3;
/// A token that text can hold, matched before anything is split.
const USER_DEFINED: usize = 4;
/// An ordinary token.
const NORMAL: usize = 1;
/// The token of what cannot be tokenized.
const UNKNOWN: usize = 2;

/// Ids of special tokens.
#[derive(Default)]
pub struct SpecialIds {
    pub bos: Option<usize>,
    /// One id, or a list where a turn and a text end differently.
    pub eos: Value,
    pub pad: Option<usize>,
}

/// A converted tokenizer.
pub struct Tokenizer {
    /// tokenizer.json.
    pub file: Value,
    /// tokenizer_config.json.
    pub config: Value,
    pub ids: SpecialIds,
    /// Number of tokens.
    pub vocabulary: usize,
}

impl Tokenizer {
    /// generation_config.json.
    pub fn generation_config(&self) -> Value {
        let SpecialIds { bos, eos, pad } = &self.ids;
        let mut config = json!({"_from_model_config": true});
        for (key, id) in [("bos_token_id", json!(bos)), ("eos_token_id", eos.clone()), ("pad_token_id", json!(pad))] {
            if !id.is_null() {
                config[key] = id;
            }
        }
        config
    }
}

/// What differs between tokenizers of one kind.
struct Parts {
    normalizer: Value,
    pre_tokenizer: Value,
    decoder: Value,
    model: Value,
    /// Whether BOS goes in front of texts where the file does not say.
    adds_bos: bool,
}

/// Converts the file's tokenizer.
pub fn convert(metadata: &Metadata, context_length: usize) -> Result<Tokenizer> {
    let tokens = metadata.need("tokenizer.ggml.tokens", Metadata::texts)?;
    if tokens.is_empty() {
        return Err(metadata.error("tokenizer.ggml.tokens: expected at least one token, found none"));
    }
    let types = metadata.numbers("tokenizer.ggml.token_type")?.unwrap_or_else(|| vec![NORMAL; tokens.len()]);
    if types.len() != tokens.len() {
        let message = format!("tokenizer.ggml.token_type: expected {} types, found {}", tokens.len(), types.len());
        return Err(metadata.error(message));
    }
    let id = |role: &str| {
        let key = format!("tokenizer.ggml.{role}_token_id");
        match metadata.number(&key)? {
            Some(id) if id >= tokens.len() => {
                Err(metadata.error(format!("{key}: expected an id below {}, found {id}", tokens.len())))
            }
            id => Ok(id),
        }
    };
    let (bos, eos, eot, pad) = (id("bos")?, id("eos")?, id("eot")?, id("padding")?);
    let unknown = id("unknown")?;
    let parts = match metadata.need("tokenizer.ggml.model", Metadata::text)? {
        "gpt2" => byte_level(metadata, &tokens)?,
        "llama" => sentence_piece(metadata, &tokens, &types, unknown)?,
        other => {
            let message = format!("tokenizer.ggml.model: expected gpt2 or llama, found \"{other}\"");
            return Err(metadata.error(message));
        }
    };
    let adds_bos = metadata.flag("tokenizer.ggml.add_bos_token")?.unwrap_or(parts.adds_bos);
    let file = json!({
        "version": "1.0",
        "truncation": null,
        "padding": null,
        "added_tokens": added_tokens(&tokens, &types, &[bos, eos, eot, pad]),
        "normalizer": parts.normalizer,
        "pre_tokenizer": parts.pre_tokenizer,
        "post_processor": bos.filter(|_| adds_bos).map(|bos| begin_with(tokens[bos], bos)),
        "decoder": parts.decoder,
        "model": parts.model,
    });
    let loaded: tokenizers::Tokenizer = file
        .to_string()
        .parse()
        .map_err(|error| metadata.error(format!("its vocabulary makes no tokenizer: {error}")))?;
    if loaded.get_vocab_size(true) != tokens.len() {
        return Err(metadata.error("tokenizer.ggml.tokens: some tokens appear twice"));
    }

    let text = |id: Option<usize>| id.map(|id| tokens[id]);
    let mut config = json!({
        "add_bos_token": adds_bos && bos.is_some(),
        "bos_token": text(bos),
        "eos_token": text(eos),
        "pad_token": text(pad),
        "unk_token": text(unknown),
        "clean_up_tokenization_spaces": false,
        "model_max_length": context_length,
        "tokenizer_class": "PreTrainedTokenizerFast",
        // transformers 4 has this class also give token_type_ids, which its decoders refuse.
        "model_input_names": ["input_ids", "attention_mask"],
    });
    if let Some(template) = metadata.text("tokenizer.chat_template")? {
        config["chat_template"] = json!(template);
    }
    let eos = match (eos, eot) {
        (Some(eos), Some(eot)) if eos != eot => json!([eos, eot]),
        (eos, eot) => json!(eos.or(eot)),
    };
    Ok(Tokenizer { file, config, ids: SpecialIds { bos, eos, pad }, vocabulary: tokens.len() })
}

/// Byte-level BPE, split the way that `tokenizer.ggml.pre` names.
fn byte_level(metadata: &Metadata, tokens: &[&str]) -> Result<Parts> {
    let name = metadata.text("tokenizer.ggml.pre")?.unwrap_or("default");
    let bytes = |use_regex: bool| json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": use_regex});
    let split = |pattern: &str| {
        let split = json!({"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": false});
        json!({"type": "Sequence", "pretokenizers": [split, bytes(false)]})
    };
    let (pre_tokenizer, ignore_merges) = match name {
        "smollm" => {
            let digits = json!({"type": "Digits", "individual_digits": true});
            (json!({"type": "Sequence", "pretokenizers": [digits, bytes(true)]}), false)
        }
        "llama-bpe" | "llama3" | "llama-v3" => (split(LLAMA3), true),
        "qwen2" | "deepseek-r1-qwen" => (split(QWEN2), false),
        "tekken" => (split(TEKKEN), true),
        "gpt-2" => (bytes(true), false),
        "default" => {
            tracing::warn!("the file does not say how its tokenizer splits text: GPT-2's way is assumed");
            (bytes(true), false)
        }
        other => {
            let known = "smollm, llama-bpe, qwen2, deepseek-r1-qwen, tekken, gpt-2 or default";
            return Err(metadata.error(format!("tokenizer.ggml.pre: expected {known}, found \"{other}\"")));
        }
    };
    let mut merges = Vec::new();
    for merge in metadata.need("tokenizer.ggml.merges", Metadata::texts)? {
        // The first character may itself be a space's stand-in, never a space.
        let Some((left, right)) = merge.split_once(' ') else {
            return Err(metadata.error(format!("tokenizer.ggml.merges: expected two tokens, found \"{merge}\"")));
        };
        merges.push([left, right]);
    }
    Ok(Parts {
        normalizer: if pre_tokenizer == split(QWEN2) { json!({"type": "NFC"}) } else { Value::Null },
        pre_tokenizer,
        decoder: bytes(true),
        model: model(tokens, &merges, None, ignore_merges),
        adds_bos: ignore_merges,
    })
}

/// SentencePiece's BPE: spaces are `▁`, bytes that no token covers are tokens of their own, and scores order merges.
fn sentence_piece(metadata: &Metadata, tokens: &[&str], types: &[usize], unknown: Option<usize>) -> Result<Parts> {
    let scores = metadata.need("tokenizer.ggml.scores", Metadata::reals)?;
    if scores.len() != tokens.len() {
        let message = format!("tokenizer.ggml.scores: expected {} scores, found {}", tokens.len(), scores.len());
        return Err(metadata.error(message));
    }
    let replace = json!({"type": "Replace", "pattern": {"String": " "}, "content": "▁"});
    let back = json!({"type": "Replace", "pattern": {"String": "▁"}, "content": " "});
    let (bytes, fuse) = (json!({"type": "ByteFallback"}), json!({"type": "Fuse"}));
    let (normalizer, decoder) = if metadata.flag("tokenizer.ggml.add_space_prefix")?.unwrap_or(true) {
        let strip = json!({"type": "Strip", "content": " ", "start": 1, "stop": 0});
        (
            json!({"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"}, replace]}),
            json!({"type": "Sequence", "decoders": [back, bytes, fuse, strip]}),
        )
    } else {
        (replace, json!({"type": "Sequence", "decoders": [back, bytes, fuse]}))
    };
    let merges = merges_by_score(tokens, types, &scores);
    Ok(Parts {
        normalizer,
        pre_tokenizer: Value::Null,
        decoder,
        model: model(tokens, &merges, Some(tokens[unknown.unwrap_or(0)]), false),
        adds_bos: true,
    })
}

/// Every way to join two tokens into a third, the best-scored third first.
fn merges_by_score<'a>(tokens: &[&'a str], types: &[usize], scores: &[f32]) -> Vec<[&'a str; 2]> {
    let is_text = |id: usize| types[id] == NORMAL;
    let ids: HashMap<&str, usize> =
        tokens.iter().enumerate().filter(|&(id, _)| is_text(id)).map(|(id, &token)| (token, id)).collect();
    let mut merges = Vec::new();
    for (id, &token) in tokens.iter().enumerate().filter(|&(id, _)| is_text(id)) {
        for (at, _) in token.char_indices().skip(1) {
            let (left, right) = token.split_at(at);
            if let (Some(&left_id), Some(&right_id)) = (ids.get(left), ids.get(right)) {
                merges.push((id, left_id, right_id, [left, right]));
            }
        }
    }
    merges.sort_by(|a, b| scores[b.0].total_cmp(&scores[a.0]).then((a.0, a.1, a.2).cmp(&(b.0, b.1, b.2))));
    merges.into_iter().map(|(.., parts)| parts).collect()
}

fn model(tokens: &[&str], merges: &[[&str; 2]], unknown: Option<&str>, ignore_merges: bool) -> Value {
    let vocabulary: serde_json::Map<_, _> =
        tokens.iter().enumerate().map(|(id, token)| ((*token).to_owned(), json!(id))).collect();
    json!({
        "type": "BPE",
        "dropout": null,
        "unk_token": unknown,
        "continuing_subword_prefix": null,
        "end_of_word_suffix": null,
        "fuse_unk": unknown.is_some(),
        "byte_fallback": unknown.is_some(),
        "ignore_merges": ignore_merges,
        "vocab": vocabulary,
        "merges": merges,
    })
}

/// Tokens that are matched as a whole: those of a special type, and those with a role.
fn added_tokens(tokens: &[&str], types: &[usize], roles: &[Option<usize>]) -> Vec<Value> {
    let special = |id: usize| matches!(types[id], CONTROL | UNKNOWN) || roles.contains(&Some(id));
    (0..tokens.len())
        .filter(|&id| special(id) || types[id] == USER_DEFINED)
        .map(|id| {
            json!({
                "id": id,
                "content": tokens[id],
                "single_word": false,
                "lstrip": false,
                "rstrip": false,
                "normalized": false,
                "special": special(id),
            })
        })
        .collect()
}

/// A post-processor that puts BOS in front.
fn begin_with(token: &str, id: usize) -> Value {
    let bos = json!({"SpecialToken": {"id": token, "type_id": 0}});
    let sequence = |name: &str, type_id: usize| json!({"Sequence": {"id": name, "type_id": type_id}});
    json!({
        "type": "TemplateProcessing",
        "single": [bos, sequence("A", 0)],
        "pair": [bos, sequence("A", 0), {"SpecialToken": {"id": token, "type_id": 1}}, sequence("B", 1)],
        "special_tokens": {token: {"id": token, "ids": [id], "tokens": [token]}},
    })
}

//! What tells one data set from another, for runs that resume.

use std::path::PathBuf;

use sapo_flow_engine::Prompt;
use sapo_flow_engine::runtime::disk::hex;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::Error;

/// A fingerprint of a data set.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Identity {
    /// Files with the SHA-256 of their bytes, in the order read.
    pub files: Vec<(PathBuf, String)>,
    /// SHA-256 of all rows' tokens.
    pub tokens: String,
}

impl Identity {
    /// Of rows that belong to no file.
    pub fn of_rows<'a>(rows: impl IntoIterator<Item = &'a Prompt>) -> Self {
        let mut digest = TokensDigest::default();
        rows.into_iter().for_each(|row| digest.add(row));
        Identity { files: Vec::new(), tokens: digest.finish() }
    }

    /// An error that names what differs, unless the data is what it was when the checkpoint was taken.
    pub fn check(&self, checkpoint: &Identity) -> Result<(), Error> {
        if self.files.len() != checkpoint.files.len() {
            let (then, now) = (checkpoint.files.len(), self.files.len());
            let message = format!("the data had {then} files when the checkpoint was taken, and has {now} now");
            return Err(Error::Restore(message));
        }
        for ((path, now), (_, then)) in self.files.iter().zip(&checkpoint.files) {
            if now != then {
                let message = format!("{} has changed since the checkpoint was taken", path.display());
                return Err(Error::Restore(message));
            }
        }
        if self.tokens != checkpoint.tokens {
            let message = "the same data files give other tokens than when the checkpoint was taken: the tokenizer, \
                           the chat template or the settings of the source have changed";
            return Err(Error::Restore(message.into()));
        }
        Ok(())
    }
}

/// SHA-256 of rows' tokens, in the making.
#[derive(Default)]
pub struct TokensDigest {
    hasher: Sha256,
    bytes: Vec<u8>,
}

impl TokensDigest {
    /// Takes a row.
    pub fn add(&mut self, prompt: &Prompt) {
        let bytes = &mut self.bytes;
        bytes.clear();
        bytes.extend(prompt.row.to_le_bytes());
        for ids in [Some(&prompt.prompt_ids), Some(&prompt.chosen_ids), prompt.rejected_ids.as_ref()] {
            // A list that is absent is told from an empty one by its length.
            bytes.extend(ids.map_or(u64::MAX, |ids| ids.len() as u64).to_le_bytes());
            bytes.extend(ids.into_iter().flatten().flat_map(|id| id.to_le_bytes()));
        }
        self.hasher.update(&self.bytes);
    }

    /// The digest of all rows, in hexadecimal.
    pub fn finish(self) -> String {
        hex(&self.hasher.finalize())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn changed_data_is_named() {
        let identity = |hash: &str, tokens: &str| Identity {
            files: vec![("data/a.jsonl".into(), hash.into())],
            tokens: tokens.into(),
        };
        let then = identity("1", "2");
        then.check(&then).unwrap();
        let text = |now: Identity| now.check(&then).unwrap_err().to_string();
        assert_eq!(text(identity("3", "2")), "cannot resume: data/a.jsonl has changed since the checkpoint was taken");
        assert!(text(identity("1", "3")).contains("the same data files give other tokens"));
        assert!(text(Identity { files: vec![], tokens: "2".into() }).contains("had 1 files"));
    }
}

//! Log-probabilities that a model has given to responses, so that none is computed twice while the model stays as it is.
//!
//! A replay buffer hands out the same pair again and again, and rewritten answers share their chosen one. What is kept is
//! in checkpoints: a number computed anew, in another batch, may differ in its last bits.

use std::collections::{HashMap, VecDeque};

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

/// A prompt with a response, by the hash of their tokens.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Key(u128);

impl Key {
    /// Of these tokens. The prompt's length counts: it says where the response begins.
    pub fn of(prompt_ids: &[u32], response_ids: &[u32]) -> Self {
        let mut hash = Sha256::new();
        hash.update((prompt_ids.len() as u64).to_le_bytes());
        for id in prompt_ids.iter().chain(response_ids) {
            hash.update(id.to_le_bytes());
        }
        let mut first = [0; 16];
        first.copy_from_slice(&hash.finalize()[..16]);
        Key(u128::from_le_bytes(first))
    }
}

/// Summed log-probabilities of responses, in nats, the newest of them.
#[derive(Debug, Default)]
pub struct Memo {
    logps: HashMap<Key, f32>,
    /// Oldest first.
    order: VecDeque<Key>,
}

impl Memo {
    /// What is known of a response.
    pub fn get(&self, key: Key) -> Option<f32> {
        self.logps.get(&key).copied()
    }

    /// Keep what was computed.
    pub fn insert(&mut self, key: Key, logps: f32) {
        if self.logps.insert(key, logps).is_none() {
            self.order.push_back(key);
        }
    }

    /// Forget the oldest beyond so many.
    pub fn trim(&mut self, capacity: usize) {
        while self.order.len() > capacity {
            if let Some(oldest) = self.order.pop_front() {
                self.logps.remove(&oldest);
            }
        }
    }

    /// Everything known, oldest first.
    pub fn entries(&self) -> Vec<(Key, f32)> {
        self.order.iter().filter_map(|key| Some((*key, self.get(*key)?))).collect()
    }
}

impl FromIterator<(Key, f32)> for Memo {
    fn from_iter<I: IntoIterator<Item = (Key, f32)>>(entries: I) -> Self {
        let mut memo = Memo::default();
        entries.into_iter().for_each(|(key, logps)| memo.insert(key, logps));
        memo
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_tell_where_the_response_begins() {
        assert_eq!(Key::of(&[1, 2], &[3]), Key::of(&[1, 2], &[3]));
        assert_ne!(Key::of(&[1, 2], &[3]), Key::of(&[1], &[2, 3]));
        assert_ne!(Key::of(&[1], &[2]), Key::of(&[1], &[2, 0]));
    }

    #[test]
    fn the_oldest_are_forgotten_and_the_rest_survives_a_checkpoint() {
        let keys: Vec<Key> = (0..4).map(|id| Key::of(&[], &[id])).collect();
        let mut memo: Memo = keys.iter().copied().zip([-0.1, -1.0 / 3.0, -3.0e-39, -7.5]).collect();
        memo.insert(keys[0], -0.2);
        memo.trim(3);
        assert_eq!((memo.get(keys[0]), memo.get(keys[1])), (None, Some(-1.0 / 3.0)));
        let text = serde_json::to_string(&memo.entries()).expect("numbers");
        let read: Memo =
            serde_json::from_str::<Vec<(Key, f32)>>(&text).expect("what was written").into_iter().collect();
        assert_eq!(read.entries(), memo.entries());
    }
}

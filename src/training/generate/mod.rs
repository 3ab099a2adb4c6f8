//! Generation: batched decoding with a cache of keys and values.

mod cache;

pub use cache::KvCache;

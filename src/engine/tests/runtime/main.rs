//! The runtime, driven by toy operators whose arithmetic is exact: hashes in place of tensors.

mod checkpoints;
mod failures;
mod staleness;
mod timeline;
mod toys;
mod views;
mod wide;

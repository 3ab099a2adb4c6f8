//! Decoder models from Hugging Face directories.
//!
//! | file | what it holds |
//! |---|---|
//! | [`config`] | config.json and generation_config.json |
//! | [`rope`] | rotary position embeddings and their scalings |
//! | [`mask`] | inputs and attention masks |
//! | `layer` | one decoder layer |
//! | [`decoder`] | the whole decoder |
//! | [`checkpointing`] | training with one layer's activations in memory |
//! | [`directory`] | a model with its weights, loaded and saved |

pub mod checkpointing;
pub mod config;
pub mod decoder;
pub mod directory;
mod layer;
pub mod mask;
pub mod rope;

pub use crate::generate::KvCache;
pub use checkpointing::CheckpointTape;
pub use config::{Architecture, ModelConfig};
pub use decoder::{Compute, Decoder, Kernels};
pub use directory::{Model, SourceFiles, save, save_description};
pub(crate) use layer::attention_kind;
pub use mask::{AttentionMask, ModelInput, SharedPrefix};

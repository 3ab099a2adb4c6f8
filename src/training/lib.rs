//! Everything of sapo-flow that touches libtorch: decoder models, text, generation, objectives and optimizers.
//!
//! Knows nothing of dataflow and never reads a pipeline: the operators crate joins the two.

pub mod bema;
mod blocks;
pub mod device;
pub mod ema;
pub mod error;
pub mod generate;
pub mod gguf;
mod heap;
pub mod learner;
pub mod logps;
pub mod memory;
pub mod model;
pub mod native;
pub mod objectives;
pub mod optim;
pub mod parameters;
mod rounding;
pub mod text;

pub use error::{Error, Result};

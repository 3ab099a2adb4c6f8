//! Objectives as formulas: what `preference_learner` takes under `objective`.
//!
//! | module | what it holds |
//! |---|---|
//! | `config` | the value of `objective`, its schema and its errors |
//! | [`definition`] | an objective as YAML: params, named expressions, a formula |
//! | `reading` | a definition read, each mistake at its key |
//! | [`built_in`] | the objectives that come along, one file each |
//! | [`formula`] | a definition compiled: what it needs, and its losses |
//! | `trial` | a formula evaluated on made-up pairs, to find what it uses and what is wrong with it |
//! | [`tensors`] | tensors in expressions |
//! | `sum` | weighted sums of objectives |
//! | `reference` | the pages that list them |

pub mod built_in;
mod config;
pub mod definition;
pub mod formula;
mod reading;
mod reference;
mod sum;
pub mod tensors;
mod trial;

pub use config::ObjectiveConfig;
pub use reference::{page, table};
pub use sum::Sum;

#[cfg(test)]
mod places;
#[cfg(test)]
mod steps;
#[cfg(test)]
mod tests;
#[cfg(test)]
mod usage;

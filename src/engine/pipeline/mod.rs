//! YAML to graph: parsing, parameters, validation, diagnostics.
//!
//! | module | stage |
//! |---|---|
//! | `yaml` | text to a tree in which every value knows its place |
//! | `params` | `-S` overrides and `${name}` |
//! | `schema` | values against the JSON Schema of an operator's config or of the `run` block |
//! | `document` | the top level, the `run` block, the nodes |
//! | `wiring` | `in` blocks to typed edges |
//! | `order` | dependency order, or the chain of a cycle that nothing delays |
//! | `lints` | what is legal and still looks like a mistake |
//!
//! Every stage goes on after an error where it can, so that one run over a file reports all of them.

use std::path::Path;

use crate::graph::Graph;
use crate::operator::Registry;

mod diagnostic;
mod document;
mod lints;
mod order;
mod params;
mod schema;
mod suggest;
mod wiring;
mod yaml;

pub use diagnostic::{Diagnostic, Diagnostics, Severity};
pub use suggest::closest;

pub(crate) use schema::{describe, follow};

/// Read a pipeline file and validate it.
///
/// `overrides` are `(name, value)` of the pipeline's `params`; values are YAML.
pub fn load(path: &Path, overrides: &[(String, String)], registry: &Registry) -> Result<Graph, Diagnostics> {
    let name = path.display().to_string();
    match std::fs::read_to_string(path) {
        Ok(text) => parse_str(&name, &text, overrides, registry),
        Err(error) => Err(Diagnostics::unreadable(&name, &error)),
    }
}

/// Validate a pipeline given as text; `name` stands for the file in diagnostics.
pub fn parse_str(
    name: &str,
    text: &str,
    overrides: &[(String, String)],
    registry: &Registry,
) -> Result<Graph, Diagnostics> {
    let mut report = diagnostic::Report::new(name, text, overrides);
    let graph = document::lower(overrides, registry, &mut report);
    let diagnostics = report.finish();
    match graph {
        Some(graph) if !diagnostics.has_errors() => Ok(Graph { warnings: diagnostics, ..graph }),
        _ => Err(diagnostics),
    }
}

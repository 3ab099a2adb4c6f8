//! YAML to graph: parsing, parameters, validation, diagnostics.
//!
//! | module | stage |
//! |---|---|
//! | `yaml` | text to a tree in which every value knows its place |
//! | `library` | `operators` and `include`: composite operators as defined |
//! | `declaration`, `environment` | what `params` and `env` say |
//! | `params`, `interpolation` | `-S` overrides and `${name}` |
//! | `composite` | uses of composite operators to the nodes inside |
//! | `schema` | values against the JSON Schema of an operator's config or of the `run` block |
//! | `document` | the top level, the `run` block, the nodes |
//! | `expand`, `composite_doc` | the flat pipeline as text; the reference pages of composite operators |
//! | `editor` | the JSON Schema of pipelines |
//! | `scaffold` | a first pipeline of given operators |
//! | `wiring`, `types` | `in` blocks to typed edges |
//! | `retractions` | edges over which something may be taken back |
//! | `order` | dependency order, or the chain of a cycle that nothing delays |
//! | `lints` | what is legal and still looks like a mistake |
//!
//! Every stage goes on after an error where it can, so that one run over a file reports all of them.

use std::path::Path;

use crate::graph::Graph;
use crate::operator::Registry;

mod composite;
mod composite_doc;
mod declaration;
mod diagnostic;
mod document;
mod editor;
mod environment;
mod expand;
mod interpolation;
mod library;
mod lints;
mod order;
mod params;
mod retractions;
mod scaffold;
mod schema;
mod suggest;
mod types;
mod wiring;
mod yaml;

pub use composite_doc::{CompositeDoc, CompositePort};
pub use diagnostic::{Diagnostic, Diagnostics, Severity};
pub use editor::json_schema;
pub use scaffold::scaffold;
pub use suggest::closest;

use diagnostic::Report;
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

/// Validate a pipeline given as text; `name` stands for the file in diagnostics, and included files are looked for
/// beside it.
pub fn parse_str(
    name: &str,
    text: &str,
    overrides: &[(String, String)],
    registry: &Registry,
) -> Result<Graph, Diagnostics> {
    let mut report = Report::new(name, text, overrides);
    let lowered = document::lower(overrides, registry, &mut report);
    let diagnostics = report.finish();
    match lowered {
        Some((graph, _)) if !diagnostics.has_errors() => Ok(Graph { warnings: diagnostics, ..graph }),
        _ => Err(diagnostics),
    }
}

/// A pipeline as the flat one that runs: parameters filled in, composite operators replaced by the nodes inside, defaults
/// written out, and a comment on every value that says where it came from.
pub fn expand(
    name: &str,
    text: &str,
    overrides: &[(String, String)],
    registry: &Registry,
) -> Result<String, Diagnostics> {
    let mut report = Report::new(name, text, overrides);
    let lowered = document::lower(overrides, registry, &mut report);
    match lowered {
        Some((_, filled)) if !report.has_errors() => Ok(expand::to_text(&filled, registry, &report)),
        _ => Err(report.finish()),
    }
}

/// The composite operators that a pipeline defines or includes, whether or not its nodes are right.
pub fn composites(name: &str, text: &str, registry: &Registry) -> Result<Vec<CompositeDoc>, Diagnostics> {
    let mut report = Report::new(name, text, &[]);
    let library = yaml::parse(0, &mut report).map(|root| library::Library::read(&root, name, registry, &mut report));
    match library {
        Some(library) if !report.has_errors() => {
            Ok(library.list.iter().map(|definition| CompositeDoc::of(definition, &report)).collect())
        }
        _ => Err(report.finish()),
    }
}

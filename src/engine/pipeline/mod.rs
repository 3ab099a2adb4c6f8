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
//! | `config`, `placed` | `with` blocks; where to show what an operator says of them |
//! | `expand` | the flat pipeline as text |
//! | `composite_doc`, `composite_ports` | the reference pages of composite operators, and what their ports carry |
//! | `overrides` | values of params from outside of their block |
//! | `testing` | `tests`: the part of a graph that one runs, and what is expected of it |
//! | `sweep` | `sweep`: values that parameters take in turn |
//! | `editor` | the JSON Schema of pipelines |
//! | `scaffold`, `scaffold_text` | a first pipeline of given operators |
//! | `wiring`, `types` | `in` blocks to typed edges |
//! | `retractions` | edges over which something may be taken back |
//! | `written` | what nodes write, each into a place of its own |
//! | `order` | dependency order, or the chain of a cycle that nothing delays |
//! | `lints` | what is legal and still looks like a mistake |
//!
//! Every stage goes on after an error where it can, so that one run over a file reports all of them.

use std::path::Path;

use crate::graph::Graph;
use crate::operator::Registry;

mod composite;
mod composite_doc;
mod composite_ports;
mod config;
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
mod overrides;
mod params;
mod placed;
mod retractions;
mod scaffold;
mod scaffold_text;
mod schema;
mod suggest;
mod sweep;
mod testing;
mod types;
mod wiring;
mod written;
mod yaml;

pub use composite_doc::{CompositeDoc, CompositePort};
pub use diagnostic::{Diagnostic, Diagnostics, Severity};
pub use editor::json_schema;
pub use scaffold::scaffold;
pub use suggest::closest;
pub use sweep::{Combination, Sweep};
pub use testing::{Case, Verdict};

use diagnostic::Report;
use document::Lowered;
pub(crate) use schema::{describe, follow};
use sweep::Values;
use testing::Source;

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
    read(&Source { name, text, overrides }, registry)
        .map(|read| Graph { warnings: read.warnings, ..read.lowered.graph })
}

/// The tests of a pipeline.
///
/// # Errors
/// What is wrong with the pipeline or with its tests.
pub fn tests(
    name: &str,
    text: &str,
    overrides: &[(String, String)],
    registry: &Registry,
) -> Result<Vec<Case>, Diagnostics> {
    read(&Source { name, text, overrides }, registry).map(|read| read.cases)
}

/// The runs of a pipeline's `sweep` block, and of overrides that give several values: `-S name=a,b`. A parameter that is
/// overridden takes these values instead of those in the block's grid. Without any, it is one combination of no values.
///
/// # Errors
/// What is wrong with the pipeline or with its sweep.
pub fn sweep(
    name: &str,
    text: &str,
    overrides: &[(String, String)],
    registry: &Registry,
) -> Result<Sweep, Diagnostics> {
    let source = Source { name, text, overrides };
    let mut report = source.report();
    let Some(root) = document::root(&mut report) else { return Err(report.finish()) };
    match sweep::read(&root, &source, registry, Values::OnCommandLine) {
        Ok(found) => Ok(found.unwrap_or_default()),
        Err(list) => Err(Diagnostics { list }),
    }
}

/// A pipeline as the flat one that runs: parameters filled in, composite operators replaced by the nodes inside, defaults
/// written out, and a comment on every value that says where it came from. Its tests are left out.
pub fn expand(
    name: &str,
    text: &str,
    overrides: &[(String, String)],
    registry: &Registry,
) -> Result<String, Diagnostics> {
    let read = read(&Source { name, text, overrides }, registry)?;
    Ok(expand::to_text(&read.lowered.filled, registry, &read.report))
}

/// A pipeline that can run, and what belongs to it.
struct Read {
    lowered: Lowered,
    cases: Vec<Case>,
    warnings: Diagnostics,
    /// The sources, for places of values.
    report: Report,
}

/// Everything there is in a pipeline, or everything that is wrong with it.
fn read(source: &Source, registry: &Registry) -> Result<Read, Diagnostics> {
    let mut report = source.report();
    let given = overrides::from_command_line(source.overrides, &mut report);
    let root = document::root(&mut report);
    let lowered = root.as_ref().and_then(|root| document::lower(root, &given, registry, &mut report));
    let Some(root) = root else { return Err(report.finish()) };
    let is_right = lowered.is_some() && !report.has_errors();
    let (cases, mut wrong) = testing::read(&root, source, registry, is_right);
    wrong.extend(sweep::read(&root, source, registry, Values::InFile { is_right }).err().unwrap_or_default());
    let (Some(lowered), true) = (lowered, is_right && wrong.is_empty()) else {
        return Err(report.finish_with(wrong));
    };
    let (warnings, report) = report.take();
    Ok(Read { lowered, cases, warnings, report })
}

/// The composite operators that a pipeline defines or includes, whether or not its nodes are right.
pub fn composites(name: &str, text: &str, registry: &Registry) -> Result<Vec<CompositeDoc>, Diagnostics> {
    let mut report = Report::new(name, text, &[]);
    let library = yaml::parse(0, &mut report).map(|root| library::Library::read(&root, name, registry, &mut report));
    match library {
        Some(library) if !report.has_errors() => {
            let page = |definition| CompositeDoc::of(definition, &library, registry, &report);
            Ok(library.list.iter().map(page).collect())
        }
        _ => Err(report.finish()),
    }
}

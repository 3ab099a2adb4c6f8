//! `sapo-flow validate`: everything that is wrong with pipelines.

use std::path::Path;

use sapo_flow_engine::pipeline::Diagnostics;
use sapo_flow_engine::{Graph, pipeline};

use super::args::ValidateArgs;
use super::{Failure, Outcome, count, show, terminal};

/// Check pipelines.
pub fn validate(args: &ValidateArgs) -> Outcome {
    let mut outcome = Ok(());
    for path in &args.pipelines {
        match load(path, &args.overrides.overrides) {
            Ok(graph) => {
                show(&graph.warnings);
                terminal::print(&format!("{}: ok, {}", path.display(), size(&graph)))?;
            }
            Err(failure) => outcome = Err(failure),
        }
    }
    outcome
}

/// Load a pipeline, or show what is wrong with it.
pub fn load(path: &Path, overrides: &[(String, String)]) -> Result<Graph, Failure> {
    pipeline::load(path, overrides, &sapo_flow_operators::registry()).map_err(|diagnostics| invalid(path, &diagnostics))
}

/// Show what is wrong with a pipeline.
pub fn invalid(path: &Path, diagnostics: &Diagnostics) -> Failure {
    show(diagnostics);
    let (errors, warnings) = (count(diagnostics.errors(), "error"), count(diagnostics.warnings(), "warning"));
    terminal::message(&format!("{}: invalid, {errors}, {warnings}", path.display()));
    Failure::Invalid
}

/// `7 nodes, 8 edges, 1 of them feedback`
pub fn size(graph: &Graph) -> String {
    let feedback = graph.feedback_edges().count();
    let mut text = format!("{}, {}", count(graph.nodes.len(), "node"), count(graph.edges.len(), "edge"));
    if feedback > 0 {
        text += &format!(", {feedback} of them feedback");
    }
    text
}

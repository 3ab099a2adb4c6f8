//! `sapo-flow graph`: a pipeline's graph in a language that other programs draw.

use super::args::{GraphArgs, GraphFormat};
use super::{Outcome, show, terminal, validate};

/// Draw a pipeline.
pub fn graph(args: &GraphArgs) -> Outcome {
    let graph = validate::load(&args.pipeline, &args.overrides.overrides)?;
    show(&graph.warnings);
    terminal::print(&match args.format {
        GraphFormat::Mermaid => graph.to_mermaid(),
        GraphFormat::Dot => graph.to_dot(),
    })?;
    Ok(())
}

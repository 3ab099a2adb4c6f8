//! `sapo-flow expand`: a pipeline as the flat one that runs, with where each of its values came from.

use anyhow::Context;
use sapo_flow_engine::pipeline;

use super::args::ExpandArgs;
use super::{Outcome, terminal, validate};

/// Print a flat pipeline.
pub fn expand(args: &ExpandArgs) -> Outcome {
    let name = args.pipeline.display().to_string();
    let text = std::fs::read_to_string(&args.pipeline).with_context(|| format!("cannot read {name}"))?;
    let registry = sapo_flow_operators::registry();
    let flat = pipeline::expand(&name, &text, &args.overrides.overrides, &registry)
        .map_err(|diagnostics| validate::invalid(&args.pipeline, &diagnostics))?;
    terminal::print(&flat)?;
    Ok(())
}

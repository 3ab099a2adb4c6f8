//! Pipelines as users write them: what is read, what is refused and where, what the graph looks like.

mod composites;
mod diagnostics;
mod docs;
mod drawing;
mod graph;
mod params;
mod plan;
mod sweeps;
mod testing;
mod toy;
mod types;

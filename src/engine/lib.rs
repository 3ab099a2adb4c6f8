//! The dataflow language of sapo-flow and its runtime.
//!
//! YAML text becomes a validated [`Graph`] ([`load`](pipeline::load)), the graph becomes a timely dataflow
//! ([`run`](runtime::run)). Operators live elsewhere and are found through a [`Registry`]; this crate never names libtorch.
//!
//! | module | what it holds |
//! |---|---|
//! | [`record`], `values` | what travels on edges |
//! | [`operator`] | what an operator is, and the registry of them |
//! | `issue` | what an operator has to say of its settings |
//! | [`pipeline`] | YAML to graph: parsing, parameters, validation, diagnostics |
//! | [`graph`] | the lowered graph, drawn as mermaid or dot |
//! | [`relation`] | operators that are dataflow: collections in, collections out |
//! | [`plan`] | what a run will take, before it is begun |
//! | [`docs`] | the reference pages of operators |
//! | [`runtime`] | the graph as a timely dataflow: steps, feedback, device threads, checkpoints |

pub mod docs;
mod draw;
pub mod graph;
mod issue;
pub mod number;
pub mod operator;
pub mod pipeline;
pub mod plan;
mod port;
pub mod record;
pub mod relation;
pub mod runtime;
mod step;
mod values;

pub use graph::{Edge, Graph, Node, RunSettings};
pub use operator::{
    BuildContext, Connections, Define, Inputs, Operator, OperatorError, OperatorSpec, Outputs, Placement, PortSpec,
    Registry, Retractions,
};
pub use plan::{NodePlan, PlanContext};
pub use record::{
    Batch, Metrics, Pair, PortType, Prompt, Record, ReferenceLogps, Retracted, Retraction, Sample, Segment, TokenId,
    Values, Weights,
};

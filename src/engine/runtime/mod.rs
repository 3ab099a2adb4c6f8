//! The graph as a timely dataflow.

pub mod event;

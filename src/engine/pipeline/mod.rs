//! YAML to graph.

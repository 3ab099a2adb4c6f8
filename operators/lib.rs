//! The operators users write in YAML, one file each, and the one list of them.
//!
//! | module | what it holds |
//! |---|---|
//! | [`data`] | reading rows of data sets and tokenizing them |
//! | [`prompt_source`] | data rows, a batch a step |
//! | [`batcher`] | pairs gathered into batches of bounded length |
//! | [`metrics_sink`], [`tensorboard`] | numbers to JSON Lines and TensorBoard |
//! | [`sample_sink`] | readable samples to JSON Lines |
//! | [`log_file`] | files that are cut back to a checkpoint when a run resumes |

pub mod batcher;
pub mod data;
pub mod error;
pub mod log_file;
pub mod metrics_sink;
pub mod prompt_source;
pub mod sample_sink;
pub mod tensorboard;
#[cfg(test)]
mod testing;

use sapo_flow_engine::{OperatorSpec, Registry};

pub use error::Error;

/// All operators. Validation, help, JSON Schema and runs read this list.
pub fn registry() -> Registry {
    Registry::new(vec![
        OperatorSpec::of::<prompt_source::PromptSource>(),
        OperatorSpec::of::<batcher::Batcher>(),
        OperatorSpec::of::<metrics_sink::MetricsSink>(),
        OperatorSpec::of::<sample_sink::SampleSink>(),
    ])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_example_is_a_valid_pipeline() {
        let registry = registry();
        for operator in registry.iter() {
            let nodes = operator.example.lines().map(|line| format!("  {line}\n")).collect::<String>();
            let text = format!("version: 1\nrun: {{steps: 1}}\nnodes:\n{nodes}");
            let graph = sapo_flow_engine::pipeline::parse_str(operator.name, &text, &[], &registry)
                .unwrap_or_else(|diagnostics| panic!("{}\n{text}", diagnostics));
            assert!(graph.nodes.iter().any(|node| node.op.name == operator.name), "{}", operator.name);
        }
    }
}

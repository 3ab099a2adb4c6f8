//! The operators users write in YAML, one file each, and the one list of them.
//!
//! | module | what it holds |
//! |---|---|
//! | [`data`] | reading rows of data sets and tokenizing them |
//! | [`prompt_source`], [`watched`] | data rows, a batch a step; data that is edited meanwhile |
//! | [`sampler`], [`decoding`] | whole responses; how samplers arrange their work |
//! | [`segment_sampler`], [`rewrite`], [`segments`] | rejected responses: segments of answers rewritten by a model |
//! | [`replay_buffer`], `replay_statistics`, `shares` | the newest pairs, and draws from them |
//! | [`batcher`] | pairs gathered into batches of bounded length |
//! | [`mod@reference`] | a reference model's log-probabilities |
//! | [`relational`] | collections of records, maintained by differential dataflow |
//! | [`preference_learner`], [`learner_config`], `failed_update` | updates of the policy, and what is kept of one that failed |
//! | [`objectives`] | what learners minimise, as formulas |
//! | [`ema`], [`bema`], [`weights`] | averaged weights; weights shared between operators |
//! | [`evaluator`], `sums` | held-out rows |
//! | [`expression`] | formulas written in YAML, within limits |
//! | [`map`], [`filter`], [`score`], [`scorer`] | expressions over records; log-probabilities for them |
//! | [`checkpoint`] | models in Hugging Face directories |
//! | [`subprocess`], [`child`], `seconds` | programs of one's own that answer records |
//! | [`openai_sampler`], [`openai_judge`], [`openai`] | servers that answer and judge |
//! | [`item`] | what prompts, samples and pairs have in common |
//! | [`draws`] | random draws as functions of seed, node and step |
//! | [`metrics_sink`], [`tensorboard`] | numbers to JSON Lines and TensorBoard |
//! | [`sample_sink`] | readable samples to JSON Lines |
//! | [`log_file`], [`state`] | files that are cut back to a checkpoint when a run resumes; what a checkpoint holds |

pub mod batcher;
pub mod bema;
pub mod checkpoint;
pub mod child;
mod compute;
pub mod data;
pub mod decoding;
pub mod draws;
pub mod ema;
pub mod error;
pub mod evaluator;
mod examples;
pub mod expression;
mod failed_update;
pub mod filter;
pub mod item;
pub mod learner_config;
pub mod log_file;
pub mod map;
pub mod metrics_sink;
pub mod objectives;
pub mod openai;
pub mod openai_judge;
pub mod openai_sampler;
mod planned_batches;
pub mod preference_learner;
pub mod prompt_source;
pub mod reference;
pub mod relational;
pub mod replay_buffer;
mod replay_statistics;
pub mod rewrite;
pub mod sample_sink;
pub mod sampler;
pub mod score;
pub mod scorer;
mod seconds;
pub mod segment_sampler;
pub mod segments;
mod shares;
pub mod state;
pub mod subprocess;
mod sums;
pub mod tensorboard;
#[cfg(test)]
mod testing;
pub mod watched;
pub mod weights;

use sapo_flow_engine::{OperatorSpec, Registry};

pub use compute::settled_dtype;
pub use error::Error;
use relational::{Relational, antijoin, best_worst, count_by, distinct, join, semijoin, top_k, window};

/// All operators. Validation, help, JSON Schema and runs read this list.
pub fn registry() -> Registry {
    Registry::new(vec![
        OperatorSpec::of::<prompt_source::PromptSource>(),
        OperatorSpec::of::<segment_sampler::SegmentSampler>(),
        OperatorSpec::of::<sampler::Sampler>(),
        OperatorSpec::of::<replay_buffer::ReplayBuffer>(),
        OperatorSpec::of::<Relational<window::Window>>(),
        OperatorSpec::of::<Relational<distinct::Distinct>>(),
        OperatorSpec::of::<Relational<count_by::CountBy>>(),
        OperatorSpec::of::<Relational<top_k::TopK>>(),
        OperatorSpec::of::<Relational<join::Join>>(),
        OperatorSpec::of::<Relational<semijoin::Semijoin>>(),
        OperatorSpec::of::<Relational<antijoin::Antijoin>>(),
        OperatorSpec::of::<Relational<best_worst::BestWorst>>(),
        OperatorSpec::of::<batcher::Batcher>(),
        OperatorSpec::of::<reference::Reference>(),
        OperatorSpec::of::<preference_learner::PreferenceLearner>(),
        OperatorSpec::of::<ema::Ema>(),
        OperatorSpec::of::<bema::Bema>(),
        OperatorSpec::of::<evaluator::Evaluator>(),
        OperatorSpec::of::<map::Map>(),
        OperatorSpec::of::<filter::Filter>(),
        OperatorSpec::of::<score::Score>(),
        OperatorSpec::of::<subprocess::Subprocess>(),
        OperatorSpec::of::<openai_sampler::OpenaiSampler>(),
        OperatorSpec::of::<openai_judge::OpenaiJudge>(),
        OperatorSpec::of::<checkpoint::Checkpoint>(),
        OperatorSpec::of::<metrics_sink::MetricsSink>(),
        OperatorSpec::of::<sample_sink::SampleSink>(),
    ])
}

#[cfg(test)]
mod tests {
    use serde_json::Value as Json;

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

    /// Threads are told by their names, which they have from the one that made them.
    #[test]
    #[cfg(target_os = "linux")]
    fn a_released_team_is_gone() {
        use sapo_flow_engine::runtime::openmp::release_team;
        use tch::{Device, Kind, Tensor};

        fn threads() -> usize {
            let named = |entry: std::io::Result<std::fs::DirEntry>| {
                std::fs::read_to_string(entry.ok()?.path().join("comm")).ok().filter(|name| name.trim() == "teams")
            };
            std::fs::read_dir("/proc/self/task").unwrap().filter_map(named).count()
        }
        let work = || {
            sapo_flow_training::device::set_threads(3);
            let alone = threads();
            let numbers = Tensor::ones([1 << 22], (Kind::Float, Device::Cpu));
            assert_eq!(numbers.sum(Kind::Float).double_value(&[]), f64::from(1 << 22));
            assert_eq!(threads(), alone + 2, "three threads work");
            release_team();
            let deadline = std::time::Instant::now() + std::time::Duration::from_secs(10);
            while threads() > alone && std::time::Instant::now() < deadline {}
            assert_eq!(threads(), alone);
            // And what comes next has a team again.
            assert_eq!(numbers.sum(Kind::Float).double_value(&[]), f64::from(1 << 22));
            assert_eq!(threads(), alone + 2);
        };
        std::thread::Builder::new().name("teams".into()).spawn(work).unwrap().join().unwrap();
    }

    /// Help, editors and `expand` read defaults from the schemas.
    #[test]
    fn every_key_that_may_be_left_out_shows_its_default() {
        fn lacking(schema: &Json, root: &Json, place: &str, found: &mut Vec<String>) {
            let at =
                |schema: &Json| match schema["$ref"].as_str().and_then(|path| root.pointer(path.strip_prefix('#')?)) {
                    Some(target) => target.clone(),
                    None => schema.clone(),
                };
            let schema = at(schema);
            let branches =
                ["anyOf", "oneOf"].into_iter().flat_map(|word| schema[word].as_array().into_iter().flatten());
            branches.for_each(|branch| lacking(branch, root, place, found));
            let required: Vec<&Json> = schema["required"].as_array().into_iter().flatten().collect();
            for (key, property) in schema["properties"].as_object().into_iter().flatten() {
                let (target, name) = (at(property), format!("{place}.{key}"));
                let may_be_absent = |schema: &Json| at(schema).to_string().contains("\"null\"");
                let default = !property["default"].is_null() || !target["default"].is_null();
                let nested = target["properties"].is_object();
                if !required.iter().any(|other| *other == key) && !default && !nested && !may_be_absent(property) {
                    found.push(name.clone());
                }
                lacking(property, root, &name, found);
            }
        }
        let mut found = Vec::new();
        for operator in registry().iter() {
            let schema = (operator.config_schema)().to_value();
            lacking(&schema, &schema, operator.name, &mut found);
        }
        // The value of `objective` is a list of alternatives that have nothing in common, told by `objectives`.
        found.retain(|name| !name.starts_with("preference_learner.objective."));
        assert_eq!(found, [""; 0]);
    }
}

//! Outputs that have the type of what arrives at an input, and operators that ask what they are connected with.

use sapo_flow_engine::operator::{ConfigIssue, Connections};
use sapo_flow_engine::pipeline::{self, Diagnostics};
use sapo_flow_engine::{
    BuildContext, Define, Graph, Inputs, Operator, OperatorError, OperatorSpec, Outputs, PortSpec, PortType,
};
use schemars::JsonSchema;
use serde::Deserialize;

use crate::toy::{around, registry};

const RECORDS: &[PortType] = &[PortType::Prompts, PortType::Pairs];

/// What `pass` takes.
#[derive(Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
struct Config {
    /// The type that it expects.
    #[serde(default)]
    expects: Option<String>,
}

/// Passes prompts or pairs on.
struct Pass;

impl Operator for Pass {
    fn step(&mut self, _: u64, _: Inputs) -> Result<Outputs, OperatorError> {
        Ok(Outputs::new())
    }
}

impl Define for Pass {
    const NAME: &'static str = "pass";
    const SUMMARY: &'static str = "Passes records on.";
    const DOCS: &'static str = "Does nothing.";
    const EXAMPLE: &'static str = "pass: {op: pass, in: prompts}";
    const INPUTS: &'static [PortSpec] = &[PortSpec::new("records", RECORDS, "what to pass on").many()];
    const OUTPUTS: &'static [PortSpec] = &[PortSpec::new("records", RECORDS, "the same").following("records")];
    type Config = Config;

    fn check_connections(config: &Config, connections: &Connections) -> Vec<ConfigIssue> {
        let arrives = connections.input("records").map(|kind| kind.to_string());
        let wrong = config.expects.is_some() && config.expects != arrives;
        let message = format!("found {arrives:?}, read: {:?}", connections.outputs);
        wrong.then(|| ConfigIssue::new("expects", message)).into_iter().collect()
    }

    fn build(_: Config, _: &BuildContext) -> Result<Self, OperatorError> {
        Ok(Pass)
    }
}

fn read(nodes: &str) -> Result<Graph, Diagnostics> {
    let source = "  prompts: {op: prompt_source, with: {path: a}}\n";
    let registry = registry().with(OperatorSpec::of::<Pass>());
    pipeline::parse_str("p.yaml", &around(&format!("{source}{nodes}")), &[], &registry)
}

fn complaints(nodes: &str) -> Vec<String> {
    let diagnostics = read(nodes).map_or_else(|diagnostics| diagnostics, |graph| graph.warnings);
    diagnostics.list.iter().map(|d| format!("{}:{} {}", d.line, d.column, d.message)).collect()
}

const LOOP: &str = "  one: {op: pass, in: prompts}
  two: {op: pass, in: one}
  segments: {op: segment_sampler, in: {prompts: two, weights: {from: learner, feedback: {max_staleness: 0}}}}
  three: {op: pass, in: segments}
  batches: {op: batcher, in: three}
  learner: {op: learner, in: batches, with: {objective: orpo}}
  metrics: {op: metrics_sink, in: learner.metrics}
";

#[test]
fn an_output_has_the_type_of_what_arrives() {
    let graph = read(LOOP).unwrap();
    let of = |from: &str| graph.edges.iter().find(|edge| graph.nodes[edge.from_node].name == from).map(|e| e.port_type);
    assert_eq!(["one", "two", "three"].map(of), [PortType::Prompts, PortType::Prompts, PortType::Pairs].map(Some));
    assert!(graph.warnings.list.is_empty());
}

#[test]
fn what_arrives_does_not_fit_further_on() {
    assert_eq!(
        complaints(&LOOP.replace("in: three", "in: two")),
        ["9:30 `two.records` carries Prompts, but the input `pairs` of `batcher` takes Pairs"]
    );
    // One mistake is one error: what `three` would carry is unknown.
    assert_eq!(
        complaints(&LOOP.replace("in: segments}", "in: learner.weights}")),
        [
            "8:25 `learner.weights` carries Weights, but the input `records` of `pass` takes Prompts or Pairs",
            "8:25 a cycle without `feedback`: three -> batches -> learner.weights -> three",
        ]
    );
    let text = LOOP.replace("in: batches,", "in: three,");
    let help = read(&text).err().and_then(|found| found.list[0].help.clone());
    assert_eq!(help.as_deref(), Some("`batches.batches` carries Batches"));
}

#[test]
fn several_types_cannot_mix() {
    assert_eq!(
        complaints(&LOOP.replace("in: segments}", "in: [segments, two]}")),
        ["8:36 the input `records` of `pass` takes records of one type, found Pairs and Prompts"]
    );
    let circle = "  a: {op: pass, in: {from: b, feedback: {max_staleness: 0}}}\n  b: {op: pass, in: a}\n";
    assert_eq!(complaints(circle), ["5:28 nothing tells what arrives at the input `records` of `pass`"]);
}

#[test]
fn operators_are_asked_once_all_is_connected() {
    let good = LOOP.replace("three: {op: pass,", "three: {op: pass, with: {expects: Pairs},");
    assert_eq!(complaints(&good), [""; 0]);
    assert_eq!(
        complaints(&good.replace("expects: Pairs", "expects: Prompts")),
        ["8:37 `expects`: found Some(\"Pairs\"), read: [\"records\"]"]
    );
}

#[test]
fn scaffolds_follow_types() {
    let registry = registry().with(OperatorSpec::of::<Pass>());
    let operators = ["segment_sampler", "pass", "batcher", "learner"].map(str::to_owned);
    let text = pipeline::scaffold(&operators, &registry).unwrap();
    let nodes: serde_yaml::Value = serde_yaml::from_str(&text).unwrap();
    assert_eq!(nodes["nodes"]["pass"]["in"]["records"], "segment_sampler.pairs");
    assert_eq!(nodes["nodes"]["batcher"]["in"]["pairs"], "pass.records");
}

//! Plans: what nodes learn of each other, and how their memory adds up.

use std::collections::BTreeMap;

use sapo_flow_engine::pipeline;
use sapo_flow_engine::plan::{Emits, Memory, peak_memory, plan};
use sapo_flow_engine::{
    BuildContext, Define, Graph, Inputs, NodePlan, Operator, OperatorError, OperatorSpec, Outputs, PlanContext,
    PortSpec, PortType, Registry,
};
use schemars::JsonSchema;
use serde::Deserialize;

/// Takes what its config says, and emits one row more than it reads.
struct Weighed;

#[derive(Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
struct Config {
    #[serde(default)]
    kept: u64,
    #[serde(default)]
    working: u64,
    #[serde(default)]
    refuse: bool,
}

impl Operator for Weighed {
    fn step(&mut self, _: u64, _: Inputs) -> Result<Outputs, OperatorError> {
        Ok(Outputs::new())
    }
}

impl Define for Weighed {
    const NAME: &'static str = "weighed";
    const SUMMARY: &'static str = "";
    const DOCS: &'static str = "";
    const EXAMPLE: &'static str = "";
    const INPUTS: &'static [PortSpec] = &[PortSpec::new("rows", &[PortType::Metrics], "").many().optional()];
    const OUTPUTS: &'static [PortSpec] = &[PortSpec::new("rows", &[PortType::Metrics], "")];
    type Config = Config;

    fn plan(config: &Config, context: &PlanContext) -> Result<NodePlan, OperatorError> {
        if config.refuse {
            return Err("no".into());
        }
        let (kept, working) = (config.kept, config.working);
        let memory = Memory { device: "cpu".into(), kept, working, working_expected: working / 10, brief: false };
        let emits = Emits { rows: Some(1 + context.input("rows").rows.unwrap_or(0)), ..Emits::default() };
        Ok(NodePlan { memory: Some(memory), emits, ..NodePlan::default() })
    }

    fn build(_: Config, _: &BuildContext) -> Result<Self, OperatorError> {
        Ok(Weighed)
    }
}

fn read(nodes: &str) -> Graph {
    let text = format!("version: 1\nrun: {{steps: 1}}\nnodes:\n{nodes}");
    pipeline::parse_str("p.yaml", &text, &[], &Registry::new(vec![OperatorSpec::of::<Weighed>()])).unwrap()
}

/// `a` leads to `b` and `c`, these to `d`, and `d` back to `a`.
fn diamond(max_staleness: u64) -> Graph {
    read(&format!(
        "  a: {{op: weighed, in: {{rows: {{from: d, feedback: {{max_staleness: {max_staleness}}}}}}}, with: {{kept: 1, working: 500}}}}
  b: {{op: weighed, in: a, with: {{kept: 2, working: 300}}}}
  c: {{op: weighed, in: a, with: {{kept: 4, working: 400}}}}
  d: {{op: weighed, in: [b, c], with: {{kept: 8, working: 600}}}}
"
    ))
}

#[test]
fn nodes_on_a_path_take_turns() {
    let graph = diamond(0);
    let plans = plan(&graph).unwrap();
    // b and c may work together, a and d by themselves.
    assert_eq!(peak_memory(&graph, &plans), BTreeMap::from([("cpu".to_owned(), (15 + 700, 15 + 70))]));
    let graph = diamond(1);
    assert_eq!(peak_memory(&graph, &plans)["cpu"], (15 + 1800, 15 + 180));
}

#[test]
fn brief_work_is_not_expected_at_the_same_time() {
    // Of a with 500 and b, c and d with 300, 400 and 600, a tenth of which is expected.
    for (a, b, expected) in [(true, false, 130), (true, true, 100), (false, true, 150)] {
        let graph = diamond(1);
        let mut plans = plan(&graph).unwrap();
        for (node, brief) in [(0, a), (1, b)] {
            plans[node].memory.as_mut().unwrap().brief = brief;
        }
        assert_eq!(peak_memory(&graph, &plans)["cpu"], (15 + 1800, 15 + expected));
    }
}

/// Where no end is heavier than all that is beside it, and what is best on one path is not best on another.
#[test]
fn the_heaviest_nodes_beside_each_other_are_found() {
    // In the shape of an N: a leads to c, b to c and d. Beside each other are a b, a d, c d.
    let graph = read(
        "  a: {op: weighed, with: {working: 50}}
  b: {op: weighed, with: {working: 30}}
  c: {op: weighed, in: [a, b], with: {working: 70}}
  d: {op: weighed, in: b, with: {working: 20}}
",
    );
    assert_eq!(peak_memory(&graph, &plan(&graph).unwrap())["cpu"], (90, 9));
}

/// Trying all sets of them would take 2^40 steps.
#[test]
fn many_paths_beside_each_other_are_no_trouble() {
    let paths = (0..40).map(|path| {
        let (first, second) = (10 + path % 2 * 10, 15);
        format!(
            "  a{path}: {{op: weighed, with: {{working: {first}}}}}\n  b{path}: {{op: weighed, in: a{path}, with: {{working: {second}}}}}\n"
        )
    });
    let graph = read(&paths.collect::<String>());
    // 20 paths with 15 and 20 with 20 at most.
    assert_eq!(peak_memory(&graph, &plan(&graph).unwrap())["cpu"].0, 700);
}

#[test]
fn plans_see_those_before_them_and_those_behind_feedback_edges() {
    let plans = plan(&diamond(0)).unwrap();
    let rows: Vec<u64> = plans.iter().filter_map(|plan| plan.emits.rows).collect();
    // At first a knows nothing of d: 1, 2, 2, 5. Then it does.
    assert_eq!(rows, [6, 2, 2, 5]);
}

#[test]
fn all_nodes_that_cannot_tell_are_named() {
    let graph = read("  a: {op: weighed, with: {refuse: true}}\n  b: {op: weighed, in: a, with: {refuse: true}}\n");
    assert_eq!(plan(&graph).unwrap_err(), ["node `a`: no", "node `b`: no"]);
}

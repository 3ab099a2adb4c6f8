//! A view turns an operator's changes into records of a declared port, step by step.

use std::collections::VecDeque;
use std::sync::Arc;

use differential_dataflow::operators::count::CountTotal;
use sapo_flow_engine::graph::{Graph, RunSettings};
use sapo_flow_engine::operator::{Define, RecordStream, View};
use sapo_flow_engine::record::{Change, Metrics, PortType, Record};
use sapo_flow_engine::runtime::view;
use sapo_flow_engine::{BuildContext, Inputs, Operator, OperatorError, OperatorSpec, Outputs, PortSpec};

use crate::toys::{Rows, Sink, ToyConfig, edge, node, run_fresh};

/// A window over the last two steps' rows.
struct Window(VecDeque<u64>);

impl Operator for Window {
    fn step(&mut self, step: u64, mut inputs: Inputs) -> Result<Outputs, OperatorError> {
        let mut outputs = Outputs::new();
        let mut change =
            |element: u64, diff| outputs.push(View::CHANGES, Record::Change(Change { element: vec![element], diff }));
        for prompt in inputs.prompts("prompts") {
            // Row 0 comes alone, row 1 twice, row 2 three times.
            (0..=prompt.row).for_each(|_| change(prompt.row, 1));
        }
        self.0.push_back(step);
        if self.0.len() > 2 {
            self.0.pop_front();
            [0, 1, 1, 2, 2, 2].into_iter().for_each(|row| change(row, -1));
        }
        Ok(outputs)
    }
}

/// How many rows are in the window, and how often each, by name.
fn rows_in_window(changes: RecordStream<'_>) -> RecordStream<'_> {
    let counts = view::collection(changes.clone()).map(|element| element[0]).count_total();
    view::running(changes, counts, |_, counts| {
        let values = counts.keys().map(|(row, count)| (format!("row{row}"), *count as f64)).collect();
        Record::Metrics(Arc::new(Metrics { values }))
    })
}

impl Define for Window {
    const NAME: &'static str = "window";
    const SUMMARY: &'static str = "";
    const DOCS: &'static str = "";
    const EXAMPLE: &'static str = "";
    const INPUTS: &'static [PortSpec] = &[PortSpec::new("prompts", &[PortType::Prompts], "")];
    const OUTPUTS: &'static [PortSpec] = &[PortSpec::new("counts", &[PortType::Metrics], "")];
    const VIEW: Option<View> = Some(View { port: "counts", build: rows_in_window });
    type Config = ToyConfig;

    fn build(_: ToyConfig, _: &BuildContext) -> Result<Self, OperatorError> {
        Ok(Window(VecDeque::new()))
    }
}

#[test]
fn a_view_reports_the_collection_after_every_step() {
    let graph = Graph {
        nodes: vec![
            node("rows", OperatorSpec::of::<Rows>(), "{}"),
            node("window", OperatorSpec::of::<Window>(), "{}"),
            node("sink", OperatorSpec::of::<Sink>(), "{}"),
        ],
        edges: vec![edge((0, 0), (1, 0), PortType::Prompts, None), edge((1, 0), (2, 0), PortType::Metrics, None)],
        run: RunSettings { steps: Some(4), ..RunSettings::default() },
        resolved: serde_yaml::Value::Null,
        params: Default::default(),
        warnings: Default::default(),
    };
    for workers in [1, 2] {
        let (_, seen) = run_fresh(&graph, workers).expect("the run completes");
        let expected = [
            r#"0 {"row0":1.0,"row1":2.0,"row2":3.0}"#,
            r#"1 {"row0":2.0,"row1":4.0,"row2":6.0}"#,
            r#"2 {"row0":2.0,"row1":4.0,"row2":6.0}"#,
            r#"3 {"row0":2.0,"row1":4.0,"row2":6.0}"#,
        ];
        assert_eq!(seen, expected.join("\n"), "{workers} workers");
    }
}

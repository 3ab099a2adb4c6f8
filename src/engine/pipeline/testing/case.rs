//! One test as it is written: what it feeds, what it expects, and the part of the graph that it runs.

use serde_json::json;

use super::Expected;
use super::expectation::Expectation;
use super::graph::{self, Feed};
use super::predicate::{Predicate, Reader};
use super::records::{self, Place};
use crate::graph::Graph;
use crate::operator::Registry;
use crate::pipeline::composite;
use crate::pipeline::diagnostic::{Report, Span};
use crate::pipeline::document::Lowered;
use crate::pipeline::yaml::{Content, Entry, Yaml};
use crate::record::{PortType, Record};

/// Most steps that a test has.
const MOST_STEPS: u64 = 10_000;

/// Reads one test of a pipeline.
pub(super) struct CaseReader<'a> {
    pub lowered: &'a Lowered,
    pub registry: &'a Registry,
    pub report: &'a mut Report,
}

impl CaseReader<'_> {
    /// Its graph, and what is expected; None where something is wrong with it, which has been reported.
    pub fn read(&mut self, name: &str, item: &Yaml) -> Option<(Graph, Expected)> {
        let before = self.report.errors();
        let feeds = self.feeds(item);
        let expectations = self.expectations(item);
        let failure = item.get("fails").and_then(|entry| self.failure(entry));
        match (item.get("expect"), item.get("fails")) {
            (None, None) => {
                let message = format!("the test `{name}` expects nothing");
                self.report.error(item.span, message).label("needs `expect` or `fails`");
            }
            (Some(_), Some(fails)) => {
                self.report.error(fails.key_span, "a test has `expect` or `fails`, not both");
            }
            _ => {}
        }
        // What could not be read has lengths, too.
        let steps = if self.report.errors() == before { self.steps(item, &feeds, &expectations) } else { 0 };
        if self.report.has_errors() {
            return None;
        }
        for expectation in &expectations {
            let fed = feeds.iter().find(|(_, feed)| expectation.outputs.iter().any(|(node, _)| *node == feed.node));
            if fed.is_some() {
                let message = format!("`{}` is fed in this test: nothing computes it", expectation.name);
                self.report.error(expectation.span, message);
            }
        }
        let outputs: Vec<Vec<(usize, usize)>> = expectations.iter().map(|expected| expected.outputs.clone()).collect();
        let also: Vec<usize> = failure.iter().map(|(node, _)| *node).collect();
        let (spans, feeds): (Vec<Span>, Vec<Feed>) = feeds.into_iter().unzip();
        let (graph, unread) = graph::part(&self.lowered.graph, &feeds, &outputs, &also, steps);
        for index in unread {
            let node = &self.lowered.graph.nodes[feeds[index].node].name;
            self.report.error(spans[index], format!("nothing that this test looks at depends on `{node}`"));
        }
        let expected = match failure {
            Some((_, predicate)) => Expected::Failure(predicate),
            None => Expected::Outputs(expectations),
        };
        Some((graph, expected))
    }

    fn steps(&mut self, item: &Yaml, feeds: &[(Span, Feed)], expectations: &[Expectation]) -> u64 {
        let listed = expectations.iter().filter_map(Expectation::steps);
        let longest = feeds.iter().map(|(_, feed)| feed.steps.len() as u64).chain(listed).max().unwrap_or(0);
        let given = item.get("steps").map(|steps| (steps, steps.value.to_value().as_u64()));
        let steps = match given {
            None if longest == 0 => {
                self.report.error(item.span, "this test has no steps").label("needs `steps`, or records to feed");
                0
            }
            None => longest,
            Some((_, Some(steps))) if (1..=MOST_STEPS).contains(&steps) => steps,
            Some((entry, _)) => {
                let found = entry.value.found();
                let message = format!("`steps` is a number from 1 to {MOST_STEPS}, found {found}");
                self.report.error(entry.value.span, message);
                0
            }
        };
        for (span, feed) in feeds.iter().filter(|(_, feed)| steps > 0 && feed.steps.len() as u64 > steps) {
            let fed = feed.steps.len();
            self.report.error(*span, format!("the test has {steps} steps, and {fed} are fed here"));
        }
        for expected in expectations.iter().filter(|expected| expected.steps().is_some_and(|listed| listed != steps)) {
            let listed = expected.steps().unwrap_or(0);
            self.report
                .error(expected.span, format!("the test has {steps} steps, and {listed} are listed here"))
                .help("write `~` for a step at which anything may be emitted, and `[]` for one without records");
        }
        steps
    }

    fn feeds(&mut self, item: &Yaml) -> Vec<(Span, Feed)> {
        let Some(entry) = item.get("feed") else { return Vec::new() };
        self.expect_mapping(entry, "outputs to records");
        let mut feeds = Vec::new();
        for entry in entry.value.entries() {
            let [(node, port)] = self.outputs(entry)[..] else { continue };
            let kind = self.kind(node, port);
            if matches!(kind, PortType::Weights | PortType::Changes) {
                self.report
                    .error(entry.key_span, format!("`{}` carries {kind}, which cannot be fed", entry.key))
                    .help("feed what the node reads: it will run as it does in the pipeline");
                continue;
            }
            let steps = self.feed(&entry.value, node, kind);
            feeds.push((entry.key_span, Feed { node, port, steps }));
        }
        feeds
    }

    /// The records of each step.
    fn feed(&mut self, value: &Yaml, node: usize, kind: PortType) -> Vec<Vec<Record>> {
        let Content::Sequence(steps) = &value.content else {
            self.report
                .error(value.span, format!("expected a list of steps, found {}", value.found()))
                .help("write the records of each step, as in `[[{row: 0}, {row: 1}], [{row: 2}]]`");
            return Vec::new();
        };
        let name = &self.lowered.graph.nodes[node].name;
        let mut index = 0;
        let mut fed = Vec::new();
        for (step, value) in steps.iter().enumerate() {
            let items = match &value.content {
                _ if value.is_null() => &[],
                Content::Sequence(items) => items.as_slice(),
                _ => std::slice::from_ref(value),
            };
            let mut records = Vec::new();
            for (position, item) in items.iter().enumerate() {
                let place = Place { node: name, step: step as u64, position: position as u32, index };
                records.extend(records::read(kind, item, &place, self.report));
                index += 1;
            }
            fed.push(records);
        }
        fed
    }

    fn expectations(&mut self, item: &Yaml) -> Vec<Expectation> {
        let Some(entry) = item.get("expect") else { return Vec::new() };
        self.expect_mapping(entry, "outputs to what they emit");
        if matches!(&entry.value.content, Content::Mapping(entries) if entries.is_empty()) {
            self.report.error(entry.key_span, "this test expects nothing");
        }
        let mut expectations = Vec::new();
        for entry in entry.value.entries() {
            let outputs = self.outputs(entry);
            let Some((node, port)) = outputs.first().copied() else { continue };
            let kind = self.kind(node, port);
            expectations.push(Expectation::read(&entry.key, entry.key_span, outputs, kind, &entry.value, self.report));
        }
        expectations
    }

    /// `fails: {node, step, message}`: the node, and what the error is like.
    fn failure(&mut self, entry: &Entry) -> Option<(usize, Predicate)> {
        self.expect_mapping(entry, "`node`, and perhaps `step` and `message`, to what they are");
        let schema = json!({"type": "object", "properties": {
            "node": {"type": "string"},
            "step": {"type": "integer", "minimum": 0},
            "message": {"type": "string"},
        }});
        let predicate = Reader { root: &schema }.read(&schema, &entry.value, "the failure", self.report);
        let Some((span, name)) = entry.value.get("node").and_then(|node| Some((node.value.span, node.value.as_str()?)))
        else {
            self.report.error(entry.key_span, "`fails` names the node that fails").label("needs `node`");
            return None;
        };
        let names: Vec<&str> = self.lowered.graph.nodes.iter().map(|node| node.name.as_str()).collect();
        let node = names.iter().position(|other| *other == name);
        if node.is_none() {
            self.report.error(span, format!("there is no node `{name}`")).suggest(name, &names);
        }
        Some((node?, predicate))
    }

    /// The outputs that a key names, by index of node and port; nothing where there is an error.
    fn outputs(&mut self, entry: &Entry) -> Vec<(usize, usize)> {
        let before = self.report.errors();
        let name = Content::Scalar(serde_yaml::Value::String(entry.key.clone()));
        let reference = Yaml::new(entry.key_span, name);
        let Lowered { nodes, library, .. } = self.lowered;
        let flat = composite::outputs(&reference, nodes, library, self.registry, self.report);
        let found: Vec<(usize, usize)> = flat.iter().filter_map(|reference| self.output(reference)).collect();
        if self.report.errors() > before {
            return Vec::new();
        }
        found
    }

    fn output(&mut self, reference: &Yaml) -> Option<(usize, usize)> {
        let text = reference.as_str()?;
        let (name, port) = match text.split_once('.') {
            Some((name, port)) => (name, Some(port)),
            None => (text, None),
        };
        let graph = &self.lowered.graph;
        let Some(index) = graph.nodes.iter().position(|node| node.name == name) else {
            let composites = self.lowered.nodes.entries().iter().map(|entry| entry.key.as_str());
            let mut names: Vec<&str> = graph.nodes.iter().map(|node| node.name.as_str()).chain(composites).collect();
            names.sort_unstable();
            names.dedup();
            self.report.error(reference.span, format!("there is no node `{name}`")).suggest(name, &names);
            return None;
        };
        let op = &graph.nodes[index].op;
        let ports: Vec<&str> = op.outputs.iter().map(|port| port.name).collect();
        let found = port.map_or(Some(0), |port| ports.iter().position(|other| *other == port));
        match (found, ports.is_empty()) {
            (Some(port), false) => Some((index, port)),
            (_, true) => {
                self.report.error(reference.span, format!("`{name}` ({}) has no outputs", op.name));
                None
            }
            _ => {
                let port = port.unwrap_or_default();
                self.report
                    .error(reference.span, format!("`{name}` ({}) has no output `{port}`", op.name))
                    .suggest(port, &ports);
                None
            }
        }
    }

    fn kind(&self, node: usize, port: usize) -> PortType {
        self.lowered.graph.emitted_type(node, port)
    }

    fn expect_mapping(&mut self, entry: &Entry, what: &str) {
        if !matches!(entry.value.content, Content::Mapping(_)) {
            let message = format!("`{}` is a mapping from {what}, found {}", entry.key, entry.value.found());
            self.report.error(entry.value.span, message);
        }
    }
}

//! Relational operators over keyed collections of prompts, samples and pairs, maintained by differential dataflow.
//!
//! What has arrived and was not taken back is a collection; each operator here is a function of it, whose results are kept
//! up to date with work proportional to the change. At each step results that no longer hold are emitted as retractions,
//! then new results as records, in the order in which the elements they are made of arrived.
//!
//! | module | what it holds |
//! |---|---|
//! | [`key`] | what records are grouped and compared by |
//! | [`ranking`] | the first of each group, in levels, so that a change touches few of a large group |
//! | [`compared`] | two responses as a pair |
//! | [`distinct`], [`count_by`], [`top_k`], [`window`] | of one collection |
//! | [`join`], [`semijoin`], [`antijoin`] | of two |
//! | [`best_worst`] | the best and the worst of a prompt's newest samples, as a pair |

pub mod antijoin;
pub mod best_worst;
pub mod compared;
pub mod count_by;
pub mod distinct;
pub mod join;
pub mod key;
pub mod ranking;
#[cfg(test)]
mod script;
pub mod semijoin;
#[cfg(test)]
mod tests;
pub mod top_k;
pub mod window;

use std::collections::{BTreeMap, HashMap};
use std::fs;
use std::path::Path;
use std::sync::Arc;

use sapo_flow_engine::operator::{ConfigIssue, config_of};
use sapo_flow_engine::plan::{Emits, PlanContext};
use sapo_flow_engine::relation::{Arrival, Element, Elements, Relation, Results, consolidate};
use sapo_flow_engine::{
    BuildContext, Connections, Define, Inputs, Metrics, NodePlan, Operator, OperatorError, Outputs, PortSpec, PortType,
    Record, Retracted, Retraction,
};
use schemars::JsonSchema;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::{Error, state};
use key::{Field, Fields, Part};

/// Records that the functions given to differential dataflow were handed in this process so far: what
/// `examples/incremental.rs` prints. Counts members of groups that were looked at again, and matches of joins.
pub use ranking::records_touched;

/// The types that relational operators take.
pub const RECORDS: &[PortType] = &[PortType::Prompts, PortType::Samples, PortType::Pairs];
/// The output that every relational operator has besides its records.
pub const METRICS: PortSpec = PortSpec::new(
    "metrics",
    &[PortType::Metrics],
    "NODE/size, NODE/inserted, NODE/retracted: results, and their changes",
);

/// The key under `with` of what records are compared by.
const SCORE: &str = "score";

/// One relational operator: what [`Relational`] makes a node of.
pub trait Shape: Send + Sized + 'static {
    /// See [`Define::NAME`].
    const NAME: &'static str;
    /// See [`Define::SUMMARY`].
    const SUMMARY: &'static str;
    /// See [`Define::DOCS`].
    const DOCS: &'static str;
    /// See [`Define::EXAMPLE`].
    const EXAMPLE: &'static str;
    /// See [`Define::INPUTS`].
    const INPUTS: &'static [PortSpec];
    /// See [`Define::OUTPUTS`]: the records, and [`METRICS`].
    const OUTPUTS: &'static [PortSpec];
    /// Elements that a result is made of, each two numbers of it.
    const PARTS: usize = 1;
    /// See [`Define::Config`].
    type Config: DeserializeOwned + JsonSchema + Send + 'static;

    /// See [`Define::check`].
    fn check(config: &Self::Config) -> Vec<ConfigIssue> {
        let _ = config;
        Vec::new()
    }

    /// What is read of the records at an input, each with the key under `with` that names it.
    fn fields(config: &Self::Config, input: &str) -> Vec<(&'static str, Field)>;

    /// See [`Relation::stays`].
    fn stays(config: &Self::Config) -> Option<u64> {
        let _ = config;
        None
    }

    /// The results that hold for these elements.
    fn relate<'scope>(config: &Self::Config, elements: Elements<'scope>) -> Results<'scope>;

    /// The record of a result: `parts` are its elements' records, `numbers` what else it holds. What has no identity of
    /// its own takes `place`'s.
    fn record(place: Place, parts: &[&Record], numbers: &[u64]) -> Result<Record, String> {
        let _ = (place, numbers);
        Ok(parts[0].clone())
    }
}

/// What a new record is known by.
#[derive(Clone, Copy, Debug)]
pub struct Place<'a> {
    /// The node.
    pub node: &'a str,
    /// The step.
    pub step: u64,
    /// Position among what it emits at that step.
    pub position: u32,
}

/// A node with a relational operator.
pub struct Relational<S: Shape> {
    node: String,
    config: S::Config,
    elements: BTreeMap<Arrival, Record>,
    /// The results that hold, and how each is taken back.
    live: BTreeMap<Vec<u64>, Retracted>,
    /// How many results are taken back alike: occurrences of a prompt's row.
    alike: BTreeMap<Retracted, u64>,
}

/// What a snapshot holds.
#[derive(Serialize, Deserialize)]
struct State {
    elements: Vec<Element>,
    live: Vec<(Vec<u64>, Retracted)>,
}

const STATE: &str = "relation.json";

impl<S: Shape> Relational<S> {
    /// Take in what arrived; the retractions among it, with their inputs.
    fn arrive(&mut self, step: u64, inputs: &mut Inputs) -> Result<Vec<(u32, Retraction)>, OperatorError> {
        let mut retractions = Vec::new();
        for (port, spec) in (0..).zip(S::INPUTS) {
            retractions.extend(inputs.retractions(spec.name).into_iter().map(|retraction| (port, retraction)));
            let fields = S::fields(&self.config, spec.name);
            for (index, record) in (0..).zip(inputs.take(spec.name)) {
                for (key, field) in &fields {
                    let part = field.of(&record).map_err(|problem| format!("{problem}, which `{key}` names"))?;
                    if *key == SCORE && !matches!(part, Part::Number(_)) {
                        let name = key::named(&record);
                        return Err(format!("{name} has a text as {field}, and `{key}` compares numbers").into());
                    }
                }
                self.elements.insert(Arrival { step, port, index }, record);
            }
        }
        Ok(retractions)
    }

    /// Strike out what no longer holds: how each result is taken back.
    fn strike(&mut self, removed: Vec<Vec<u64>>, causes: &BTreeMap<Arrival, String>) -> Vec<Retraction> {
        let mut struck = Vec::new();
        for result in removed {
            let Some(of) = self.live.remove(&result) else { continue };
            if let Some(alike) = self.alike.get_mut(&of) {
                *alike -= 1;
            }
            let parts = arrivals::<S>(&result);
            let first = self.elements.get(&parts[0]).map(Record::port_type);
            let port_type = if S::PARTS > 1 { Some(S::OUTPUTS[0].types[0]) } else { first };
            let because = parts.iter().find_map(|part| causes.get(part).cloned());
            struck.extend(port_type.map(|port_type| Retraction { port_type, of, because }));
        }
        struck
    }

    /// What led to the removal of elements, where retractions say so. Of two that concern an element, the later one.
    fn causes(&self, retractions: Vec<(u32, Retraction)>, gone: &[Arrival]) -> BTreeMap<Arrival, String> {
        let mut told = HashMap::new();
        for (order, (port, Retraction { of, because, .. })) in retractions.into_iter().enumerate() {
            if let Some(because) = because {
                told.insert((port, of), (order, because));
            }
        }
        let cause = |at: &Arrival| {
            let record = self.elements.get(at)?;
            let concerned_by = [row_of(record), identity_of(record)].into_iter().flatten();
            let (_, because) =
                concerned_by.filter_map(|of| told.get(&(at.port, of))).max_by_key(|(order, _)| *order)?;
            Some((*at, because.clone()))
        };
        gone.iter().filter_map(cause).collect()
    }

    fn emit(&mut self, step: u64, added: Vec<Vec<u64>>, outputs: &mut Outputs) -> Result<(), OperatorError> {
        for (position, result) in (0..).zip(added) {
            let parts = arrivals::<S>(&result);
            let parts: Option<Vec<&Record>> = parts.iter().map(|arrival| self.elements.get(arrival)).collect();
            let parts = parts.ok_or("a result is made of an element that is not there")?;
            let place = Place { node: &self.node, step, position };
            let record = S::record(place, &parts, &result[2 * S::PARTS..])?;
            let of = retraction_of(&record).ok_or("a result that is neither prompt, sample nor pair")?;
            *self.alike.entry(of.clone()).or_insert(0) += 1;
            self.live.insert(result, of);
            outputs.push(S::OUTPUTS[0].name, record);
        }
        Ok(())
    }
}

/// The elements that a result is made of.
fn arrivals<S: Shape>(result: &[u64]) -> Vec<Arrival> {
    let parts = result.chunks_exact(2).take(S::PARTS);
    parts.map(|part| Arrival::from_numbers([part[0], part[1]])).collect()
}

/// How a record is taken back.
fn retraction_of(record: &Record) -> Option<Retracted> {
    identity_of(record).or_else(|| row_of(record))
}

/// The retraction that concerns a sample or pair alone.
fn identity_of(record: &Record) -> Option<Retracted> {
    let (origin, step, position) = record.identity()?;
    Some(Retracted::Record { origin: origin.into(), step, position })
}

/// The retraction that concerns all records of a row.
fn row_of(record: &Record) -> Option<Retracted> {
    let (source, row) = record.row()?;
    Some(Retracted::Row { source: source.into(), row })
}

impl<S: Shape> Operator for Relational<S> {
    fn step(&mut self, step: u64, mut inputs: Inputs) -> Result<Outputs, OperatorError> {
        let retractions = self.arrive(step, &mut inputs)?;
        let gone: Vec<Arrival> = consolidate(inputs.take(Relation::ELEMENTS))
            .into_iter()
            .filter(|(_, diff)| *diff < 0)
            .map(|(numbers, _)| Arrival::from_numbers([numbers[0], numbers[1]]))
            .collect();
        let causes = self.causes(retractions, &gone);
        let (added, removed): (Vec<_>, Vec<_>) =
            consolidate(inputs.take(Relation::RESULTS)).into_iter().partition(|(_, diff)| *diff > 0);
        let only = |changes: Vec<(Vec<u64>, i64)>| changes.into_iter().map(|(result, _)| result).collect::<Vec<_>>();
        let (inserted, retracted) = (added.len(), removed.len());
        let struck = self.strike(only(removed), &causes);
        let mut emitted = Outputs::new();
        self.emit(step, only(added), &mut emitted)?;

        let mut outputs = Outputs::new();
        for retraction in struck {
            // A row's retraction stands for all that stem from it: one, once no occurrence is left.
            let last = self.alike.get(&retraction.of) == Some(&0);
            if last {
                self.alike.remove(&retraction.of);
            }
            if last || matches!(retraction.of, Retracted::Record { .. }) {
                outputs.push(S::OUTPUTS[0].name, Record::Retraction(retraction));
            }
        }
        outputs.records.extend(emitted.records);
        gone.iter().for_each(|arrival| drop(self.elements.remove(arrival)));
        let values = [("size", self.live.len()), ("inserted", inserted), ("retracted", retracted)];
        let values = values.map(|(name, value)| (format!("{}/{name}", self.node), value as f64)).into();
        outputs.push("metrics", Record::Metrics(Arc::new(Metrics { values })));
        Ok(outputs)
    }

    fn snapshot(&mut self, directory: &Path) -> Result<(), OperatorError> {
        let live = self.live.iter().map(|(result, of)| (result.clone(), of.clone())).collect();
        let state = State { elements: self.elements(), live };
        let path = directory.join(STATE);
        Ok(fs::write(&path, serde_json::to_vec(&state)?).map_err(Error::io(&path))?)
    }

    fn restore(&mut self, directory: &Path) -> Result<(), OperatorError> {
        let state: State = state::read(directory, STATE)?;
        self.elements = state.elements.into_iter().map(|element| (element.arrival, element.record)).collect();
        self.live = state.live.into_iter().collect();
        self.live.values().for_each(|of| *self.alike.entry(of.clone()).or_insert(0) += 1);
        Ok(())
    }

    fn elements(&self) -> Vec<Element> {
        self.elements.iter().map(|(arrival, record)| Element { arrival: *arrival, record: record.clone() }).collect()
    }
}

impl<S: Shape> Define for Relational<S> {
    const NAME: &'static str = S::NAME;
    const SUMMARY: &'static str = S::SUMMARY;
    const DOCS: &'static str = S::DOCS;
    const EXAMPLE: &'static str = S::EXAMPLE;
    const INPUTS: &'static [PortSpec] = S::INPUTS;
    const OUTPUTS: &'static [PortSpec] = S::OUTPUTS;
    const RELATION: Option<Relation> = Some(Relation { stays: stays::<S>, build: build::<S> });
    type Config = S::Config;

    fn check(config: &Self::Config) -> Vec<ConfigIssue> {
        let mut read: BTreeMap<&str, Vec<Field>> = BTreeMap::new();
        for (key, field) in S::INPUTS.iter().flat_map(|input| S::fields(config, input.name)) {
            let fields = read.entry(key).or_default();
            // Two inputs may read by one key.
            if !fields.contains(&field) {
                fields.push(field);
            }
        }
        let unknown: Vec<ConfigIssue> = read.into_iter().flat_map(|(key, fields)| Fields(fields).issues(key)).collect();
        if unknown.is_empty() { S::check(config) } else { unknown }
    }

    fn check_connections(config: &Self::Config, connections: &Connections) -> Vec<ConfigIssue> {
        let mut issues = Vec::new();
        for (input, port_type) in &connections.inputs {
            for (key, field) in S::fields(config, input) {
                if !field.fits(*port_type) {
                    let message = format!("{port_type}, which `{input}` takes, have no `{field}`");
                    issues.push(ConfigIssue::new(key, message));
                }
            }
        }
        issues
    }

    fn plan(_: &Self::Config, context: &PlanContext) -> Result<NodePlan, OperatorError> {
        let emits = Emits { batch_size: None, ..context.input(S::INPUTS[0].name) };
        Ok(NodePlan { emits, ..NodePlan::default() })
    }

    fn build(config: Self::Config, context: &BuildContext) -> Result<Self, OperatorError> {
        let node = context.node.to_string();
        Ok(Relational { node, config, elements: BTreeMap::new(), live: BTreeMap::new(), alike: BTreeMap::new() })
    }
}

fn stays<S: Shape>(config: &serde_yaml::Value) -> Option<u64> {
    S::stays(&validated::<S>(config))
}

fn build<'scope, S: Shape>(config: &serde_yaml::Value, elements: Elements<'scope>) -> Results<'scope> {
    S::relate(&validated::<S>(config), elements)
}

fn validated<S: Shape>(config: &serde_yaml::Value) -> S::Config {
    config_of(config).expect("a graph's configs have been validated")
}

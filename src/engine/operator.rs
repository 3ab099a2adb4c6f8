//! What an operator is: how it is declared, configured, stepped, saved and restored.
//!
//! An operator is a function of a step. The runtime calls [`Operator::step`] once for every step, in order, when all
//! records of that step have arrived on every input; so what an operator computes never depends on thread timing.
//! A new operator implements [`Operator`] and [`Define`], and is added to the one list of its registry.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use schemars::{JsonSchema, Schema};
use serde::de::DeserializeOwned;

use crate::graph::RunSettings;
pub use crate::issue::ConfigIssue;
use crate::plan::{NodePlan, PlanContext};
pub use crate::port::{Connections, PortSpec, Retractions, Source};
use crate::record::Record;
use crate::relation::{Element, Relation};
use crate::runtime::event::EventSender;
pub use crate::step::{Inputs, Outputs};

/// What goes wrong inside an operator; the runtime adds the node's name and the step.
pub type OperatorError = Box<dyn std::error::Error + Send + Sync>;

/// A running operator.
pub trait Operator: Send {
    /// Called once, before the first step of a run (a resumed run included, after [`restore`](Self::restore)), in
    /// dependency order; `inputs` holds what the operators before it emitted here, feedback edges left out.
    /// What it emits stands for "step -1" and reaches only other operators' `start`, and feedback edges: there it is
    /// delivered at every step that no emission of a real step can reach yet. Heavy loading belongs here: it runs on
    /// the device thread.
    fn start(&mut self, inputs: Inputs) -> Result<Outputs, OperatorError> {
        let _ = inputs;
        Ok(Outputs::default())
    }

    /// One step: all records of `step` on every input, in edge order, to all records of `step` on every output.
    fn step(&mut self, step: u64, inputs: Inputs) -> Result<Outputs, OperatorError>;

    /// Write what a later [`restore`](Self::restore) needs into `directory`, which exists and is empty.
    /// Called between steps; the state is that after the step just done.
    fn snapshot(&mut self, directory: &Path) -> Result<(), OperatorError> {
        let _ = directory;
        Ok(())
    }

    /// Take up the state that [`snapshot`](Self::snapshot) wrote. Called before [`start`](Self::start).
    fn restore(&mut self, directory: &Path) -> Result<(), OperatorError> {
        let _ = directory;
        Ok(())
    }

    /// Give a record of ours that was in flight on a feedback edge its process-local parts back, after a restore.
    fn reattach(&mut self, record: &mut Record) -> Result<(), OperatorError> {
        let _ = record;
        Ok(())
    }

    /// Operators with a [`Relation`]: the elements that their dataflow begins with, after [`restore`](Self::restore).
    fn elements(&self) -> Vec<Element> {
        Vec::new()
    }

    /// Called once after the last step of a completed run (not when interrupted).
    fn finish(&mut self) -> Result<(), OperatorError> {
        Ok(())
    }
}

/// Where an operator's calls run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Placement {
    /// On the timely worker, for work of microseconds.
    Worker,
    /// On a thread of its own, for tensor work; the dataflow goes on meanwhile.
    Device,
}

/// A stream of records in a timely dataflow over steps.
pub type RecordStream<'scope> = timely::dataflow::StreamVec<'scope, u64, Record>;

/// What an operator says about its state, computed incrementally by differential dataflow.
///
/// The operator emits [`Change`](crate::record::Change)s of a collection on the hidden port [`View::CHANGES`]; `build`
/// turns them into the records of the declared output `port`. A view keeps no state of its own across a resume: the
/// restored operator emits its whole collection as insertions at its first step.
#[derive(Clone, Copy)]
pub struct View {
    /// The output that the view feeds.
    pub port: &'static str,
    /// Changes to records, as dataflow.
    pub build: for<'scope> fn(RecordStream<'scope>) -> RecordStream<'scope>,
}

impl View {
    /// The hidden output an operator with a view emits its changes on.
    pub const CHANGES: &'static str = "(changes)";
}

/// What [`Define::build`] may look at.
pub struct BuildContext<'a> {
    /// The node's name.
    pub node: &'a str,
    /// The pipeline's `run` block: seed, device, dtype, threads.
    pub run: &'a RunSettings,
    /// Steps of the whole run; 0 while sources are being built, since they decide it.
    pub total_steps: u64,
    /// The run directory, which exists.
    pub run_directory: &'a Path,
    /// Whether this run takes up a checkpoint: `restore` will follow.
    pub resumed: bool,
    /// How many versions of a weights output may still be read by feedback consumers, the newest included:
    /// 1 + the largest max_staleness among its feedback edges (1 where there is none).
    pub retained_versions: u64,
    /// Threads for this node's tensor work: `run.threads`, or all cores, halved where feedback lets generation and
    /// learning run at the same time.
    pub threads: usize,
    /// Whether feedback lets generation and learning run at the same time.
    pub overlaps: bool,
    /// Names of the inputs and outputs that are connected.
    pub connected_inputs: Vec<&'static str>,
    /// See `connected_inputs`.
    pub connected_outputs: Vec<&'static str>,
    /// Where progress and results for people go.
    pub events: EventSender,
}

/// An operator that users can write in YAML.
pub trait Define: Operator + Sized + 'static {
    /// The value of `op`.
    const NAME: &'static str;
    /// One line.
    const SUMMARY: &'static str;
    /// Markdown: what it does, its state, its errors.
    const DOCS: &'static str;
    /// A YAML pipeline fragment: one or more entries of `nodes`, as a mapping. A test validates it.
    const EXAMPLE: &'static str;
    /// Inputs, in order; the first is meant by `in: x`.
    const INPUTS: &'static [PortSpec];
    /// Outputs, in order; the first is meant by `in: node` where several exist and none is named.
    const OUTPUTS: &'static [PortSpec];
    /// Where its calls run.
    const PLACEMENT: Placement = Placement::Worker;
    /// A part of the operator that is dataflow itself: see [`View`].
    const VIEW: Option<View> = None;
    /// For an operator that is dataflow: see [`Relation`].
    const RELATION: Option<Relation> = None;
    /// The keys under `with`: `deny_unknown_fields`, a doc comment and (unless required) a default on every field.
    type Config: DeserializeOwned + JsonSchema;

    /// What is wrong with a config beyond its types.
    fn check(config: &Self::Config) -> Vec<ConfigIssue> {
        let _ = config;
        Vec::new()
    }

    /// Whether a node with this config may take back what it emitted on outputs marked
    /// [`retracting`](PortSpec::retracting).
    fn retracts(config: &Self::Config) -> bool {
        let _ = config;
        true
    }

    /// Whether a node with this config will tell how many steps an epoch has: a run of so many `epochs` needs one that
    /// does. Unless it says otherwise, a source does.
    fn has_epochs(config: &Self::Config) -> bool {
        let _ = config;
        Self::INPUTS.is_empty()
    }

    /// What is wrong with a config given what the node is connected with. Asked where [`check`](Self::check) and the
    /// wiring have no complaint.
    fn check_connections(config: &Self::Config, connections: &Connections) -> Vec<ConfigIssue> {
        let _ = (config, connections);
        Vec::new()
    }

    /// Markdown that follows [`DOCS`](Self::DOCS), where some of it is made by the program.
    fn appendix() -> String {
        String::new()
    }

    /// What the node will take.
    fn plan(config: &Self::Config, context: &PlanContext) -> Result<NodePlan, OperatorError> {
        let _ = (config, context);
        Ok(NodePlan::default())
    }

    /// Paths of models and data that the node reads, for the manifest's hashes.
    fn files(config: &Self::Config) -> Vec<PathBuf> {
        let _ = config;
        Vec::new()
    }

    /// Files and folders of the run directory that a node of this name writes, relative to it. No other node may write there.
    fn writes(config: &Self::Config, node: &str) -> Vec<PathBuf> {
        let _ = (config, node);
        Vec::new()
    }

    /// Sources only: steps in one pass over the data, asked after `build`.
    fn steps_per_epoch(&self) -> Option<u64> {
        None
    }

    /// Make the operator. Cheap for [`Placement::Device`] operators: loading belongs into [`Operator::start`].
    fn build(config: Self::Config, context: &BuildContext) -> Result<Self, OperatorError>;
}

/// A built operator and what it says of the run's length.
pub struct Built {
    /// The operator.
    pub operator: Box<dyn Operator>,
    /// See [`Define::steps_per_epoch`].
    pub steps_per_epoch: Option<u64>,
}

/// An operator's declaration with its types erased: one entry of the registry.
#[derive(Clone)]
pub struct OperatorSpec {
    /// See [`Define::NAME`].
    pub name: &'static str,
    /// See [`Define::SUMMARY`].
    pub summary: &'static str,
    /// See [`Define::DOCS`].
    pub docs: &'static str,
    /// See [`Define::EXAMPLE`].
    pub example: &'static str,
    /// See [`Define::INPUTS`].
    pub inputs: &'static [PortSpec],
    /// See [`Define::OUTPUTS`].
    pub outputs: &'static [PortSpec],
    /// See [`Define::PLACEMENT`].
    pub placement: Placement,
    /// See [`Define::VIEW`].
    pub view: Option<View>,
    /// See [`Define::RELATION`].
    pub relation: Option<Relation>,
    /// JSON Schema of the keys under `with`.
    pub config_schema: fn() -> Schema,
    /// Deserialize and [`Define::check`].
    pub check: fn(&serde_yaml::Value) -> Vec<ConfigIssue>,
    /// [`Define::retracts`].
    pub retracts: fn(&serde_yaml::Value) -> bool,
    /// [`Define::has_epochs`].
    pub has_epochs: fn(&serde_yaml::Value) -> bool,
    /// [`Define::check_connections`].
    pub check_connections: fn(&serde_yaml::Value, &Connections) -> Vec<ConfigIssue>,
    /// [`Define::appendix`].
    pub appendix: fn() -> String,
    /// [`Define::plan`].
    pub plan: fn(&serde_yaml::Value, &PlanContext) -> Result<NodePlan, OperatorError>,
    /// [`Define::files`].
    pub files: fn(&serde_yaml::Value) -> Vec<PathBuf>,
    /// [`Define::writes`].
    pub writes: fn(&serde_yaml::Value, &str) -> Vec<PathBuf>,
    /// [`Define::build`].
    pub build: fn(&serde_yaml::Value, &BuildContext) -> Result<Built, OperatorError>,
}

impl OperatorSpec {
    /// The entry for an operator type.
    pub fn of<D: Define>() -> Self {
        OperatorSpec {
            name: D::NAME,
            summary: D::SUMMARY,
            docs: D::DOCS,
            example: D::EXAMPLE,
            inputs: D::INPUTS,
            outputs: D::OUTPUTS,
            placement: D::PLACEMENT,
            view: D::VIEW,
            relation: D::RELATION,
            config_schema: || schemars::schema_for!(D::Config),
            check: |value| match config_of::<D::Config>(value) {
                Ok(config) => D::check(&config),
                Err(error) => vec![ConfigIssue::new("", error.to_string())],
            },
            retracts: |value| config_of(value).is_ok_and(|config| D::retracts(&config)),
            has_epochs: |value| config_of(value).is_ok_and(|config| D::has_epochs(&config)),
            check_connections: |value, connections| {
                config_of(value).map(|config| D::check_connections(&config, connections)).unwrap_or_default()
            },
            appendix: D::appendix,
            plan: |value, context| D::plan(&config_of(value)?, context),
            files: |value| config_of(value).map(|config| D::files(&config)).unwrap_or_default(),
            writes: |value, node| config_of(value).map(|config| D::writes(&config, node)).unwrap_or_default(),
            build: |value, context| {
                let operator = D::build(config_of(value)?, context)?;
                let steps_per_epoch = operator.steps_per_epoch();
                Ok(Built { operator: Box::new(operator), steps_per_epoch })
            },
        }
    }
}

/// A `with` block as an operator's config; an absent block is an empty one.
///
/// # Errors
/// Where the block is none of this type; validation has made sure of that for the nodes of a graph.
pub fn config_of<C: DeserializeOwned>(value: &serde_yaml::Value) -> Result<C, serde_yaml::Error> {
    match value {
        serde_yaml::Value::Null => serde_yaml::from_value(serde_yaml::Value::Mapping(Default::default())),
        value => serde_yaml::from_value(value.clone()),
    }
}

/// The operators a pipeline may use. Validation, docs, schema and runs all read this list.
#[derive(Clone, Default)]
pub struct Registry {
    specs: Vec<Arc<OperatorSpec>>,
}

impl Registry {
    /// A registry of these operators.
    ///
    /// # Panics
    /// When two have the same name: a mistake in the program, not in its input.
    pub fn new(specs: Vec<OperatorSpec>) -> Self {
        let mut registry = Registry::default();
        specs.into_iter().for_each(|spec| registry.add(spec));
        registry
    }

    fn add(&mut self, spec: OperatorSpec) {
        assert!(self.get(spec.name).is_none(), "two operators are named `{}`", spec.name);
        self.specs.push(Arc::new(spec));
    }

    /// The same registry with one operator more.
    ///
    /// # Panics
    /// As [`new`](Self::new).
    pub fn with(mut self, spec: OperatorSpec) -> Self {
        self.add(spec);
        self
    }

    /// The operator of that name.
    pub fn get(&self, name: &str) -> Option<&Arc<OperatorSpec>> {
        self.specs.iter().find(|spec| spec.name == name)
    }

    /// All operators, in the order listed.
    pub fn iter(&self) -> impl Iterator<Item = &Arc<OperatorSpec>> {
        self.specs.iter()
    }
}

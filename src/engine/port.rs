//! Ports: what an operator takes and emits, and what a node is connected with.

#[cfg(doc)]
use crate::operator::Define;
use crate::record::PortType;

/// What a port has to do with [`Retraction`](crate::record::Retraction)s.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Retractions {
    /// An input that must not be sent any; an output that never carries any.
    None,
    /// An input whose operator takes back what it holds of the record, and passes the retraction on where it has emitted
    /// something that stems from it.
    Honoured,
    /// An output that carries retractions when one of the node's inputs does.
    PassedOn,
    /// An output that may take back what it emitted, where [`Define::retracts`] says so.
    Emitted,
}

/// An input or output of an operator.
#[derive(Clone, Copy, Debug)]
pub struct PortSpec {
    /// The name used in YAML: `node.port`, or the key under `in`.
    pub name: &'static str,
    /// Types of records accepted (inputs) or emitted (outputs: exactly one, unless it follows an input).
    pub types: &'static [PortType],
    /// Outputs: the input whose type it takes on, one of `types`. What arrives there must then be of one type.
    pub follows: Option<&'static str>,
    /// Inputs: whether the node is wrong without it.
    pub required: bool,
    /// Inputs: whether several edges may end here (their records are concatenated in the order written).
    pub many: bool,
    /// Whether retractions may arrive here, or be emitted.
    pub retractions: Retractions,
    /// One line for people.
    pub doc: &'static str,
}

impl PortSpec {
    /// A port of one type, required, with a single edge.
    pub const fn new(name: &'static str, types: &'static [PortType], doc: &'static str) -> Self {
        PortSpec { name, types, follows: None, required: true, many: false, retractions: Retractions::None, doc }
    }

    /// The same port, which may be left unconnected.
    pub const fn optional(self) -> Self {
        PortSpec { required: false, ..self }
    }

    /// The same port, which takes any number of edges.
    pub const fn many(self) -> Self {
        PortSpec { many: true, ..self }
    }

    /// The same output, which has the type of what arrives at an input.
    pub const fn following(self, input: &'static str) -> Self {
        PortSpec { follows: Some(input), ..self }
    }

    /// The same input, at which retractions are honoured. Without this an edge that may carry them cannot end there.
    pub const fn honouring_retractions(self) -> Self {
        PortSpec { retractions: Retractions::Honoured, ..self }
    }

    /// The same output, which passes on the retractions that arrive.
    pub const fn passing_retractions(self) -> Self {
        PortSpec { retractions: Retractions::PassedOn, ..self }
    }

    /// The same output, which takes back what it emitted: see [`Define::retracts`].
    pub const fn retracting(self) -> Self {
        PortSpec { retractions: Retractions::Emitted, ..self }
    }
}

/// What a node is connected with.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Connections {
    /// The node's name.
    pub node: String,
    /// The inputs that edges end at, each with the type that arrives there.
    pub inputs: Vec<(&'static str, PortType)>,
    /// Where the edges come from.
    pub sources: Vec<Source>,
    /// The outputs that are read.
    pub outputs: Vec<&'static str>,
}

/// Where an edge that ends at a node comes from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Source {
    /// The input where it ends.
    pub input: &'static str,
    /// The node that it comes from.
    pub node: String,
    /// That node's operator.
    pub op: &'static str,
}

impl Connections {
    /// The type that arrives at an input, where an edge ends there.
    pub fn input(&self, port: &str) -> Option<PortType> {
        self.inputs.iter().find(|(name, _)| *name == port).map(|(_, port_type)| *port_type)
    }
}

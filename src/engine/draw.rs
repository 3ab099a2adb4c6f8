//! A graph as text that other programs draw: mermaid for READMEs, dot for Graphviz.

use crate::graph::{Edge, Graph};

/// Words that mermaid reads as its own where a node's id should stand.
const MERMAID_WORDS: &[&str] = &[
    "call",
    "class",
    "classDef",
    "click",
    "default",
    "end",
    "flowchart",
    "graph",
    "href",
    "linkStyle",
    "style",
    "subgraph",
];

impl Graph {
    /// The graph as a mermaid flowchart. Feedback edges are dashed and tell their staleness.
    pub fn to_mermaid(&self) -> String {
        let id = |index: usize| {
            let name = self.nodes[index].name.replace('/', ".");
            if MERMAID_WORDS.contains(&name.as_str()) { format!("node-{name}") } else { name }
        };
        let mut text = String::from("flowchart LR\n");
        for (index, node) in self.nodes.iter().enumerate() {
            let title = if node.name == node.op.name {
                node.name.clone()
            } else {
                format!("{}<br/><small>{}</small>", node.name, node.op.name)
            };
            line(&mut text, format!("    {}[\"{title}\"]", id(index)));
        }
        for edge in &self.edges {
            let arrow = if edge.feedback.is_some() { "-.->" } else { "-->" };
            let label = self.label(edge).replace('\n', "<br/>");
            line(&mut text, format!("    {} {arrow}|\"{label}\"| {}", id(edge.from_node), id(edge.to_node)));
        }
        text
    }

    /// The graph in Graphviz's language. Feedback edges are dashed and tell their staleness.
    pub fn to_dot(&self) -> String {
        let mut text = String::from("digraph pipeline {\n    rankdir=LR;\n    node [shape=box];\n");
        for node in &self.nodes {
            let title =
                if node.name == node.op.name { node.name.clone() } else { format!("{}\\n{}", node.name, node.op.name) };
            line(&mut text, format!("    \"{}\" [label=\"{title}\"];", node.name));
        }
        for edge in &self.edges {
            let style = if edge.feedback.is_some() { ", style=dashed, constraint=false" } else { "" };
            let label = self.label(edge).replace('\n', "\\n");
            let (from, to) = (&self.nodes[edge.from_node].name, &self.nodes[edge.to_node].name);
            line(&mut text, format!("    \"{from}\" -> \"{to}\" [label=\"{label}\"{style}];"));
        }
        text.push_str("}\n");
        text
    }

    fn label(&self, edge: &Edge) -> String {
        match edge.feedback {
            Some(feedback) => format!("{}\nmax_staleness {}", edge.port_type, feedback.max_staleness),
            None => edge.port_type.to_string(),
        }
    }
}

fn line(text: &mut String, line: String) {
    text.push_str(&line);
    text.push('\n');
}

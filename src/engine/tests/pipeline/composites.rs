//! Composite operators: what they flatten to, and what is wrong with them, told at both places.

use sapo_flow_engine::pipeline;

use crate::toy::{LOOP, complaints, read, read_with, registry};

/// The loop of [`LOOP`] with sampler, buffer and average in one operator.
const AUGMENTED: &str = r#"version: 1
params:
  ema_decay: 0.5
run: {steps: 10}
operators:
  augment:
    description: The model rewrites answers, and a buffer keeps them.
    params:
      decay: {default: 0.9, min: 0, max: 1}
      max_staleness: 0
    inputs:
      prompts: what to answer
      weights:
    outputs: {pairs: replay.pairs, metrics: replay.metrics}
    nodes:
      segments:
        op: segment_sampler
        in:
          prompts: prompts
          weights: {from: ema, feedback: {max_staleness: "${max_staleness}"}}
      replay: {op: replay_buffer, in: segments}
      ema: {op: ema, in: weights, with: {decay: "${decay}"}}
nodes:
  prompts: {op: prompt_source, with: {path: rows.jsonl}}
  self:
    op: augment
    in: {prompts: prompts, weights: learner.weights}
    with: {decay: "${ema_decay}"}
  batches: {op: batcher, in: self}
  learner: {op: learner, in: batches, with: {objective: orpo}}
  metrics: {op: metrics_sink, in: [learner.metrics, self.metrics]}
"#;

fn edges(text: &str) -> Vec<String> {
    let graph = read(text).map_err(|error| error.to_string()).unwrap();
    let name = |index: usize| graph.nodes[index].name.trim_start_matches("self/").to_owned();
    let edge = |edge: &sapo_flow_engine::Edge| {
        let (from, to) = (graph.output(edge).name, graph.input(edge).name);
        format!("{}.{from} -> {}.{to} {:?}", name(edge.from_node), name(edge.to_node), edge.feedback)
    };
    let mut edges: Vec<String> = graph.edges.iter().map(edge).collect();
    edges.sort();
    edges
}

#[test]
fn a_composite_is_the_nodes_inside() {
    assert_eq!(edges(AUGMENTED), edges(LOOP));
    let graph = read(AUGMENTED).unwrap();
    assert!(graph.warnings.list.is_empty(), "{}", graph.warnings);
    let mut names: Vec<&str> = graph.nodes.iter().map(|node| node.name.as_str()).collect();
    names.sort_unstable();
    assert_eq!(names, ["batches", "learner", "metrics", "prompts", "self/ema", "self/replay", "self/segments"]);
    let decay = |overrides: &[(&str, &str)]| {
        let graph = read_with(AUGMENTED, overrides).unwrap();
        graph.nodes.iter().find(|node| node.name == "self/ema").unwrap().config["decay"].clone()
    };
    assert_eq!(decay(&[]), 0.5);
    assert_eq!(decay(&[("ema_decay", "0.25")]), 0.25);
}

#[test]
fn the_resolved_pipeline_is_flat_and_reads_the_same() {
    let graph = read(AUGMENTED).unwrap();
    let text = serde_yaml::to_string(&graph.resolved).unwrap();
    assert!(!text.contains("operators:") && text.contains("self/ema:"), "{text}");
    let again = read(&text).unwrap();
    assert_eq!((again.edges.clone(), &again.resolved), (graph.edges.clone(), &graph.resolved));
    assert!(graph.to_mermaid().contains("self.ema[\"self/ema<br/>"), "{}", graph.to_mermaid());
}

#[test]
fn parameters_have_defaults_of_their_own() {
    let text = AUGMENTED.replace("    with: {decay: \"${ema_decay}\"}\n", "").replace("  ema_decay: 0.5\n", "");
    let graph = read(&text).unwrap();
    let ema = graph.nodes.iter().find(|node| node.name == "self/ema").unwrap();
    assert_eq!(ema.config["decay"], 0.9);
}

#[test]
fn composites_nest_and_merge_outputs() {
    let text = AUGMENTED
        .replace(
            "nodes:\n  prompts: {op: prompt",
            "  twice:
    inputs: {prompts: , weights: }
    outputs: {pairs: [one, other.pairs], metrics: [one.metrics, other.metrics]}
    nodes:
      one: {op: augment, in: {prompts: prompts, weights: weights}}
      other: {op: augment, in: {prompts: prompts, weights: weights}, with: {decay: 0.1}}
nodes:\n  prompts: {op: prompt",
        )
        .replace("    op: augment\n    in: {p", "    op: twice\n    in: {p")
        .replace("    with: {decay: \"${ema_decay}\"}\n", "")
        .replace("  ema_decay: 0.5\n", "")
        .replace(
            "batches: {op: batcher, in: self}",
            "all: {op: replay_buffer, in: self}\n  batches: {op: batcher, in: all}",
        );
    let graph = read(&text).map_err(|error| error.to_string()).unwrap();
    let decays: Vec<_> = graph
        .nodes
        .iter()
        .filter(|node| node.op.name == "ema")
        .map(|node| (node.name.as_str(), node.config["decay"].as_f64().unwrap()))
        .collect();
    assert_eq!(decays, [("self/one/ema", 0.9), ("self/other/ema", 0.1)]);
    let all = graph.nodes.iter().position(|node| node.name == "all").unwrap();
    assert_eq!(graph.edges.iter().filter(|edge| edge.to_node == all).count(), 2);
}

#[test]
fn an_error_inside_is_told_at_both_places() {
    let text = AUGMENTED.replace("op: ema, in: weights", "op: ema, in: segments");
    let refused = read(&text).err().unwrap().to_string();
    let expected = "\
error: no node of `augment` reads the input `weights`
  --> p.yaml:13:7
   |
13 |       weights:
   |       ^^^^^^^

error: `self/segments.pairs` carries Pairs, but the input `weights` of `ema` takes Weights
  --> p.yaml:22:22
   |
22 |       ema: {op: ema, in: segments, with: {decay: \"${decay}\"}}
   |                          ^^^^^^^^ expected Weights";
    let wanted = expected.replace("22:22", "22:26");
    assert!(refused.starts_with(&wanted), "{refused}");
    assert!(refused.contains("= note: inside `augment`, which `self` uses at p.yaml:26:9"), "{refused}");
    // A value that is wrong only for a node inside.
    let text = AUGMENTED.replace("decay: {default: 0.9, min: 0, max: 1}", "decay: 0.9");
    let refused = read_with(&text, &[("ema_decay", "7")]).err().unwrap().to_string();
    assert_eq!(
        refused,
        "\
error: `decay`: must be at least 0 and below 1
  --> p.yaml:22:48
   |
22 |       ema: {op: ema, in: weights, with: {decay: \"${decay}\"}}
   |                                                 ^^^^^^^^^^
   = note: `${decay}` (given at p.yaml:28:19) is the number 7
   = note: inside `augment`, which `self` uses at p.yaml:26:9
26 |     op: augment
   |         ^^^^^^^"
            .replace("22:48", "22:49")
    );
}

#[test]
fn a_mistake_inside_of_two_uses_is_told_once() {
    let text = AUGMENTED
        .replace("op: replay_buffer, in: segments}", "op: replay_bufer, in: segments}")
        .replace("  batches:", "  more: {op: augment, in: {prompts: prompts, weights: learner.weights}}\n  batches:");
    let refused = read(&text).err().unwrap();
    let found: Vec<_> = refused.list.iter().filter(|d| d.message == "unknown operator `replay_bufer`").collect();
    assert_eq!(found.len(), 1, "{refused}");
    assert_eq!(found[0].notes.len(), 2, "{refused}");
    assert_eq!(found[0].help.as_deref(), Some("did you mean `replay_buffer`?"));
}

#[test]
fn mistakes_of_the_use_are_told_there() {
    let cases = [
        (
            "in: {prompts: prompts, weights: learner.weights}",
            "in: prompts",
            "27:5 the input `weights` of `self` (augment) is not connected",
        ),
        (
            "prompts: prompts, weights: learner",
            "prompt: prompts, weights: learner",
            "27:10 `augment` has no input `prompt`",
        ),
        ("with: {decay: \"${ema", "with: {dekay: \"${ema", "28:12 unknown key `dekay`"),
        ("with: {decay: \"${ema_decay}\"}", "with: {decay: 3}", "28:19 `decay` must be at most 1, found 3"),
        ("decay: {default: 0.9, min", "extra: {type: number, min", "28:5 the key `extra` of `self` is missing"),
        ("decay: {default: 0.9, min", "extra: {default: 1, min", "22:49 there is no parameter `decay`"),
        ("in: self}", "in: self.pears}", "29:30 `self` (augment) has no output `pears`"),
        ("op: augment", "op: augmnt", "26:9 unknown operator `augmnt`"),
        ("pairs: replay.pairs,", "pairs: reply.pairs,", "14:22 there is no node `reply` in `augment`"),
        ("  augment:", "  ema:", "6:3 `ema` is a built-in operator"),
        ("\"${decay}\"", "\"${env.HOME}\"", "22:49 the inside of an operator cannot read `${env.HOME}`"),
    ];
    for (from, to, expected) in cases {
        let found = complaints(&AUGMENTED.replace(from, to));
        assert!(found.iter().any(|complaint| complaint == expected), "{from} -> {to}: {found:?}");
    }
}

#[test]
fn a_connection_is_delayed_once() {
    let text = AUGMENTED
        .replace("in: weights, with", "in: {from: weights, feedback: {max_staleness: 0}}, with")
        .replace("weights: learner.weights", "weights: {from: learner.weights, feedback: {max_staleness: 0}}");
    assert!(
        complaints(&text).contains(&"22:26 this connection is delayed twice".to_owned()),
        "{:?}",
        complaints(&text)
    );
}

#[test]
fn recursion_is_refused_with_its_chain() {
    let text =
        AUGMENTED.replace("op: replay_buffer, in: segments}", "op: augment, in: {prompts: prompts, weights: ema}}");
    assert_eq!(complaints(&text), ["21:20 operators are made of each other: augment -> augment"]);
    let text = text.replace("op: augment, in: {prompts: prompts, weights: ema}}", "op: other, in: segments}").replace(
        "nodes:\n  prompts: {op",
        "  other:\n    inputs: {x: }\n    nodes:\n      a: {op: augment, in: x}\nnodes:\n  prompts: {op",
    );
    assert_eq!(complaints(&text), ["26:15 operators are made of each other: augment -> other -> augment"]);
}

#[test]
fn names_cannot_nest_by_accident() {
    let text = LOOP.replace("  ema: {op", "  ema/x: {op: ema, in: learner.weights, with: {decay: 0.1}}\n  ema: {op");
    assert!(complaints(&text).contains(&"16:3 `ema/x` is named as if it were inside of the node `ema`".to_owned()));
}

#[test]
fn operators_are_included() {
    let here = tempfile::tempdir().unwrap();
    let write = |name: &str, text: &str| std::fs::write(here.path().join(name), text).unwrap();
    let load = || pipeline::load(&here.path().join("p.yaml"), &[], &registry());
    let (head, rest) = AUGMENTED.split_once("operators:\n").unwrap();
    let (operators, nodes) = rest.split_once("nodes:\n  prompts: {op").unwrap();
    std::fs::create_dir(here.path().join("operators")).unwrap();
    let pipeline = format!("{head}include: [operators/a.yaml, operators/b.yaml]\nnodes:\n  prompts: {{op{nodes}");
    write("p.yaml", &pipeline);
    write("operators/a.yaml", "include: b.yaml\n");
    write("operators/b.yaml", &format!("operators:\n{operators}"));
    assert_eq!(load().unwrap().edges, read(AUGMENTED).unwrap().edges);
    // An error in the included file names it, and the use.
    write("operators/b.yaml", &format!("operators:\n{}", operators.replace("in: segments", "in: segmints")));
    let refused = load().err().unwrap();
    assert!(refused.list[0].file.ends_with("operators/b.yaml"), "{refused}");
    assert_eq!((refused.list[0].line, refused.list[0].column), (17, 39), "{refused}");
    assert!(refused.list[0].notes[0].contains("p.yaml:9:9"), "{refused}");
    // Files that include each other.
    write("operators/b.yaml", "include: [../p.yaml]\n");
    let refused = load().err().unwrap();
    let message = &refused.list.iter().find(|d| d.message.starts_with("files include each other")).unwrap().message;
    assert_eq!(message.matches(" -> ").count(), 3, "{message}");
    write("p.yaml", &pipeline.replace("operators/a.yaml", "operators/z.yaml"));
    let refused = load().err().unwrap();
    assert!(refused.list.iter().any(|d| d.message.starts_with("cannot read `")), "{refused}");
}

#[test]
fn expanding_tells_where_the_pieces_of_a_text_come_from() {
    let text = "version: 1
params: {tag: a, dir: data, at: \"${dir}/x\"}
run: {steps: 1, directory: \"runs-${tag}\"}
nodes:
  prompts: {op: prompt_source, with: {path: \"${at}/${dir}-${tag}\"}}
";
    let expanded =
        pipeline::expand("p.yaml", text, &[("tag".to_owned(), "true".to_owned())], &registry()).expect("it is right");
    for line in [
        "  directory: runs-true # \"runs-${tag}\" at p.yaml:3:28, tag: -S tag=true",
        "      path: data/x/data-true # \"${at}/${dir}-${tag}\" at p.yaml:5:45, at: default at p.yaml:2:33 \
         (\"${dir}/x\" at p.yaml:2:33, dir: default at p.yaml:2:23), dir: default at p.yaml:2:23, tag: -S tag=true",
    ] {
        assert!(expanded.lines().any(|found| found == line), "{line}\n{expanded}");
    }
}

#[test]
fn expanding_tells_where_values_come_from() {
    let overrides = [("ema_decay".to_owned(), "0.25".to_owned())];
    let text = pipeline::expand("p.yaml", AUGMENTED, &overrides, &registry()).unwrap();
    for line in [
        "  seed: 42 # default",
        "    keep: 2 # default",
        "  steps: 10 # p.yaml:4:14",
        "  self/ema:",
        "      decay: 0.25 # ${decay}, given at p.yaml:28:19; ${ema_decay}, -S ema_decay=0.25",
        "          max_staleness: 0 # ${max_staleness}, default at p.yaml:10:22",
        "      batch_size: 8 # default",
    ] {
        assert!(text.lines().any(|found| found == line), "{line} in\n{text}");
    }
    // What is printed reads as the same pipeline, and prints the same values.
    let again = read(&text).map_err(|error| error.to_string()).unwrap();
    assert_eq!(again.edges, read(AUGMENTED).unwrap().edges);
    let values = |text: &str| serde_yaml::from_str::<serde_yaml::Value>(text).unwrap();
    assert_eq!(values(&pipeline::expand("q.yaml", &text, &[], &registry()).unwrap()), values(&text));
    assert!(pipeline::expand("p.yaml", "version: 2", &[], &registry()).is_err());
}

#[test]
fn composites_are_documented() {
    let pages = pipeline::composites("p.yaml", AUGMENTED, &registry()).unwrap();
    assert_eq!(
        pages[0].to_text(),
        "\
augment: The model rewrites answers, and a buffer keeps them.

defined at p.yaml:6:3

Inputs

    prompts: Prompts
        what to answer
    weights: Weights

Outputs

    pairs: Pairs
        what is drawn (`replay.pairs`)
    metrics: Metrics
        sizes (`replay.metrics`)

With

    decay: a number, default 0.9
    max_staleness: a number, default 0

Example

    include: p.yaml
    nodes:
      augment:
        op: augment
        in: {prompts: prompt_source.prompts, weights: learner.weights}
        with:
          decay: 0.9
          max_staleness: 0
"
    );
}

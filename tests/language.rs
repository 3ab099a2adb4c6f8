//! The pipeline language with the real operators: composites that ship, and what `expand` prints.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use sapo_flow_engine::{Graph, pipeline};

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn shipped() -> Vec<PathBuf> {
    let entries = fs::read_dir(root().join("pipelines")).unwrap().map(|entry| entry.unwrap().path());
    let mut paths: Vec<PathBuf> =
        entries.filter(|path| path.extension().is_some_and(|found| found == "yaml")).collect();
    paths.sort();
    paths
}

fn sapo_flow(arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_sapo-flow")).args(arguments).current_dir(root()).output().unwrap()
}

/// SAPO with the ORPO objective: `self_augment`, or what is in its place, and the rest.
fn sapo(head: &str, augment: &str, pairs: &str, metrics: &str) -> String {
    format!(
        r#"version: 1
{head}
params: {{model: m, data: d.jsonl}}
run: {{epochs: 4}}
nodes:
  prompts:
    op: prompt_source
    with: {{path: "${{data}}", tokenizer: "${{model}}", batch_size: 8, max_prompt_tokens: 1792}}
{augment}
  replay: {{op: replay_buffer, in: {pairs}, with: {{capacity: 2000, sampling: inverse_count, draws: 8}}}}
  batches: {{op: batcher, in: replay.pairs, with: {{batch_size: 8, max_length: 2048}}}}
  learner:
    op: preference_learner
    in: batches.batches
    with: {{model: "${{model}}", objective: orpo, learning_rate: 5.0e-6}}
  samples: {{op: sample_sink, in: {pairs}, with: {{tokenizer: "${{model}}"}}}}
  metrics: {{op: metrics_sink, in: [learner.metrics, {metrics}, replay.metrics, batches.metrics]}}
  model: {{op: checkpoint, in: learner.weights}}
"#
    )
}

fn with_self_augment() -> String {
    let include = format!("include: {}", root().join("operators/self_augment.yaml").display());
    let augment = "  augment: {op: self_augment, in: {prompts: prompts, weights: learner.weights}}";
    sapo(&include, augment, "augment.pairs", "augment.metrics")
}

/// The same without composites: what the authors' repository does, with their settings.
fn without_self_augment() -> String {
    let nodes = "  segments:
    op: segment_sampler
    in: {prompts: prompts, weights: {from: ema, feedback: {max_staleness: 0}}}
    with:
      segment_tokens: 256
      max_length: 2048
      max_prompt_tokens: 1792
      temperature: 0.7
      top_k: 50
      top_p: 0.95
      responses_per_prompt: 1
      sample_every: 1
  ema: {op: ema, in: learner.weights, with: {decay: 0.5}}";
    sapo("", nodes, "segments.pairs", "segments.metrics")
}

/// Sampler, buffer, average and reference: how they are wired, and their configs.
fn loop_of(graph: &Graph) -> Vec<String> {
    let name = |index: usize| graph.nodes[index].name.trim_start_matches("augment/").to_owned();
    let is_inside = |index: usize| ["segments", "replay", "ema"].contains(&name(index).as_str());
    let edges = graph.edges.iter().filter(|edge| is_inside(edge.to_node)).map(|edge| {
        let (from, to) = (name(edge.from_node), name(edge.to_node));
        format!("{from}.{} -> {to}.{} {:?}", graph.output(edge).name, graph.input(edge).name, edge.feedback)
    });
    let nodes = (0..graph.nodes.len()).filter(|index| is_inside(*index));
    let configs = nodes.map(|index| format!("{} {:?}", name(index), graph.nodes[index].config));
    let mut found: Vec<String> = edges.chain(configs).collect();
    found.sort();
    found
}

#[test]
fn self_augment_is_the_loop_of_the_sapo_pipelines() {
    let registry = sapo_flow_operators::registry();
    let composed = pipeline::parse_str("p.yaml", &with_self_augment(), &[], &registry).unwrap();
    assert!(composed.warnings.list.is_empty(), "{}", composed.warnings);
    let written = pipeline::parse_str("p.yaml", &without_self_augment(), &[], &registry).unwrap();
    assert_eq!(loop_of(&composed), loop_of(&written));
    let load = |name: &str, overrides: &[(String, String)]| {
        loop_of(&pipeline::load(&root().join("pipelines").join(name), overrides, &registry).unwrap())
    };
    assert_eq!(load("sapo_orpo.yaml", &[]), loop_of(&written));
    assert_eq!(load("sapo_async.yaml", &[("max_staleness".into(), "0".into())]), loop_of(&written));
    assert_eq!(load("sapo_dpo.yaml", &[]), loop_of(&written));
    let on_policy = load("sapo_onpolicy.yaml", &[("ema_decay".into(), "0.5".into())]);
    let without_buffer = loop_of(&written).into_iter().filter(|line| !line.contains("replay")).collect::<Vec<_>>();
    assert_eq!(on_policy, without_buffer);
}

#[test]
fn expanded_pipelines_read_as_the_same_pipelines() {
    let registry = sapo_flow_operators::registry();
    for path in shipped() {
        let written = pipeline::load(&path, &[], &registry).unwrap();
        let said = sapo_flow(&["expand", path.to_str().unwrap()]);
        let text = String::from_utf8(said.stdout).unwrap();
        let expanded = pipeline::parse_str("p.yaml", &text, &[], &registry)
            .unwrap_or_else(|refused| panic!("{}: {refused}\n{text}", path.display()));
        assert_eq!(expanded.edges, written.edges, "{}", path.display());
        // Defaults are added, nothing else changes.
        for (node, before) in expanded.nodes.iter().zip(&written.nodes) {
            for (key, value) in before.config.as_mapping().unwrap() {
                assert!(value.is_mapping() || node.config[key] == *value, "{}: {}: {key:?}", path.display(), node.name);
            }
        }
    }
    let said = sapo_flow(&["expand", "pipelines/sapo_orpo.yaml", "-S", "ema_decay=0.9", "-S", "evaluate_every=27"]);
    let text = String::from_utf8(said.stdout).unwrap();
    assert!(text.contains("      every: 27 # ${evaluate_every}, -S evaluate_every=27\n"), "{text}");
    // Inside the composite: given by the use, and there by the command line or the default.
    let given = |line: &str| {
        let found = text.lines().find(|found| found.trim_start().starts_with(line)).expect("the key is there");
        found.split("; ").map(str::to_owned).collect::<Vec<_>>()
    };
    let decay = given("decay: 0.9 # ${ema_decay}, given at pipelines/sapo_orpo.yaml:");
    assert_eq!(decay[1], "${ema_decay}, -S ema_decay=0.9");
    let tokens = given("segment_tokens: 256 # ${segment_tokens}, given at pipelines/sapo_orpo.yaml:");
    assert!(tokens[1].starts_with("${segment_tokens}, default at pipelines/sapo_orpo.yaml:"), "{tokens:?}");
    assert!(
        text.contains("      segment_tokens: 256 # ${segment_tokens}, default at pipelines/sapo_orpo.yaml:"),
        "{text}"
    );
    let said = sapo_flow(&["expand", "pipelines/sapo_orpo.yaml", "-S", "ema_dekay=0.9"]);
    assert_eq!(said.status.code(), Some(78));
}

#[test]
fn composites_are_listed_and_documented() {
    let file = "operators/self_augment.yaml";
    let said = |arguments: &[&str]| String::from_utf8(sapo_flow(arguments).stdout).unwrap();
    let list = said(&["operators", "--pipeline", file]);
    assert_eq!(list, "self_augment  Pairs whose rejected answers an EMA of the model wrote.\n");
    let page = said(&["operators", "self_augment", "--pipeline", file, "--format", "markdown"]);
    assert!(
        page.contains(
            "| `ema_decay` | a number | `0.5` | Weight of the average's past at each step; 0 is the model itself. |\n"
        ),
        "{page}"
    );
    let pages: serde_json::Value =
        serde_json::from_str(&said(&["operators", "--pipeline", file, "--format", "json"])).unwrap();
    assert_eq!(pages[0]["outputs"][2]["name"], "metrics");
    assert_eq!(pages[0]["inputs"][1]["types"], serde_json::json!(["Weights"]));
    // Where no pipeline is named, those in operators/ are at hand.
    let text = said(&["operators", "self_augment"]);
    for line in [
        "    prompts: Prompts (many)",
        "    pairs: Pairs",
        "    in: {prompts: prompt_source.prompts, weights: preference_learner.weights}",
    ] {
        assert!(text.lines().any(|found| found.ends_with(line)), "{line}\n{text}");
    }
    assert!(said(&["operators"]).contains("\nself_augment "));
    let unknown = String::from_utf8(sapo_flow(&["operators", "something_else"]).stderr).unwrap();
    assert!(unknown.contains("`sapo-flow operators --pipeline FILE`"), "{unknown}");
    let wrong = sapo_flow(&["operators", "self_augmint", "--pipeline", file]);
    assert_eq!(wrong.status.code(), Some(2));
    assert!(String::from_utf8_lossy(&wrong.stderr).contains("did you mean `self_augment`?"));
}

#[test]
fn scaffolds_are_valid_for_every_operator() {
    let registry = sapo_flow_operators::registry();
    let read = |operators: &[String]| {
        let text = pipeline::scaffold(operators, &registry).unwrap();
        let graph = pipeline::parse_str("new.yaml", &text, &[], &registry);
        let graph = graph.unwrap_or_else(|refused| panic!("{refused}\n{text}"));
        // Of an operator that is there twice, one's metrics may have no sink.
        let mut seen = std::collections::HashSet::new();
        let once = graph.nodes.iter().all(|node| seen.insert(node.op.name));
        assert!(!once || graph.warnings.list.is_empty(), "{}\n{text}", graph.warnings);
        let models = text.matches("models/").count();
        assert!(models <= 1, "one model, named once:\n{text}");
        graph
    };
    let names: Vec<String> = registry.iter().map(|spec| spec.name.to_owned()).collect();
    for name in &names {
        let graph = read(std::slice::from_ref(name));
        assert!(graph.nodes.iter().any(|node| node.op.name == name), "{name}");
        for other in &names {
            read(&[name.clone(), other.clone()]);
        }
    }
    read(&names);
}

#[test]
fn a_scaffold_joins_two_sources_and_keeps_what_it_trains() {
    let registry = sapo_flow_operators::registry();
    let text = pipeline::scaffold(&["join".to_owned(), "preference_learner".to_owned()], &registry).unwrap();
    let graph = pipeline::parse_str("new.yaml", &text, &[], &registry).unwrap();
    let names: Vec<&str> = graph.params.keys().map(String::as_str).collect();
    assert_eq!(names, ["model", "data", "data_2"]);
    let join = graph.nodes.iter().position(|node| node.op.name == "join").unwrap();
    let sources: Vec<usize> =
        graph.edges.iter().filter(|edge| edge.to_node == join).map(|edge| edge.from_node).collect();
    assert_eq!((sources.len(), sources[0] == sources[1]), (2, false), "{text}");
    for sink in ["checkpoint", "metrics_sink"] {
        assert!(graph.nodes.iter().any(|node| node.op.name == sink), "{text}");
    }
}

#[test]
fn a_scaffold_of_the_sapo_operators_is_its_loop() {
    let operators =
        "prompt_source,segment_sampler,replay_buffer,batcher,preference_learner,ema,metrics_sink,checkpoint";
    let said = sapo_flow(&["new", operators]);
    let text = String::from_utf8(said.stdout).unwrap();
    let graph = pipeline::parse_str("new.yaml", &text, &[], &sapo_flow_operators::registry()).unwrap();
    assert!(graph.warnings.list.is_empty(), "{}", graph.warnings);
    let name = |index: usize| graph.nodes[index].name.as_str();
    let mut edges: Vec<String> = graph
        .edges
        .iter()
        .filter(|edge| graph.input(edge).name != "metrics")
        .map(|edge| {
            let mark = if edge.feedback.is_some() { " later" } else { "" };
            format!("{} -> {}{mark}", name(edge.from_node), name(edge.to_node))
        })
        .collect();
    edges.sort_by_key(|edge| !edge.ends_with("later"));
    assert_eq!(
        edges,
        [
            "ema -> segment_sampler later",
            "prompt_source -> segment_sampler",
            "segment_sampler -> replay_buffer",
            "replay_buffer -> batcher",
            "batcher -> preference_learner",
            "preference_learner -> ema",
            "ema -> checkpoint",
        ]
    );
    // What is missing is added where it learns from what comes out of the buffer.
    let said = sapo_flow(&["new", "prompt_source,segment_sampler,replay_buffer"]);
    let text = String::from_utf8(said.stdout).unwrap();
    let graph = pipeline::parse_str("new.yaml", &text, &[], &sapo_flow_operators::registry()).unwrap();
    let reads = |reader: &str| {
        let edge = graph.edges.iter().find(|edge| graph.nodes[edge.to_node].name == reader).unwrap();
        graph.nodes[edge.from_node].name.as_str()
    };
    assert_eq!(
        ["replay_buffer", "batcher", "preference_learner"].map(reads),
        ["segment_sampler", "replay_buffer", "batcher"]
    );
    assert_eq!(graph.edges.iter().filter(|edge| edge.feedback.is_some()).count(), 1);

    let wrong = sapo_flow(&["new", "prompt_sourc"]);
    assert_eq!(wrong.status.code(), Some(2));
    assert!(String::from_utf8_lossy(&wrong.stderr).contains("did you mean `prompt_source`?"));
}

#[test]
fn models_and_metrics_that_nobody_writes_are_warned_of() {
    let registry = sapo_flow_operators::registry();
    let warnings = |text: &str| {
        let graph = pipeline::parse_str("p.yaml", text, &[], &registry).unwrap();
        graph.warnings.list.iter().map(|found| (found.line, found.message.clone())).collect::<Vec<_>>()
    };
    let whole = with_self_augment();
    let without = whole.replace("  model: {op: checkpoint, in: learner.weights}\n", "");
    assert_eq!(warnings(&without), [(12, "no node writes the model that `learner` trains".to_owned())]);
    let fewer = whole.replace(", batches.metrics", "");
    assert_eq!(warnings(&fewer), [(11, "nothing reads `batches.metrics`".to_owned())]);
    // The average of a model is a model too.
    let average =
        whole.replace("model: {op: checkpoint, in: learner.weights}", "model: {op: checkpoint, in: augment.weights}");
    assert_eq!(warnings(&average), []);
}

//! Each kind of mistake: what is said of it, at which line and column.

use crate::toy::{LOOP, around, complaints, help, read};

#[test]
fn a_finding_is_shown_with_its_line() {
    let refused = read(&LOOP.replace("replay: {op:", "replay: {opp:")).err().unwrap();
    assert_eq!(
        refused.to_string(),
        "\
error: the node `replay` has no `op`
  --> p.yaml:13:3
   |
13 |   replay: {opp: replay_buffer, in: segments}
   |   ^^^^^^ needs `op`: the name of an operator

error: unknown key `opp` in the node `replay`
  --> p.yaml:13:12
   |
13 |   replay: {opp: replay_buffer, in: segments}
   |            ^^^ unknown key
   = help: did you mean `op`?"
    );
}

#[test]
fn all_errors_are_told_at_once() {
    let text = "version: 2
rum: {steps: 10}
run: {steps: 10, epochs: 2, device: gpu}
nodes:
  prompts: {op: prompt_sauce}
  segments: {op: segment_sampler, in: {prompts: promts, weights: learner, extra: prompts}, with: {temperature: hot}}
  batches: {op: batcher, in: segments}
  learner: {op: learner, in: batches, with: {objective: orpoo, betta: 1}}
  metrics: {op: metrics_sink, in: learner.metrix}
";
    assert_eq!(
        complaints(text),
        [
            "1:10 this sapo-flow reads pipelines of version 1, found the number 2",
            "2:1 unknown key `rum` in the pipeline",
            "3:18 `run` takes `steps` or `epochs`, not both",
            "3:37 `run.device` names no device: found the text \"gpu\"",
            "5:17 unknown operator `prompt_sauce`",
            "6:49 there is no node `promts`",
            "6:66 a cycle without `feedback`: segments -> batches -> learner.weights -> segments",
            "6:75 `segment_sampler` has no input `extra`",
            "6:112 `temperature` must be a number, found the text \"hot\"",
            "8:57 `objective` must be `orpo` or `dpo`, found the text \"orpoo\"",
            "8:64 unknown key `betta`",
            "9:35 `learner` (learner) has no output `metrix`",
        ]
    );
}

#[test]
fn a_cycle_prints_its_whole_chain() {
    let text = LOOP
        .replace("{from: ema, feedback: {max_staleness: \"${max_staleness}\"}}", "ema")
        .replace("  max_staleness: 0\n", "");
    let refused = read(&text).err().unwrap();
    assert_eq!(
        refused.to_string(),
        "\
error: a cycle without `feedback`: segments -> replay.pairs -> batches -> learner.weights -> ema -> segments
  --> p.yaml:11:16
   |
11 |       weights: ema
   |                ^^^ every step would wait for itself
   = help: delay one of its edges, such as `weights: {from: ema, feedback: {max_staleness: 0}}`"
    );
    let selfish = around("  ema: {op: ema, in: ema, with: {decay: 0.5}}\n");
    assert_eq!(complaints(&selfish)[0], "4:22 a cycle without `feedback`: ema -> ema");
}

#[test]
fn two_cycles_are_two_errors() {
    let text = around(
        "  a: {op: ema, in: b, with: {decay: 0.5}}
  b: {op: ema, in: a, with: {decay: 0.5}}
  c: {op: ema, in: d, with: {decay: 0.5}}
  d: {op: ema, in: c, with: {decay: 0.5}}
  e: {op: ema, in: d, with: {decay: 0.5}}
",
    );
    let cycles: Vec<_> = complaints(&text).into_iter().filter(|text| text.contains("cycle")).collect();
    assert_eq!(
        cycles,
        ["4:20 a cycle without `feedback`: a -> b -> a", "6:20 a cycle without `feedback`: c -> d -> c"]
    );
}

#[test]
fn a_wrong_connection_names_both_types() {
    let text = LOOP.replace("batches: {op: batcher, in: replay}", "batches: {op: batcher, in: learner.metrics}");
    let refused = read(&text).err().unwrap();
    assert_eq!(
        refused.list[0].to_string(),
        "\
error: `learner.metrics` carries Metrics, but the input `pairs` of `batcher` takes Pairs
  --> p.yaml:14:30
   |
14 |   batches: {op: batcher, in: learner.metrics}
   |                              ^^^^^^^^^^^^^^^ expected Pairs
   = help: `segments.pairs` and `replay.pairs` carry Pairs"
    );
}

#[test]
fn missing_connections_are_errors() {
    let text = LOOP.replace(", in: segments}", "}").replace("      prompts: prompts\n", "");
    assert_eq!(
        complaints(&text)[..2],
        [
            "10:5 the input `prompts` of `segments` (segment_sampler) is not connected",
            "12:3 the input `pairs` of `replay` (replay_buffer) is not connected",
        ]
    );
    assert_eq!(help(&text).as_deref(), Some("`prompts.prompts` carries Prompts"));
    let text = LOOP.replace("in: segments}", "in: []}");
    assert_eq!(complaints(&text)[0], "13:35 the input `pairs` of `replay_buffer` needs an edge");
}

#[test]
fn too_many_connections_are_errors() {
    let text = LOOP.replace("in: batches,", "in: [batches, batches],");
    assert_eq!(
        complaints(&text),
        [
            "15:30 the input `batches` of `learner` takes one edge, found 2",
            "15:40 `batches.batches` is connected twice",
        ]
    );
    let text = LOOP.replace("op: prompt_source,", "op: prompt_source, in: ema,");
    assert_eq!(complaints(&text)[0], "7:32 `prompts` has inputs, but `prompt_source` takes none");
    let text = LOOP.replace("in: replay}", "in: metrics}");
    assert_eq!(complaints(&text)[0], "14:30 `metrics` (metrics_sink) has no outputs");
}

#[test]
fn malformed_connections_are_errors() {
    let text = LOOP.replace("feedback: {max_staleness: \"${max_staleness}\"}", "feedback: {max_staleness: -1}");
    assert_eq!(complaints(&text)[1], "12:54 `max_staleness` is a number of steps, found the number -1");
    for staleness in ["10001", "18446744073709551615"] {
        let text = LOOP.replace("max_staleness: 0", &format!("max_staleness: {staleness}"));
        assert_eq!(complaints(&text), [format!("12:54 `max_staleness` is at most 10000 steps, found {staleness}")]);
    }
    assert!(read(&LOOP.replace("max_staleness: 0", "max_staleness: 10000")).is_ok());
    let text = LOOP.replace("feedback: {max_staleness: \"${max_staleness}\"}", "feedback: {staleness: 1}");
    assert_eq!(
        complaints(&text)[1..],
        ["12:28 `feedback` has no `max_staleness`", "12:39 unknown key `staleness` in `feedback`"]
    );
    let text = LOOP.replace("feedback: {max_staleness: \"${max_staleness}\"}", "feedback: true");
    assert_eq!(complaints(&text)[1], "12:38 `feedback` is a mapping, found `true`");
    let text = LOOP.replace("{from: ema, feedback:", "{form: ema, feedback:");
    assert_eq!(
        complaints(&text),
        ["12:16 this connection has no `from`", "12:17 unknown key `form` in this connection"]
    );
    let text = LOOP.replace("in: replay}", "in: 3}");
    assert_eq!(complaints(&text)[0], "14:30 a connection is `node` or `node.port`, found the number 3");
}

#[test]
fn configs_are_held_against_their_schema() {
    let with = |with: &str| {
        complaints(&around(&format!("  a: {{op: prompt_source, with: {with}}}\n")))
            .into_iter()
            .filter(|text| !text.contains("no sink"))
            .collect::<Vec<_>>()
    };
    assert_eq!(with("{}"), ["4:26 the key `path` is missing"]);
    assert_eq!(with("[a]"), ["4:26 `with` is a mapping, found a list"]);
    assert_eq!(with("{path: 3}"), ["4:39 `path` must be text, found the number 3"]);
    assert_eq!(with("{path: a, batch_size: 0}"), ["4:54 `batch_size` must be at least 1, found 0"]);
    assert_eq!(with("{path: a, batch_size: 1.5}"), ["4:54 `batch_size` must be an integer, found the number 1.5"]);
    assert_eq!(with("{path: a, batch_size: null}"), ["4:54 `batch_size` must be an integer, found nothing"]);
    assert_eq!(with("{path: a, columns: b}"), ["4:51 `columns` must be a list, each item text, found the text \"b\""]);
    assert_eq!(with("{path: a, columns: [b, 1]}"), ["4:55 `columns[1]` must be text, found the number 1"]);
    assert_eq!(
        with("{Path: a, batchsize: 1}"),
        ["4:26 the key `path` is missing", "4:33 unknown key `Path`", "4:42 unknown key `batchsize`"]
    );
    let text = around("  a: {op: prompt_source}\n");
    assert_eq!(complaints(&text)[0], "4:11 the key `path` is missing");
}

#[test]
fn alternatives_are_told_apart() {
    let sampler = |with: &str| {
        let text = LOOP.replace("op: segment_sampler\n", &format!("op: segment_sampler\n    with: {with}\n"));
        complaints(&text)
    };
    assert_eq!(sampler("{segment_tokens: 3, top_p: 1}"), Vec::<String>::new());
    assert_eq!(sampler("{segment_tokens: all, top_p: null}"), Vec::<String>::new());
    assert_eq!(
        sampler("{segment_tokens: al}"),
        ["10:28 `segment_tokens` must be an integer or `all`, found the text \"al\""]
    );
    assert_eq!(sampler("{segment_tokens: -3}"), ["10:28 `segment_tokens` must be at least 0, found -3"]);
    assert_eq!(sampler("{top_p: 0}"), ["10:19 `top_p` must be above 0, found 0"]);
    assert_eq!(sampler("{top_p: 1.5}"), ["10:19 `top_p` must be at most 1, found 1.5"]);
    assert_eq!(sampler("{temperature: .nan}"), ["10:25 `temperature` must be at least 0.0, found .nan"]);
}

#[test]
fn nested_configs_are_checked_inside() {
    let learner = |optimizer: &str| {
        complaints(&LOOP.replace("{objective: orpo}", &format!("{{objective: orpo, optimizer: {optimizer}}}")))
    };
    assert_eq!(learner("{name: adamw, learning_rate: 1e-6, betas: [0.9, 0.99]}"), Vec::<String>::new());
    assert_eq!(learner("{name: sgd, learning_rate: 1, momentum: 0.9}"), Vec::<String>::new());
    assert_eq!(
        learner("{name: adamw, learning_rate: fast, momentum: 0}"),
        [
            "15:103 `optimizer.learning_rate` must be a number, found the text \"fast\"",
            "15:109 unknown key `momentum` in `optimizer`",
        ]
    );
    assert_eq!(learner("{name: sgd}"), ["15:63 the key `optimizer.learning_rate` is missing"]);
    assert_eq!(
        learner("{name: adam, learning_rate: 1}"),
        ["15:81 `optimizer.name` must be `adamw` or `sgd`, found the text \"adam\""]
    );
    assert_eq!(learner("adamw"), ["15:74 `optimizer` must be a mapping, found the text \"adamw\""]);
}

#[test]
fn an_operators_own_check_points_at_its_key() {
    let text = LOOP.replace("ema_decay: 0.5", "ema_decay: 1.5");
    let refused = read(&text).err().unwrap();
    assert_eq!(
        refused.to_string(),
        "\
error: `decay`: must be at least 0 and below 1
  --> p.yaml:16:53
   |
16 |   ema: {op: ema, in: learner.weights, with: {decay: \"${ema_decay}\"}}
   |                                                     ^^^^^^^^^^^^^^
   = note: `${ema_decay}` is the number 1.5"
    );
}

#[test]
fn the_run_block_is_checked() {
    let run = |run: &str| complaints(&LOOP.replace("{steps: 10}", run));
    assert_eq!(run("{}"), ["5:1 the `run` block does not say how long the run is"]);
    assert_eq!(run("{steps: 0}"), ["5:14 `run.steps` must be at least 1, found 0"]);
    assert_eq!(
        run("{epochs: 1, dtype: float16}"),
        ["5:25 `run.dtype` must be `float32`, `bfloat16` or `auto`, found the text \"float16\""]
    );
    assert_eq!(run("{epochs: 1, checkpoint: {evry: 5}}"), ["5:31 unknown key `evry` in `run.checkpoint`"]);
    assert_eq!(
        run("{epochs: 1, checkpoint: {every: 5, keep: 0}}"),
        ["5:47 `run.checkpoint.keep` must be at least 1, found 0"]
    );
    assert_eq!(run("{steps: 1, device: \"cuda:1\", threads: 2, seed: 7, dtype: bfloat16}"), Vec::<String>::new());
    assert_eq!(run("{steps: 1, seed: -1}"), ["5:23 `run.seed` must be at least 0, found -1"]);
    assert_eq!(run("3"), ["5:6 `run` must be a mapping, found the number 3"]);
}

#[test]
fn the_top_level_is_checked() {
    assert_eq!(
        complaints("params: {}\n"),
        ["1:1 the pipeline has no `version`", "1:1 the pipeline has no `run` block", "1:1 the pipeline has no `nodes`"]
    );
    assert_eq!(complaints(""), ["1:1 a pipeline is a mapping, found nothing"]);
    assert_eq!(complaints("- a\n"), ["1:1 a pipeline is a mapping, found a list"]);
    assert_eq!(
        complaints("version: 1\nrun: {steps: 1}\nnodes: {}\n"),
        ["3:1 `nodes` is a mapping from names to nodes, found an empty mapping"]
    );
    assert_eq!(
        complaints("version: 1\nrun: {steps: 1}\nnodes: {a: ema, b-c: {op: ema, in: b-c, with: {decay: 0.1}}}\n"),
        [
            "3:9 the node `a` is a mapping with `op`, found the text \"ema\"",
            "3:17 `b-c` is no name for a node",
            "3:36 a cycle without `feedback`: b-c -> b-c",
        ]
    );
}

#[test]
fn broken_yaml_is_located() {
    assert_eq!(
        complaints("version: 1\nrun: {steps: 1\nnodes: x\n"),
        ["3:6 this is not YAML: did not find expected ',' or '}'"]
    );
    assert_eq!(complaints("\u{feff}version: 2\n"), complaints("version: 2\n"));
    let refused = complaints("version: 1\nrun: {steps: 36893488147419103232}\nnodes: {}\n");
    assert_eq!(refused.len(), 1);
    let expected = "the integer 36893488147419103232 has more than 64 bits; with a point it is a number";
    assert!(refused[0].ends_with(expected), "{refused:?}");
    assert_eq!(
        complaints("version: 1\nrun: {steps: 1, steps: 2}\nversion: 1\n"),
        ["2:17 the key `steps` is given twice", "3:1 the key `version` is given twice"]
    );
    assert_eq!(
        complaints("version: !!int 1\nrun: {steps: 1}\nnodes: {a: {op: prompt_source, with: {path: b}}}\n"),
        ["1:10 a tag has no meaning here"]
    );
    assert_eq!(complaints("1: 2\n")[0], "1:1 keys are text, found the number 1");
    assert_eq!(complaints("a: *b\n").len(), 1);
}

#[test]
fn a_missing_file_is_named() {
    let path = std::path::Path::new("no/such/pipeline.yaml");
    let refused = sapo_flow_engine::pipeline::load(path, &[], &crate::toy::registry()).err().unwrap();
    assert!(refused.to_string().starts_with("error: cannot read `no/such/pipeline.yaml`: "), "{refused}");
}

#[test]
fn mistakes_of_all_kinds_are_told_at_once() {
    // A type, what the same operator says of another key, and what is missing; a wrong edge; a sweep and a test.
    let text = r#"version: 1
params: {ema_decay: 2.5, steps: 10}
run: {steps: "${steps}"}
nodes:
  prompts: {op: prompt_source, with: {batch_size: many}}
  segments: {op: segment_sampler, in: {prompts: prompts, weights: {from: emma, feedback: {max_staleness: 0}}}}
  batches: {op: batcher, in: segments}
  learner: {op: learner, in: batches, with: {objective: orpo}}
  ema: {op: ema, in: learner.weights, with: {decay: "${ema_decay}", dekay: 3}}
  metrics: {op: metrics_sink, in: learner}
sweep: {grid: {ema_dekay: [1, 2], steps: []}, sedes: [1]}
tests:
  - {name: a, fed: {}, expect: {}}
  - {nam: b}
"#;
    assert_eq!(
        complaints(text),
        [
            "5:32 the key `path` is missing",
            "5:51 `batch_size` must be an integer, found the text \"many\"",
            "6:74 there is no node `emma`",
            "9:53 `decay`: must be at least 0 and below 1",
            "9:69 unknown key `dekay`",
            "10:35 `learner.weights` carries Weights, but the input `metrics` of `metrics_sink` takes Metrics",
            "11:16 the pipeline has no parameter `ema_dekay`",
            "11:42 expected a list of values for `steps`, found an empty list",
            "11:47 unknown key `sedes` in `sweep`",
            "13:15 unknown key `fed` in the test `a`",
            "14:5 a test has a `name`",
        ]
    );
}

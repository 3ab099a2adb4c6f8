//! Other algorithms are other YAML: the operators are the same.

use std::collections::BTreeSet;
use std::fs;

use serde_json::Value;

use crate::workplace::Workplace;

/// The data, and a sampler that reads its weights over a feedback edge.
const PROMPTS: &str = "
  prompts: {op: prompt_source, with: {path: chats.jsonl, tokenizer: model, batch_size: 3}}
";
const LEARNER: &str = "
  learner:
    op: preference_learner
    in: batches.batches
    with: {model: model, objective: orpo, learning_rate: 1e-3}
  policy: {op: checkpoint, in: learner.weights}
";

fn sampler(name: &str, weights: &str, more: &str) -> String {
    format!(
        "  {name}:
    op: segment_sampler
    in: {{prompts: prompts, weights: {{from: {weights}, feedback: {{max_staleness: \"${{max_staleness}}\"}}}}}}
    with: {{segment_tokens: 4, max_length: 48, max_prompt_tokens: 24{more}}}
"
    )
}

fn batcher(pairs: &str) -> String {
    format!("  batches: {{op: batcher, in: {pairs}, with: {{batch_size: 4, max_length: 48}}}}\n")
}

/// A value of every step, where it was reported.
fn values(metrics: &[Value], name: &str) -> Vec<f64> {
    metrics.iter().filter_map(|step| step[name].as_f64()).collect()
}

fn json_lines(text: &str) -> Vec<Value> {
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

#[test]
fn two_samplers_fill_one_buffer() {
    let here = Workplace::new();
    let nodes = [
        PROMPTS,
        &sampler("cool", "ema", ", temperature: 0.3"),
        &sampler("warm", "ema", ", temperature: 2.0, top_k: 0, top_p: 1.0, responses_per_prompt: 2"),
        "  replay: {op: replay_buffer, in: [cool.pairs, warm.pairs], with: {capacity: 100, draws: 6}}\n",
        &batcher("replay.pairs"),
        LEARNER,
        "  ema: {op: ema, in: learner.weights, with: {decay: 0.9}}
  metrics: {op: metrics_sink, in: [learner.metrics, cool.metrics, warm.metrics, replay.metrics]}
  made: {op: sample_sink, in: [cool.pairs, warm.pairs], with: {tokenizer: model, every: 1, count: 9, file: made.jsonl}}
  drawn: {op: sample_sink, in: replay.pairs, with: {tokenizer: model, every: 1, count: 6, file: drawn.jsonl}}
",
    ]
    .concat();
    here.pipeline("p.yaml", &nodes);
    let results = here.run("p.yaml", "out", &["steps=8"]);
    // 14 rows, three a step and two in the fifth: 8 steps have 3 + 3 + 3 + 3 + 2 + 3 + 3 + 3 of them, three pairs each.
    assert_eq!(values(&results.metrics, "buffer/size"), [9., 18., 27., 36., 42., 51., 60., 69.]);
    assert_eq!(values(&results.metrics, "loss").len(), 8);
    let lines = |file: &str| json_lines(&fs::read_to_string(here.path("out").join(file)).unwrap());
    let of = |lines: &[Value], origin: &str| lines.iter().filter(|line| line["origin"] == origin).count();
    let (made, drawn) = (lines("made.jsonl"), lines("drawn.jsonl"));
    assert_eq!((of(&made, "cool"), of(&made, "warm"), made.len()), (23, 46, 69));
    assert_eq!(drawn.len(), 48);
    assert!(of(&drawn, "cool") > 0 && of(&drawn, "warm") > 0);
    // What is drawn was made: the same pair, known by its seed.
    let seeds = |lines: &[Value]| lines.iter().map(|line| line["seed"].as_u64().unwrap()).collect::<BTreeSet<_>>();
    assert!(seeds(&drawn).is_subset(&seeds(&made)));
    assert_eq!(seeds(&made).len(), 69);
}

#[test]
fn staleness_is_what_the_edge_declares() {
    let here = Workplace::new();
    // No buffer, and no average: the policy samples, and its pairs are used at once.
    let nodes = [
        PROMPTS,
        &sampler("segments", "learner.weights", ""),
        &batcher("segments.pairs"),
        LEARNER,
        "  metrics: {op: metrics_sink, in: learner.metrics}
  samples: {op: sample_sink, in: segments, with: {tokenizer: model, every: 1, count: 3}}
",
    ]
    .concat();
    here.pipeline("p.yaml", &nodes);
    let mut losses = Vec::new();
    for max_staleness in [0, 1, 3] {
        let out = format!("out-{max_staleness}");
        let results = here.run("p.yaml", &out, &[&format!("max_staleness={max_staleness}"), "steps=10"]);
        // Before step k nothing older than the first weights exists.
        let expected: Vec<f64> = (0..10).map(|step| f64::from(step.min(max_staleness))).collect();
        assert_eq!(values(&results.metrics, "staleness"), expected, "max_staleness {max_staleness}");
        assert_eq!(values(&results.metrics, "pair_age"), [0.0; 10]);
        for sample in json_lines(&String::from_utf8(results.samples).unwrap()) {
            let step = sample["step"].as_i64().unwrap();
            assert_eq!(sample["weights_version"], (step - i64::from(max_staleness)).max(0));
        }
        losses.push(values(&results.metrics, "loss"));
    }
    assert!(losses[0] != losses[1] && losses[1] != losses[2]);
    // All three sample the first step with the first weights.
    assert!(losses.iter().all(|loss| loss[0] == losses[0][0]));
}

#[test]
fn spin_rewrites_whole_responses() {
    let here = Workplace::new();
    let nodes = [
        PROMPTS,
        &sampler("segments", "learner.weights", ", responses_per_prompt: 2, sample_every: 2")
            .replace("segment_tokens: 4", "segment_tokens: all"),
        &batcher("segments.pairs"),
        LEARNER,
        "  metrics: {op: metrics_sink, in: [learner.metrics, segments.metrics]}
  samples: {op: sample_sink, in: segments, with: {tokenizer: model, every: 1, count: 9}}
",
    ]
    .concat();
    here.pipeline("p.yaml", &nodes);
    let results = here.run("p.yaml", "out", &["steps=4"]);
    let steps: Vec<u64> = results.metrics.iter().filter_map(|line| line["step"].as_u64()).collect();
    assert_eq!(steps, [0, 2], "nothing happens at steps without pairs");
    let samples = json_lines(&String::from_utf8(results.samples).unwrap());
    assert_eq!(samples.len(), 12);
    for sample in &samples {
        assert_eq!(sample["segment"]["start"], 0);
        assert_eq!(sample["segment"]["text"], sample["rejected"]);
        assert_eq!(sample["segment"]["ended"], sample["rejected"].as_str().unwrap().ends_with("</s>"));
    }
}

#[test]
fn two_sinks_read_one_output() {
    let here = Workplace::new();
    let nodes = [
        "  prompts: {op: prompt_source, with: {path: pairs.jsonl, tokenizer: model, batch_size: 4}}\n",
        &batcher("prompts.pairs"),
        LEARNER,
        "  every: {op: metrics_sink, in: learner.metrics}
  fourth: {op: metrics_sink, in: learner.metrics, with: {every: 4, file: fourth.jsonl}}
",
    ]
    .concat();
    here.pipeline("p.yaml", &nodes);
    let results = here.run("p.yaml", "out", &["steps=6"]);
    let losses = values(&results.metrics, "loss");
    assert_eq!(losses.len(), 6);
    let fourth = json_lines(&fs::read_to_string(here.path("out/fourth.jsonl")).unwrap());
    let mean = |losses: &[f64]| losses.iter().sum::<f64>() / losses.len() as f64;
    assert_eq!(values(&fourth, "loss"), [mean(&losses[..4]), mean(&losses[4..])]);
    assert_eq!(values(&fourth, "step"), [3.0, 5.0]);

    // One file for both is refused, and so is one name from two nodes in one sink.
    let same_file = nodes.replace(", file: fourth.jsonl", "");
    here.pipeline("same_file.yaml", &same_file);
    let said = here.sapo_flow(&["run", "same_file.yaml", "--run-dir", "same_file"]);
    assert_eq!(said.code, Some(78));
    assert!(said.stderr.contains("`every` and `fourth` both write `metrics.jsonl`"), "{}", said.stderr);
}

#[test]
fn dpo_learns_from_pairs_against_a_frozen_reference() {
    let here = Workplace::new();
    let nodes = [
        "  prompts: {op: prompt_source, with: {path: pairs.jsonl, tokenizer: model, batch_size: 4}}\n",
        &batcher("prompts.pairs"),
        "  reference: {op: reference, in: batches.batches, with: {model: model}}\n",
        &LEARNER.replace("batches.batches", "reference").replace("objective: orpo", "objective: dpo"),
        "  metrics: {op: metrics_sink, in: learner.metrics}\n",
    ]
    .concat();
    here.pipeline("p.yaml", &nodes);
    let results = here.run("p.yaml", "out", &["steps=12"]);
    let losses = values(&results.metrics, "loss");
    // The policy is the reference at first, so every reward is 0 and the loss ln 2.
    assert!((losses[0] - std::f64::consts::LN_2).abs() < 1e-6, "{losses:?}");
    assert_eq!(results.metrics[0]["rewards/margins"], 0.0);
    assert!(losses[11] < losses[0] - 0.01, "{losses:?}");
    assert!(results.metrics[11]["rewards/margins"].as_f64() > Some(0.0));
}

#[test]
fn the_datas_own_pairs_are_evaluated() {
    let here = Workplace::new();
    let evaluation = |name: &str, path: &str| {
        format!(
            "  {name}:\n    op: evaluator\n    in: learner.weights\n    with: {{path: {path}, tokenizer: model, max_length: 48, \
             max_prompt_tokens: 24, show: 0}}\n  {name}_metrics: {{op: metrics_sink, in: {name}.metrics, with: {{file: \
             {name}.jsonl}}}}\n"
        )
    };
    let nodes = [
        "  pairs: {op: prompt_source, with: {path: pairs.jsonl, tokenizer: model, batch_size: 3}}\n",
        &batcher("pairs.pairs"),
        LEARNER,
        "  metrics: {op: metrics_sink, in: learner.metrics}\n",
        &evaluation("one", "one.jsonl"),
        &evaluation("turned", "turned.jsonl"),
    ]
    .concat();
    here.pipeline("p.yaml", &nodes);
    let pairs = fs::read_to_string(here.path("pairs.jsonl")).unwrap();
    let mut row: Value = serde_json::from_str(pairs.lines().next().unwrap()).unwrap();
    here.write("one.jsonl", &format!("{row}\n"));
    let (chosen, rejected) = (row["chosen"].take(), row["rejected"].take());
    (row["chosen"], row["rejected"]) = (rejected, chosen);
    here.write("turned.jsonl", &format!("{row}\n"));
    here.run("p.yaml", "out", &["steps=3"]);
    let last = |name: &str| -> Value {
        let text = fs::read_to_string(here.path(format!("out/{name}.jsonl"))).unwrap();
        serde_json::from_str(text.lines().last().unwrap()).unwrap()
    };
    let (one, turned) = (last("one"), last("turned"));
    let value = |line: &Value, name: &str| line[name].as_f64().unwrap_or_else(|| panic!("{name}: {line}"));
    // Of a row alone, the margin per token is the difference of both answers' NLLs per token.
    let margin = value(&turned, "eval_nll") - value(&one, "eval_nll");
    assert!((value(&one, "eval_given_margin") - margin).abs() < 1e-5 && margin.abs() > 1e-3, "{one} {turned}");
    assert!((value(&turned, "eval_given_margin") + margin).abs() < 1e-5, "{one} {turned}");
    assert_eq!(value(&one, "eval_given_accuracy"), f64::from(margin > 0.0));
    assert_eq!(value(&turned, "eval_given_accuracy"), f64::from(margin < 0.0));
}

#[test]
fn a_run_without_an_update_says_so() {
    let here = Workplace::new();
    let nodes = [
        "  pairs: {op: prompt_source, with: {path: pairs.jsonl, tokenizer: model, batch_size: 3}}\n",
        "  none: {op: filter, in: pairs.pairs, with: {where: chosen_len < 0}}\n",
        &batcher("none"),
        LEARNER,
        "  metrics: {op: metrics_sink, in: learner.metrics}\n",
    ]
    .concat();
    here.pipeline("p.yaml", &nodes);
    let said = here.sapo_flow(&["run", "p.yaml", "-S", "steps=2"]);
    assert_eq!(said.code, Some(0), "{}", said.stderr);
    assert!(said.stderr.contains("no pairs arrived at any step"), "{}", said.stderr);
}

#[test]
fn sft_learns_from_prompts() {
    let here = Workplace::new();
    let nodes = [
        PROMPTS,
        &batcher("prompts"),
        &LEARNER.replace("objective: orpo", "objective: sft"),
        "  metrics: {op: metrics_sink, in: [learner.metrics, evaluation.metrics]}
  evaluation:
    op: evaluator
    in: learner.weights
    with: {path: chats.jsonl, tokenizer: model, every: 5, max_length: 48, max_prompt_tokens: 24, show: 0}
",
    ]
    .concat();
    here.pipeline("p.yaml", &nodes);
    // 14 rows, three a step: five steps an epoch.
    here.write("p.yaml", &fs::read_to_string(here.path("p.yaml")).unwrap().replace("steps: \"${steps}\"", "epochs: 4"));
    here.write("p.yaml", &fs::read_to_string(here.path("p.yaml")).unwrap().replace(", steps: 16", ""));
    let results = here.run("p.yaml", "out", &[]);
    assert_eq!(results.metrics.len(), 20);
    let nll = values(&results.metrics, "eval_nll");
    assert_eq!(nll.len(), 4);
    assert!(nll.windows(2).all(|pair| pair[1] < pair[0]), "{nll:?}");
    assert!(results.metrics.iter().all(|step| step["staleness"].is_null() && step["rewards/margins"].is_null()));
}

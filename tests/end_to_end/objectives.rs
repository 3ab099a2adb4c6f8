//! Objectives written in pipelines: they train, they do not depend on how a step is divided, and what they need has to be
//! there.

use serde_json::Value;

use crate::workplace::Workplace;

/// Pairs from a file, against a reference model.
fn nodes(objective: &str, batch_size: u32) -> String {
    format!(
        r#"
  prompts: {{op: prompt_source, with: {{path: pairs.jsonl, tokenizer: model, batch_size: 5}}}}
  batches: {{op: batcher, in: prompts.pairs, with: {{batch_size: {batch_size}, max_length: 48}}}}
  reference: {{op: reference, in: batches.batches, with: {{model: reference}}}}
  learner:
    op: preference_learner
    in: reference
    with:
      model: model
      objective: {objective}
      learning_rate: 1e-3
  metrics: {{op: metrics_sink, in: learner.metrics}}
  policy: {{op: checkpoint, in: learner.weights}}
"#
    )
}

fn values(metrics: &[Value], name: &str) -> Vec<f64> {
    metrics.iter().map(|step| step[name].as_f64().unwrap_or_else(|| panic!("no {name} in {step}"))).collect()
}

/// The objective of tomorrow that the README shows, as a learner with this model.
fn of_tomorrow() -> String {
    let readme = std::fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/README.md")).unwrap();
    let block = readme.split_once("<!-- objective:begin -->\n```yaml\n").expect("the README has the mark").1;
    let block = block.split_once("```").expect("the block ends").0;
    assert!(block.lines().count() < 30);
    let small = block.replace("models/smollm2-135m-instruct", "model").replace("5.0e-7", "1e-3");
    small.lines().map(|line| format!("  {line}\n")).collect()
}

#[test]
fn a_formula_in_a_pipeline_trains() {
    let here = Workplace::new();
    let all = nodes("dpo", 5);
    let (before, rest) = all.split_once("  learner:").unwrap();
    let (_, after) = rest.split_once("  metrics:").unwrap();
    here.pipeline("p.yaml", &format!("{before}{}  metrics:{after}", of_tomorrow()));
    let metrics = here.run("p.yaml", "out", &["steps=8"]).metrics;
    let (losses, targets) = (values(&metrics, "loss"), values(&metrics, "target"));
    // Each two steps are a pass over the data, of 5 and 3 rows.
    let pass = |values: &[f64], number: usize| 5.0 * values[2 * number] + 3.0 * values[2 * number + 1];
    assert!(pass(&losses, 3) < pass(&losses, 0), "{losses:?}");
    assert!((pass(&targets, 3) - pass(&targets, 0)).abs() < 1e-5, "{targets:?}");
    // Before the first update the policy is another model than the reference: rewards are beta d, and metrics TRL's.
    let margins = values(&metrics, "rewards/margins");
    let (chosen, rejected) = (values(&metrics, "rewards/chosen"), values(&metrics, "rewards/rejected"));
    assert!((margins[0] - (chosen[0] - rejected[0])).abs() < 1e-5);
    assert!(values(&metrics, "logps/chosen").iter().all(|logps| *logps < 0.0));
}

#[test]
fn how_a_step_is_divided_changes_nothing() {
    let here = Workplace::new();
    for objective in ["aot", "{name: bco_pair, beta: 0.5}", "kto_pair", "[{name: wpo, weight: 0.5}, ld_dpo, sft]"] {
        let run = |batch_size: u32| {
            here.pipeline("p.yaml", &nodes(objective, batch_size));
            let metrics = here.run("p.yaml", &format!("out-{batch_size}"), &["steps=6"]).metrics;
            std::fs::remove_dir_all(here.path(format!("out-{batch_size}"))).unwrap();
            (values(&metrics, "loss"), values(&metrics, "grad_norm"))
        };
        let (losses, norms) = run(5);
        for batch_size in [1, 2, 3] {
            let (other_losses, other_norms) = run(batch_size);
            for (one, other) in losses.iter().zip(&other_losses).chain(norms.iter().zip(&other_norms)) {
                let close = (one - other).abs() < 1e-4 * one.abs().max(1.0);
                assert!(close, "{objective} in batches of {batch_size}: {losses:?} and {other_losses:?}");
            }
        }
    }
}

/// Rows with one answer each, every second one a bad one, in marked.jsonl.
fn write_marked(here: &Workplace) {
    let rows: Vec<Value> = std::fs::read_to_string(here.path("pairs.jsonl"))
        .unwrap()
        .lines()
        .enumerate()
        .map(|(row, line)| {
            let pair: Value = serde_json::from_str(line).unwrap();
            let good = row % 2 == 0;
            serde_json::json!({"prompt": pair["prompt"], "chosen": pair[if good { "chosen" } else { "rejected" }],
                "desirable": good})
        })
        .collect();
    here.write("marked.jsonl", &rows.iter().map(|row| format!("{row}\n")).collect::<String>());
}

/// What the header of pipelines/kto.yaml says of marked answers.
#[test]
fn single_answers_are_learned_from_by_their_marks() {
    let here = Workplace::new();
    write_marked(&here);
    let nodes = |batch_size: u32| {
        nodes("{name: kto, beta: 0.5, desirable_weight: 1.5}", batch_size)
            .replace("path: pairs.jsonl", "path: marked.jsonl, columns: {values: [desirable]}")
            .replace("in: prompts.pairs, with: {", "in: prompts, with: {rejected: next_answer, ")
    };
    here.pipeline("p.yaml", &nodes(5));
    let whole = here.run("p.yaml", "out", &["steps=6"]).metrics;
    assert!(values(&whole, "kl").iter().all(|kl| *kl >= 0.0));
    // The good answers become likelier than they were, and the bad ones less likely than they.
    let (good, bad) = (values(&whole, "rewards/chosen"), values(&whole, "rewards/rejected"));
    assert!(good[4] - bad[4] > good[0] - bad[0], "{good:?} {bad:?}");
    here.pipeline("p.yaml", &nodes(2));
    let parts = here.run("p.yaml", "parts", &["steps=6"]).metrics;
    for (one, other) in values(&whole, "loss").iter().zip(values(&parts, "loss")) {
        assert!((one - other).abs() < 1e-4, "{whole:?} {parts:?}");
    }
    here.pipeline("p.yaml", &nodes(5).replace(", columns: {values: [desirable]}", ""));
    let said = here.sapo_flow(&["run", "p.yaml", "--run-dir", "none", "-S", "steps=6"]);
    assert_eq!(said.code, Some(1));
    assert!(said.stderr.contains("`values.desirable`") && said.stderr.contains("learner"), "{}", said.stderr);
}

/// Other objectives for marked answers name no rejected ones, and do without.
#[test]
fn marked_answers_need_no_rejected_ones() {
    let here = Workplace::new();
    write_marked(&here);
    for objective in ["{name: bco, beta: 0.5}", "{name: apo_zero_unpaired, beta: 0.5, undesirable_weight: 0.8}"] {
        let nodes = nodes(objective, 5)
            .replace("path: pairs.jsonl", "path: marked.jsonl, columns: {values: [desirable]}")
            .replace("in: prompts.pairs", "in: prompts");
        here.pipeline("p.yaml", &nodes);
        let metrics = here.run("p.yaml", "out", &["steps=6"]).metrics;
        std::fs::remove_dir_all(here.path("out")).unwrap();
        let (good, bad) = (values(&metrics, "rewards/chosen"), values(&metrics, "rewards/rejected"));
        assert!(good[4] - bad[4] > good[0] - bad[0], "{objective}: {good:?} {bad:?}");
    }
}

#[test]
fn a_reference_is_there_if_and_only_if_the_formula_names_it() {
    let here = Workplace::new();
    let refused = |nodes: &str| {
        here.pipeline("p.yaml", nodes);
        let said = here.sapo_flow(&["validate", "p.yaml"]);
        assert_eq!(said.code, Some(78), "{}", said.stderr);
        format!("{}{}", said.stderr, said.stdout)
    };
    let without = nodes("{name: hinge, beta: 0.2}", 5).replace("in: reference", "in: batches.batches");
    let without: String =
        without.lines().filter(|line| !line.contains("op: reference")).map(|line| format!("{line}\n")).collect();
    let said = refused(&without);
    assert!(said.contains("`ref_chosen_logps`") && said.contains("`batches`"), "{said}");
    assert!(said.contains("{op: reference, in: batches"), "{said}");
    let said = refused(&nodes("simpo", 5));
    assert!(said.contains("`reference` would have no effect"), "{said}");
    // Places inside a formula.
    let said = refused(&nodes("{use: dpo, formula: -logsigmoid(beta * margni)}", 5));
    assert!(said.contains("unknown name `margni`") && said.contains("did you mean `margin`?"), "{said}");
    let said = refused(&nodes("[dpo, {name: sft, nnl: response}]", 5));
    assert!(said.contains("no param `nnl` (did you mean `nll`?)"), "{said}");
}

#[test]
fn the_reference_page_lists_objectives() {
    let here = Workplace::new();
    let said = here.sapo_flow(&["operators", "preference_learner"]);
    for text in ["`simpo`", "`gamma` 0.5", "`chosen_collision_entropy`", "`logsigmoid`", "objective.name"] {
        assert!(said.stdout.contains(text), "{text}: {}", said.stdout);
    }
}

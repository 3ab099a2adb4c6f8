//! Where mistakes in objectives are shown: in the pipeline, in the text of a formula, in a file.

use sapo_flow_engine::pipeline::{self, Diagnostics};

/// What is said of a pipeline with this objective, whose text begins in line 12.
fn reported(objective: &str) -> Diagnostics {
    let objective: String = objective.lines().map(|line| format!("        {line}\n")).collect();
    let text = "version: 1\nrun: {steps: 1}\nnodes:
  prompts: {op: prompt_source, with: {path: a, tokenizer: m, batch_size: 1}}
  batches: {op: batcher, in: prompts.pairs, with: {batch_size: 1, max_length: 8}}
  learner:
    op: preference_learner
    in: batches
    with:
      {}
";
    let text =
        text.replace("      {}\n", &format!("      model: m\n      learning_rate: 1.0\n      objective:\n{objective}"));
    let text = format!("{text}  sink: {{op: metrics_sink, in: learner.metrics}}\n");
    pipeline::parse_str("p.yaml", &text, &[], &crate::registry()).err().unwrap_or_default()
}

#[test]
fn mistakes_in_folded_formulas_are_shown_in_their_line() {
    let found = reported("formula: >-\n  -logsigmoid(beta * chosen_logps)\n  + 2 * chosen_lgps\nparams: {beta: 1}");
    assert_eq!(found.list.len(), 1, "{found}");
    let told = &found.list[0];
    assert_eq!((told.line, told.column, told.width), (15, 17, 11), "{found}");
    assert_eq!(told.source_line, "          + 2 * chosen_lgps");
    assert_eq!(told.message, "`objective.formula`: unknown name `chosen_lgps`");
    assert_eq!(told.help.as_deref(), Some("did you mean `chosen_logps`?"));
}

#[test]
fn mistakes_in_named_expressions_are_shown_there() {
    let found = reported("formula: -chosen_logps * scale\nlet:\n  scale: 2 + exq(chosen_len)");
    assert_eq!(found.list.len(), 1, "{found}");
    let told = &found.list[0];
    assert_eq!((told.line, told.column, told.width), (15, 22, 3), "{found}");
    assert_eq!(told.message, "`objective.let.scale`: unknown function `exq` of (tensor)");
}

#[test]
fn mistakes_in_a_file_are_shown_in_the_file() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("own.yaml");
    let told = |definition: &str| {
        std::fs::write(&path, definition).unwrap();
        let found = reported(&format!("file: {}\nbeta: 2", path.display()));
        assert_eq!(found.list.len(), 1, "{found}");
        let told = found.list[0].clone();
        assert_eq!(told.file, path.display().to_string(), "{found}");
        assert_eq!(told.notes, ["`objective.file` names this file at p.yaml:13:15"], "{found}");
        told
    };
    let wrong_name =
        told("# Mine.\nparams: {beta: 1}\nformula: |\n  let x = beta * chosen_logps;\n  x + chosen_lgps\n");
    assert_eq!((wrong_name.line, wrong_name.column), (5, 7), "{wrong_name}");
    assert_eq!(wrong_name.message, "`formula`: unknown name `chosen_lgps`");
    let wrong_key = told("params: {beta: {default: 1, mni: 0}}\nformula: -beta * chosen_logps\n");
    assert_eq!(wrong_key.line, 1, "{wrong_key}");
    assert_eq!(wrong_key.message, "`params.beta.mni`: a param has no `mni`");
    assert_eq!(wrong_key.help.as_deref(), Some("did you mean `min`?"));
    let unused = told("params: {beta: 1}\nformula: -beta * chosen_logps\nlet:\n  spare: chosen_len\n");
    assert_eq!((unused.line, unused.column), (4, 10), "{unused}");
    assert_eq!(unused.message, "`let.spare`: `spare` has no effect: the formula never reads it");
}

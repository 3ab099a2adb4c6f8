//! Formulas in use: what they need, what a new one takes, and what is said of those that are wrong.

use sapo_flow_training::objectives::{Objective, PairTensor};

use super::ObjectiveConfig;
use super::tests::{assert_close, compile, losses, numbers, two_pairs};

/// What is said of an objective: key and message.
fn issues(text: &str) -> Vec<(String, String)> {
    let config: ObjectiveConfig = serde_yaml::from_str(text).expect("a test's own YAML");
    let issues = config.compile().map(|_| panic!("{text} was accepted")).unwrap_err();
    issues.into_iter().map(|issue| (issue.key.clone(), issue.to_string())).collect()
}

#[test]
fn what_is_not_named_is_not_needed() {
    let needs = |text: &str| compile(text).needs().clone();
    assert!(needs("dpo").reference() && needs("dpo").rejected() && !needs("dpo").whole_step);
    assert!(!needs("orpo").reference() && needs("orpo").rejected());
    assert!(!needs("sft").rejected() && !needs("{name: sft, nll: sequence}").reference());
    assert!(needs("aot").whole_step && needs("bco_pair").whole_step && !needs("simpo").whole_step);
    assert!(needs("orpo").tensors.contains(&PairTensor::SequenceNll));
    assert!(!needs("{name: orpo, nll: response}").tensors.contains(&PairTensor::SequenceNll));
    assert!(!needs("dpo").tensors.contains(&PairTensor::ChosenTailLogps));
    let weighted = needs("{use: dpo, formula: -logsigmoid(beta * margin) * values.score / (1 + staleness)}");
    assert_eq!(weighted.numbers.iter().map(String::as_str).collect::<Vec<_>>(), ["staleness", "values.score"]);
}

/// An objective of tomorrow: its own params, a named expression, metrics.
#[test]
fn a_new_objective_is_a_few_lines() {
    let text = "
        description: A margin that grows with the difference in length.
        use: log_ratios
        params:
          gamma: {default: 0.2, min: 0, description: Margin per token of difference.}
        let:
          target: gamma * abs(chosen_len - rejected_len)
        formula: softplus(target - beta * margin)
        report:
          target: target
    ";
    let found = compile(text).losses(&two_pairs()).unwrap();
    // Lengths differ by 5 and 2; D = 5 and -2.
    let softplus = |x: f64| (1.0 + x.exp()).ln();
    assert_close("loss", &numbers(&found.losses), &[softplus(1.0 - 0.5), softplus(0.4 + 0.2)], 1e-9);
    let target = found.report.iter().find(|(name, _)| name == "target").unwrap();
    assert_close("target", &numbers(&target.1), &[1.0, 0.4], 1e-9);
}

/// Each of these definitions has a mistake: at that key, with that in its message.
fn assert_told(mistakes: &[(&str, &str, &str)]) {
    for (text, key, message) in mistakes {
        let found = issues(text);
        let right = found.iter().any(|(at, said)| at == key && said.contains(message));
        assert!(right, "{text}: expected {key}: {message}, found {found:?}");
    }
}

#[test]
fn mistakes_are_named_with_their_place() {
    assert_told(&[
        ("dop", "objective", "did you mean `dpo`?"),
        ("{name: dop}", "objective.name", "did you mean `dpo`?"),
        ("{name: dpo, btea: 1}", "objective.btea", "no param `btea` (did you mean `beta`?)"),
        ("{name: dpo, beta: 0}", "objective.beta", "expected a number above 0, found 0"),
        ("{name: dpo, beta: strong}", "objective.beta", "expected a number above 0, found strong"),
        ("{name: dpo, label_smoothing: 0.5}", "objective.label_smoothing", "at least 0 and below 0.5, found 0.5"),
        ("{name: dpo, divergence: forward}", "objective.divergence", "did you mean `forward_kl`?"),
        ("{name: dpo, divergence_alpha: 0.3}", "objective.divergence_alpha", "has no effect"),
        ("{name: aot, divergence: js}", "objective.divergence", "has no effect"),
        ("{name: dpo, weight: 2}", "objective.weight", "has no effect"),
        ("[dpo, {name: sft, weight: -1}]", "objective.1.weight", "expected a number of 0 or more, found -1"),
        ("[{name: dpo, weight: 0}]", "objective", "expected a weight above 0, found none"),
        ("[]", "objective", "an empty list"),
        ("{formla: chosen_logps}", "objective", "did you mean `formula`?"),
        ("{file: none/such.yaml}", "objective.file", "none/such.yaml"),
        ("7", "objective", "found 7"),
    ]);
}

#[test]
fn numbers_beyond_those_of_tensors_are_refused_in_their_place() {
    let range = "expected a number within ±3.4e38, found";
    for formula in [
        "chosen_logps * 1e300",
        "1e300 * chosen_logps",
        "min(chosen_logps, 1e39)",
        "max(-1e39, chosen_logps)",
        "chosen_logps ** 1e39",
        "where(chosen_logps > 1e39, chosen_logps, 0)",
        "where(chosen_logps > 1, chosen_logps, 1e39)",
        "clamp(chosen_logps, -1e39, 1e39)",
        "clamp(chosen_logps, -1, 1e39)",
    ] {
        assert_told(&[(&format!("{{formula: '{formula}'}}"), "objective.formula", range)]);
    }
    assert_told(&[
        ("{formula: beta * chosen_logps, params: {beta: -1e39}}", "objective.formula", &format!("{range} -1e39")),
        ("{name: orpo, beta: 1e39}", "objective.formula", &format!("{range} 1e39")),
        ("[dpo, {name: sft, weight: 1e39}]", "objective.1.weight", "expected a number of at most 3.4e38, found 1e39"),
    ]);
    // The largest one, and infinity, are numbers of tensors.
    compile("{formula: '3.4028234663852886e38 + min(chosen_logps, 1 / 0.0)'}");
}

#[test]
fn mistakes_in_formulas_are_named() {
    assert_told(&[
        (
            "{formula: chosen_lgps}",
            "objective.formula",
            "at column 1: unknown name `chosen_lgps` (did you mean `chosen_logps`?)",
        ),
        (
            "{formula: -logsigmod(chosen_logps)}",
            "objective.formula",
            "unknown function `logsigmod` of (tensor) (did you mean `logsigmoid`?)",
        ),
        ("{formula: 'chosen_logps *'}", "objective.formula", "at column"),
        (
            "{formula: mean(chosen_logps)}",
            "objective.formula",
            "expected a loss for each pair (the learner takes their mean), found one number",
        ),
        ("{formula: '1.5'}", "objective.formula", "found the number 1.5"),
        ("{formula: ref_chosen_logps}", "objective.formula", "without a gradient"),
        ("{formula: detach(chosen_logps)}", "objective.formula", "without a gradient"),
        (
            "{formula: 'if chosen_logps > 0 { chosen_logps } else { -chosen_logps }'}",
            "objective.formula",
            "where(condition, a, b)",
        ),
        ("{formula: x, let: {x: y, y: x}}", "objective.let.x", "`y` needs `x`: a name cannot need itself"),
        ("{formula: 'chosen_logps == \"a\"'}", "objective.formula", "`==` does not work on (tensor, text)"),
        ("{formula: 'sort(\"a\") + chosen_logps'}", "objective.formula", "`sort` does not take (text)"),
        ("{formula: 'loop { }'}", "objective.formula", "stopped after 1000000 operations"),
        (
            "{formula: 'let x = chosen_logps; loop { x = 1.1 * x } x'}",
            "objective.formula",
            "stopped after 1000000 operations",
        ),
    ]);
}

#[test]
fn mistakes_in_definitions_are_named() {
    assert_told(&[
        ("{formula: chosen_logps, params: {beta: 1}}", "objective.params.beta", "nothing reads it"),
        (
            "{formula: chosen_logps, params: {beta: {defalt: 1}}}",
            "objective.params.beta.defalt",
            "a param has no `defalt` (did you mean `default`?)",
        ),
        ("{formula: chosen_logps, params: {beta: {min: 1}}}", "objective.params.beta", "a param needs a `default`"),
        ("{formula: chosen_logps, params: {beta: [1]}}", "objective.params.beta", "or a mapping, found a list"),
        (
            "{formula: chosen_logps, rewards: [1, 2]}",
            "objective.rewards.0",
            "`rewards`: expected an expression, a text, found 1",
        ),
        ("{formula: chosen_logps, rewards: [x]}", "objective.rewards", "two expressions, found a list of 1"),
        ("{formula: chosen_logps, let: {x: 1}}", "objective.let.x", "`x`: expected an expression, a text, found 1"),
        ("{formula: 2, use: dpo}", "objective.formula", "`formula`: expected an expression, a text, found 2"),
        (
            "{formula: chosen_logps, state: {x: {initial: a, nxt: x}}}",
            "objective.state.x.nxt",
            "a state has no `nxt` (did you mean `next`?)",
        ),
        (
            "{formula: -chosen_logps, let: {spare: rejected_logps}}",
            "objective.let.spare",
            "`spare` has no effect: the formula never reads it",
        ),
        (
            "{formula: -chosen_logps, let: {spare: more * 2, more: rejected_logps}}",
            "objective.let.more",
            "`more` has no effect",
        ),
        // A new default is within the bounds that there are, unless it brings its own.
        (
            "{use: log_ratios, params: {beta: -1}, formula: softplus(-beta * margin)}",
            "objective.use",
            "`beta`: expected a number above 0, found -1",
        ),
        ("{use: dpo, let: {spare: beta * margin}}", "objective.let.spare", "`spare` has no effect"),
        ("{formula: chosen_logps, params: {chosen_len: 1}}", "objective.params.chosen_len", "a number of every pair"),
        ("{formula: x * chosen_logps, let: {x: '1'}, params: {x: 1}}", "objective.let.x", "twice in use"),
        ("{formula: chosen_logps, use: dop}", "objective.use", "did you mean `dpo`?"),
        ("{formula: chosen_logps, report: {x: values}}", "objective.report.x", "expected a number for each pair"),
        (
            "{formula: chosen_logps, state: {x: {initial: 0, next: chosen_logps}}}",
            "objective.state.x.next",
            "expected one number, found [3]",
        ),
        (
            "{formula: 'if x > 1 { chosen_logps } else { rejected_logps }', state: {x: {initial: 0, next: x + 1}}}",
            "objective.formula",
            "a tensor is not true or false",
        ),
    ]);
}

#[test]
fn all_mistakes_are_told_at_once() {
    let text =
        "{use: log_ratios, params: {gamma: 0.1}, let: {target: gama * chosen_len}, formula: relu(target - margni)}";
    let keys: Vec<String> = issues(text).into_iter().map(|(key, _)| key).collect();
    assert_eq!(keys, ["objective.let.target", "objective.formula"]);
}

#[test]
fn params_listed_are_those_that_are_read() {
    let read = |name: &str| {
        let definition = super::built_in::definition(name).unwrap().whole().unwrap();
        definition.params_read().map(|(name, _)| name.clone()).collect::<Vec<_>>()
    };
    assert_eq!(read("apo_zero"), ["beta", "ld_alpha", "weighting"]);
    assert_eq!(read("hinge"), ["beta", "divergence", "divergence_alpha", "ld_alpha", "weighting"]);
    assert_eq!(read("orpo"), ["beta", "nll"]);
}

#[test]
fn a_definition_can_stand_in_a_file() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("clipped.yaml");
    std::fs::write(
        &path,
        "use: log_ratios\nparams: {most: {default: 10, above: 0}}\nformula: -min(beta * margin, most)\n",
    )
    .unwrap();
    let written = format!("{{file: {}, beta: 2, most: 4}}", path.display());
    // 2 D = 10 and -4, at most 4.
    assert_close("file", &losses(&written, &two_pairs()), &[-4.0, 4.0], 1e-9);
    let config: ObjectiveConfig = serde_yaml::from_str(&written).unwrap();
    assert_eq!(config.files(), [path]);
}

/// What is overridden in a definition that another uses is read there.
#[test]
fn names_that_a_used_definition_reads_are_in_use() {
    compile("{use: dpo, let: {margin: d_chosen}}");
    compile("{use: log_ratios, params: {beta: {default: -1, min: -2}}, formula: softplus(-beta * margin)}");
    compile(
        "{formula: -chosen_logps * scale, params: {far: 2}, let: {scale: 'if far == 1 { other } else { 1 }', other: far}}",
    );
}

#[test]
fn the_page_says_what_params_mean() {
    let page = super::page();
    for line in [
        "one of none, wpo. wpo: pairs weigh their probability under the policy.",
        "- `ld_alpha` (ld_dpo): a number at least 0 and at most 1. Weight of tokens past the length of the shorter response",
        "- `beta` (dpo",
        "a number above 0. Strength of the pull to the reference.",
    ] {
        assert!(page.contains(line), "{line}\n{page}");
    }
}

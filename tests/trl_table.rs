//! The table of TRL's trainers in pipelines/README.md: its files are there, and every change that it names is valid.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use sapo_flow_engine::operator::Registry;
use sapo_flow_engine::pipeline;
use serde_yaml::{Mapping, Value};

fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("pipelines")
}

/// Rows of all tables under the heads that name pipelines, as cells.
fn rows() -> Vec<Vec<String>> {
    let text = fs::read_to_string(folder().join("README.md")).unwrap();
    let rows = text.lines().filter(|line| line.starts_with("| ") && !line.starts_with("| TRL |"));
    let cells = |line: &str| line.trim_matches('|').split('|').map(|cell| cell.trim().to_owned()).collect();
    rows.map(cells).collect()
}

/// What stands between backticks.
fn code(cell: &str) -> Vec<&str> {
    cell.split('`').skip(1).step_by(2).collect()
}

/// The file that a cell links to.
fn linked(cell: &str) -> Option<&str> {
    Some(cell.split_once("](")?.1.split_once(')')?.0)
}

/// Put what changes into a node's mapping; mappings inside are merged, everything else is replaced.
fn merge(into: &mut Mapping, from: &Mapping) {
    for (key, value) in from {
        match (into.get_mut(key), value) {
            (Some(Value::Mapping(old)), Value::Mapping(new)) if key != "objective" => merge(old, new),
            _ => {
                into.insert(key.clone(), value.clone());
            }
        }
    }
}

/// A pipeline with the changes of a row, validated. Errors are told with the row.
fn validate(row: &str, file: &str, changes: &[&str], registry: &Registry) {
    let path = folder().join(file);
    let (mut overrides, mut nodes) = (Vec::new(), Mapping::new());
    for change in changes {
        if let Some(set) = change.strip_prefix("-S ") {
            let (name, value) = set.split_once('=').unwrap_or_else(|| panic!("{row}: {set}"));
            overrides.push((name.to_owned(), value.trim_matches('\'').to_owned()));
            continue;
        }
        let change: Mapping = serde_yaml::from_str(change).unwrap_or_else(|error| panic!("{row}: {change}: {error}"));
        for (key, value) in change {
            if key == "objective" {
                let with = Mapping::from_iter([("with".into(), Mapping::from_iter([(key, value)]).into())]);
                merge(&mut nodes, &Mapping::from_iter([("learner".into(), with.into())]));
            } else {
                merge(&mut nodes, &Mapping::from_iter([(key, value)]));
            }
        }
    }
    let mut whole: Mapping = serde_yaml::from_str(&fs::read_to_string(&path).unwrap()).unwrap();
    let names: BTreeSet<String> = whole["nodes"].as_mapping().unwrap().keys().map(|key| format!("{key:?}")).collect();
    for (name, change) in &nodes {
        assert!(names.contains(&format!("{name:?}")) || change["op"].is_string(), "{row}: no node {name:?} in {file}");
    }
    let Some(Value::Mapping(all)) = whole.get_mut("nodes") else { panic!("{file} has nodes") };
    merge(all, &nodes);
    let text = serde_yaml::to_string(&whole).unwrap();
    if let Err(refused) = pipeline::parse_str(path.to_str().unwrap(), &text, &overrides, registry) {
        panic!("{row}: {refused}\n{text}");
    }
}

/// Its `beta` stands beside the name, so a mapping or a list has no place there: they are told so at the param.
#[test]
fn the_objective_of_dpo_yaml_is_a_name() {
    let registry = sapo_flow_operators::registry();
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("pipelines/dpo.yaml");
    let text = fs::read_to_string(&path).unwrap();
    let parsed = |value: &str| {
        let overrides = [("objective".to_owned(), value.to_owned()), ("beta".to_owned(), "0.2".to_owned())];
        pipeline::parse_str(path.to_str().unwrap(), &text, &overrides, &registry).map(|_| ())
    };
    for name in ["ipo", "hinge", "robust", "nca_pair", "apo_zero"] {
        parsed(name).unwrap_or_else(|refused| panic!("{name}: {refused}"));
    }
    for other in ["{name: ipo, length: per_token}", "[dpo, sft]"] {
        let refused = parsed(other).expect_err(other);
        assert_eq!(refused.list.len(), 1, "{refused}");
        assert!(refused.list[0].message.contains("`objective` must be text, found a "), "{refused}");
    }
}

#[test]
fn what_the_table_names_is_there_and_valid() {
    let registry = sapo_flow_operators::registry();
    let (mut checked, mut objectives) = (0, String::new());
    for row in rows() {
        assert_eq!(row.len(), 4, "{row:?}");
        let Some(file) = linked(&row[1]) else {
            assert!(row[1].is_empty() && code(&row[2]).is_empty(), "{row:?}");
            assert!(row[2] == "not there" || row[2] == "nothing to set", "{row:?}");
            continue;
        };
        let label = code(&row[1])[0];
        assert_eq!(Path::new(label).file_name(), Path::new(file).file_name(), "{row:?}");
        validate(&row[0], file, &code(&row[2]), &registry);
        // Fragments in the last column are objectives too.
        for fragment in code(&row[3]).into_iter().filter(|code| code.starts_with("objective: ")) {
            validate(&row[0], file, &[fragment], &registry);
        }
        objectives += &format!("{} {} ", row[2], row[3]);
        checked += 1;
    }
    assert!(checked >= 30, "{checked}");
    // Every objective that comes along is in the table, or the default of a pipeline in it.
    let defaults = ["dpo", "orpo", "cpo", "tpo", "simpo", "kto_pair", "sft"];
    let words: BTreeSet<&str> = objectives.split(|c: char| !(c.is_alphanumeric() || c == '_')).collect();
    for name in sapo_flow_operators::objectives::built_in::names() {
        assert!(words.contains(name) || defaults.contains(&name), "{name} is not in the table");
    }
}

/// The trainers and loss types of TRL 1.16's preference family: `DPOConfig`, `CPOConfig`, `KTOConfig`, `OnlineDPOConfig` and
/// the modules beside them.
const TRL: [&str; 39] = [
    "sigmoid",
    "hinge",
    "ipo",
    "exo_pair",
    "nca_pair",
    "robust",
    "bco_pair",
    "sppo_hard",
    "aot",
    "aot_unpaired",
    "apo_zero",
    "apo_down",
    "discopop",
    "sft",
    "sigmoid_norm",
    "simpo",
    "alphapo",
    "kto",
    "apo_zero_unpaired",
    "loss_weights",
    "f_divergence_type",
    "use_weighting",
    "ld_alpha",
    "sync_ref_model",
    "bema_for_ref_model",
    "DPOTrainer",
    "CPOTrainer",
    "ORPOTrainer",
    "TPOTrainer",
    "KTOTrainer",
    "SFTTrainer",
    "OnlineDPOTrainer",
    "BCOTrainer",
    "XPOTrainer",
    "NashMDTrainer",
    "RewardTrainer",
    "GRPOTrainer",
    "RLOOTrainer",
    "DistillationTrainer",
];

#[test]
fn the_table_has_all_of_trls_trainers_and_all_pipelines() {
    let text = fs::read_to_string(folder().join("README.md")).unwrap();
    let words: BTreeSet<&str> = text.split(|c: char| !(c.is_alphanumeric() || c == '_')).collect();
    for name in TRL {
        assert!(words.contains(name), "{name}");
    }
    for entry in fs::read_dir(folder()).unwrap() {
        let name = entry.unwrap().file_name().into_string().unwrap();
        assert!(name == "README.md" || text.contains(&format!("]({name})")), "{name} is not in the table");
    }
}

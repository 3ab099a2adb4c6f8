//! The objectives that come with sapo-flow: one file of YAML each, beside this one, and the one list of them.

use super::definition::Definition;

/// Name and text of every definition; the first ones are no objectives, but what others use.
const FILES: [(&str, &str); 31] = [
    ("log_ratios", include_str!("log_ratios.yaml")),
    ("log_probabilities", include_str!("log_probabilities.yaml")),
    ("orpo", include_str!("orpo.yaml")),
    ("dpo", include_str!("dpo.yaml")),
    ("dpo_nll", include_str!("dpo_nll.yaml")),
    ("hinge", include_str!("hinge.yaml")),
    ("ipo", include_str!("ipo.yaml")),
    ("exo_pair", include_str!("exo_pair.yaml")),
    ("nca_pair", include_str!("nca_pair.yaml")),
    ("robust", include_str!("robust.yaml")),
    ("bco_pair", include_str!("bco_pair.yaml")),
    ("sppo_hard", include_str!("sppo_hard.yaml")),
    ("aot", include_str!("aot.yaml")),
    ("aot_unpaired", include_str!("aot_unpaired.yaml")),
    ("apo_zero", include_str!("apo_zero.yaml")),
    ("apo_down", include_str!("apo_down.yaml")),
    ("discopop", include_str!("discopop.yaml")),
    ("sigmoid_norm", include_str!("sigmoid_norm.yaml")),
    ("kto", include_str!("kto.yaml")),
    ("apo_zero_unpaired", include_str!("apo_zero_unpaired.yaml")),
    ("bco", include_str!("bco.yaml")),
    ("kto_pair", include_str!("kto_pair.yaml")),
    ("cpo", include_str!("cpo.yaml")),
    ("cpo_hinge", include_str!("cpo_hinge.yaml")),
    ("cpo_ipo", include_str!("cpo_ipo.yaml")),
    ("simpo", include_str!("simpo.yaml")),
    ("alphapo", include_str!("alphapo.yaml")),
    ("tpo", include_str!("tpo.yaml")),
    ("sft", include_str!("sft.yaml")),
    ("wpo", include_str!("wpo.yaml")),
    ("ld_dpo", include_str!("ld_dpo.yaml")),
];

/// The definition of that name.
pub fn definition(name: &str) -> Option<Definition> {
    let (name, text) = FILES.iter().find(|(other, _)| *other == name)?;
    let value = serde_yaml::from_str(text).unwrap_or_else(|error| panic!("{name}.yaml, which a test reads: {error}"));
    Some(Definition::read(&value).unwrap_or_else(|issues| panic!("{name}.yaml, which a test reads: {issues:?}")))
}

/// Names of all objectives.
pub fn names() -> impl Iterator<Item = &'static str> {
    names_with_shared().filter(|name| !SHARED.contains(name))
}

/// Names of all objectives and of what they share.
pub fn names_with_shared() -> impl Iterator<Item = &'static str> {
    FILES.iter().map(|(name, _)| *name)
}

const SHARED: [&str; 2] = ["log_ratios", "log_probabilities"];

//! Choosing parameters by patterns of their names.

use crate::parameters::ParameterSet;
use crate::{Error, Result};

/// For every parameter, in order, whether one of the patterns matches its name. `*` stands for any text.
///
/// # Errors
/// When a pattern matches nothing, or no parameter remains to be trained.
pub(super) fn frozen(parameters: &ParameterSet, patterns: &[String]) -> Result<Vec<bool>> {
    for pattern in patterns {
        if !parameters.names().any(|name| matches(pattern, name)) {
            let example = parameters.names().next().unwrap_or_default();
            return Err(Error::Argument(format!(
                "freeze: no parameter is called `{pattern}` (names are like `{example}`; `*` stands for any text)"
            )));
        }
    }
    let frozen: Vec<bool> =
        parameters.names().map(|name| patterns.iter().any(|pattern| matches(pattern, name))).collect();
    if frozen.iter().all(|&frozen| frozen) {
        return Err(Error::Argument("freeze: expected some parameter to train, found all of them frozen".into()));
    }
    Ok(frozen)
}

fn matches(pattern: &str, name: &str) -> bool {
    let Some((head, rest)) = pattern.split_once('*') else { return pattern == name };
    let Some(name) = name.strip_prefix(head) else { return false };
    (0..=name.len()).filter(|&at| name.is_char_boundary(at)).any(|at| matches(rest, &name[at..]))
}

#[cfg(test)]
mod tests {
    use tch::Tensor;

    use super::frozen;
    use crate::parameters::ParameterSet;

    fn parameters() -> ParameterSet {
        ["model.layers.1.up.weight", "model.layers.10.up.weight", "model.norm.weight"]
            .into_iter()
            .map(|name| (name.to_owned(), Tensor::from(0.0f32)))
            .collect()
    }

    #[test]
    fn patterns_choose_parameters() {
        let chosen = |patterns: &[&str]| {
            frozen(&parameters(), &patterns.iter().map(|pattern| pattern.to_string()).collect::<Vec<_>>())
        };
        assert_eq!(chosen(&[]).unwrap(), [false, false, false]);
        assert_eq!(chosen(&["model.layers.1.*"]).unwrap(), [true, false, false]);
        assert_eq!(chosen(&["model.layers.1*"]).unwrap(), [true, true, false]);
        assert!(chosen(&["*.up.*", "model.norm.weight"]).unwrap_err().to_string().contains("all of them"));
        assert_eq!(chosen(&["model.norm*", "*.1.*"]).unwrap(), [true, false, true]);
        let error = chosen(&["layers.1.*"]).unwrap_err().to_string();
        assert!(error.contains("`layers.1.*`") && error.contains("model.layers.1.up.weight"), "{error}");
    }
}

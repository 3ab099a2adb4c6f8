//! `${name}` in texts: where they are, and how a text is written that has none.

use serde_yaml::Value;

use super::yaml::{Content, Yaml};

/// A part of a text.
#[derive(Debug, PartialEq)]
pub(crate) enum Piece {
    /// Plain text.
    Text(String),
    /// The name in `${name}`.
    Param(String),
}

/// Cut a text at its `${name}`.
pub(crate) fn pieces(text: &str) -> Result<Vec<Piece>, String> {
    let mut pieces = Vec::new();
    let mut plain = String::new();
    let mut rest = text;
    while let Some(start) = rest.find("${") {
        if let Some(before) = rest[..start].strip_suffix('$') {
            plain.push_str(before);
            plain.push_str("${");
            rest = &rest[start + 2..];
            continue;
        }
        plain.push_str(&rest[..start]);
        let Some(end) = rest[start..].find('}') else {
            return Err(format!("`${{` in {text:?} is not closed by `}}`"));
        };
        let name = &rest[start + 2..start + end];
        if !is_identifier(name.strip_prefix("env.").unwrap_or(name)) {
            return Err(format!("`${{{name}}}` does not hold the name of a parameter"));
        }
        if !plain.is_empty() {
            pieces.push(Piece::Text(std::mem::take(&mut plain)));
        }
        pieces.push(Piece::Param(name.to_owned()));
        rest = &rest[start + end + 1..];
    }
    plain.push_str(rest);
    if !plain.is_empty() {
        pieces.push(Piece::Text(plain));
    }
    Ok(pieces)
}

/// Names that a value refers to.
pub(crate) fn names_in(yaml: &Yaml) -> Vec<String> {
    match &yaml.content {
        Content::Scalar(Value::String(text)) => pieces(text)
            .unwrap_or_default()
            .into_iter()
            .filter_map(|piece| if let Piece::Param(name) = piece { Some(name) } else { None })
            .collect(),
        Content::Sequence(items) => items.iter().flat_map(names_in).collect(),
        Content::Mapping(entries) => entries.iter().flat_map(|entry| names_in(&entry.value)).collect(),
        _ => Vec::new(),
    }
}

/// Letters, digits and underscores, not beginning with a digit.
pub(crate) fn is_identifier(name: &str) -> bool {
    let mut characters = name.chars();
    characters.next().is_some_and(|c| c.is_ascii_alphabetic() || c == '_')
        && characters.all(|c| c.is_ascii_alphanumeric() || c == '_')
}

/// The text so that interpolation gives it back.
pub(crate) fn escape(text: &str) -> String {
    text.replace("${", "$${")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_is_cut_at_references() {
        let text = |text: &str| Piece::Text(text.to_owned());
        let param = |name: &str| Piece::Param(name.to_owned());
        assert_eq!(pieces("${a}").unwrap(), [param("a")]);
        assert_eq!(pieces("x/${a}-${b_2}.y").unwrap(), [text("x/"), param("a"), text("-"), param("b_2"), text(".y")]);
        assert_eq!(pieces("costs $5 and $${a}").unwrap(), [text("costs $5 and ${a}")]);
        assert_eq!(pieces("").unwrap(), []);
        assert!(pieces("${a").is_err());
        assert!(pieces("${}").is_err());
        assert!(pieces("${a b}").is_err());
        assert_eq!(pieces(&escape("${a} ${")).unwrap(), [text("${a} ${")]);
    }
}

//! Messages about records, by templates.

use minijinja::value::Value;
use minijinja::{Environment, UndefinedBehavior, context};
use sapo_flow_engine::pipeline::closest;
use sapo_flow_engine::{OperatorError, PortType};

use crate::item::{ITEMS, Item, Part, Texts};

const NAME: &str = "message";

/// A Jinja template over the texts of a record, its `row` and its `values`.
pub struct MessageTemplate {
    environment: Environment<'static>,
}

impl MessageTemplate {
    /// Compile a template for records of one type, or of any.
    ///
    /// # Errors
    /// When it is no template, or names what such records have not.
    pub fn read(source: &str, port_type: Option<PortType>) -> Result<Self, String> {
        let mut environment = Environment::new();
        environment.set_undefined_behavior(UndefinedBehavior::Strict);
        environment.add_template_owned(NAME, source.to_owned()).map_err(|error| describe(&error))?;
        let template = environment.get_template(NAME).map_err(|error| describe(&error))?;
        let mut known = vec!["row", "values"];
        for part in
            ITEMS.iter().filter(|kind| port_type.is_none_or(|wanted| wanted == **kind)).flat_map(|k| Part::of(*k))
        {
            if !known.contains(&part.name()) {
                known.push(part.name());
            }
        }
        let globals: Vec<&str> = environment.globals().map(|(name, _)| name).collect();
        let mut unknown: Vec<String> = template.undeclared_variables(false).into_iter().collect();
        unknown.retain(|name| !known.contains(&name.as_str()) && !globals.contains(&name.as_str()));
        unknown.sort();
        if let Some(name) = unknown.first() {
            let help = closest(name, known.iter().copied()).map(|near| format!("; did you mean `{near}`?"));
            let help = help.unwrap_or_else(|| format!("; there is {}", known.join(", ")));
            return Err(format!("there is no `{name}`{help}"));
        }
        Ok(MessageTemplate { environment })
    }

    /// The message about a record. No special tokens are written out: a server's tokenizer could take them for its own.
    ///
    /// # Errors
    /// When the template fails on this record, or its tokens are no text.
    pub fn render(&self, item: &Item, texts: &Texts) -> Result<String, OperatorError> {
        let mut parts = Vec::new();
        for part in Part::of(item.port_type()) {
            let text = item.ids(*part).map(|ids| texts.tokenizer.decode_without_special_tokens(ids)).transpose()?;
            parts.push((part.name(), text));
        }
        let about = context! { row => item.row(), values => item.values(), ..Value::from_iter(parts) };
        let rendered = self.environment.get_template(NAME).and_then(|template| template.render(about));
        rendered
            .map_err(|error| format!("{}: the message cannot be written: {}", item.label(), describe(&error)).into())
    }
}

/// Without the name that we gave it.
fn describe(error: &minijinja::Error) -> String {
    let what = error.detail().map_or_else(|| error.kind().to_string(), |detail| format!("{}: {detail}", error.kind()));
    error.line().map_or_else(|| what.clone(), |line| format!("line {line}: {what}"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{pair, tiny_tokenizer};
    use sapo_flow_training::text::TextTokenizer;

    #[test]
    fn messages_are_written_from_records() {
        let tokenizer = tiny_tokenizer();
        let texts = Texts { tokenizer: TextTokenizer::load(tokenizer.path()).unwrap() };
        let mut given = pair(4, &[5, 7], &[6, 7, 6], None);
        given.values = [("score".to_owned(), 0.5)].into();
        let item = Item::Pair(given.into());
        let source =
            "{{ prompt }}? {{ chosen }} {% if rejected %}or{% else %}only{% endif %} {{ row }} {{ values.score }}";
        let template = MessageTemplate::read(source, Some(PortType::Pairs)).unwrap();
        assert_eq!(template.render(&item, &texts).unwrap(), "hi b? a b a only 4 0.5");
        let template = MessageTemplate::read("{{ values.margin }}", None).unwrap();
        let error = template.render(&item, &texts).expect_err("there is no margin").to_string();
        assert!(
            error.starts_with(
                "row 4 (pair 4 of `data` at step 0): the message cannot be written: line 1: undefined value"
            ),
            "{error}"
        );
    }

    #[test]
    fn mistakes_are_found_before_a_run() {
        for (source, port_type, expected) in [
            ("{{ prompt", PortType::Pairs, "line 1: syntax error"),
            ("{{ promt }}", PortType::Pairs, "there is no `promt`; did you mean `prompt`?"),
            ("{{ chosen }}", PortType::Samples, "there is no `chosen`; there is row, values, prompt, response"),
        ] {
            let error = MessageTemplate::read(source, Some(port_type)).err().unwrap();
            assert!(error.starts_with(expected), "{source}: {error}");
        }
    }
}

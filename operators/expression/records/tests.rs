//! What expressions over records see, and what is wrong with some.

use super::super::engine;
use super::*;
use crate::testing::{pair, tiny_tokenizer};
use sapo_flow_engine::Segment;
use sapo_flow_training::text::TextTokenizer;

fn complaint(text: &str, kind: Kind, port_type: PortType) -> String {
    Formula::read(&engine(), "where", text, kind, Some(port_type)).expect_err(text).to_string()
}

#[test]
fn mistakes_are_found_before_a_run() {
    for (text, kind, port_type, expected) in [
        (
            "respons_len > 3",
            Kind::Truth,
            PortType::Samples,
            "at column 1: unknown name `respons_len` (did you mean `response_len`?)",
        ),
        ("response_len > 3", Kind::Truth, PortType::Pairs, "at column 1: unknown name `response_len`"),
        ("chosen_len", Kind::Truth, PortType::Pairs, "expected true or false, found the number 3"),
        ("chosen_len > 2 && chosen", Kind::Truth, PortType::Pairs, "expected true or false, found a text"),
        ("prompt * 2", Kind::Number, PortType::Prompts, "`*` does not work on"),
        ("lenn(prompt)", Kind::Number, PortType::Prompts, "at column 1: unknown function `lenn`"),
        ("values.score + prompt_ids", Kind::Number, PortType::Prompts, "`+` does not work on"),
        ("chosen_len >", Kind::Truth, PortType::Pairs, "at column 13: "),
        ("source == 3", Kind::Truth, PortType::Pairs, "`==` does not work on (text, number)"),
        ("chosen_len != \"3\"", Kind::Truth, PortType::Pairs, "`!=` does not work on (number, text)"),
        ("while true { }", Kind::Number, PortType::Pairs, "stopped after 1000000 operations"),
    ] {
        let found = complaint(text, kind, port_type);
        assert!(found.contains(expected), "{text}: {found}");
    }
    // Work that grows with data is found as well.
    for text in [
        "let text = \"x\"; while text.len() < 500000 { text += text; } for i in 0..200000 { \"y\" in text; } 1",
        "let ids = chosen_ids; while ids.len() < 30000 { ids += ids; } loop { ids.sort(); }",
        "let text = prompt; while text.len() < 60000 { text += text; } loop { words(text); }",
    ] {
        let found = complaint(text, Kind::Number, PortType::Pairs);
        assert!(found.contains("stopped after"), "{text}: {found}");
    }
    // What depends on a record is not a mistake.
    for text in
        ["values.score > 1", "chosen_ids[7] == 2", "row / step > 1", "if \"a\" in values { true } else { false }"]
    {
        Formula::read(&engine(), "where", text, Kind::Truth, Some(PortType::Pairs)).expect(text);
    }
}

#[test]
fn names_are_what_the_record_holds() {
    let tokenizer = tiny_tokenizer();
    let texts = Texts { tokenizer: TextTokenizer::load(tokenizer.path()).unwrap() };
    let mut given = pair(4, &[0, 2, 5, 1], &[6, 7, 1], Some(&[7, 1]));
    given.segment = Some(Segment { start: 1, len: 2, ended: true });
    (given.weights_version, given.values) = (Some(5), [("score".to_owned(), 0.25)].into());
    let item = Item::Pair(given.into());
    let logps = Some(Logps { first: (-6.0, -2.0), rejected: (-8.0, -4.0) });
    let facts = Facts { item: &item, step: 9, texts: Some(&texts), logps };
    let engine = engine();
    for (text, kind, expected) in [
        ("row * 100 + step", Kind::Number, Outcome::Number(409.0)),
        ("prompt", Kind::Text, Outcome::Text("<s> <user> hi </s>".into())),
        ("chosen + '!' + rejected", Kind::Text, Outcome::Text("a b!b".into())),
        ("chosen.split().len() / rejected_len", Kind::Number, Outcome::Number(1.0)),
        ("prompt_len * 10 + chosen_len", Kind::Number, Outcome::Number(43.0)),
        ("chosen_ids[1] == 7 && rejected_ids == [7, 1]", Kind::Truth, Outcome::Truth(true)),
        ("staleness", Kind::Number, Outcome::Number(4.0)),
        ("generated && has_rejected", Kind::Number, Outcome::Number(1.0)),
        ("segment_start + 10 * segment_tokens", Kind::Number, Outcome::Number(21.0)),
        ("values.score * 4", Kind::Number, Outcome::Number(1.0)),
        ("chosen_logps - rejected_logps", Kind::Number, Outcome::Number(2.0)),
        ("chosen_avg_logps - rejected_avg_logps", Kind::Number, Outcome::Number(2.0)),
        ("origin == source && origin == 'data'", Kind::Truth, Outcome::Truth(true)),
        ("words(prompt).len() + words(\"\").len()", Kind::Number, Outcome::Number(4.0)),
        ("(' ' + rejected + ' ').trim().replace('b', 'bb')", Kind::Text, Outcome::Text("bb".into())),
        ("rejected_ids + [6]", Kind::Ids, Outcome::Ids(vec![7, 1, 6])),
    ] {
        let text = text.replace('\'', "\"");
        let formula = Formula::read(&engine, "score", &text, kind, Some(PortType::Pairs)).unwrap();
        assert_eq!(formula.evaluate(&engine, &facts).unwrap(), expected, "{text}");
    }
    for (text, expected) in [
        ("values.margin", "`score`: at column 8: there is no `margin`; the record's values are: score"),
        ("chosen_ids[9]", "`score`: at column 12: "),
        ("log(0)", "`score`: expected a finite number, found the number -inf"),
    ] {
        let formula = Formula::read(&engine, "score", text, Kind::Number, Some(PortType::Pairs));
        let error = match formula {
            Ok(formula) => formula.evaluate(&engine, &facts).expect_err(text).to_string(),
            Err(issue) => format!("`{}`: {}", issue.key, issue.message),
        };
        assert!(error.starts_with(expected), "{text}: {error}");
    }
}

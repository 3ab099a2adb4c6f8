//! What expressions come to, and where they stop.

use super::*;

fn value(text: &str) -> Result<Dynamic, String> {
    let engine = engine();
    let expression = Expression::compile(&engine, text, ["score", "row"]).map_err(|error| error.to_string())?;
    let mut scope = Scope::new();
    scope.push("score", 3.0);
    let mut row = rhai::Map::new();
    row.insert("length".into(), 7_i64.into());
    scope.push("row", row);
    expression
        .evaluate(&engine, &mut scope)
        .map_err(|error| ExpressionError::of(&error, ["sqrt", "sigmoid"]).to_string())
}

fn number(text: &str) -> f64 {
    let found = value(text).unwrap_or_else(|error| panic!("{text}: {error}"));
    numbers::number(&found).unwrap_or_else(|| panic!("{text}: {found:?}"))
}

#[test]
fn numbers_are_what_formulas_mean() {
    for (text, expected) in [
        ("1 / 2", 0.5),
        ("7 / 2 * 2", 7.0),
        ("2 ** -1", 0.5),
        ("2 ** 0.5 * 2 ** 0.5", 2.0),
        ("-(score ** 2)", -9.0),
        ("(-score) ** 2", 9.0),
        ("log(exp(2))", 2.0),
        ("sqrt(16) + abs(-1)", 5.0),
        ("max(score, 4) - min(1, 2.5)", 3.0),
        ("if score > 2 && row.length == 7 { 1 } else { 0 }", 1.0),
        ("clamp(score, 0, 1)", 1.0),
        ("sigmoid(0)", 0.5),
        ("softplus(0)", std::f64::consts::LN_2),
        // log(1 - e^-1e-8) from Python's decimal, as in the training core's test.
        ("log1mexp(-1e-8)", -18.420680748952366),
        ("relu(-2) + relu(2)", 2.0),
        ("let twice = 2 * score; twice + 1", 7.0),
    ] {
        let found = number(text);
        assert!((found - expected).abs() <= 1e-12 * expected.abs().max(1.0), "{text}: {found}, not {expected}");
    }
}

#[test]
fn mistakes_say_where() {
    for (text, expected) in [
        ("score + scoer", "at column 9: unknown name `scoer` (did you mean `score`?)"),
        ("1 +\n  sqr(2.0)", "at line 2, column 3: unknown function `sqr` of (number) (did you mean `sqrt`?)"),
        ("row.lenght", "there is no `lenght`"),
        ("score * \"a\"", "`*` does not work on (number, text)"),
        ("if false { nothing } else { 1 }", "unknown name `nothing`"),
        ("1 +", "Script is incomplete"),
        (
            "1 +\n  -score ** 2",
            "at line 2, column 3: a sign goes before a power here, unlike in Python (write -(a ** b), or (-a) ** b)",
        ),
    ] {
        let error = value(text).expect_err(text);
        assert!(error.contains(expected), "{text}: {error}");
    }
}

#[test]
fn an_expression_can_neither_hang_nor_grow_nor_reach_out() {
    let long = format!("\"{}\".len()", "x".repeat(1 << 15));
    for (text, expected) in [
        ("loop { }", "stopped after 1000000 operations"),
        ("let text = \"ab\"; loop { text += text; }", "a text grew too large: at most 1024 kib"),
        ("let list = [1]; loop { list += list; }", "a list grew too large: at most 65536 items"),
        ("let list = []; loop { list.push(list); }", "a list grew too large"),
        ("let list = [1, 2]; loop { list[0] = list; list[1] = list; }", "a list grew too large"),
        ("let row = #{a: 1}; for index in 0..100000 { row[`${index}`] = index; } row", "stopped after"),
        (&format!("{}1{}", "(".repeat(200), ")".repeat(200)), "maximum"),
        (&long, "an expression has at most 16384 bytes, found 32776"),
        ("eval(\"1\")", "eval"),
        ("print(1)", "print"),
        ("debug(1)", "debug"),
        ("import \"files\" as files; 1", "import"),
        ("fn twice(x) { 2 * x } twice(1)", ""),
        ("sleep(1)", "unknown function `sleep`"),
        ("blob(100)", "unknown function `blob`"),
    ] {
        let error = value(text).expect_err(text);
        assert!(error.to_lowercase().contains(expected), "{text}: {error}");
    }
}

/// Operations that take work in proportion to data: without counting that, each of these takes minutes, or gigabytes.
#[test]
fn work_on_data_is_counted() {
    let megabyte = "let text = \"x\"; while text.len() < 500000 { text += text; } ";
    let list = "let list = [5]; while list.len() < 30000 { list += list; } ";
    let operations = "stopped after 1000000 operations";
    let data = "stopped after making 32 MiB of data";
    let variables = (0..250).map(|n| format!("let v{n} = text + text; ")).collect::<String>();
    let mut wrong = Vec::new();
    for (start, text, expected) in [
        (megabyte, "for i in 0..200000 { text.contains(\"y\"); }", operations),
        (megabyte, "for i in 0..200000 { \"y\" in text; }", operations),
        (megabyte, "for i in 0..200000 { if text == text + \"y\" { break; } }", data),
        (megabyte, "for i in 0..200000 { text.to_upper(); }", data),
        (megabyte, variables.as_str(), data),
        (megabyte, "let words = [text]; loop { words += words; }", "a text grew too large"),
        (list, "for i in 0..200000 { list.sort(); }", operations),
        (list, "for i in 0..200000 { list.reverse(); }", operations),
        (list, "for i in 0..200000 { let other = list; }", operations),
        (list, "for i in 0..200000 { list.index_of(6); }", operations),
        (list, "for i in 0..200000 { list == list; }", operations),
        (list, "for i in 0..200000 { list + [i]; }", data),
        ("let text = \"a \"; while text.len() < 60000 { text += text; } ", "loop { words(text); }", data),
        ("let text = \"a \"; while text.len() < 60000 { text += text; } ", "loop { text.split(\" \"); }", data),
        ("", "loop { \"a b c d e f g h i j k l m n o p q r s t u v w x y z\".chars(); }", data),
    ] {
        match value(&format!("{start}{text}")) {
            Err(error) if error.contains(expected) => {}
            found => wrong.push(format!("{text}: expected {expected}, found {found:?}")),
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    // As much as one may want to do with a long record.
    let tokens = "let found = 0; for id in list { if id == 7 { found += 1; } } found";
    assert_eq!(number(&format!("{list}{tokens}")), 0.0);
    assert_eq!(number(&format!("{megabyte}text.replace(\"x\", \"\").trim().len()")), 0.0);
}

#[test]
fn variables_are_few() {
    let many = (0..250).map(|n| format!("let v{n} = {n}; ")).collect::<String>();
    let error = value(&format!("{many}1")).expect_err("too many variables");
    assert!(error.contains("variables"), "{error}");
}

#[test]
fn texts_and_lists_have_their_functions() {
    for (text, expected) in [
        ("\" A b \".trim().to_lower().len()", 3.0),
        ("\"naïve\".len() + \"naïve\".index_of(\"v\")", 8.0),
        ("\"a,b,c\".split(\",\").len() * 10 + \"a b\".words().len()", 32.0),
        ("if \"abc\".sub_string(1, 1) == \"b\" && \"abc\".sub_string(1) == \"bc\" { 1 } else { 0 }", 1.0),
        ("if \"abc\"[1] == \"b\" && \"abc\" < \"abd\" && \"x\" + \"y\" == `x${\"y\"}` { 1 } else { 0 }", 1.0),
        ("if \"abc\".starts_with(\"ab\") && \"abc\".ends_with(\"c\") && !(\"d\" in \"abc\") { 1 } else { 0 }", 1.0),
        ("let list = [3, 1.5, 2]; list.sort(); list[0] + list.index_of(3)", 3.5),
        ("let list = [\"b\", \"a\"]; list.sort(); list.reverse(); list.push(\"c\"); list.index_of(\"a\")", 1.0),
        ("let sum = 0; for id in [1, 2] + [3] { sum += id } sum", 6.0),
        ("let sum = 0; for id in 0..4 { sum += id } sum", 6.0),
        ("[1, 2, 3, 4].extract(1, 2).len() + [[1], 2].len", 4.0),
        ("if [1, [2.0]] == [1.0, [2]] && row.contains(\"length\") && row.keys() == [\"length\"] { 1 } else { 0 }", 1.0),
        ("parse_int(\"7\") + floor(2.5) + \"12\".parse_float()", 21.0),
    ] {
        assert_eq!(number(text), expected, "{text}");
    }
}

#[test]
fn values_of_different_kinds_cannot_be_compared() {
    for (text, expected) in [
        ("score == \"3\"", "`==` does not work on (number, text)"),
        ("\"a\" != 1", "`!=` does not work on (text, number)"),
        ("[1] == 1", "`==` does not work on (list, number)"),
        ("\"7\" in [7]", "`==` does not work on (number, text)"),
        ("score < \"3\"", "`<` does not work on (number, text)"),
        ("true == 1", "`==` does not work on (truth value, number)"),
    ] {
        let error = value(text).expect_err(text);
        assert!(error.contains(expected), "{text}: {error}");
    }
}

#[test]
fn types_are_named_as_people_name_them() {
    for (text, expected) in [
        ("sqrt(\"a\")", "`sqrt` does not take (text)"),
        ("score + [1]", "`+` does not work on (number, list)"),
        ("if score { 1 } else { 2 }", "expected true or false, found a number"),
        ("score && true", "expected true or false, found a number"),
        ("score[0]", "a number has no items to take by `[ ]`"),
        ("row.length.size", "number"),
        ("for x in score { }", "iterable"),
    ] {
        let error = value(text).expect_err(text);
        assert!(error.contains(expected), "{text}: {error}");
        for leaked in ["i64", "f64", "ImmutableString", "&str", "Dynamic", "array"] {
            assert!(!error.contains(leaked), "{text}: {error}");
        }
    }
}

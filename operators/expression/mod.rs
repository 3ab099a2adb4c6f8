//! Expressions in YAML: formulas of objectives, and of operators over records.
//!
//! The language is Rhai's (rhai.rs) without functions, modules, `eval` and output, so that an expression can do nothing
//! but compute its value; [`engine`] bounds how long that takes and how large it gets. Numbers behave as people who
//! write formulas expect: `/` always divides exactly, and `log` is the natural logarithm, as in torch. A sign binds closer than a
//! power: `-x ** 2` is `(-x) ** 2`.

use rhai::{AST, Dynamic, Engine, EvalAltResult, OptimizationLevel, ParseErrorType, Position, Scope};
use sapo_flow_engine::pipeline::closest;

pub mod evaluation;
mod numbers;
pub mod records;

pub use numbers::number;

/// Operations one evaluation may take.
pub const MAX_OPERATIONS: u64 = 1_000_000;
/// Depth of brackets and operators in an expression.
pub const MAX_DEPTH: usize = 64;
/// Variables that a program of several statements may declare.
pub const MAX_VARIABLES: usize = 256;
/// Bytes of a text.
pub const MAX_TEXT_BYTES: usize = 1 << 20;
/// Items of a list, or of a mapping.
pub const MAX_ITEMS: usize = 1 << 16;

/// An engine that evaluates expressions over numbers, texts, lists and mappings, within limits. Register more types and
/// functions on it as the use needs; one engine serves any number of expressions and threads.
pub fn engine() -> Engine {
    let mut engine = Engine::new();
    engine
        .set_max_operations(MAX_OPERATIONS)
        .set_max_expr_depths(MAX_DEPTH)
        .set_max_variables(MAX_VARIABLES)
        .set_max_string_size(MAX_TEXT_BYTES)
        .set_max_array_size(MAX_ITEMS)
        .set_max_map_size(MAX_ITEMS)
        // Names are checked when an expression is compiled, those in branches not taken included.
        .set_strict_variables(true)
        .set_fail_on_invalid_map_property(true)
        // `1 / 2` is ours: see `numbers`.
        .set_fast_operators(false)
        .set_optimization_level(OptimizationLevel::None);
    for symbol in ["eval", "print", "debug"] {
        engine.disable_symbol(symbol);
    }
    numbers::register(&mut engine);
    engine
}

/// An expression that has been read.
#[derive(Clone, Debug)]
pub struct Expression {
    ast: AST,
}

impl Expression {
    /// Read an expression in which these names may occur.
    ///
    /// # Errors
    /// Where it is not one, or names something else.
    pub fn compile<'a>(
        engine: &Engine,
        text: &str,
        names: impl IntoIterator<Item = &'a str>,
    ) -> Result<Self, ExpressionError> {
        let names: Vec<&str> = names.into_iter().collect();
        let mut scope = Scope::new();
        for name in &names {
            scope.push(*name, ());
        }
        let ast = engine.compile_with_scope(&scope, text).map_err(|error| {
            let (mut message, mut help) = (error.0.to_string(), None);
            if let ParseErrorType::VariableUndefined(name) = &*error.0 {
                message = format!("unknown name `{name}`");
                help = closest(name, names.iter().copied()).map(|near| format!("did you mean `{near}`?"));
            }
            ExpressionError::at(error.1, message, help)
        })?;
        Ok(Expression { ast })
    }

    /// Its value, with the names that it uses in `scope`.
    ///
    /// # Errors
    /// What Rhai says; [`ExpressionError::of`] makes it readable.
    pub fn evaluate(&self, engine: &Engine, scope: &mut Scope) -> Result<Dynamic, Box<EvalAltResult>> {
        let depth = scope.len();
        let value = engine.eval_ast_with_scope::<Dynamic>(scope, &self.ast);
        scope.rewind(depth);
        value
    }
}

/// What is wrong with an expression, and where in its text.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{}{message}{}", place(*line, *column), help.as_deref().map(|help| format!(" ({help})")).unwrap_or_default())]
pub struct ExpressionError {
    /// What was expected and what was found.
    pub message: String,
    /// What may have been meant.
    pub help: Option<String>,
    /// Line of the text, from 1; 0 where there is no place.
    pub line: usize,
    /// Column of the line, from 1.
    pub column: usize,
}

fn place(line: usize, column: usize) -> String {
    match line {
        0 => String::new(),
        1 => format!("at column {column}: "),
        _ => format!("at line {line}, column {column}: "),
    }
}

impl ExpressionError {
    /// Something wrong with the expression as a whole.
    pub fn whole(message: impl Into<String>) -> Self {
        ExpressionError { message: message.into(), help: None, line: 0, column: 0 }
    }

    fn at(position: Position, message: String, help: Option<String>) -> Self {
        let (line, column) = (position.line().unwrap_or(0), position.position().unwrap_or(0));
        ExpressionError { message, help, line, column }
    }

    /// What went wrong in an evaluation; `functions` are the names that may have been meant where one is unknown.
    pub fn of<'a>(error: &EvalAltResult, functions: impl IntoIterator<Item = &'a str>) -> Self {
        let inner = error.unwrap_inner();
        let (message, help) = match inner {
            EvalAltResult::ErrorFunctionNotFound(signature, _) => unknown_function(signature, functions),
            EvalAltResult::ErrorTooManyOperations(_) => {
                (format!("stopped after {MAX_OPERATIONS} operations: an expression must be short"), None)
            }
            EvalAltResult::ErrorPropertyNotFound(name, _) => (format!("there is no `{name}`"), None),
            EvalAltResult::ErrorRuntime(value, _) => (value.to_string(), None),
            other => (error_without_place(other).chars().take(300).collect(), None),
        };
        ExpressionError::at(inner.position(), message, help)
    }
}

/// `name (type, type)` as Rhai writes it, for people.
fn unknown_function<'a>(signature: &str, functions: impl IntoIterator<Item = &'a str>) -> (String, Option<String>) {
    let (name, arguments) = signature.split_once(" (").unwrap_or((signature, ")"));
    let arguments = arguments.trim_end_matches(')').replace("i64", "number").replace("f64", "number");
    let functions: Vec<&str> = functions.into_iter().collect();
    if !name.starts_with(|first: char| first.is_alphabetic() || first == '_') {
        return (format!("`{name}` does not work on ({arguments})"), None);
    }
    if functions.contains(&name) {
        return (format!("`{name}` does not take ({arguments})"), None);
    }
    let help = closest(name, functions).map(|near| format!("did you mean `{near}`?"));
    (format!("unknown function `{name}` of ({arguments})"), help)
}

fn error_without_place(error: &EvalAltResult) -> String {
    let text = error.to_string();
    match text.rfind(" (line ") {
        Some(at) => text[..at].to_owned(),
        None => text,
    }
}

#[cfg(test)]
mod tests {
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
            // A sign binds closer than a power, unlike in Python.
            ("-score ** 2", 9.0),
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
            ("score * \"a\"", "`*` does not work on (number, &str"),
            ("if false { nothing } else { 1 }", "unknown name `nothing`"),
            ("1 +", "Script is incomplete"),
        ] {
            let error = value(text).expect_err(text);
            assert!(error.contains(expected), "{text}: {error}");
        }
    }

    #[test]
    fn an_expression_can_neither_hang_nor_grow_nor_reach_out() {
        for (text, expected) in [
            ("loop { }", "stopped after 1000000 operations"),
            ("let text = \"ab\"; loop { text += text; }", "too large"),
            ("let list = [1]; loop { list += list; }", "too large"),
            ("let row = #{a: 1}; for index in 0..100000 { row[`${index}`] = index; } row", "stopped after"),
            (&format!("{}1{}", "(".repeat(200), ")".repeat(200)), "maximum"),
            ("eval(\"1\")", "eval"),
            ("print(1)", "print"),
            ("debug(1)", "debug"),
            ("import \"files\" as files; 1", "import"),
            ("fn twice(x) { 2 * x } twice(1)", ""),
        ] {
            let error = value(text).expect_err(text);
            assert!(error.to_lowercase().contains(expected), "{text}: {error}");
        }
    }
}

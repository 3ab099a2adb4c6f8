//! Expressions in YAML: formulas of objectives, and of operators over records.
//!
//! The language is Rhai's (rhai.rs) without functions of one's own, modules, `eval` and output, and with the functions of
//! [`functions`] and `numbers` alone, so that an expression can do nothing but compute its value; [`budget`] bounds how
//! long that takes and how large it gets. Numbers behave as people who write formulas expect: `/` always divides exactly,
//! and `log` is the natural logarithm, as in torch. A sign binds closer than a power: `-x ** 2` is `(-x) ** 2`.

use rhai::packages::{ArithmeticPackage, BasicMathPackage, LogicPackage, Package};
use rhai::{AST, Dynamic, Engine, EvalAltResult, OptimizationLevel, ParseErrorType, Scope};
use sapo_flow_engine::pipeline::closest;

pub mod budget;
mod error;
pub mod evaluation;
pub mod functions;
mod numbers;
mod powers;
pub mod records;

pub use error::{ExpressionError, with_article};
pub use numbers::number;

/// Depth of brackets and operators in an expression.
pub const MAX_DEPTH: usize = 64;
/// Bytes of an expression.
pub const MAX_EXPRESSION_BYTES: usize = 1 << 14;
/// Variables that an evaluation may have, the names of its record or pairs included.
pub const MAX_VARIABLES: usize = 64;
/// Bytes of a text.
pub const MAX_TEXT_BYTES: usize = 1 << 20;
/// Items of a list, or of a mapping.
pub const MAX_ITEMS: usize = 1 << 16;

/// How many times beyond these limits a variable may be: records' own texts and tokens are what they are.
const LARGEST: u64 = 16;

/// An engine that evaluates expressions over numbers, texts, lists and mappings, within limits. Register more types and
/// functions on it as the use needs, each of which tells the [`budget`] what it costs beyond an operation; one engine
/// serves any number of expressions and threads.
pub fn engine() -> Engine {
    let mut engine = Engine::new_raw();
    engine
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
        .set_optimization_level(OptimizationLevel::None)
        .on_progress(|operations| budget::exceeded(operations).map(Dynamic::from));
    // Whoever names a variable may copy it. (Deprecated is Rhai's mark for what may change with its next version.)
    #[allow(deprecated)]
    engine.on_var(|name, _, context| {
        if let Some(value) = context.scope().get(name) {
            let size = budget::Size::of(value);
            budget::work(size);
            // Rhai looks at what functions give, not at what grows by putting a list into itself.
            if size.items > LARGEST * MAX_ITEMS as u64 || size.bytes > LARGEST * MAX_TEXT_BYTES as u64 {
                return Err(functions::too_large("Size of list"));
            }
        }
        Ok(None)
    });
    for symbol in ["eval", "print", "debug"] {
        engine.disable_symbol(symbol);
    }
    ArithmeticPackage::new().register_into_engine(&mut engine);
    LogicPackage::new().register_into_engine(&mut engine);
    BasicMathPackage::new().register_into_engine(&mut engine);
    functions::register(&mut engine);
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
        if text.len() > MAX_EXPRESSION_BYTES {
            let message = format!("an expression has at most {MAX_EXPRESSION_BYTES} bytes, found {}", text.len());
            return Err(ExpressionError::whole(message));
        }
        if let Some(sign) = powers::negated(text) {
            let message = "a sign goes before a power here, unlike in Python".to_owned();
            let help = "write -(a ** b), or (-a) ** b".to_owned();
            return Err(ExpressionError::at_byte(text, sign, message, Some(help)));
        }
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
        budget::begin();
        let value = engine.eval_ast_with_scope::<Dynamic>(scope, &self.ast);
        scope.rewind(depth);
        value
    }
}

#[cfg(test)]
mod tests;

//! Tensors in expressions: operators and functions over numbers of pairs, with gradients.
//!
//! Everything is elementwise over pairs, but for `mean`, `sum`, `sort`, and `min` and `max` of one argument: a value
//! that comes from those depends on several pairs, and knows it.

use std::sync::{Arc, LazyLock, Mutex, PoisonError};

use rhai::{Dynamic, Engine, EvalAltResult};
use sapo_flow_training::objectives::math;
use tch::{Kind, TchError, Tensor};

use crate::expression::{self, budget, with_article};

/// The engine of objectives' formulas.
pub static ENGINE: LazyLock<Engine> = LazyLock::new(|| {
    let mut engine = expression::engine();
    register(&mut engine);
    engine
});

/// Names of the functions, for people and for messages.
pub const FUNCTIONS: [&str; 20] = [
    "logsigmoid",
    "sigmoid",
    "log1mexp",
    "softplus",
    "relu",
    "exp",
    "log",
    "sqrt",
    "square",
    "abs",
    "tanh",
    "detach",
    "mean",
    "sum",
    "sort",
    "min",
    "max",
    "clamp",
    "where",
    "is_finite",
];

/// A tensor as a value of an expression.
#[derive(Clone, Debug)]
pub struct Value {
    // libtorch's handles may be sent, but tch does not let them be shared.
    tensor: Arc<Mutex<Tensor>>,
    /// Whether an element depends on several pairs.
    mixed: bool,
}

type Fallible<T> = Result<T, Box<EvalAltResult>>;

impl Value {
    /// Numbers of pairs, or one number; `mixed` where it comes from several pairs.
    pub fn new(tensor: Tensor, mixed: bool) -> Self {
        Value { tensor: Arc::new(Mutex::new(tensor)), mixed }
    }

    /// The tensor.
    pub fn tensor(&self) -> Tensor {
        self.tensor.lock().unwrap_or_else(PoisonError::into_inner).shallow_clone()
    }

    /// See [`Value::new`].
    pub fn is_mixed(&self) -> bool {
        self.mixed
    }

    /// A value that is a tensor, or a number as one of the same kind and device.
    fn like(&self, value: &Dynamic) -> Fallible<Value> {
        if let Some(tensor) = value.read_lock::<Value>() {
            return Ok(tensor.clone());
        }
        let number = expression::number(value)
            .or_else(|| value.as_bool().ok().map(|truth| if truth { 1.0 } else { 0.0 }))
            .ok_or_else(|| format!("expected a tensor or a number, found {}", with_article(value.type_name())))?;
        let own = self.tensor();
        if let Some(largest) = largest(own.kind()).filter(|largest| number.is_finite() && number.abs() > *largest) {
            // libtorch refuses such a number, and tch panics on that where it frees its own copy of it.
            return Err(format!("expected a number within ±{largest:.1e}, found {number:e}").into());
        }
        // Filled where it is needed: a copy from the host would wait for the device.
        let tensor = torch(Tensor::f_full([0i64; 0], number, (own.kind(), own.device())))?;
        Ok(Value::new(tensor, false))
    }

    fn map(&self, function: impl FnOnce(&Tensor) -> Result<Tensor, TchError>) -> Fallible<Value> {
        Ok(Value::new(torch(function(&self.tensor()))?, self.mixed))
    }

    fn reduced(&self, function: impl FnOnce(&Tensor) -> Result<Tensor, TchError>) -> Fallible<Value> {
        Ok(Value { mixed: true, ..self.map(function)? })
    }
}

/// The largest finite number of a kind; none where every number here is within its range.
fn largest(kind: Kind) -> Option<f64> {
    match kind {
        Kind::Float => Some(f32::MAX.into()),
        Kind::BFloat16 => Some(f32::from_bits(0x7f7f_0000).into()),
        Kind::Half => Some(65504.0),
        _ => None,
    }
}

/// Operations of an expression in whose time torch does one, on a few numbers and with its part of the graph.
const TORCH_OPERATION: u64 = 100;

fn torch<T>(result: Result<T, TchError>) -> Fallible<T> {
    budget::operations(TORCH_OPERATION);
    result.map_err(|error| {
        let text = error.to_string();
        text.lines().next().unwrap_or_default().to_owned().into()
    })
}

type Unary = fn(&Tensor) -> Result<Tensor, TchError>;
type Binary = fn(&Tensor, &Tensor) -> Result<Tensor, TchError>;

fn register(engine: &mut Engine) {
    engine.register_type_with_name::<Value>("tensor");
    let unary: [(&str, Unary); 11] = [
        ("-", Tensor::f_neg),
        ("logsigmoid", Tensor::f_log_sigmoid),
        ("sigmoid", Tensor::f_sigmoid),
        ("softplus", |x| x.f_neg()?.f_log_sigmoid()?.f_neg()),
        ("relu", Tensor::f_relu),
        ("exp", Tensor::f_exp),
        ("log", Tensor::f_log),
        ("sqrt", Tensor::f_sqrt),
        ("square", Tensor::f_square),
        ("abs", Tensor::f_abs),
        ("tanh", Tensor::f_tanh),
    ];
    for (name, function) in unary {
        engine.register_fn(name, move |x: Value| x.map(function));
    }
    engine.register_fn("+", |x: Value| x);
    engine.register_fn("log1mexp", |x: Value| {
        budget::operations(TORCH_OPERATION);
        let values = math::log1mexp(&x.tensor()).map_err(|error| error.to_string())?;
        Ok::<_, Box<EvalAltResult>>(Value::new(values, x.mixed))
    });
    engine.register_fn("detach", |x: Value| x.map(Tensor::f_detach));
    engine.register_fn("is_finite", |x: Value| x.map(|x| x.f_isfinite()?.f_to_kind(x.kind())));
    let reductions: [(&str, Unary); 5] = [
        ("mean", |x| x.f_mean(x.kind())),
        ("sum", |x| x.f_sum(x.kind())),
        ("sort", |x| Ok(x.f_sort(0, false)?.0)),
        ("min", Tensor::f_min),
        ("max", Tensor::f_max),
    ];
    for (name, function) in reductions {
        engine.register_fn(name, move |x: Value| x.reduced(function));
    }
    register_pairwise(engine);
}

/// Operators and functions of several values.
fn register_pairwise(engine: &mut Engine) {
    let binary: [(&str, Binary); 13] = [
        ("+", |a, b| a.f_add(b)),
        ("-", |a, b| a.f_sub(b)),
        ("*", |a, b| a.f_mul(b)),
        ("/", |a, b| a.f_div(b)),
        ("**", |a, b| a.f_pow(b)),
        ("min", |a, b| a.f_minimum(b)),
        ("max", |a, b| a.f_maximum(b)),
        ("<", |a, b| a.f_lt_tensor(b)?.f_to_kind(a.kind())),
        ("<=", |a, b| a.f_le_tensor(b)?.f_to_kind(a.kind())),
        (">", |a, b| a.f_gt_tensor(b)?.f_to_kind(a.kind())),
        (">=", |a, b| a.f_ge_tensor(b)?.f_to_kind(a.kind())),
        ("==", |a, b| a.f_eq_tensor(b)?.f_to_kind(a.kind())),
        ("!=", |a, b| a.f_ne_tensor(b)?.f_to_kind(a.kind())),
    ];
    for (name, function) in binary {
        register_binary(engine, name, function);
    }
    engine.register_fn("clamp", |x: Value, low: Dynamic, high: Dynamic| {
        let low = x.like(&low)?;
        let (high, mixed) = (x.like(&high)?, x.mixed || low.mixed);
        let tensor = torch(x.tensor().f_maximum(&low.tensor()).and_then(|t| t.f_minimum(&high.tensor())))?;
        Ok::<_, Box<EvalAltResult>>(Value::new(tensor, mixed || high.mixed))
    });
    engine.register_fn("where", |condition: Value, yes: Dynamic, no: Dynamic| {
        let (yes, no) = (condition.like(&yes)?, condition.like(&no)?);
        let chosen = condition.tensor().f_ne(0.0).and_then(|chosen| yes.tensor().f_where_self(&chosen, &no.tensor()));
        Ok::<_, Box<EvalAltResult>>(Value::new(torch(chosen)?, condition.mixed || yes.mixed || no.mixed))
    });
}

/// An operator or function of two values, one of which is a tensor.
fn register_binary(engine: &mut Engine, name: &str, function: Binary) {
    let both = move |left: &Value, right: &Value| {
        let tensor = torch(function(&left.tensor(), &right.tensor()))?;
        Fallible::Ok(Value::new(tensor, left.mixed || right.mixed))
    };
    engine.register_fn(name, move |left: Value, right: Value| both(&left, &right));
    engine.register_fn(name, move |left: Value, right: f64| both(&left, &left.like(&right.into())?));
    engine.register_fn(name, move |left: Value, right: i64| both(&left, &left.like(&right.into())?));
    engine.register_fn(name, move |left: f64, right: Value| both(&right.like(&left.into())?, &right));
    engine.register_fn(name, move |left: i64, right: Value| both(&right.like(&left.into())?, &right));
}

impl Value {
    /// A number that is carried from step to step: a tensor, since what a formula reads must not depend on it.
    pub fn carried(number: f64) -> Dynamic {
        Value::new(Tensor::from(number), false).into_dynamic()
    }

    /// The value as expressions hold it.
    pub fn into_dynamic(self) -> Dynamic {
        Dynamic::from(self)
    }
}

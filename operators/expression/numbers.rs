//! What numbers do in expressions.

use rhai::{Dynamic, Engine};

/// A value as a number, if it is one.
pub fn number(value: &Dynamic) -> Option<f64> {
    value.as_float().ok().or_else(|| value.as_int().ok().map(|integer| integer as f64))
}

/// Functions of one number.
type Function = fn(f64) -> f64;

/// Names and functions of one number, each for integers too.
const FUNCTIONS: [(&str, Function); 9] = [
    ("exp", f64::exp),
    ("log", f64::ln),
    ("sqrt", f64::sqrt),
    ("square", |x| x * x),
    ("sigmoid", |x| 1.0 / (1.0 + (-x).exp())),
    ("logsigmoid", |x| -softplus(-x)),
    ("softplus", softplus),
    ("log1mexp", log1mexp),
    ("relu", |x| x.max(0.0)),
];

/// Give numbers exact division, powers and the functions that formulas use.
pub fn register(engine: &mut Engine) {
    engine.register_fn("/", |left: i64, right: i64| left as f64 / right as f64);
    engine.register_fn("/", |left: f64, right: i64| left / right as f64);
    engine.register_fn("/", |left: i64, right: f64| left as f64 / right);
    engine.register_fn("**", |left: i64, right: i64| (left as f64).powf(right as f64));
    engine.register_fn("**", |left: f64, right: i64| left.powf(right as f64));
    engine.register_fn("**", |left: i64, right: f64| (left as f64).powf(right));
    for (name, function) in FUNCTIONS {
        engine.register_fn(name, function);
        engine.register_fn(name, move |x: i64| function(x as f64));
    }
    engine.register_fn("clamp", |x: Dynamic, low: Dynamic, high: Dynamic| clamp(&x, &low, &high));
}

fn clamp(x: &Dynamic, low: &Dynamic, high: &Dynamic) -> Result<f64, Box<rhai::EvalAltResult>> {
    match (number(x), number(low), number(high)) {
        (Some(x), Some(low), Some(high)) if low <= high => Ok(x.clamp(low, high)),
        _ => Err(format!("clamp: expected a number and two bounds in order, found {x}, {low} and {high}").into()),
    }
}

/// log(1 + exp(x)) without overflow.
fn softplus(x: f64) -> f64 {
    x.max(0.0) + (-x.abs()).exp().ln_1p()
}

/// log(1 - exp(x)) for x < 0 without losing precision near 0; see the training core's `objectives::math`.
fn log1mexp(x: f64) -> f64 {
    if x > -std::f64::consts::LN_2 { (-x.exp_m1()).ln() } else { (-x.exp()).ln_1p() }
}

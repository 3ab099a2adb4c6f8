//! Stable forms of functions whose textbook forms lose all precision in f32.

use tch::Tensor;

use crate::Result;

/// log(1 - exp(x)) for x < 0, accurate in f32 over the whole range, gradient included.
///
/// Near 0 through expm1, elsewhere through log1p, switching at -ln 2 (Maechler, "Accurately computing
/// log(1 - exp(-|a|))", equation 7). Minus infinity at 0.
pub fn log1mexp(x: &Tensor) -> Result<Tensor> {
    let switch = -std::f64::consts::LN_2;
    let near_zero = x.f_gt(switch)?;
    // Each branch sees only values it is fit for: the gradient of the branch not taken is multiplied by zero, and
    // must be finite for that.
    let near = x.f_where_scalarother(&near_zero, switch)?.f_expm1()?.f_neg()?.f_log()?;
    let far = Tensor::f_where_scalarself(&near_zero, switch, x)?.f_exp()?.f_neg()?.f_log1p()?;
    Ok(near.f_where_self(&near_zero, &far)?)
}

#[cfg(test)]
mod tests {
    use tch::{Kind, Tensor};

    use super::log1mexp;

    /// (x, log(1 - exp(x)), derivative), from Python's `decimal` with 50 digits; x rounded to f32 first.
    const CASES: [(f32, f64, f64); 8] = [
        (-1e-30, -69.07755278665029, -9.999999968289232e+29),
        (-1e-08, -18.420680755029835, -100000000.10774711),
        (-0.0001, -9.210390396820378, -9999.500260954588),
        (-0.5, -0.9327521295671886, -1.5414940825367982),
        (-0.694, -0.6922950820889054, -0.9982965289235403),
        (-0.7, -0.6863410145675932, -0.9864338869933527),
        (-5.0, -0.006760749449488557, -0.006783654906304231),
        (-50.0, -1.9287498479639178e-22, -1.9287498479639178e-22),
    ];

    #[test]
    fn log1mexp_is_accurate_at_both_ends() {
        let x = Tensor::from_slice(&CASES.map(|case| case.0)).set_requires_grad(true);
        let values = log1mexp(&x).unwrap();
        values.sum(Kind::Float).backward();
        let values: Vec<f32> = values.try_into().unwrap();
        let slopes: Vec<f32> = x.grad().try_into().unwrap();
        for (index, (x, value, slope)) in CASES.into_iter().enumerate() {
            let close = |found: f32, expected: f64| (f64::from(found) - expected).abs() <= 2e-6 * expected.abs();
            assert!(close(values[index], value), "log1mexp({x}): expected {value}, found {}", values[index]);
            assert!(close(slopes[index], slope), "slope at {x}: expected {slope}, found {}", slopes[index]);
        }
    }
}

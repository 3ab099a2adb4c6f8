//! The elementwise parts of a decoder layer and of its loss on a CPU, each as one pass over memory, with gradients.
//!
//! libtorch composes them of many passes there, forward and backward, and keeps what lies between. Results agree with the
//! composed ones but for the last bits: arithmetic is in f32 throughout, and rounded once.

use std::ffi::c_char;

use tch::Tensor;
use torch_sys::C_tensor;

use super::{check, made};
use crate::Result;

unsafe extern "C" {
    fn sapo_norm(input: *const C_tensor, weight: *const C_tensor, eps: f64, output: *mut *mut C_tensor) -> *mut c_char;
    fn sapo_gated(gate: *const C_tensor, up: *const C_tensor, output: *mut *mut C_tensor) -> *mut c_char;
    fn sapo_rotate(
        input: *const C_tensor,
        cosine: *const C_tensor,
        sine: *const C_tensor,
        output: *mut *mut C_tensor,
    ) -> *mut c_char;
    fn sapo_score(
        logits: *const C_tensor,
        targets: *const C_tensor,
        logps: *const C_tensor,
        log_sums: *const C_tensor,
        correct: *const C_tensor,
    ) -> *mut c_char;
    fn sapo_score_backward(
        logits: *const C_tensor,
        targets: *const C_tensor,
        log_sums: *const C_tensor,
        gradient: *const C_tensor,
    ) -> *mut c_char;
}

/// Root-mean-square norm (arXiv 1910.07467) of `input` (..., width) in f32 or bf16, times `weight` (width,); in the input's
/// kind.
pub fn rms_norm(input: &Tensor, weight: &Tensor, eps: f64) -> Result<Tensor> {
    // Safety: valid handles for the length of the call, here and below.
    made(|output| unsafe { sapo_norm(input.as_ptr(), weight.as_ptr(), eps, output) })
}

/// silu(gate) * up, of two tensors of one shape in f32 or bf16 (SwiGLU, arXiv 2002.05202).
pub fn gated(gate: &Tensor, up: &Tensor) -> Result<Tensor> {
    made(|output| unsafe { sapo_gated(gate.as_ptr(), up.as_ptr(), output) })
}

/// Rotary embedding of `input` (batch, tokens, heads, head_dim) in f32 or bf16, as f32. Dimension i pairs with i +
/// head_dim / 2; `cosine` and `sine` are (batch, tokens, 1, head_dim / 2), f32.
pub fn rotate(input: &Tensor, cosine: &Tensor, sine: &Tensor) -> Result<Tensor> {
    made(|output| unsafe { sapo_rotate(input.as_ptr(), cosine.as_ptr(), sine.as_ptr(), output) })
}

/// What [`score`] fills: contiguous f32 tensors, (rows,) or views of that many elements.
pub struct RowScores<'a> {
    /// Log-probability of each row's target.
    pub logps: &'a Tensor,
    /// Log of each row's sum of exponentials.
    pub log_sums: &'a Tensor,
    /// 1 where no logit is above the target's, else 0.
    pub correct: &'a Tensor,
}

/// Of logits (rows, vocabulary), f32 or bf16 and contiguous, and a target (rows,), i64, for each row. No gradient flows: see
/// [`score_backward`].
pub fn score(logits: &Tensor, targets: &Tensor, into: &RowScores) -> Result<()> {
    let RowScores { logps, log_sums, correct } = into;
    // Safety: the shapes of what is filled are those that the caller allocated for these rows.
    unsafe { check(sapo_score(logits.as_ptr(), targets.as_ptr(), logps.as_ptr(), log_sums.as_ptr(), correct.as_ptr())) }
}

/// Puts gradient (rows,) * (onehot(target) - softmax(logits)) in the place of the logits: the gradient with respect to them
/// from the one with respect to the rows' log-probabilities.
pub fn score_backward(logits: &mut Tensor, targets: &Tensor, log_sums: &Tensor, gradient: &Tensor) -> Result<()> {
    unsafe { check(sapo_score_backward(logits.as_ptr(), targets.as_ptr(), log_sums.as_ptr(), gradient.as_ptr())) }
}

#[cfg(test)]
mod tests {
    use tch::{Device, Kind, Tensor};

    use super::super::testing::{self, numbers};
    use super::*;

    /// In f32 sums of some hundred numbers differ by their order, in bf16 the two ways by the roundings of the composed one.
    fn assert_same(inputs: &[Tensor], fused: impl Fn(&[Tensor]) -> Tensor, composed: impl Fn(&[Tensor]) -> Tensor) {
        for (kind, tolerance) in [(Kind::Float, 4e-6), (Kind::BFloat16, 2e-2)] {
            let inputs: Vec<Tensor> = inputs.iter().map(|input| input.to_kind(kind)).collect();
            testing::assert_same(&inputs, tolerance, &fused, &composed);
        }
    }

    // Sizes that are no multiples of a vector's, and more rows than one piece has.

    #[test]
    fn norms_are_libtorch_s() {
        let inputs = [numbers(&[5, 61, 177], 1.7), numbers(&[177], 0.9)];
        assert_same(
            &inputs,
            |of| rms_norm(&of[0], &of[1], 1e-5).unwrap(),
            |of| of[0].rms_norm([177], Some(&of[1]), 1e-5),
        );
    }

    #[test]
    fn gates_are_libtorch_s() {
        let inputs = [numbers(&[3, 71, 333], 1.3), numbers(&[3, 71, 333], 2.1)];
        assert_same(&inputs, |of| gated(&of[0], &of[1]).unwrap(), |of| of[0].silu() * &of[1]);
    }

    #[test]
    fn gates_far_from_zero_are_the_limits() {
        let gate = Tensor::from_slice(&[-1e30f32, -200.0, -87.5, 0.0, 87.5, 200.0, 1e30]);
        let expected = Tensor::from_slice(&[0f32, 0.0, 0.0, 0.0, 87.5, 200.0, 1e30]);
        let broken = Tensor::from_slice(&[f32::NAN]);
        testing::with_all_instructions(|| {
            assert!(gated(&gate, &gate.ones_like()).unwrap().allclose(&expected, 1e-6, 1e-30, false));
            assert!(gated(&broken, &broken.ones_like()).unwrap().double_value(&[0]).is_nan());
        });
    }

    #[test]
    fn rotations_are_composed_of_products() {
        let (cosine, sine) = (numbers(&[2, 301, 1, 5], 0.31).cos(), numbers(&[2, 301, 1, 5], 0.31).sin());
        assert_same(
            &[numbers(&[2, 301, 7, 10], 1.9)],
            |of| rotate(&of[0], &cosine, &sine).unwrap(),
            |of| {
                let wide = of[0].to_kind(Kind::Float);
                let (left, right) = (wide.narrow(-1, 0, 5), wide.narrow(-1, 5, 5));
                Tensor::cat(&[&left * &cosine - &right * &sine, &right * &cosine + &left * &sine], -1)
            },
        );
    }

    /// Sums go by vectors of as many numbers as an instruction takes, and so differ in their last bits.
    #[test]
    fn each_set_of_instructions_is_used() {
        let (input, weight) = (numbers(&[61, 177], 1.7), numbers(&[177], 0.9));
        let mut found = Vec::new();
        testing::with_all_instructions(|| {
            let normed = rms_norm(&input, &weight, 1e-5).unwrap();
            assert!(!found.contains(&normed), "as with the set before");
            found.push(normed);
        });
    }

    #[test]
    fn errors_name_what_was_expected() {
        let message = |result: Result<Tensor>| result.unwrap_err().to_string();
        let doubles = Tensor::zeros([2, 4], (Kind::Double, Device::Cpu));
        assert!(message(gated(&doubles, &doubles)).contains("expected float32 or bfloat16"));
        let input = numbers(&[2, 4], 1.0);
        assert!(message(rms_norm(&input, &numbers(&[3], 1.0), 1e-5)).contains("a weight of 4 numbers"));
        let scores = numbers(&[2], 1.0);
        let into = RowScores { logps: &scores, log_sums: &scores, correct: &scores };
        let error = score(&input, &Tensor::from_slice(&[0i64, 4]), &into).unwrap_err().to_string();
        assert!(error.contains("target 4 is not in the vocabulary"), "{error}");
    }
}

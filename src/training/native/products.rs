//! Matrix products in float32 on a CPU by whichever library is faster there, and attention of many queries, made of them.

use std::ffi::c_char;
use std::ptr;

use tch::{Device, Kind, Tensor};
use torch_sys::C_tensor;

use super::{check, made};
use crate::Result;

unsafe extern "C" {
    fn sapo_faster_by_onednn() -> bool;
    fn sapo_linear(
        input: *const C_tensor,
        weight: *const C_tensor,
        bias: *const C_tensor,
        output: *mut *mut C_tensor,
    ) -> *mut c_char;
    fn sapo_product(a: *const C_tensor, b: *const C_tensor, output: *mut *mut C_tensor) -> *mut c_char;
    fn sapo_add_product(sum: *const C_tensor, a: *const C_tensor, b: *const C_tensor) -> *mut c_char;
    fn sapo_attend(
        query: *const C_tensor,
        key: *const C_tensor,
        value: *const C_tensor,
        pairs: *const C_tensor,
        window: i64,
        in_bfloat16: bool,
        output: *mut *mut C_tensor,
    ) -> *mut c_char;
}

/// Whether oneDNN makes products of this kind on this device. It makes machine code for every new shape of a product, and keeps
/// 0.7 MB for each of the last ones (`device::keep_memory`).
pub fn by_onednn(kind: Kind, device: Device) -> bool {
    // Safety: asks what the processor is.
    device == Device::Cpu && (kind != Kind::Float || unsafe { sapo_faster_by_onednn() })
}

/// `input` (..., in) times `weight` (out, in), plus `bias` (out,): (..., out), with its gradient. Of any kind and device that
/// libtorch's own `linear` takes; in float32 on a CPU often twice as fast.
pub fn linear(input: &Tensor, weight: &Tensor, bias: Option<&Tensor>) -> Result<Tensor> {
    let bias = bias.map_or(ptr::null(), Tensor::as_ptr);
    // Safety: valid handles for the length of the call, here and below; a null bias is allowed.
    made(|output| unsafe { sapo_linear(input.as_ptr(), weight.as_ptr(), bias, output) })
}

/// a (m, k) times b (k, n), of one kind. No gradient flows.
pub fn product(a: &Tensor, b: &Tensor) -> Result<Tensor> {
    made(|output| unsafe { sapo_product(a.as_ptr(), b.as_ptr(), output) })
}

/// sum (m, n) += a (m, k) times b (k, n), all of one kind. No gradient flows.
pub fn add_product(sum: &mut Tensor, a: &Tensor, b: &Tensor) -> Result<()> {
    unsafe { check(sapo_add_product(sum.as_ptr(), a.as_ptr(), b.as_ptr())) }
}

/// Scaled dot-product attention within sequences of tokens, with its gradient: each token sees itself and those before it,
/// or `window` of them, itself included, where there is a window.
///
/// `query` is (batch, tokens, heads, head_dim), `key` and `value` (batch, tokens, key heads, head_dim), f32 on the CPU; groups
/// of consecutive query heads share a key head. `pairs`, (pairs, 3) of i64, divides all tokens, row after row: tokens that
/// two sequences have in common, those of the first, these included, and the other ones of the second. The result, (tokens,
/// heads, head_dim), is bf16 where `kind` is, or else f32.
pub fn attend(
    query: &Tensor,
    key: &Tensor,
    value: &Tensor,
    pairs: &Tensor,
    window: Option<i64>,
    kind: Kind,
) -> Result<Tensor> {
    let in_bfloat16 = kind == Kind::BFloat16;
    let window = window.unwrap_or(0);
    made(|output| unsafe {
        sapo_attend(query.as_ptr(), key.as_ptr(), value.as_ptr(), pairs.as_ptr(), window, in_bfloat16, output)
    })
}

#[cfg(test)]
mod tests {
    use super::super::testing::{assert_same, numbers};
    use super::*;

    #[test]
    fn products_are_libtorch_s() {
        let inputs = [numbers(&[3, 67, 70], 1.3), numbers(&[50, 70], 2.1), numbers(&[50], 0.4)];
        for with_bias in [false, true] {
            let inputs = &inputs[..if with_bias { 3 } else { 2 }];
            let ours = |of: &[Tensor]| linear(&of[0], &of[1], of.get(2)).unwrap();
            assert_same(inputs, 2e-6, ours, |of| of[0].linear(&of[1], of.get(2)));
        }
        let (left, right) = (inputs[0].get(0), inputs[1].transpose(0, 1));
        let expected = left.matmul(&right);
        assert!(product(&left, &right).unwrap().allclose(&expected, 1e-5, 1e-4, false));
        let before = numbers(&[67, 50], 0.9);
        let mut sum = before.copy();
        add_product(&mut sum, &left, &right).unwrap();
        assert!(sum.allclose(&(before + expected), 1e-5, 1e-4, false));
    }

    #[test]
    fn no_gradient_is_made_for_frozen_weights() {
        let (input, weight) = (numbers(&[5, 8], 1.1).set_requires_grad(true), numbers(&[6, 8], 0.7));
        linear(&input, &weight, None).unwrap().sum(Kind::Float).backward();
        let expected = weight.sum_dim_intlist([0i64].as_slice(), false, Kind::Float);
        assert!(input.grad().allclose(&expected.expand([5, 8], false), 1e-5, 1e-5, false));
        assert!(!weight.grad().defined());
    }

    /// Shared tokens, of the first sequence, and of the second without them: more than one block of queries; nothing
    /// shared; one sequence alone; one that is but a beginning of the other.
    const PAIRS: [[i64; 3]; 4] = [[150, 170, 140], [0, 3, 5], [9, 9, 0], [4, 70, 1]];

    /// The same by libtorch, from a mask of all tokens over all tokens.
    fn composed(query: &Tensor, key: &Tensor, value: &Tensor, window: Option<i64>) -> Tensor {
        let mut sequences = Vec::new();
        let mut at = 0;
        for [shared, first, second] in PAIRS {
            sequences.push((at..at + first).collect::<Vec<_>>());
            sequences.push((at..at + shared).chain(at + first..at + first + second).collect());
            at += first + second;
        }
        let mut visible = vec![false; (at * at) as usize];
        for sequence in sequences {
            for (place, &of) in sequence.iter().enumerate() {
                let far = window.map_or(0, |window| (place + 1).saturating_sub(window as usize));
                sequence[far..=place].iter().for_each(|&to| visible[(of * at + to) as usize] = true);
            }
        }
        let mask = Tensor::from_slice(&visible).view([at, at]);
        let group = query.size()[2] / key.size()[2];
        let heads = |tensor: &Tensor, repeats| tensor.repeat_interleave_self_int(repeats, 2, None).transpose(1, 2);
        let (query, key, value) = (heads(query, 1), heads(key, group), heads(value, group));
        let attended =
            Tensor::scaled_dot_product_attention(&query, &key, &value, Some(&mask), 0.0, false, None::<f64>, false);
        attended.transpose(1, 2).squeeze_dim(0)
    }

    #[test]
    fn attention_within_sequences_is_libtorch_s() {
        let tokens: i64 = PAIRS.iter().map(|[_, first, second]| first + second).sum();
        let pairs = Tensor::from_slice2(&PAIRS);
        let of_heads = |heads, step| numbers(&[1, tokens, heads, 20], step);
        let inputs = [of_heads(6, 1.7), of_heads(2, 0.9), of_heads(2, 2.3)];
        for window in [None, Some(2), Some(60), Some(1000)] {
            for (kind, tolerance) in [(Kind::Float, 5e-6), (Kind::BFloat16, 1e-2)] {
                assert_same(
                    &inputs,
                    tolerance,
                    |of| attend(&of[0], &of[1], &of[2], &pairs, window, kind).unwrap(),
                    |of| composed(&of[0], &of[1], &of[2], window).to_kind(kind),
                );
            }
        }
    }

    #[test]
    fn attention_over_other_tokens_than_there_are_is_an_error() {
        let (query, key) = (numbers(&[1, 4, 2, 8], 1.0), numbers(&[1, 4, 1, 8], 1.0));
        let attend = |pairs: [i64; 3], value: &Tensor| {
            attend(&query, &key, value, &Tensor::from_slice2(&[pairs]), None, Kind::Float).unwrap_err().to_string()
        };
        assert!(attend([0, 5, 0], &key).contains("pairs of 5 tokens for 4"));
        assert!(attend([3, 2, 2], &key).contains("no pair has such parts"));
        assert!(attend([0, 4, 0], &query).contains("do not fit each other"));
    }
}

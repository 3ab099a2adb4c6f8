//! A decoder layer on the next token of a few sequences, on a CPU: one call a layer, where libtorch's operators would take
//! longer between the products than reading the weights does. All arithmetic is in f32; weights are f32, bf16 or 8 bits.
//!
//! A sequence's results depend on its own tokens alone, to the last bit.

use std::ffi::c_char;
use std::ptr;

use tch::{Device, Kind, Tensor};
use torch_sys::C_tensor;

use super::check;
use crate::Result;

unsafe extern "C" {
    fn sapo_decode_layer(
        layer: *const SapoLayer,
        hidden: *const C_tensor,
        positions: *const C_tensor,
        cosine: *const C_tensor,
        sine: *const C_tensor,
    ) -> *mut c_char;
    fn sapo_few_rows_linear(
        input: *const C_tensor,
        weight: *const C_tensor,
        scales: *const C_tensor,
        output: *const C_tensor,
    ) -> *mut c_char;
    fn sapo_quantize_rows(weight: *const C_tensor, quantized: *const C_tensor, scales: *const C_tensor) -> *mut c_char;
}

/// As native/decode.cpp has it.
#[repr(C)]
struct SapoLayer {
    norms: [*const C_tensor; 4],
    weights: [*const C_tensor; 7],
    scales: [*const C_tensor; 7],
    biases: [*const C_tensor; 7],
    keys: *const C_tensor,
    values: *const C_tensor,
    heads: i64,
    key_heads: i64,
    head_dim: i64,
    window: i64,
    eps: f64,
}

/// The weight (out, in) of a linear layer, read once for each token in the order it lies in.
#[derive(Debug)]
pub struct Linear {
    weight: Tensor,
    /// Of a weight in 8 bits: (out,), f32.
    scales: Option<Tensor>,
    /// (out,), f32.
    bias: Option<Tensor>,
}

impl Linear {
    /// The weight as it is, f32 or bf16, not copied where it is contiguous.
    pub fn new(weight: &Tensor, bias: Option<&Tensor>) -> Result<Self> {
        let bias = bias.map(|bias| bias.f_to_kind(Kind::Float)?.f_contiguous()).transpose()?;
        Ok(Linear { weight: weight.f_contiguous()?, scales: None, bias })
    }

    /// The weight in 8 bits: each of its rows is divided by a 127th of its largest number, and rounded to integers.
    pub fn quantized(weight: &Tensor, bias: Option<&Tensor>) -> Result<Self> {
        let Linear { weight, bias, .. } = Linear::new(weight, bias)?;
        let integers = Tensor::f_empty(weight.size(), (Kind::Int8, Device::Cpu))?;
        let scales = Tensor::f_empty([weight.size()[0]], (Kind::Float, Device::Cpu))?;
        // Safety: valid handles for the length of the call, here and below.
        unsafe { check(sapo_quantize_rows(weight.as_ptr(), integers.as_ptr(), scales.as_ptr()))? };
        Ok(Linear { weight: integers, scales: Some(scales), bias })
    }

    /// `input` (rows, in), f32, times the weight: (rows, out), f32. Without the bias.
    pub fn multiply(&self, input: &Tensor) -> Result<Tensor> {
        let output = Tensor::f_empty([input.size()[0], self.weight.size()[0]], (Kind::Float, Device::Cpu))?;
        let (scales, input) = (handle(self.scales.as_ref()), input.f_contiguous()?);
        unsafe {
            check(sapo_few_rows_linear(input.as_ptr(), self.weight.as_ptr(), scales, output.as_ptr()))?;
        }
        Ok(output)
    }
}

/// A layer's weights and shape.
#[derive(Debug)]
pub struct DecodedLayer {
    /// Weights, (width,) in f32, of the norms before attention and before the feed-forward block.
    pub norms: [Tensor; 2],
    /// Of the norms of queries and keys, where the model has them.
    pub head_norms: Option<[Tensor; 2]>,
    /// Query, key, value, output, gate, up and down.
    pub linears: [Linear; 7],
    /// Query heads.
    pub heads: i64,
    /// Heads of keys and values.
    pub key_heads: i64,
    /// Width of a head.
    pub head_dim: i64,
    /// Tokens attended to at most, where there is a limit.
    pub window: Option<i64>,
    /// Of the norms.
    pub eps: f64,
}

// Safety: as for any tensor that nobody writes to.
unsafe impl Sync for DecodedLayer {}
unsafe impl Sync for Linear {}

/// Where the tokens stand that are decoded.
pub struct Places<'a> {
    /// (rows,), i64.
    pub positions: &'a Tensor,
    /// Cosines of their rotations, (rows, head_dim / 2) or views of that many, f32.
    pub cosine: &'a Tensor,
    /// And sines.
    pub sine: &'a Tensor,
}

impl DecodedLayer {
    /// Adds to `hidden` (rows, width), f32, what the layer makes of it. Keys and values, (rows, capacity, key heads,
    /// head_dim) in f32, get the tokens' own at their positions; those before them are there.
    ///
    /// # Errors
    /// When a shape or a kind is another, or a position beyond the cache.
    pub fn apply(&self, hidden: &Tensor, cache: [&Tensor; 2], places: &Places) -> Result<()> {
        let linears = |of: fn(&Linear) -> *const C_tensor| self.linears.each_ref().map(of);
        let head_norm = |which: usize| handle(self.head_norms.as_ref().map(|norms| &norms[which]));
        let [attention, feed_forward] = self.norms.each_ref().map(Tensor::as_ptr);
        let layer = SapoLayer {
            norms: [attention, feed_forward, head_norm(0), head_norm(1)],
            weights: linears(|linear| linear.weight.as_ptr()),
            scales: linears(|linear| handle(linear.scales.as_ref())),
            biases: linears(|linear| handle(linear.bias.as_ref())),
            keys: cache[0].as_ptr(),
            values: cache[1].as_ptr(),
            heads: self.heads,
            key_heads: self.key_heads,
            head_dim: self.head_dim,
            window: self.window.unwrap_or(0),
            eps: self.eps,
        };
        let Places { positions, cosine, sine } = places;
        unsafe { check(sapo_decode_layer(&layer, hidden.as_ptr(), positions.as_ptr(), cosine.as_ptr(), sine.as_ptr())) }
    }
}

fn handle(tensor: Option<&Tensor>) -> *const C_tensor {
    tensor.map_or(ptr::null(), |tensor| tensor.as_ptr())
}

// That a layer is what libtorch makes of it, the golden models show (tests/parity/generation.rs).
#[cfg(test)]
mod tests {
    use super::super::testing::with_all_instructions;
    use super::*;

    fn numbers(rows: i64, columns: i64, step: f64) -> Tensor {
        (Tensor::arange(rows * columns, (Kind::Float, Device::Cpu)) * step).sin().view([rows, columns])
    }

    // Sizes that are no multiples of a vector's, a tile's or a piece's.
    #[test]
    fn products_are_libtorch_s() {
        for kind in [Kind::Float, Kind::BFloat16] {
            let weight = numbers(69, 77, 1.7).to_kind(kind);
            let linear = Linear::new(&weight, None).unwrap();
            for rows in [1, 3, 4, 9] {
                let input = numbers(rows, 77, 2.3);
                let expected = input.linear::<Tensor>(&weight.to_kind(Kind::Float), None);
                with_all_instructions(|| {
                    let found = linear.multiply(&input).unwrap();
                    assert!(found.allclose(&expected, 1e-5, 1e-5, false), "{kind:?} {rows}");
                });
            }
        }
    }

    #[test]
    fn a_row_is_the_same_whatever_the_others_are() {
        let weight = numbers(50, 77, 1.7);
        for linear in [Linear::new(&weight, None), Linear::quantized(&weight, None)] {
            let (linear, input) = (linear.unwrap(), numbers(7, 77, 2.3));
            with_all_instructions(|| {
                let together = linear.multiply(&input).unwrap();
                for row in 0..7 {
                    assert_eq!(linear.multiply(&input.narrow(0, row, 1)).unwrap(), together.narrow(0, row, 1));
                }
            });
        }
    }

    /// 2, -0.5, 0.51 over 2 / 127 are 127, -31.75, 32.385: as integers 127, -32, 32.
    #[test]
    fn eight_bits_by_hand() {
        let weight = Tensor::from_slice(&[2f32, -0.5, 0.51, 0.0, 0.0, 0.0]).view([2, 3]);
        let by_hand = |kind| {
            let linear = Linear::quantized(&weight.to_kind(kind), None).unwrap();
            let expected = Tensor::from_slice(&[127i64, -32, 32, 0, 0, 0]).view([2, 3]).to_kind(Kind::Int8);
            assert_eq!(linear.weight, expected);
            assert_eq!(linear.scales, Some(Tensor::from_slice(&[2f32 / 127.0, 0.0])));
            let input = Tensor::from_slice(&[1f32, 2.0, 4.0]).view([1, 3]);
            // (127 - 64 + 128) 2 / 127
            let found = linear.multiply(&input).unwrap().double_value(&[0, 0]);
            assert!((found - 3.007874).abs() < 1e-5, "{found}");
        };
        with_all_instructions(|| [Kind::Float, Kind::BFloat16].into_iter().for_each(by_hand));
    }

    #[test]
    fn eight_bits_are_near_the_weights() {
        let (weight, input) = (numbers(69, 77, 1.7), numbers(5, 77, 2.3));
        let expected = input.linear::<Tensor>(&weight, None);
        with_all_instructions(|| {
            let found = Linear::quantized(&weight, None).unwrap().multiply(&input).unwrap();
            // 77 numbers of at most 1, each off by half a 127th at most; all of them in one direction would be twice that.
            let differs = (found - &expected).abs().max().double_value(&[]);
            assert!(differs > 1e-6 && differs < 77.0 * 0.5 / 127.0 / 2.0, "{differs}");
        });
    }

    #[test]
    fn errors_name_what_was_expected() {
        let linear = Linear::new(&numbers(5, 77, 1.0), None).unwrap();
        let message = linear.multiply(&numbers(1, 76, 1.0)).unwrap_err().to_string();
        assert!(message.contains("expected a contiguous weight (5, 76), found [5, 77]"), "{message}");
        let message = linear.multiply(&numbers(1, 77, 1.0).to_kind(Kind::BFloat16)).unwrap_err().to_string();
        assert!(message.contains("77 contiguous float32 numbers"), "{message}");
    }
}

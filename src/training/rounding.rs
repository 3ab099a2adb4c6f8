//! Stochastic rounding to bfloat16 (Gupta et al. 2015, arXiv 1502.02551; for updates of weights, Zamirai et al. 2020,
//! arXiv 2010.06192).
//!
//! A number between two neighbours of bfloat16 becomes the one further from 0 with a probability as large as its distance
//! from the other, so that it stays as it is on average: many updates that are each below half a unit in the last place
//! add up instead of being lost, at the price of noise of that size.
//!
//! An element's 16 random bits are a pure function of seed, tensor and index: the index within its row of 32768 names
//! some Philox bits, tensor and row name others, and the two are combined by exclusive or. The draws of any two elements
//! of a tensor are independent and uniform, which is all that the mean and the variance of sums depend on.

use tch::{Device, Kind, Tensor};

use crate::Result;
use crate::device::upload;
use crate::generate::random::{derive, philox4x32};

/// Elements that share a row's bits.
const ROW: i64 = 1 << 15;

/// The random bits of one update of a set of tensors.
pub(crate) struct Rounding {
    seed: u64,
    /// (ROW,) i32
    columns: Tensor,
}

// Safety: the tensor is only read, which any number of threads may do.
unsafe impl Sync for Rounding {}

impl Rounding {
    /// Roundings on a device, a function of `seed`.
    pub fn new(seed: u64, device: Device) -> Result<Self> {
        let key = derive(seed, &[0]);
        let key = [key as u32, (key >> 32) as u32];
        let bits: Vec<i32> =
            (0..ROW as u32 / 4).flat_map(|block| philox4x32([block, 0, 0, 0], key)).map(|bits| bits as i32).collect();
        Ok(Rounding { seed, columns: upload(&bits, device)? })
    }

    /// `values`, f32, as bfloat16: elements `first`, `first + 1`, ... of the flattened tensor number `tensor`.
    pub fn round(&self, values: &Tensor, tensor: u64, first: i64) -> Result<Tensor> {
        let count = values.numel() as i64;
        let last_row = (first + count - 1).max(first) / ROW;
        let rows: Vec<i32> =
            (first / ROW..=last_row).map(|row| derive(self.seed, &[1, tensor, row as u64]) as i32).collect();
        let random = match rows[..] {
            [row] => self.columns.f_narrow(0, first % ROW, count)?.f_bitwise_xor(i64::from(row))?,
            _ => {
                let rows = upload(&rows, values.device())?.f_unsqueeze(1)?;
                // (rows, ROW) -> (count,)
                rows.f_bitwise_xor_tensor(&self.columns)?.f_view([-1])?.f_narrow(0, first % ROW, count)?
            }
        };
        // The lower half of an f32 is what bfloat16 lacks: a carry out of it is the step to the next number.
        let bits = random.f_bitwise_and(0xffff)?.f_add_(&values.f_view_dtype(Kind::Int)?)?.f_bitwise_and_(-0x1_0000)?;
        Ok(bits.f_view_dtype(Kind::Float)?.f_to_kind(Kind::BFloat16)?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rounded(seed: u64, values: &Tensor, first: i64) -> Tensor {
        Rounding::new(seed, Device::Cpu).unwrap().round(values, 7, first).unwrap()
    }

    #[test]
    fn numbers_of_bfloat16_stay() {
        let values = [0.0f32, -0.0, 1.0, -1.0078125, f32::from_bits(0x7f7f_0000), f32::INFINITY];
        assert_eq!(Vec::<f32>::try_from(rounded(3, &Tensor::from_slice(&values), 0)).unwrap(), values);
        assert!(rounded(3, &Tensor::from_slice(&[f32::NAN]), 0).isnan().double_value(&[0]) == 1.0);
    }

    /// Neighbours in bfloat16 are 1 + k / 128 here. A quarter of the way, one of four is rounded up: of 100000 draws the
    /// share's standard deviation is sqrt(0.25 * 0.75 / 100000) = 0.0014.
    #[test]
    fn others_go_to_either_side_and_stay_the_same_on_average() {
        for (value, low, high) in [(1.0f32 + 0.25 / 128.0, 1.0, 1.0078125), (-1.0 - 0.25 / 128.0, -1.0, -1.0078125)] {
            let values = Tensor::full([100_000], f64::from(value), (Kind::Float, Device::Cpu));
            let rounded = rounded(42, &values, 5);
            let up = rounded.eq(high).sum(Kind::Double).double_value(&[]) / 100_000.0;
            let down = rounded.eq(low).sum(Kind::Double).double_value(&[]) / 100_000.0;
            assert_eq!(up + down, 1.0);
            assert!((up - 0.25).abs() < 0.006, "{up}");
        }
    }

    #[test]
    fn an_element_is_rounded_alike_in_every_block() {
        let values = (Tensor::arange(70_000, (Kind::Float, Device::Cpu)) * 1.7).sin();
        let whole = rounded(1, &values, 0);
        for (start, length) in [(0, 256), (32_512, 1024), (65_536, 4464), (100, 69_900)] {
            assert_eq!(rounded(1, &values.narrow(0, start, length), start), whole.narrow(0, start, length));
        }
        assert_ne!(rounded(2, &values, 0), whole);
    }
}

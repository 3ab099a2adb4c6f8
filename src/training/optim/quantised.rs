//! Running means in 8 bits: block-wise dynamic quantisation (Dettmers et al. 2021, arXiv 2110.02861), as torchao 0.18
//! has it (`torchao/optim/quant_utils.py`, `subclass_8bit.py`).
//!
//! Of every 256 elements the largest magnitude is kept in f32, and each element as the nearest of 256 fractions of it.
//! The fractions are finer near 0: their decimal exponents go from 0 to -6, and what bits an exponent leaves divide its
//! decade. Ties and the last bit are torchao's: where a code ends is found by its own arithmetic, once.

use tch::{Device, Kind, Tensor};

use crate::Result;
use crate::device::upload;

/// Elements that share a scale.
pub(super) const BLOCK: i64 = 256;
/// Smaller tensors stay f32.
const FEWEST: i64 = 4096;
/// Decimal exponents of fractions.
const EXPONENTS: i32 = 7;
/// What a block of zeros is divided by.
const LEAST_SCALE: f64 = 1e-12;

/// Whether a tensor of so many elements is kept in 8 bits.
pub(super) fn takes(elements: i64) -> bool {
    elements >= FEWEST && elements % BLOCK == 0
}

/// The 256 fractions, and where one gives way to the next.
pub(super) struct Codes {
    /// The fraction of each code, rising; (256,) f32.
    values: Tensor,
    /// The least number that gets code i + 1 and not i; (255,) f32.
    bounds: Tensor,
}

// Safety: the tensors are only read, which any number of threads may do.
unsafe impl Sync for Codes {}

impl Codes {
    /// For numbers of either sign, such as means of gradients.
    pub fn signed(device: Device) -> Result<Self> {
        Codes::new(true, device)
    }

    /// For numbers from 0, such as means of squares.
    pub fn unsigned(device: Device) -> Result<Self> {
        Codes::new(false, device)
    }

    fn new(signed: bool, device: Device) -> Result<Self> {
        let values = fractions(signed)?;
        let bounds: Vec<f32> = values.windows(2).map(|pair| bound(pair[0], pair[1])).collect();
        let on_device = |numbers: &[f32]| upload(numbers, device);
        Ok(Codes { values: on_device(&values)?, bounds: on_device(&bounds)? })
    }

    /// What codes (elements,) u8 and scales (elements / 256,) f32 stand for; (elements,) f32.
    pub fn read(&self, codes: &Tensor, scales: &Tensor) -> Result<Tensor> {
        let fractions = self.values.f_index_select(0, &codes.f_to_kind(Kind::Int)?)?;
        let _ = fractions.f_view([-1, BLOCK])?.f_mul_(&scales.f_unsqueeze(1)?)?;
        Ok(fractions)
    }

    /// Write numbers (elements,) f32 as codes and scales; the numbers are used up.
    pub fn write(&self, numbers: &Tensor, codes: &mut Tensor, scales: &mut Tensor) -> Result<()> {
        let mut blocks = numbers.f_view([-1, BLOCK])?;
        scales.f_copy_(&blocks.f_abs()?.f_amax([1i64], false)?.f_clamp_min(LEAST_SCALE)?)?;
        let _ = blocks.f_div_(&scales.f_unsqueeze(1)?)?;
        codes.f_copy_(&numbers.f_bucketize(&self.bounds, true, true)?)?;
        Ok(())
    }
}

/// torchao's `create_dynamic_map`, by the same operations in f32.
fn fractions(signed: bool) -> Result<Vec<f32>> {
    let mut fractions = vec![0.0, 1.0];
    for exponent in 0..EXPONENTS {
        let count = 1i64 << if signed { exponent } else { exponent + 1 };
        let edges = Tensor::f_linspace(0.1, 1.0, count + 1, (Kind::Float, Device::Cpu))?;
        let middles = edges.f_narrow(0, 0, count)?.f_add(&edges.f_narrow(0, 1, count)?)?.f_div_scalar(2.0)?;
        let decade = middles.f_mul_scalar(10f64.powi(exponent - (EXPONENTS - 1)))?;
        let decade = Vec::<f32>::try_from(decade)?;
        if signed {
            fractions.extend(decade.iter().map(|fraction| -fraction));
        }
        fractions.extend(decade);
    }
    fractions.sort_by(f32::total_cmp);
    Ok(fractions)
}

/// The least x from `low` on with x - low >= (high - low) / 2 in f32.
fn bound(low: f32, high: f32) -> f32 {
    let is_past = |x: f32| x - low >= (high - low) * 0.5;
    let mut bound = low + (high - low) * 0.5;
    while !is_past(bound) {
        bound = bound.next_up();
    }
    while is_past(bound.next_down()) {
        bound = bound.next_down();
    }
    bound
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The largest magnitude and 0 are exact; 0.55 is the only fraction of the lowest decade, 0.55e-6, for signed numbers.
    #[test]
    fn codes_by_hand() {
        let codes = Codes::signed(Device::Cpu).unwrap();
        let values = Vec::<f32>::try_from(&codes.values).unwrap();
        assert_eq!((values.len(), values[127], values[255]), (256, 0.0, 1.0));
        assert!((values[128] - 5.5e-7).abs() < 1e-13 && values[126] == -values[128]);
        // The largest decade, 0.1 to 1, has 64 fractions; the last two are 1 - 0.9 / 128 * {1, 3}.
        assert!((values[254] - (1.0 - 0.9 / 128.0)).abs() < 1e-6);
        assert!((values[253] - (1.0 - 2.7 / 128.0)).abs() < 1e-6);

        let mut numbers = vec![0.0f32; 512];
        (numbers[0], numbers[1], numbers[2], numbers[3]) = (8.0, -8.0 * 5.5e-7, 2e-6, 8.0 * (1.0 - 0.5 * 0.9 / 128.0));
        let mut written = Tensor::zeros([512], (Kind::Uint8, Device::Cpu));
        let mut scales = Tensor::zeros([2], (Kind::Float, Device::Cpu));
        codes.write(&Tensor::from_slice(&numbers), &mut written, &mut scales).unwrap();
        assert_eq!(Vec::<f32>::try_from(&scales).unwrap(), [8.0, 1e-12]);
        let found = Vec::<u8>::try_from(&written).unwrap();
        // 2e-6 is 2.5e-7 of 8, below half of 5.5e-7; the last one is a tie up to rounding, and either neighbour will do.
        assert_eq!(found[..3], [255, 126, 127]);
        assert!(found[3] >= 254 && found[4..].iter().all(|&code| code == 127));
        let read = Vec::<f32>::try_from(codes.read(&written, &scales).unwrap()).unwrap();
        assert_eq!((read[0], read[2], read[300]), (8.0, 0.0, 0.0));
    }

    #[test]
    fn unsigned_codes_have_every_fraction_twice_as_fine() {
        let values = Vec::<f32>::try_from(&Codes::unsigned(Device::Cpu).unwrap().values).unwrap();
        assert_eq!((values.len(), values[0], values[255]), (256, 0.0, 1.0));
        // The lowest decade has two: 0.1 to 0.55 and 0.55 to 1, in millionths.
        assert!((values[1] - 3.25e-7).abs() < 1e-13 && (values[2] - 7.75e-7).abs() < 1e-13);
        assert!(values.windows(2).all(|pair| pair[0] < pair[1]));
    }

    /// As torchao made them: tests/torchao/adamw_8bit.py.
    #[test]
    fn fractions_are_those_of_torchao() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../../tests/torchao/adamw_8bit.json");
        let recorded: serde_json::Value = serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap();
        for (name, signed) in [("signed", true), ("unsigned", false)] {
            let bytes: Vec<u8> =
                fractions(signed).unwrap().iter().flat_map(|fraction| fraction.to_le_bytes()).collect();
            let found: String = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
            assert_eq!(recorded[name], found, "{name}");
        }
    }
}

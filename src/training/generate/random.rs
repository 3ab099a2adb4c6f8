//! Random numbers as pure functions of a seed and a position: Philox4x32-10 (Salmon et al., "Parallel random numbers:
//! as easy as 1, 2, 3", SC 2011). There is no generator whose state would have to be kept or saved.

const MULTIPLIERS: [u32; 2] = [0xD251_1F53, 0xCD9E_8D57];
const KEY_STEPS: [u32; 2] = [0x9E37_79B9, 0xBB67_AE85];
const ROUNDS: usize = 10;

/// The block of 128 random bits that belongs to `counter` under `key`.
pub fn philox4x32(counter: [u32; 4], key: [u32; 2]) -> [u32; 4] {
    let ([mut a, mut b, mut c, mut d], [mut left, mut right]) = (counter, key);
    for _ in 0..ROUNDS {
        let first = u64::from(MULTIPLIERS[0]) * u64::from(a);
        let second = u64::from(MULTIPLIERS[1]) * u64::from(c);
        [a, b, c, d] = [high(second) ^ b ^ left, low(second), high(first) ^ d ^ right, low(first)];
        (left, right) = (left.wrapping_add(KEY_STEPS[0]), right.wrapping_add(KEY_STEPS[1]));
    }
    [a, b, c, d]
}

/// The number at `index` of the stream `stream` under `seed`, uniform in [0, 1) with 53 random bits.
pub fn uniform(seed: u64, stream: u64, index: u64) -> f64 {
    let [a, b, ..] = philox4x32([low(index), high(index), low(stream), high(stream)], [low(seed), high(seed)]);
    (join(a, b) >> 11) as f64 / (1u64 << 53) as f64
}

/// A seed of its own for what `path` names, such as [node, step, row], under `seed`.
pub fn derive(seed: u64, path: &[u64]) -> u64 {
    // The last word of the counter keeps these blocks apart from those of `uniform` with small streams.
    path.iter().zip(0u32..).fold(seed, |seed, (&part, depth)| {
        let [a, b, ..] = philox4x32([low(part), high(part), depth, u32::MAX], [low(seed), high(seed)]);
        join(a, b)
    })
}

fn low(value: u64) -> u32 {
    value as u32
}

fn high(value: u64) -> u32 {
    (value >> 32) as u32
}

fn join(low: u32, high: u32) -> u64 {
    u64::from(high) << 32 | u64::from(low)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    /// The known answers that come with the authors' own implementation, Random123 (kat_vectors, philox4x32 10).
    #[test]
    fn known_answers() {
        let zeros = philox4x32([0; 4], [0; 2]);
        assert_eq!(zeros, [0x6627_e8d5, 0xe169_c58d, 0xbc57_ac4c, 0x9b00_dbd8]);
        let ones = philox4x32([u32::MAX; 4], [u32::MAX; 2]);
        assert_eq!(ones, [0x408f_276d, 0x41c8_3b0e, 0xa20b_c7c6, 0x6d54_51fd]);
        let pi = philox4x32([0x243f_6a88, 0x85a3_08d3, 0x1319_8a2e, 0x0370_7344], [0xa409_3822, 0x299f_31d0]);
        assert_eq!(pi, [0xd16c_fe09, 0x94fd_cceb, 0x5001_e420, 0x2412_6ea1]);
    }

    #[test]
    fn uniform_numbers_are_the_top_53_bits_of_a_block() {
        let bits = 0xe169_c58d_6627_e8d5_u64 >> 11;
        assert_eq!(uniform(0, 0, 0), bits as f64 / 9_007_199_254_740_992.0);
        let mean = (0..10_000).map(|index| uniform(7, 3, index)).sum::<f64>() / 10_000.0;
        assert!((mean - 0.5).abs() < 0.01, "{mean}"); // 3.5 standard deviations
        assert!((0..10_000).all(|index| (0.0..1.0).contains(&uniform(7, 3, index))));
    }

    #[test]
    fn seeds_differ_by_every_part_of_their_path() {
        let paths: [&[u64]; 8] = [&[], &[0], &[1], &[0, 0], &[0, 1], &[1, 0], &[1 << 32], &[0, 0, 0]];
        let seeds: BTreeSet<u64> = paths.iter().map(|path| derive(42, path)).collect();
        assert_eq!(seeds.len(), paths.len());
    }
}

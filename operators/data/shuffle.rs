//! The order of rows in an epoch: a pure function of seed, node and epoch.

/// A permutation of `0..rows`: Fisher-Yates, drawing from a generator that these three seed.
pub fn epoch_order(seed: u64, node: &str, epoch: u64, rows: usize) -> Vec<usize> {
    let mut random = SplitMix64::of(seed, node, epoch);
    let mut order: Vec<usize> = (0..rows).collect();
    for last in (1..rows).rev() {
        order.swap(last, random.below(last as u64 + 1) as usize);
    }
    order
}

/// The generator of Steele, Lea and Flood, "Fast Splittable Pseudorandom Number Generators" (OOPSLA 2014): a counter in
/// steps of the golden ratio, scrambled.
struct SplitMix64(u64);

impl SplitMix64 {
    fn of(seed: u64, node: &str, epoch: u64) -> Self {
        let absorb = |state: u64, word: u64| SplitMix64(state ^ word).next();
        let state = node.bytes().map(u64::from).fold(absorb(0, seed), absorb);
        SplitMix64(absorb(absorb(state, node.len() as u64), epoch))
    }

    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// Uniform in `0..bound` without bias: Lemire, "Fast Random Integer Generation in an Interval" (2019).
    fn below(&mut self, bound: u64) -> u64 {
        let unfair = bound.wrapping_neg() % bound;
        loop {
            let product = u128::from(self.next()) * u128::from(bound);
            if product as u64 >= unfair {
                return (product >> 64) as u64;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The outputs that the generator's reference program gives (used as test vectors in many languages).
    #[test]
    fn the_generator_is_splitmix64() {
        let mut random = SplitMix64(1_234_567);
        let expected = [6_457_827_717_110_365_317, 3_203_168_211_198_807_973, 9_817_491_932_198_370_423];
        assert_eq!([random.next(), random.next(), random.next()], expected);
        assert_eq!(SplitMix64(0).next(), 0xe220_a839_7b1d_cdaf);
    }

    #[test]
    fn every_order_is_a_permutation_and_each_argument_matters() {
        let order = epoch_order(42, "prompts", 0, 100);
        let mut sorted = order.clone();
        sorted.sort_unstable();
        assert_eq!(sorted, Vec::from_iter(0..100));
        assert_eq!(order, epoch_order(42, "prompts", 0, 100));
        for other in [(43, "prompts", 0), (42, "prompt", 0), (42, "prompts", 1)] {
            assert_ne!(order, epoch_order(other.0, other.1, other.2, 100));
        }
        assert_eq!(epoch_order(42, "prompts", 0, 1), [0]);
        assert!(epoch_order(42, "prompts", 0, 0).is_empty());
    }

    /// 6000 shuffles of three rows: each of the six orders about 1000 times (standard deviation 29).
    #[test]
    fn all_orders_are_as_likely() {
        let mut counts = std::collections::BTreeMap::new();
        for epoch in 0..6000 {
            *counts.entry(epoch_order(7, "n", epoch, 3)).or_insert(0_i32) += 1;
        }
        assert_eq!(counts.len(), 6);
        assert!(counts.values().all(|count| (count - 1000).abs() < 150), "{counts:?}");
    }
}

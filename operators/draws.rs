//! Random draws of a node: pure functions of (run seed, node, step, and where in the step).
//!
//! Nothing is kept between draws, so nothing about them needs saving, and no order of threads can change them.

use sapo_flow_training::generate::random;

/// The random draws of one node.
#[derive(Clone, Debug)]
pub struct Draws {
    key: u64,
}

impl Draws {
    /// Draws that depend on the run's seed and the node's name.
    pub fn new(seed: u64, node: &str) -> Self {
        // The length first: no name is the beginning of another then.
        let name: Vec<u64> = std::iter::once(node.len() as u64).chain(node.bytes().map(u64::from)).collect();
        Draws { key: random::derive(seed, &name) }
    }

    /// The n-th number of a step, uniform in [0, 1).
    pub fn uniform(&self, step: u64, n: u64) -> f64 {
        random::uniform(self.key, step, n)
    }

    /// The n-th integer of a step, uniform in 0..bound. `bound` is above 0 and far below 2^53.
    pub fn below(&self, step: u64, n: u64, bound: usize) -> usize {
        ((self.uniform(step, n) * bound as f64) as usize).min(bound - 1)
    }

    /// A seed for the n-th stream of random numbers of a step, such as one response's tokens.
    pub fn seed(&self, step: u64, n: u64) -> u64 {
        random::derive(self.key, &[step, n])
    }
}

//! Weighted draws from a queue, in time that grows with the logarithm of its length.
//!
//! The sums of weights are kept in a binary indexed tree (Fenwick, "A New Data Structure for Cumulative Frequency
//! Tables", 1994) over the slots of a ring. They are integers, so that they do not depend on the way they came about: a
//! resumed run has the sums of one that was never interrupted.

/// The weight of 1. Sums of 2^27 of them times 2^53 fit into 128 bits.
const ONE: u64 = 1 << 48;

/// SAPO's weight of a pair drawn so many times: 1 / (1 + times).
pub fn inverse_count(times: u64) -> u64 {
    ONE / (times + 1)
}

/// Weights of a queue's elements, the oldest first.
#[derive(Clone, Debug)]
pub struct Shares {
    /// By slot; 0 where there is no element. Their number is a power of two.
    weights: Vec<u64>,
    /// Entry n, counted from 1, holds the sum of as many slots up to the n-th as the lowest bit of n says.
    sums: Vec<u128>,
    /// The slot of the oldest element.
    first: usize,
    len: usize,
}

impl Shares {
    /// Of elements with these weights.
    pub fn new(weights: impl ExactSizeIterator<Item = u64>) -> Self {
        let len = weights.len();
        let slots = (len + 1).next_power_of_two();
        let weights: Vec<u64> = weights.chain(std::iter::repeat(0)).take(slots).collect();
        let mut sums: Vec<u128> = std::iter::once(0).chain(weights.iter().map(|weight| u128::from(*weight))).collect();
        for place in 1..=slots {
            let parent = place + lowest_bit(place);
            if parent <= slots {
                sums[parent] += sums[place];
            }
        }
        Shares { weights, sums, first: 0, len }
    }

    /// Add an element.
    pub fn push(&mut self, weight: u64) {
        if self.len == self.weights.len() {
            let weights: Vec<u64> = (0..self.len).map(|index| self.weights[self.slot(index)]).collect();
            *self = Shares::new(weights.into_iter());
        }
        self.len += 1;
        self.set(self.len - 1, weight);
    }

    /// Drop the oldest element.
    pub fn pop(&mut self) {
        if self.len > 0 {
            self.set(0, 0);
            self.first = self.slot(1);
            self.len -= 1;
        }
    }

    /// Give the n-th oldest element another weight.
    pub fn set(&mut self, index: usize, weight: u64) {
        let slot = self.slot(index);
        let before = u128::from(std::mem::replace(&mut self.weights[slot], weight));
        let mut place = slot + 1;
        while place < self.sums.len() {
            self.sums[place] = self.sums[place] + u128::from(weight) - before;
            place += lowest_bit(place);
        }
    }

    /// The element up to which the weights make more than this fraction, from 0 to below 1, of all. There must be one
    /// with a weight.
    pub fn at(&self, fraction: f64) -> usize {
        let slots = self.weights.len();
        let total = self.sums[slots];
        let target = ((fraction * (1u64 << 53) as f64) as u128 * total) >> 53;
        // In the order of slots those before the first are the newest.
        let newest: u128 = self.sum_before(self.first);
        let mut left = if target + newest < total { target + newest } else { target + newest - total };
        let (mut slot, mut width) = (0, slots);
        while width > 0 {
            if slot + width <= slots && self.sums[slot + width] <= left {
                left -= self.sums[slot + width];
                slot += width;
            }
            width /= 2;
        }
        (slot + slots - self.first) % slots
    }

    /// What fraction of all each element makes, the oldest first: what [`at`](Self::at) goes by.
    #[cfg(test)]
    pub fn fractions(&self) -> Vec<f64> {
        let total = self.sums[self.weights.len()] as f64;
        let weight = |slot: usize| self.sum_before(slot + 1) - self.sum_before(slot);
        (0..self.len).map(|index| weight(self.slot(index)) as f64 / total).collect()
    }

    /// The sum of the slots before one.
    fn sum_before(&self, slot: usize) -> u128 {
        let (mut place, mut sum) = (slot, 0);
        while place > 0 {
            sum += self.sums[place];
            place -= lowest_bit(place);
        }
        sum
    }

    fn slot(&self, index: usize) -> usize {
        (self.first + index) % self.weights.len()
    }
}

fn lowest_bit(place: usize) -> usize {
    place & place.wrapping_neg()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// By hand: of weights 1, 2, 3 and 4 the first makes a tenth, the first two three tenths, the first three six.
    #[test]
    fn fractions_find_their_elements() {
        let mut shares = Shares::new([1, 2, 3, 4].into_iter());
        let fractions = [0.0, 0.09, 0.11, 0.29, 0.31, 0.59, 0.61, 0.999];
        assert_eq!(fractions.map(|fraction| shares.at(fraction)), [0, 0, 1, 1, 2, 2, 3, 3]);
        // Now 2, 3, 4, 1.
        shares.pop();
        shares.push(1);
        assert_eq!(
            [0.0, 0.19, 0.21, 0.49, 0.51, 0.89, 0.91].map(|fraction| shares.at(fraction)),
            [0, 0, 1, 1, 2, 2, 3]
        );
        // Now 2, 3, 0, 1: a third, a half, nothing, a sixth.
        shares.set(2, 0);
        assert_eq!([0.0, 0.33, 0.34, 0.83, 0.84].map(|fraction| shares.at(fraction)), [0, 0, 1, 1, 3]);
    }

    /// A queue that has come and gone for a while draws as one that was made as it is.
    #[test]
    fn history_leaves_no_trace() {
        let mut shares = Shares::new(std::iter::empty());
        let mut weights = std::collections::VecDeque::new();
        for step in 0..5000u64 {
            let weight = inverse_count(step * 7919 % 13);
            shares.push(weight);
            weights.push_back(weight);
            if step % 3 > 0 && step > 50 {
                shares.pop();
                weights.pop_front();
            }
            let index = (step * 31) as usize % weights.len();
            weights[index] = inverse_count(step % 5);
            shares.set(index, weights[index]);
        }
        let fresh = Shares::new(weights.into_iter());
        for draw in 0..1000 {
            let fraction = f64::from(draw) / 1000.0;
            assert_eq!(shares.at(fraction), fresh.at(fraction), "{fraction}");
        }
    }
}

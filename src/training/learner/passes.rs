//! How a step's examples are divided among forward and backward passes.

use super::Example;

/// Which examples go through the model together. What is together changes memory and speed, not the update.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Passes {
    /// In their order, so many at a time.
    Of(usize),
    /// In their order, as many as each of these says; any that are left over go together.
    Sizes(Vec<usize>),
}

impl From<usize> for Passes {
    fn from(examples: usize) -> Self {
        Passes::Of(examples)
    }
}

impl Passes {
    /// The examples of each pass; none is empty.
    pub(super) fn divide<'e>(&self, examples: &'e [Example]) -> Vec<&'e [Example]> {
        let sizes = match self {
            Passes::Of(size) => return examples.chunks((*size).max(1)).collect(),
            Passes::Sizes(sizes) => sizes,
        };
        let mut rest = examples;
        let mut parts = Vec::with_capacity(sizes.len());
        for size in sizes.iter().chain(Some(&examples.len())) {
            let (part, after) = rest.split_at((*size).min(rest.len()));
            parts.push(part);
            rest = after;
        }
        parts.retain(|part| !part.is_empty());
        parts
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_example_is_in_one_pass() {
        let examples = vec![Example::default(); 7];
        let lengths = |passes: Passes| passes.divide(&examples).iter().map(|part| part.len()).collect::<Vec<_>>();
        assert_eq!(lengths(3.into()), [3, 3, 1]);
        assert_eq!(lengths(0.into()), [1; 7]);
        assert_eq!(lengths(Passes::Sizes(vec![2, 0, 5])), [2, 5]);
        assert_eq!(lengths(Passes::Sizes(vec![4])), [4, 3]);
        assert_eq!(lengths(Passes::Sizes(vec![9])), [7]);
    }
}

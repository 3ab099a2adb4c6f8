//! Gradients of several passes, added up in float32.

use tch::{Kind, Tensor, no_grad};

use crate::Result;
use crate::parameters::ParameterSet;

/// What the gradients of bfloat16 leaves come to over several passes. Added up in their own kind, with 8 bits of a number, a
/// small pass after many others would be rounded away.
pub(super) struct Sums<'a> {
    leaves: &'a ParameterSet,
    /// f32, for each leaf that has had a gradient.
    sums: Vec<Option<Tensor>>,
}

impl<'a> Sums<'a> {
    /// Of these leaves' gradients, over so many passes; none where the leaves do as well by themselves.
    pub fn of(leaves: &'a ParameterSet, passes: usize) -> Option<Self> {
        let coarse = leaves.iter().any(|(_, leaf)| leaf.kind() == Kind::BFloat16);
        (coarse && passes > 1).then(|| Sums { leaves, sums: leaves.iter().map(|_| None).collect() })
    }

    /// Moves what the last pass has left in the leaves' gradients into the sums.
    pub fn take(&mut self) -> Result<()> {
        no_grad(|| {
            for ((_, leaf), sum) in self.leaves.iter().zip(&mut self.sums) {
                let mut gradient = leaf.f_grad()?;
                if !gradient.defined() {
                    continue;
                }
                match sum {
                    Some(sum) => drop(sum.f_add_(&gradient)?),
                    None => *sum = Some(gradient.f_to_kind(Kind::Float)?),
                }
                let _ = gradient.f_zero_()?;
            }
            Ok(())
        })
    }

    /// The sum for a leaf, by its place among the leaves.
    pub fn of_leaf(&self, index: usize) -> Option<&Tensor> {
        self.sums[index].as_ref()
    }
}

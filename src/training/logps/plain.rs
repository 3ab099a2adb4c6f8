//! Log-probabilities the plain way: the logits of all rows at once, their log-softmax in float32, and autograd's gradient.

use tch::{Kind, Tensor, no_grad};

use super::{Kept, Scores};
use crate::Result;

/// A head's weight, as it is trained.
pub struct Head {
    /// (vocabulary, hidden_size), a leaf.
    weight: Tensor,
    /// Kind of the matrix products.
    kind: Kind,
}

impl Head {
    pub(super) fn new(weight: &Tensor, kind: Kind) -> Result<Self> {
        Ok(Head { weight: weight.f_detach()?.f_set_requires_grad(true)?, kind })
    }

    pub(super) fn mean_logits(&self, hidden: &Tensor) -> Result<Tensor> {
        no_grad(|| Ok(self.logits(hidden)?.f_mean_dim(1, false, Kind::Float)?))
    }

    pub(super) fn collision_entropies(&self, hidden: &Tensor) -> Result<Tensor> {
        no_grad(|| {
            let mut log_squares = self.logits(hidden)?.f_log_softmax(1, Kind::Float)?;
            let _ = log_squares.f_mul_scalar_(2.0)?;
            Ok(log_squares.f_logsumexp([1], false)?.f_neg()?)
        })
    }

    pub(super) fn logps(&self, hidden: &Tensor, targets: &Tensor) -> Result<Tensor> {
        no_grad(|| logps(&self.logits(hidden)?, targets))
    }

    pub(super) fn score(&self, hidden: &Tensor, targets: &Tensor) -> Result<Scores<'_>> {
        let hidden = hidden.f_detach()?.f_set_requires_grad(true)?;
        let logits = self.logits(&hidden)?;
        let of_targets = gather(&logits.f_detach()?, targets)?;
        let correct = of_targets.f_ge_tensor(&logits.f_detach()?.f_amax(1, false)?)?.f_to_kind(Kind::Float)?;
        let logps = logps(&logits, targets)?;
        Ok(Scores { logps: logps.f_detach()?, correct, kept: Kept::Graph(Graph { head: self, hidden, logps }) })
    }

    /// (rows, hidden_size) -> (rows, vocabulary) f32, by a product of the kind that products have.
    fn logits(&self, hidden: &Tensor) -> Result<Tensor> {
        let (hidden, weight) = (hidden.f_to_kind(self.kind)?, self.weight.f_to_kind(self.kind)?);
        Ok(hidden.f_linear(&weight, None::<&Tensor>)?.f_to_kind(Kind::Float)?)
    }
}

/// Of the targets (rows,), from logits (rows, vocabulary) f32.
fn logps(logits: &Tensor, targets: &Tensor) -> Result<Tensor> {
    gather(&logits.f_log_softmax(1, Kind::Float)?, targets)
}

/// The element of each row (rows, vocabulary) that `indices` (rows,) says.
fn gather(rows: &Tensor, indices: &Tensor) -> Result<Tensor> {
    Ok(rows.f_gather(1, &indices.f_unsqueeze(1)?, false)?.f_squeeze_dim(1)?)
}

/// What autograd has recorded.
pub struct Graph<'a> {
    head: &'a Head,
    /// (rows, hidden_size), a leaf.
    hidden: Tensor,
    /// (rows,) f32
    logps: Tensor,
}

impl Graph<'_> {
    pub(super) fn backward(self, gradient: &Tensor, weight_gradient: Option<&mut Tensor>) -> Result<Tensor> {
        // What has the gradient wanted with respect to the log-probabilities.
        let loss = self.logps.f_mul(&gradient.f_detach()?)?.f_sum(Kind::Float)?;
        let mut leaves = vec![&self.hidden];
        leaves.extend(weight_gradient.is_some().then_some(&self.head.weight));
        let mut gradients = Tensor::f_run_backward(&[loss], &leaves, false, false)?;
        if let Some(sum) = weight_gradient {
            let _ = no_grad(|| sum.f_add_(&gradients.swap_remove(1)))?;
        }
        Ok(gradients.swap_remove(0))
    }
}

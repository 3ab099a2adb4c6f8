//! Log-probabilities without ever holding the logits of a whole batch in f32.
//!
//! With a vocabulary of 49,000 to 128,000 tokens the logits are a training step's peak of memory, so they are computed
//! only for hidden states whose next token a loss needs, and in chunks of rows. The gradient is worked out here rather
//! than by autograd: the derivative of a row's log-probability with respect to its logits is onehot - softmax, and the
//! row's share of the loss's gradient scales it. Between the passes only the logits themselves are kept, in the kind
//! they were computed in and up to a limit; those beyond are computed again.

use tch::{Device, Kind, Tensor, no_grad};

use super::{Kept, Limits, Scores};
use crate::Result;
use crate::blocks::spans;
use crate::native::fused::{self, RowScores};
use crate::native::products;

/// A head's weight in the kind of the matrix products, and how it is used.
pub struct Head {
    /// (vocabulary, hidden_size), in the kind of the matrix products.
    weight: Tensor,
    /// Mean over the vocabulary, (hidden_size,) f32.
    mean: Tensor,
    /// Whether logits go through [`native::fused`](crate::native::fused).
    fused: bool,
    chunk_rows: i64,
    piece_rows: i64,
    kept_bytes: i64,
}

impl Head {
    pub(super) fn new(weight: &Tensor, kind: Kind, fused: bool, limits: Limits) -> Result<Self> {
        no_grad(|| {
            let weight = weight.f_detach()?;
            let (vocabulary, _) = weight.size2()?;
            let rows = |bytes: i64| (bytes / (4 * vocabulary)).max(1);
            let chunk_rows = rows(limits.chunk_bytes);
            let piece_rows = match weight.device() {
                Device::Cpu => rows(limits.piece_bytes).min(chunk_rows),
                _ => chunk_rows,
            };
            let (mean, kept_bytes) = (weight.f_mean_dim(0, false, Kind::Float)?, limits.kept_bytes);
            Ok(Head { weight: weight.f_to_kind(kind)?, mean, fused, chunk_rows, piece_rows, kept_bytes })
        })
    }

    /// The mean of a product is the product with the mean.
    pub(super) fn mean_logits(&self, hidden: &Tensor) -> Result<Tensor> {
        Ok(hidden.f_to_kind(Kind::Float)?.f_mv(&self.mean)?)
    }

    pub(super) fn logps(&self, hidden: &Tensor, targets: &Tensor) -> Result<Tensor> {
        Ok(self.score_and_keep(hidden, targets, 0)?.logps)
    }

    pub(super) fn score(&self, hidden: &Tensor, targets: &Tensor) -> Result<Scores<'_>> {
        self.score_and_keep(hidden, targets, self.kept_bytes)
    }

    /// Keeps up to so many bytes of logits.
    fn score_and_keep(&self, hidden: &Tensor, targets: &Tensor, kept_bytes: i64) -> Result<Scores<'_>> {
        no_grad(|| {
            let hidden = hidden.f_detach()?.f_to_kind(self.weight.kind())?;
            let rows = hidden.size2()?.0;
            let column = || Tensor::f_empty([rows, 1], (Kind::Float, hidden.device()));
            let (logps, correct, log_sums) = (column()?, column()?, column()?);
            let targets = targets.f_unsqueeze(-1)?; // (rows,) -> (rows, 1)
            let mut logits_kept = Vec::new();
            let mut budget = kept_bytes;
            for (start, length) in spans(rows, self.chunk_rows) {
                let logits = self.logits(&hidden.f_narrow(0, start, length)?)?;
                let of_chunk = |tensor: &Tensor| tensor.f_narrow(0, start, length);
                let (logps, correct, log_sums) = (of_chunk(&logps)?, of_chunk(&correct)?, of_chunk(&log_sums)?);
                let into = RowScores { logps: &logps, log_sums: &log_sums, correct: &correct };
                match self.fused {
                    true => fused::score(&logits, &of_chunk(&targets)?, &into)?,
                    false => self.score_in_pieces(&logits, &of_chunk(&targets)?, into)?,
                }
                budget -= (logits.numel() * logits.kind().elt_size_in_bytes()) as i64;
                logits_kept.push((budget >= 0).then_some(logits));
            }
            let (logps, correct) = (logps.f_squeeze_dim(1)?, correct.f_squeeze_dim(1)?);
            let chunks = Chunks { head: self, hidden, targets, log_sums, logits: logits_kept };
            Ok(Scores { logps, correct, kept: Kept::Chunks(chunks) })
        })
    }

    /// What [`fused::score`] does, in the operators of libtorch.
    fn score_in_pieces(&self, logits: &Tensor, targets: &Tensor, into: RowScores) -> Result<()> {
        for (start, length) in spans(logits.size2()?.0, self.piece_rows) {
            let of_piece = |tensor: &Tensor| tensor.f_narrow(0, start, length);
            // Always a copy: it is overwritten, and the logits may be needed again.
            let mut work = of_piece(logits)?.f_to_dtype(Kind::Float, false, true)?;
            let target = work.f_gather(1, &of_piece(targets)?, false)?;
            let largest = work.f_amax(1, true)?;
            let _ = work.f_sub_(&largest)?.f_exp_()?;
            let log_sums = work.f_sum_dim_intlist(1, true, Kind::Float)?.f_log()?.f_add(&largest)?;
            of_piece(into.logps)?.f_copy_(&target.f_sub(&log_sums)?)?;
            of_piece(into.correct)?.f_copy_(&target.f_ge_tensor(&largest)?)?;
            of_piece(into.log_sums)?.f_copy_(&log_sums)?;
        }
        Ok(())
    }

    /// What [`fused::score_backward`] does.
    fn score_backward_in_pieces(
        &self,
        logits: &Tensor,
        targets: &Tensor,
        log_sums: &Tensor,
        gradient: &Tensor,
    ) -> Result<()> {
        for (start, length) in spans(logits.size2()?.0, self.piece_rows) {
            let of_piece = |tensor: &Tensor| tensor.f_narrow(0, start, length);
            let (mut piece, scale) = (of_piece(logits)?, of_piece(gradient)?);
            // gradient * (onehot - softmax), which takes the logits' place.
            let mut work = piece.f_to_dtype(Kind::Float, false, true)?;
            let _ = work.f_sub_(&of_piece(log_sums)?)?.f_exp_()?.f_mul_(&scale.f_neg()?)?;
            let _ = work.f_scatter_add_(1, &of_piece(targets)?, &scale)?;
            piece.f_copy_(&work)?;
        }
        Ok(())
    }

    pub(super) fn collision_entropies(&self, hidden: &Tensor) -> Result<Tensor> {
        no_grad(|| {
            let hidden = hidden.f_detach()?.f_to_kind(self.weight.kind())?;
            let mut entropies = Vec::new();
            for (start, length) in spans(hidden.size2()?.0, self.piece_rows) {
                let logits = self.logits(&hidden.f_narrow(0, start, length)?)?.f_to_kind(Kind::Float)?;
                let log_normalizer = logits.f_logsumexp([1], false)?;
                let log_squares = logits.f_mul_scalar(2.0)?.f_logsumexp([1], false)?;
                entropies.push(log_normalizer.f_mul_scalar(2.0)?.f_sub(&log_squares)?);
            }
            Ok(Tensor::f_cat(&entropies, 0)?)
        })
    }

    /// (rows, hidden_size) -> (rows, vocabulary), in the kind of the matrix products.
    fn logits(&self, hidden: &Tensor) -> Result<Tensor> {
        self.product(hidden, &self.weight.f_transpose(0, 1)?)
    }

    fn product(&self, left: &Tensor, right: &Tensor) -> Result<Tensor> {
        if self.fused { products::product(left, right) } else { Ok(left.f_matmul(right)?) }
    }

    /// sum += left right, where the product may be of a smaller kind than the sum.
    fn add_product(&self, sum: &mut Tensor, left: &Tensor, right: &Tensor) -> Result<()> {
        match (left.kind() == sum.kind(), self.fused) {
            (true, true) => products::add_product(sum, left, right)?,
            (true, false) => _ = sum.f_addmm_(left, right)?,
            (false, _) => _ = sum.f_add_(&left.f_matmul(right)?)?,
        }
        Ok(())
    }
}

/// What the gradient needs.
pub struct Chunks<'a> {
    head: &'a Head,
    /// (rows, hidden_size)
    hidden: Tensor,
    /// (rows, 1)
    targets: Tensor,
    /// Log of each row's sum of exponentials, (rows, 1).
    log_sums: Tensor,
    /// Of each chunk, where kept.
    logits: Vec<Option<Tensor>>,
}

impl Chunks<'_> {
    pub(super) fn backward(mut self, gradient: &Tensor, mut weight_gradient: Option<&mut Tensor>) -> Result<Tensor> {
        no_grad(|| {
            let gradient = gradient.f_contiguous()?.f_unsqueeze(-1)?; // (rows,) -> (rows, 1)
            let hidden_gradient = self.hidden.f_empty_like()?;
            let chunks: Vec<_> = spans(self.hidden.size2()?.0, self.head.chunk_rows).collect();
            for (chunk, (start, length)) in chunks.into_iter().enumerate() {
                let hidden = self.hidden.f_narrow(0, start, length)?;
                let mut logits = match self.logits[chunk].take() {
                    Some(logits) => logits,
                    None => self.head.logits(&hidden)?,
                };
                let of_chunk = |tensor: &Tensor| tensor.f_narrow(0, start, length);
                let (targets, log_sums) = (of_chunk(&self.targets)?, of_chunk(&self.log_sums)?);
                let gradient = of_chunk(&gradient)?;
                match self.head.fused {
                    true => fused::score_backward(&mut logits, &targets, &log_sums, &gradient)?,
                    false => self.head.score_backward_in_pieces(&logits, &targets, &log_sums, &gradient)?,
                }
                hidden_gradient.f_narrow(0, start, length)?.f_copy_(&self.head.product(&logits, &self.head.weight)?)?;
                if let Some(weight_gradient) = weight_gradient.as_deref_mut() {
                    self.head.add_product(weight_gradient, &logits.f_transpose(0, 1)?, &hidden)?;
                }
            }
            Ok(hidden_gradient)
        })
    }
}

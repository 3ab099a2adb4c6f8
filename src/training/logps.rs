//! Log-probabilities of tokens from hidden states, without ever holding the logits of a whole batch in f32.
//!
//! With a vocabulary of 49,000 to 128,000 tokens the logits are a training step's peak of memory, so they are computed
//! only for hidden states whose next token a loss needs, and in chunks of rows. The gradient is worked out here rather
//! than by autograd: the derivative of a row's log-probability with respect to its logits is onehot - softmax, and the
//! row's share of the loss's gradient scales it. Between the passes only the logits themselves are kept, in the kind
//! they were computed in and up to a limit; those beyond are computed again.

use tch::{Device, Kind, Tensor, no_grad};

use crate::Result;
use crate::model::{Compute, Decoder};
use crate::native::fused::{self, RowScores};
use crate::native::products;
use crate::parameters::ParameterSet;

/// Bytes of f32 logits that one matrix product computes.
pub const CHUNK_BYTES: i64 = 128 << 20;
/// Bytes of f32 logits that elementwise operations work on at a time on a CPU: what its cache holds.
const PIECE_BYTES: i64 = 4 << 20;
/// Bytes of logits kept between the forward and the backward pass.
pub const KEPT_BYTES: i64 = 512 << 20;

/// A model's head, made ready once for all that a step computes with it.
pub struct Head {
    /// (vocabulary, hidden_size), in the kind of the matrix products.
    weight: Tensor,
    /// Mean over the vocabulary, (hidden_size,) f32.
    mean: Tensor,
    /// Whether logits go through [`native::fused`](crate::native::fused).
    fused: bool,
    chunk_rows: i64,
    piece_rows: i64,
}

impl Head {
    /// The head of a decoder with these weights.
    pub fn new(decoder: &Decoder, weights: &ParameterSet, compute: &Compute) -> Result<Self> {
        no_grad(|| {
            let weight = weights.get(decoder.head_name())?.f_detach()?;
            let (vocabulary, _) = weight.size2()?;
            let chunk_rows = (CHUNK_BYTES / (4 * vocabulary)).max(1);
            let piece_rows = match decoder.device {
                Device::Cpu => (PIECE_BYTES / (4 * vocabulary)).clamp(1, chunk_rows),
                _ => chunk_rows,
            };
            let mean = weight.f_mean_dim(0, false, Kind::Float)?;
            let fused = compute.is_fused(decoder.device);
            Ok(Head { weight: weight.f_to_kind(compute.kind)?, mean, fused, chunk_rows, piece_rows })
        })
    }

    /// Each row's mean logit over the vocabulary, (rows,) f32: the mean of a product is the product with the mean.
    pub fn mean_logits(&self, hidden: &Tensor) -> Result<Tensor> {
        Ok(hidden.f_to_kind(Kind::Float)?.f_mv(&self.mean)?)
    }

    /// Log-probabilities of `targets` (rows,) i64 after `hidden` (rows, hidden_size), where no gradient will be asked
    /// for: none is kept.
    pub fn logps(&self, hidden: &Tensor, targets: &Tensor) -> Result<Tensor> {
        Ok(self.score(hidden, targets, 0)?.logps)
    }

    /// Log-probabilities of `targets` (rows,) i64 after `hidden` (rows, hidden_size), and what their gradient needs:
    /// up to `kept_bytes` of logits.
    pub fn score(&self, hidden: &Tensor, targets: &Tensor, kept_bytes: i64) -> Result<Scores<'_>> {
        no_grad(|| {
            let hidden = hidden.f_detach()?.f_to_kind(self.weight.kind())?;
            let rows = hidden.size2()?.0;
            let column = || Tensor::f_empty([rows, 1], (Kind::Float, hidden.device()));
            let (logps, correct, log_sums) = (column()?, column()?, column()?);
            let targets = targets.f_unsqueeze(-1)?; // (rows,) -> (rows, 1)
            let mut kept = Vec::new();
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
                kept.push((budget >= 0).then_some(logits));
            }
            let (logps, correct) = (logps.f_squeeze_dim(1)?, correct.f_squeeze_dim(1)?);
            Ok(Scores { head: self, logps, correct, hidden, targets, log_sums, kept })
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

    /// -log sum_v p_v^2 of each row's distribution over the vocabulary, (rows,) f32, in nats: its Renyi entropy of order 2.
    pub fn collision_entropies(&self, hidden: &Tensor) -> Result<Tensor> {
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

/// Log-probabilities, and what is needed to send a gradient back through them.
pub struct Scores<'a> {
    head: &'a Head,
    /// Of the targets, (rows,) f32, without a graph.
    pub logps: Tensor,
    /// 1 where no token was more probable than the target, else 0; (rows,) f32.
    pub correct: Tensor,
    /// (rows, hidden_size)
    hidden: Tensor,
    /// (rows, 1)
    targets: Tensor,
    /// Log of each row's sum of exponentials, (rows, 1).
    log_sums: Tensor,
    /// Each chunk's logits, where kept.
    kept: Vec<Option<Tensor>>,
}

impl Scores<'_> {
    /// From the gradient with respect to `logps`, (rows,) f32, the one with respect to the hidden states, (rows,
    /// hidden_size); the one with respect to the head's weight is added to `weight_gradient`, (vocabulary, hidden_size)
    /// f32, where it is wanted.
    pub fn backward(mut self, gradient: &Tensor, mut weight_gradient: Option<&mut Tensor>) -> Result<Tensor> {
        no_grad(|| {
            let gradient = gradient.f_contiguous()?.f_unsqueeze(-1)?; // (rows,) -> (rows, 1)
            let hidden_gradient = self.hidden.f_empty_like()?;
            let chunks: Vec<_> = spans(self.hidden.size2()?.0, self.head.chunk_rows).collect();
            for (chunk, (start, length)) in chunks.into_iter().enumerate() {
                let hidden = self.hidden.f_narrow(0, start, length)?;
                let mut logits = match self.kept[chunk].take() {
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

/// Start and length of every span of at most `length` among so many rows.
fn spans(rows: i64, length: i64) -> impl Iterator<Item = (i64, i64)> {
    (0..rows).step_by(length as usize).map(move |start| (start, length.min(rows - start)))
}

#[cfg(test)]
mod tests {
    use tch::{Device, Kind, Tensor};

    use super::Head;
    use crate::native::testing::with_all_instructions;

    const ROWS: i64 = 11;
    const VOCABULARY: i64 = 37;

    /// Numbers without a pattern that matters, from -1 to 1.
    fn numbers(rows: i64, columns: i64, step: f64) -> Tensor {
        (Tensor::arange(rows * columns, (Kind::Float, Device::Cpu)) * step).sin().view([rows, columns])
    }

    #[test]
    fn chunks_agree_with_autograd_on_all_logits_at_once() {
        let weight = numbers(VOCABULARY, 8, 1.7).set_requires_grad(true);
        let hidden = (numbers(ROWS, 8, 2.3) * 4.0).set_requires_grad(true);
        let targets = Tensor::arange(ROWS, (Kind::Int64, Device::Cpu)) * 3;
        let upstream = numbers(1, ROWS, 0.9).view(-1);

        let logits = hidden.matmul(&weight.transpose(0, 1));
        let expected = logits.log_softmax(-1, Kind::Float).gather(1, &targets.unsqueeze(-1), false).squeeze_dim(1);
        (&expected * &upstream).sum(Kind::Float).backward();
        let best = logits.argmax(-1, false).eq_tensor(&targets).to_kind(Kind::Float);

        let mean = weight.detach().mean_dim(0, false, Kind::Float);
        let sizes = [(64, 64, 1 << 20), (4, 3, 1 << 20), (4, 4, 0), (3, 1, 4 * 3 * VOCABULARY)];
        with_all_instructions(|| {
            for (fused, (chunk_rows, piece_rows, kept)) in
                [true, false].iter().flat_map(|fused| sizes.map(|of| (*fused, of)))
            {
                let head = Head { weight: weight.detach(), mean: mean.copy(), fused, chunk_rows, piece_rows };
                let scores = head.score(&hidden, &targets, kept).unwrap();
                assert!(scores.logps.allclose(&expected, 1e-5, 1e-6, false));
                assert_eq!(scores.correct, best);
                let mut weight_gradient = weight.detach().zeros_like();
                let hidden_gradient = scores.backward(&upstream, Some(&mut weight_gradient)).unwrap();
                assert!(hidden_gradient.allclose(&hidden.grad(), 1e-5, 1e-6, false));
                assert!(weight_gradient.allclose(&weight.grad(), 1e-5, 1e-6, false));
                let squares = logits.softmax(-1, Kind::Float).square().sum_dim_intlist(-1, false, Kind::Float);
                let entropies = head.collision_entropies(&hidden).unwrap();
                assert!(entropies.allclose(&-squares.log(), 1e-5, 1e-6, false));
                assert!(head.mean_logits(&hidden).unwrap().allclose(
                    &logits.mean_dim(-1, false, Kind::Float),
                    1e-5,
                    1e-6,
                    false
                ));
            }
        });
    }
}

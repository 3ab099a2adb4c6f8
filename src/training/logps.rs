//! Log-probabilities of tokens from hidden states.
//!
//! | file | what it holds |
//! |---|---|
//! | `plain` | the logits of all rows at once, and autograd's gradient |
//! | `chunks` | the logits of some rows at a time, and a gradient worked out by hand |

mod chunks;
mod plain;

use tch::Tensor;

use crate::Result;
use crate::model::{Compute, Decoder, Kernels};
use crate::parameters::ParameterSet;

/// How many logits there are at a time, unless kernels are plain: then there are all.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Bytes of f32 logits that one matrix product computes.
    pub chunk_bytes: i64,
    /// Bytes of f32 logits that libtorch's elementwise operations work on at a time on a CPU: what its cache holds.
    pub piece_bytes: i64,
    /// Bytes of logits kept between the forward and the backward pass; others are computed again.
    pub kept_bytes: i64,
}

impl Default for Limits {
    /// What is best for memory and speed.
    fn default() -> Self {
        Limits { chunk_bytes: 128 << 20, piece_bytes: 4 << 20, kept_bytes: 128 << 20 }
    }
}

/// A model's head, made ready once for all that a step computes with it.
pub enum Head {
    /// For plain kernels.
    Plain(plain::Head),
    /// For all others.
    InChunks(chunks::Head),
}

impl Head {
    /// The head of a decoder with these weights.
    pub fn new(decoder: &Decoder, weights: &ParameterSet, compute: &Compute, limits: Limits) -> Result<Self> {
        let weight = weights.get(decoder.head_name())?;
        Ok(match compute.kernels {
            Kernels::Plain => Head::Plain(plain::Head::new(weight, compute.kind)?),
            Kernels::Fused => {
                Head::InChunks(chunks::Head::new(weight, compute.kind, compute.is_fused(decoder.device), limits)?)
            }
        })
    }

    /// Each row's mean logit over the vocabulary, (rows,) f32.
    pub fn mean_logits(&self, hidden: &Tensor) -> Result<Tensor> {
        match self {
            Head::Plain(head) => head.mean_logits(hidden),
            Head::InChunks(head) => head.mean_logits(hidden),
        }
    }

    /// -log sum_v p_v^2 of each row's distribution over the vocabulary, (rows,) f32, in nats: its Renyi entropy of order 2.
    pub fn collision_entropies(&self, hidden: &Tensor) -> Result<Tensor> {
        match self {
            Head::Plain(head) => head.collision_entropies(hidden),
            Head::InChunks(head) => head.collision_entropies(hidden),
        }
    }

    /// Log-probabilities of `targets` (rows,) i64 after `hidden` (rows, hidden_size), where no gradient will be asked
    /// for: nothing is kept.
    pub fn logps(&self, hidden: &Tensor, targets: &Tensor) -> Result<Tensor> {
        match self {
            Head::Plain(head) => head.logps(hidden, targets),
            Head::InChunks(head) => head.logps(hidden, targets),
        }
    }

    /// Log-probabilities of `targets` (rows,) i64 after `hidden` (rows, hidden_size), and what their gradient needs.
    pub fn score(&self, hidden: &Tensor, targets: &Tensor) -> Result<Scores<'_>> {
        match self {
            Head::Plain(head) => head.score(hidden, targets),
            Head::InChunks(head) => head.score(hidden, targets),
        }
    }
}

/// Log-probabilities, and what is needed to send a gradient back through them.
pub struct Scores<'a> {
    /// Of the targets, (rows,) f32, without a graph.
    pub logps: Tensor,
    /// 1 where no token was more probable than the target, else 0; (rows,) f32.
    pub correct: Tensor,
    kept: Kept<'a>,
}

enum Kept<'a> {
    Graph(plain::Graph<'a>),
    Chunks(chunks::Chunks<'a>),
}

impl Scores<'_> {
    /// From the gradient with respect to `logps`, (rows,) f32, the one with respect to the hidden states, (rows,
    /// hidden_size); the one with respect to the head's weight is added to `weight_gradient`, (vocabulary, hidden_size)
    /// f32, where it is wanted.
    pub fn backward(self, gradient: &Tensor, weight_gradient: Option<&mut Tensor>) -> Result<Tensor> {
        match self.kept {
            Kept::Graph(graph) => graph.backward(gradient, weight_gradient),
            Kept::Chunks(chunks) => chunks.backward(gradient, weight_gradient),
        }
    }
}

#[cfg(test)]
mod tests;

//! Gradient checkpointing by layers (arXiv 1604.06174): memory for one layer's activations instead of all.
//!
//! The forward pass keeps each layer's input alone. The backward pass goes through the layers from the last to the
//! first: it computes a layer again, this time with a graph, and sends the gradient through it.

use tch::Tensor;

use super::decoder::{Compute, Decoder, LAST_NORM};
use super::layer::Pass;
use super::mask::ModelInput;
use crate::Result;
use crate::parameters::ParameterSet;

/// What a checkpointed forward pass keeps for its backward pass.
pub struct CheckpointTape<'a> {
    decoder: &'a Decoder,
    weights: &'a ParameterSet,
    input: &'a ModelInput,
    compute: Compute,
    pass: Pass<'a>,
    /// Each layer's input, and last that of the last norm: (batch, tokens, hidden_size) without a graph.
    inputs: Vec<Tensor>,
}

impl Decoder {
    /// [`hidden_states`](Self::hidden_states) for training in little memory.
    ///
    /// The hidden states returned are a leaf that requires a gradient. Compute a loss from them, call its `backward`,
    /// and give the leaf's gradient to [`CheckpointTape::backward`], which adds to the gradients of the weights.
    pub fn hidden_states_checkpointed<'a>(
        &'a self,
        weights: &'a ParameterSet,
        input: &'a ModelInput,
        compute: &Compute,
    ) -> Result<(Tensor, CheckpointTape<'a>)> {
        let _guard = tch::no_grad_guard();
        let pass = self.pass(weights, input, None, compute)?;
        let mut inputs = Vec::with_capacity(self.layers() + 1);
        let mut hidden = self.embed(weights, input, compute)?;
        for layer in 0..self.layers() {
            let output = pass.layer(layer, &hidden, None)?;
            inputs.push(std::mem::replace(&mut hidden, output));
        }
        let normed = pass.norm(&hidden, LAST_NORM)?.f_detach()?.f_set_requires_grad(true)?;
        inputs.push(hidden);
        Ok((normed, CheckpointTape { decoder: self, weights, input, compute: *compute, pass, inputs }))
    }
}

impl CheckpointTape<'_> {
    /// Sends `gradient`, the loss's with respect to the hidden states, back through the decoder and adds to the weights'
    /// gradients.
    pub fn backward(mut self, gradient: &Tensor) -> Result<()> {
        let mut gradient = gradient.shallow_clone();
        let mut layer = self.decoder.layers();
        while let Some(input) = self.inputs.pop() {
            let input = input.f_set_requires_grad(true)?;
            let output = match layer == self.decoder.layers() {
                true => self.pass.norm(&input, LAST_NORM)?,
                false => self.pass.layer(layer, &input, None)?,
            };
            send_back(&output, &gradient)?;
            gradient = input.f_grad()?;
            layer = layer.wrapping_sub(1);
        }
        let embedded = self.decoder.embed(self.weights, self.input, &self.compute)?;
        if embedded.requires_grad() {
            send_back(&embedded, &gradient)?;
        }
        Ok(())
    }
}

/// Runs the backward pass of `output` from the gradient at it: that of sum(output * gradient).
pub(crate) fn send_back(output: &Tensor, gradient: &Tensor) -> Result<()> {
    Ok(output.f_mul(&gradient.f_detach()?)?.f_sum(output.kind())?.f_backward()?)
}

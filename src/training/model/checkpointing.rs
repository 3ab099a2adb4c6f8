//! Gradient checkpointing by layers (arXiv 1604.06174): memory for one layer's activations instead of all.
//!
//! The forward pass keeps each layer's input alone. The backward pass goes through the layers from the last to the
//! first: it computes a layer again, this time with a graph, and sends the gradient through it.

use tch::Tensor;

use super::decoder::{Compute, Decoder};
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
        let normed = pass.norm(&hidden, Decoder::LAST_NORM)?.f_detach()?.f_set_requires_grad(true)?;
        inputs.push(hidden);
        Ok((normed, CheckpointTape { decoder: self, weights, input, compute: *compute, pass, inputs }))
    }
}

impl<'a> CheckpointTape<'a> {
    /// Sends `gradient`, the loss's with respect to the hidden states, back through the decoder and adds to the weights'
    /// gradients.
    pub fn backward(mut self, gradient: &Tensor) -> Result<()> {
        let mut gradient = gradient.shallow_clone();
        while let Some((input, output, _)) = self.next()? {
            send_back(&output, &gradient)?;
            gradient = input.f_grad()?;
        }
        let embedded = self.embedded()?;
        if embedded.requires_grad() {
            send_back(&embedded, &gradient)?;
        }
        Ok(())
    }

    /// The same, with every part's gradients handed to `take` as soon as they are there, by the weights' names, and none
    /// kept: of the last norm, of each layer from the last to the first, and of the embedding. A part's weights are not
    /// read after that, and may be changed.
    pub fn backward_by_layers(
        mut self,
        gradient: &Tensor,
        mut take: impl FnMut(Vec<(&'a str, Tensor)>) -> Result<()>,
    ) -> Result<()> {
        let mut gradient = gradient.shallow_clone();
        while let Some((input, output, prefix)) = self.next()? {
            let leaves = self.leaves(&prefix);
            let mut gradients = gradients_of(&output, &gradient, leaves.iter().map(|(_, leaf)| *leaf).chain([&input]))?;
            gradient = gradients.pop().unwrap_or(gradient);
            drop(output);
            take(leaves.iter().map(|(name, _)| *name).zip(gradients).collect())?;
        }
        let embedded = self.embedded()?;
        if embedded.requires_grad() {
            let leaves = self.leaves(Decoder::EMBEDDING);
            let gradients = gradients_of(&embedded, &gradient, leaves.iter().map(|(_, leaf)| *leaf))?;
            take(leaves.iter().map(|(name, _)| *name).zip(gradients).collect())?;
        }
        Ok(())
    }

    /// The last part of the decoder that is left, computed again with a graph: its input, a leaf, its output, and what its
    /// weights' names begin with.
    fn next(&mut self) -> Result<Option<(Tensor, Tensor, String)>> {
        let Some(input) = self.inputs.pop() else { return Ok(None) };
        let input = input.f_set_requires_grad(true)?;
        let layer = self.inputs.len();
        let (output, prefix) = match layer == self.decoder.layers() {
            true => (self.pass.norm(&input, Decoder::LAST_NORM)?, Decoder::LAST_NORM.to_owned()),
            false => (self.pass.layer(layer, &input, None)?, format!("model.layers.{layer}.")),
        };
        Ok(Some((input, output, prefix)))
    }

    fn embedded(&self) -> Result<Tensor> {
        self.decoder.embed(self.weights, self.input, &self.compute)
    }

    /// The weights whose names begin like that and that a gradient is wanted for.
    fn leaves(&self, prefix: &str) -> Vec<(&'a str, &'a Tensor)> {
        self.weights.iter().filter(|(name, leaf)| name.starts_with(prefix) && leaf.requires_grad()).collect()
    }
}

/// The gradients of sum(output * gradient) with respect to these, which keep none.
fn gradients_of<'t>(
    output: &Tensor,
    gradient: &Tensor,
    inputs: impl Iterator<Item = &'t Tensor>,
) -> Result<Vec<Tensor>> {
    let inputs: Vec<&Tensor> = inputs.collect();
    let sum = output.f_mul(&gradient.f_detach()?)?.f_sum(output.kind())?;
    Ok(Tensor::f_run_backward(&[sum], &inputs, false, false)?)
}

/// Runs the backward pass of `output` from the gradient at it: that of sum(output * gradient).
pub(crate) fn send_back(output: &Tensor, gradient: &Tensor) -> Result<()> {
    Ok(output.f_mul(&gradient.f_detach()?)?.f_sum(output.kind())?.f_backward()?)
}

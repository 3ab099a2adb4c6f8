//! Weights laid out for decoding on a CPU, where reading them is the work.

use std::collections::HashMap;

use tch::{Device, Tensor};

use crate::Result;
use crate::model::Decoder;
use crate::native::PackedLinear;
use crate::parameters::ParameterSet;

/// Tokens from which on laying the weights out pays: it takes about as long as this many tokens save by it.
const WORTHWHILE_TOKENS: usize = 12;

/// The weights of linear layers in the layout that decoding reads fastest, by name. None where that does not pay.
#[derive(Debug, Default)]
pub struct PackedWeights {
    layers: HashMap<String, PackedLinear>,
}

impl PackedWeights {
    /// Whether decoding so many tokens with this decoder gains by it.
    pub fn pay(decoder: &Decoder, new_tokens: usize) -> bool {
        decoder.device == Device::Cpu && new_tokens >= WORTHWHILE_TOKENS
    }

    /// Takes the linear layers' weights out of `weights`, one by one, for batches of `rows` rows. An embedding that is the
    /// head as well stays there too.
    pub fn take_from(weights: &mut ParameterSet, decoder: &Decoder, rows: i64) -> Result<Self> {
        let head = decoder.head_name();
        let mut layers = HashMap::new();
        let names: Vec<String> = weights.names().map(str::to_owned).collect();
        for name in names {
            let packed = match name.as_str() {
                name if name == head => PackedLinear::new(weights.get(name)?, rows)?,
                name if name.ends_with("_proj.weight") => PackedLinear::new(&weights.take(name)?, rows)?,
                _ => continue,
            };
            layers.insert(name, packed);
        }
        Ok(PackedWeights { layers })
    }

    /// `input` (..., in) through the layer whose weight has that name, if it is one of these.
    pub(crate) fn apply(&self, name: &str, input: &Tensor, bias: Option<&Tensor>) -> Result<Option<Tensor>> {
        self.layers.get(name).map(|layer| layer.apply(input, bias)).transpose()
    }
}

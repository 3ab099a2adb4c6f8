//! Weights laid out for decoding on a CPU, where reading them is the work.

use std::collections::HashMap;

use tch::Tensor;

use crate::Result;
use crate::model::Decoder;
use crate::native::PackedLinear;
use crate::parameters::ParameterSet;

/// The linear layers of a decoder layer. Those with one input become one, since each product costs a little time of its
/// own whatever its size.
const JOINED: [(&str, &[&str]); 4] = [
    ("self_attn.qkv_proj", &["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"]),
    ("self_attn.o_proj", &["self_attn.o_proj"]),
    ("mlp.gate_up_proj", &["mlp.gate_proj", "mlp.up_proj"]),
    ("mlp.down_proj", &["mlp.down_proj"]),
];

/// Linear layers in the layout that decoding reads fastest, by name. None where that does not pay.
#[derive(Debug, Default)]
pub struct PackedWeights {
    layers: HashMap<String, Packed>,
}

#[derive(Debug)]
struct Packed {
    weight: PackedLinear,
    bias: Option<Tensor>,
}

// Safety: as for any tensor that nobody writes to.
unsafe impl Sync for Packed {}

impl PackedWeights {
    /// Takes the linear layers' weights out of `weights`, one by one, for batches of `rows` rows. An embedding that is the
    /// head as well stays there too.
    pub fn take_from(weights: &mut ParameterSet, decoder: &Decoder, rows: i64) -> Result<Self> {
        let head = decoder.head_name();
        let packed = Packed { weight: PackedLinear::new(weights.get(head)?, rows)?, bias: None };
        let mut layers = HashMap::from([(head.to_owned(), packed)]);
        for layer in 0..decoder.config.num_hidden_layers {
            for (joined, parts) in JOINED {
                let name = |part: &str| format!("model.layers.{layer}.{part}");
                let biases: Vec<&Tensor> =
                    parts.iter().filter_map(|part| weights.get(&format!("{}.bias", name(part))).ok()).collect();
                let bias = if biases.is_empty() { None } else { Some(Tensor::f_cat(&biases, 0)?) };
                let taken = parts.iter().map(|part| weights.take(&format!("{}.weight", name(part))));
                let taken: Vec<Tensor> = taken.collect::<Result<_>>()?;
                let weight = match taken.as_slice() {
                    [one] => PackedLinear::new(one, rows)?,
                    several => PackedLinear::new(&Tensor::f_cat(several, 0)?, rows)?,
                };
                layers.insert(format!("{}.weight", name(joined)), Packed { weight, bias });
            }
        }
        Ok(PackedWeights { layers })
    }

    /// `input` (..., in) through the layer whose weight has that name, its bias added, if it is one of these.
    pub(crate) fn apply(&self, name: &str, input: &Tensor) -> Result<Option<Tensor>> {
        self.layers.get(name).map(|layer| layer.weight.apply(input, layer.bias.as_ref())).transpose()
    }
}

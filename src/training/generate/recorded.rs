//! The work of one token, with its inputs and results in fixed places: what a GPU records once and launches as a whole. A
//! decoder's kernels for a few rows are so short that launching them one by one takes longer.

use tch::{Device, Tensor};

use super::Recording;
use super::on_device::Drawn;
use crate::Result;
use crate::native::graph::Graph;

/// Slots of the cache that attention is recorded over: a multiple of this, so that few recordings serve a response.
const KEYS: i64 = 256;

/// What a token's work starts from, for each row.
#[derive(Debug)]
pub(super) struct Fed {
    /// The last tokens, (rows, 1), i64.
    pub tokens: Tensor,
    /// Their positions, (rows, 1), i64.
    pub positions: Tensor,
    /// Random numbers for the next tokens, (rows,), f64.
    pub draws: Tensor,
}

impl Fed {
    fn copy(&self) -> Result<Self> {
        let [tokens, positions, draws] = [&self.tokens, &self.positions, &self.draws].map(copy);
        Ok(Fed { tokens: tokens?, positions: positions?, draws: draws? })
    }

    fn fill(&mut self, from: &Fed) -> Result<()> {
        self.tokens.f_copy_(&from.tokens)?;
        self.positions.f_copy_(&from.positions)?;
        self.draws.f_copy_(&from.draws)?;
        Ok(())
    }
}

/// A token's work for a number of rows, over a number of the cache's slots.
pub(super) struct TokenWork {
    /// None where the work is done anew each time.
    graph: Option<Graph>,
    fed: Fed,
    drawn: Drawn,
    /// How many slots.
    pub keys: i64,
}

/// Slots to record over where the longest row will hold `used` tokens, of `capacity`.
pub(super) fn keys_for(used: i64, capacity: i64) -> i64 {
    ((used + KEYS - 1) / KEYS * KEYS).min(capacity)
}

impl TokenWork {
    /// Records `work` on these rows over `keys` slots, on their device.
    pub fn record(
        recording: Recording,
        device: Device,
        fed: &Fed,
        keys: i64,
        work: impl Fn(&Fed) -> Result<Drawn>,
    ) -> Result<Self> {
        let fed = fed.copy()?;
        // To do it once changes nothing: keys and values go where they will go again.
        let drawn = work(&fed)?;
        if recording != Recording::CudaGraph {
            return Ok(TokenWork { graph: None, fed, drawn, keys });
        }
        let (graph, drawn) = Graph::record(device, || work(&fed))?;
        Ok(TokenWork { graph: Some(graph), fed, drawn, keys })
    }

    /// Whether it is the work for so many rows, the longest of which will hold `used` tokens.
    pub fn serves(&self, rows: i64, used: i64) -> bool {
        self.fed.tokens.size()[0] == rows && used <= self.keys
    }

    /// Does it for other inputs; `work` is what was recorded.
    pub fn again(&mut self, fed: &Fed, work: impl Fn(&Fed) -> Result<Drawn>) -> Result<Drawn> {
        self.fed.fill(fed)?;
        match &self.graph {
            Some(graph) => graph.replay()?,
            None => self.drawn = work(&self.fed)?,
        }
        // The next token's go to the same place.
        let Drawn { tokens, logps, missed_ties } = &self.drawn;
        Ok(Drawn { tokens: copy(tokens)?, logps: copy(logps)?, missed_ties: copy(missed_ties)? })
    }
}

fn copy(tensor: &Tensor) -> Result<Tensor> {
    let mut copy = tensor.f_empty_like()?;
    copy.f_copy_(tensor)?;
    Ok(copy)
}

#[cfg(test)]
mod tests {
    use super::keys_for;

    #[test]
    fn slots_are_rounded_up_as_far_as_there_are_any() {
        assert_eq!([1, 256, 257, 400].map(|used| keys_for(used, 500)), [256, 256, 500, 500]);
    }
}

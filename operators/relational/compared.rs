//! Two responses to a prompt as a pair.

use std::sync::Arc;

use sapo_flow_engine::record::{Pair, Record, Values};
use sapo_flow_engine::{PortType, TokenId};

use super::Place;
use super::key::named;

/// A record as one side of a comparison.
struct Side<'a> {
    prompt_ids: &'a [TokenId],
    response_ids: &'a [TokenId],
    values: &'a Values,
    weights_version: Option<u64>,
    seed: Option<u64>,
}

/// The pair of the better record's response as chosen and the worse one's as rejected. Of a prompt the answer counts; of
/// a pair its chosen response on the better side, its rejected one on the worse. The records' values are kept under
/// `chosen_NAME` and `rejected_NAME`.
///
/// # Errors
/// In words, where the worse record is a pair without a rejected response.
pub fn pair(place: Place, better: &Record, worse: &Record) -> Result<Record, String> {
    let (chosen, rejected) = (side(better, false)?, side(worse, true)?);
    let (source, row) = better.row().unwrap_or_default();
    let mut values = chosen.values.prefixed("chosen_");
    values.extend(rejected.values.prefixed("rejected_"));
    Ok(Record::Pair(Arc::new(Pair {
        step: place.step,
        position: place.position,
        origin: place.node.to_owned(),
        source: source.to_owned(),
        row,
        prompt_ids: chosen.prompt_ids.to_vec(),
        chosen_ids: chosen.response_ids.to_vec(),
        rejected_ids: Some(rejected.response_ids.to_vec()),
        segment: None,
        weights_version: rejected.weights_version,
        seed: rejected.seed,
        values,
    })))
}

fn side(record: &Record, worse: bool) -> Result<Side<'_>, String> {
    match record {
        Record::Prompt(prompt) => Ok(Side {
            prompt_ids: &prompt.prompt_ids,
            response_ids: &prompt.chosen_ids,
            values: &prompt.values,
            weights_version: None,
            seed: None,
        }),
        Record::Sample(sample) => Ok(Side {
            prompt_ids: &sample.prompt_ids,
            response_ids: &sample.response_ids,
            values: &sample.values,
            weights_version: sample.weights_version,
            seed: sample.seed,
        }),
        Record::Pair(pair) => {
            let rejected =
                || pair.rejected_ids.as_ref().ok_or_else(|| format!("{} has no rejected response", named(record)));
            Ok(Side {
                prompt_ids: &pair.prompt_ids,
                response_ids: if worse { rejected()? } else { &pair.chosen_ids },
                values: &pair.values,
                weights_version: pair.weights_version.filter(|_| worse),
                seed: pair.seed.filter(|_| worse),
            })
        }
        _ => Err(format!("{} has no response", PortType::to_string(&record.port_type()))),
    }
}

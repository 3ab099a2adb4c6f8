//! SAPO's segments: which part of an answer is rewritten, and how the rewritten answer is put together.
//!
//! SAPO (arXiv 2405.20830), section 3.2, as the authors' code has it, less its faults: theirs draws the start of an
//! over-long sample's segment and then loses it in the truncation, and fails where the room left is negative.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use sapo_flow_engine::TokenId;

/// Which end of an over-long prompt is kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Truncation {
    /// The prompt's last tokens, next to the answer.
    KeepEnd,
    /// The prompt's first tokens.
    KeepStart,
}

/// A prompt and its answer cut to `max_length` tokens together: only when they are longer, first the prompt down to
/// `max_prompt_tokens`, then the answer's end.
pub fn fit<'a>(
    prompt: &'a [TokenId],
    answer: &'a [TokenId],
    max_length: usize,
    max_prompt_tokens: usize,
    truncation: Truncation,
) -> (&'a [TokenId], &'a [TokenId]) {
    if prompt.len() + answer.len() <= max_length {
        return (prompt, answer);
    }
    let kept = prompt.len().min(max_prompt_tokens).min(max_length);
    let prompt = match truncation {
        Truncation::KeepEnd => &prompt[prompt.len() - kept..],
        Truncation::KeepStart => &prompt[..kept],
    };
    (prompt, &answer[..answer.len().min(max_length - kept)])
}

/// The length of a segment and the largest start it may have, for an answer of `answer_tokens` (EOS included) after
/// a prompt of `prompt_tokens`, both before they are cut to `max_length`.
///
/// The start leaves the segment's tokens and three more before the answer's end, as the authors' does.
pub fn bounds(
    prompt_tokens: usize,
    answer_tokens: usize,
    segment_tokens: usize,
    max_length: usize,
    max_prompt_tokens: usize,
) -> (usize, usize) {
    let room = max_length.saturating_sub(prompt_tokens.min(max_prompt_tokens));
    let len = segment_tokens.min(answer_tokens);
    let last_start = answer_tokens.saturating_sub(3 + len).min(room.saturating_sub(len));
    // Of an over-long answer only what fits in the room is left to rewrite.
    (if prompt_tokens + answer_tokens > max_length { len.min(room) } else { len }, last_start)
}

/// The rejected response: `generated` in place of `len` tokens from `start`, then the answer's own tail, unless the
/// segment has EOS, which ends the response. Returns the response, the tokens of the segment kept, and whether it ended.
pub fn splice(
    answer: &[TokenId],
    start: usize,
    len: usize,
    generated: &[TokenId],
    eos: &[TokenId],
) -> (Vec<TokenId>, usize, bool) {
    let generated = &generated[..generated.len().min(len)];
    let mut response = answer[..start].to_vec();
    if let Some(end) = generated.iter().position(|token| eos.contains(token)) {
        response.extend_from_slice(&generated[..=end]);
        return (response, end + 1, true);
    }
    response.extend_from_slice(generated);
    response.extend_from_slice(&answer[(start + len).min(answer.len())..]);
    (response, generated.len(), false)
}

#[cfg(test)]
mod tests {
    use serde_json::Value;

    use super::*;
    use crate::testing::{golden, token_ids};

    /// What is learned, in the authors' form: the response's tokens, with -100 in place of the prompt's.
    fn labels(prompt: &[TokenId], response: &[TokenId]) -> Value {
        let response = response.iter().map(|id| i64::from(*id));
        prompt.iter().map(|_| -100).chain(response).collect::<Vec<i64>>().into()
    }

    #[test]
    fn segments_are_the_authors_own_where_theirs_are_sound() {
        let mut sound = 0;
        for case in golden("segments.json").as_array().expect("a list of cases") {
            let number = |key: &str| case[key].as_u64().expect("a number") as usize;
            let (prompt, mut answer) = (token_ids(&case["prompt_ids"]), token_ids(&case["chosen_ids"]));
            answer.push(number("eos") as TokenId);
            let truncation: Truncation = serde_json::from_value(case["truncation"].clone()).expect("a truncation");
            let (max_length, max_prompt) = (number("max_length"), number("max_prompt_length"));
            let (len, last_start) =
                bounds(prompt.len(), answer.len(), number("segment_tokens"), max_length, max_prompt);
            let (fitted_prompt, fitted) = fit(&prompt, &answer, max_length, max_prompt, truncation);
            assert!(len > 0 && last_start + len <= fitted.len(), "the segment lies within the answer: {case}");
            let Some(sequence) = case.get("sequence") else { continue };
            sound += 1;

            assert_eq!([fitted_prompt, fitted].concat(), token_ids(sequence), "{case}");
            assert_eq!(labels(fitted_prompt, fitted), case["labels"], "{case}");
            assert_eq!(fitted_prompt.len(), number("prompt_len"), "{case}");
            assert_eq!(len, number("segment_len"), "{case}");
            match &case["draw"] {
                Value::Null => assert_eq!((last_start, number("segment_start")), (0, 0), "{case}"),
                draw => {
                    assert_eq!(draw[1], last_start, "{case}");
                    // Theirs forgets the draw when the sample is over-long.
                    let over_long = prompt.len() + answer.len() > max_length;
                    let theirs = if over_long { &draw[1] } else { &draw[2] };
                    assert_eq!(case["segment_start"], *theirs, "{case}");
                }
            }
        }
        assert!(sound > 0, "no case was compared");
    }

    #[test]
    fn splices_are_the_authors_own() {
        let cases = golden("splice.json");
        let cases = cases.as_array().expect("a list of cases");
        assert!(!cases.is_empty());
        for case in cases {
            let number = |key: &str| case[key].as_u64().expect("a number") as usize;
            let (answer, generated) = (token_ids(&case["chosen_ids"]), token_ids(&case["generated"]));
            let eos = number("eos") as TokenId;
            let (start, len) = (number("segment_start"), number("segment_len"));
            let (response, kept, ended) = splice(&answer, start, len, &generated, &[eos]);
            let expected = token_ids(&case["rejected_sequence"]);
            let prompt = token_ids(&case["prompt_ids"]);
            assert_eq!(labels(&prompt, &response), case["rejected_labels"], "{case}");
            assert_eq!([prompt, response.clone()].concat(), expected, "{case}");
            assert_eq!(ended, generated[..len].contains(&eos), "{case}");
            assert_eq!(response[start..start + kept], generated[..kept], "{case}");
        }
    }

    #[test]
    fn a_response_that_ends_early_has_one_eos() {
        assert_eq!(splice(&[10, 11, 12, 13, 2], 1, 2, &[7, 2], &[2]), (vec![10, 7, 2], 2, true));
        assert_eq!(splice(&[10, 11, 12, 13, 2], 1, 2, &[7, 8], &[2]), (vec![10, 7, 8, 13, 2], 2, false));
    }
}

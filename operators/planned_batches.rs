//! How long the rows of a run's largest batch will be, for plans.

use sapo_flow_engine::plan::{Emits, Lengths, PlanContext};

use sapo_flow_training::learner::LayoutKind;
use sapo_flow_training::memory::Shape;

use crate::draws::Draws;

/// What the memory for a batch depends on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BatchLengths {
    /// The mean of its rows, rounded up: where they stand one after the other.
    pub mean: Lengths,
    /// The longest row: where all are padded to it.
    pub longest: Lengths,
}

/// Rows of logits that a pair of these lengths needs: the answers' tokens, of which those that both begin with count once
/// where the layout has them once, and where prompts are scored the one before the chosen answer.
pub fn logit_rows(lengths: Lengths, layout: LayoutKind, needs_prompt: bool, needs_rejected: bool) -> u64 {
    let Lengths { prompt, shared_answer, response } = lengths;
    let prompt = if needs_prompt { prompt.saturating_sub(shared_answer) } else { 0 };
    let rejected = match layout {
        _ if !needs_rejected => 0,
        LayoutKind::SharedPrefix => response,
        LayoutKind::Padded => shared_answer + response,
    };
    prompt + shared_answer + response + rejected
}

/// So many pairs of these lengths.
pub fn pairs_of(pairs: u64, Lengths { prompt, response, .. }: Lengths) -> Shape {
    Shape::Pairs { pairs, prompt, response }
}

/// The largest batch of a run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PlannedBatches {
    /// Where every sequence has as many tokens as may be. Nothing is known of how the longest are divided: all of them may be
    /// response.
    pub most: BatchLengths,
    /// What is expected of batches drawn from the data's rows; none where nothing is known of these.
    pub expected: Option<BatchLengths>,
}

/// Rows that are drawn at most, and batches where the number of steps is unknown.
const MOST_DRAWN: u64 = 1 << 20;
const MOST_STEPS: u64 = 1000;

impl PlannedBatches {
    /// Of so many rows each, of what arrives, one or more at every step of the run.
    ///
    /// The expected one is the largest of as many batches as the run will have, each of rows drawn from the sample.
    pub fn new(context: &PlanContext, arrives: &Emits, rows: u64) -> Self {
        let limit = arrives.max_length.unwrap_or(0);
        let longest = Lengths { response: limit, ..Lengths::default() };
        let most = BatchLengths { mean: longest, longest };
        let cut = |row: &Lengths| match arrives.max_length {
            Some(_) => Lengths {
                prompt: row.prompt.min(limit),
                shared_answer: row.shared_answer.min(limit),
                response: row.response.min(limit - row.prompt.min(limit)),
            },
            None => *row,
        };
        let sample: Vec<Lengths> = arrives.sample.iter().map(cut).collect();
        if sample.is_empty() || rows == 0 {
            return PlannedBatches { most, expected: None };
        }
        let of_a_step = arrives.rows.map_or(1, |all| all.div_ceil(rows)).max(1);
        let batches = context.steps.unwrap_or(MOST_STEPS).saturating_mul(of_a_step);
        let draws = Draws::new(context.run.seed, context.node);
        let drawn = |batch: u64| {
            let row = |n| sample[draws.below(batch, n, sample.len())];
            (0..rows).map(row).fold(Lengths::default(), |sum, row| Lengths {
                prompt: sum.prompt + row.prompt,
                shared_answer: sum.shared_answer + row.shared_answer,
                response: sum.response + row.response,
            })
        };
        let largest = (0..batches.clamp(1, (MOST_DRAWN / rows).max(1))).map(drawn).max_by_key(Lengths::of_pair);
        let longest = sample.iter().copied().max_by_key(Lengths::tokens);
        let expected = largest.zip(longest).map(|(sum, longest)| {
            let [prompt, shared_answer, response] =
                [sum.prompt, sum.shared_answer, sum.response].map(|tokens| tokens.div_ceil(rows));
            let mean = Lengths { prompt, shared_answer, response };
            BatchLengths { mean, longest }
        });
        PlannedBatches { most, expected }
    }
}

#[cfg(test)]
mod tests {
    use sapo_flow_engine::RunSettings;

    use super::*;

    fn lengths(prompt: u64, response: u64) -> Lengths {
        Lengths { prompt, shared_answer: 0, response }
    }

    /// A prompt of 30 tokens, answers of 5 common ones and 20 of each.
    #[test]
    fn rows_of_logits_by_hand() {
        let pair = Lengths { prompt: 35, shared_answer: 5, response: 20 };
        let rows = |layout, prompt, rejected| logit_rows(pair, layout, prompt, rejected);
        for layout in [LayoutKind::SharedPrefix, LayoutKind::Padded] {
            assert_eq!((rows(layout, false, false), rows(layout, true, false)), (25, 55));
        }
        assert_eq!((rows(LayoutKind::SharedPrefix, false, true), rows(LayoutKind::SharedPrefix, true, true)), (45, 75));
        assert_eq!((rows(LayoutKind::Padded, false, true), rows(LayoutKind::Padded, true, true)), (50, 80));
    }

    fn planned(sample: &[(u64, u64)], rows: u64, steps: u64) -> BatchLengths {
        let run = RunSettings::default();
        let context = PlanContext { node: "node", run: &run, steps: Some(steps), retained_versions: 1, inputs: vec![] };
        let sample = sample.iter().map(|&(prompt, response)| lengths(prompt, response)).collect();
        let arrives = Emits { max_length: Some(100), sample, ..Emits::default() };
        let planned = PlannedBatches::new(&context, &arrives, rows);
        assert_eq!(planned.most.mean, lengths(0, 100));
        planned.expected.unwrap()
    }

    #[test]
    fn equal_rows_make_equal_batches() {
        let row = lengths(30, 20);
        assert_eq!(planned(&[(30, 20); 3], 4, 10), BatchLengths { mean: row, longest: row });
        // What is too long is cut, first the response.
        let (cut, all) = (lengths(60, 40), lengths(100, 0));
        assert_eq!(planned(&[(60, 50)], 2, 1).mean, cut);
        assert_eq!(planned(&[(160, 50)], 2, 1).mean, all);
    }

    /// Of many batches of two rows, one has the long one twice; one batch alone has half of it as a rule.
    #[test]
    fn the_more_batches_the_longer_the_largest() {
        let sample = [(0, 0), (0, 90)];
        assert_eq!(planned(&sample, 2, 1000).mean.response, 90);
        // The largest of 1000 means of 64 rows is 3.2 standard deviations above 45 of one, 45 / 8: 63.
        let many = planned(&sample, 64, 1000).mean.response;
        assert!((60..=68).contains(&many), "{many}");
        assert_eq!(planned(&sample, 64, 1000).longest.response, 90);
    }
}

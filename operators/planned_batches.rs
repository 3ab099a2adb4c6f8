//! How long the rows of a run's largest batch will be, for plans.

use sapo_flow_engine::plan::{Emits, Lengths, PlanContext};

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

/// So many pairs of these lengths.
pub fn pairs_of(pairs: u64, Lengths { prompt, response }: Lengths) -> Shape {
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
        let longest = Lengths { prompt: 0, response: limit };
        let most = BatchLengths { mean: longest, longest };
        let cut = |row: &Lengths| match arrives.max_length {
            Some(_) => {
                Lengths { prompt: row.prompt.min(limit), response: row.response.min(limit - row.prompt.min(limit)) }
            }
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
                response: sum.response + row.response,
            })
        };
        let largest = (0..batches.clamp(1, (MOST_DRAWN / rows).max(1))).map(drawn).max_by_key(Lengths::of_pair);
        let longest = sample.iter().copied().max_by_key(Lengths::tokens);
        let expected = largest.zip(longest).map(|(sum, longest)| {
            let mean = Lengths { prompt: sum.prompt.div_ceil(rows), response: sum.response.div_ceil(rows) };
            BatchLengths { mean, longest }
        });
        PlannedBatches { most, expected }
    }
}

#[cfg(test)]
mod tests {
    use sapo_flow_engine::RunSettings;

    use super::*;

    fn planned(sample: &[(u64, u64)], rows: u64, steps: u64) -> BatchLengths {
        let run = RunSettings::default();
        let context = PlanContext { node: "node", run: &run, steps: Some(steps), retained_versions: 1, inputs: vec![] };
        let sample = sample.iter().map(|&(prompt, response)| Lengths { prompt, response }).collect();
        let arrives = Emits { max_length: Some(100), sample, ..Emits::default() };
        let planned = PlannedBatches::new(&context, &arrives, rows);
        assert_eq!(planned.most.mean, Lengths { prompt: 0, response: 100 });
        planned.expected.unwrap()
    }

    #[test]
    fn equal_rows_make_equal_batches() {
        let row = Lengths { prompt: 30, response: 20 };
        assert_eq!(planned(&[(30, 20); 3], 4, 10), BatchLengths { mean: row, longest: row });
        // What is too long is cut, first the response.
        let (cut, all) = (Lengths { prompt: 60, response: 40 }, Lengths { prompt: 100, response: 0 });
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

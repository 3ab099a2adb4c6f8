//! What an evaluation adds up over held-out rows.

use sapo_flow_training::learner::ExampleScore;

/// What an evaluation adds up. Log-probabilities in nats.
#[derive(Default)]
pub struct Sums {
    rows: f64,
    nll: f64,
    tokens: f64,
    preferred: f64,
    margin: f64,
}

impl Sums {
    /// Of so many rows.
    pub fn of(scores: &[ExampleScore]) -> Self {
        let mut sums = Sums::default();
        scores.iter().for_each(|score| sums.add(score));
        sums
    }

    /// Count one row's responses; rows without a rejected one do not count.
    pub fn add(&mut self, score: &ExampleScore) {
        let Some(rejected) = score.rejected else { return };
        let margin = f64::from(score.chosen.mean()) - f64::from(rejected.mean());
        self.rows += 1.0;
        self.nll -= f64::from(score.chosen.logps);
        self.tokens += score.chosen.tokens as f64;
        self.preferred += f64::from(margin > 0.0);
        self.margin += margin;
    }

    /// Negative log-likelihood of the chosen responses, nats a token.
    pub fn nll(&self) -> f64 {
        self.nll / self.tokens
    }

    /// Share of rows whose chosen response is the likelier, per token.
    pub fn accuracy(&self) -> f64 {
        self.preferred / self.rows
    }

    /// Mean difference of chosen and rejected, nats a token.
    pub fn margin(&self) -> f64 {
        self.margin / self.rows
    }
}

#[cfg(test)]
mod tests {
    use sapo_flow_training::learner::ResponseScore;

    use super::*;

    #[test]
    fn sums_by_hand() {
        let mut sums = Sums::default();
        // -6 nats over 3 tokens against -9 over 3: preferred by 1 nat a token. -8 over 2
        // against -3 over 1: not, by 1.
        let response = |logps, tokens| ResponseScore { logps, tokens };
        sums.add(&ExampleScore { chosen: response(-6.0, 3), rejected: Some(response(-9.0, 3)) });
        sums.add(&ExampleScore { chosen: response(-8.0, 2), rejected: Some(response(-3.0, 1)) });
        assert_eq!(sums.nll(), 14.0 / 5.0);
        assert_eq!(sums.accuracy(), 0.5);
        assert_eq!(sums.margin(), (1.0 - 1.0) / 2.0);
    }
}

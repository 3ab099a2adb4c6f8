//! Weighted sums of formulas, which learners minimise.

use std::collections::BTreeMap;

use sapo_flow_training::Error;
use sapo_flow_training::objectives::{Needs, Objective, PairLosses, PairNumbers};

use super::formula::Formula;

/// One part of a sum.
#[derive(Debug)]
pub struct Term {
    /// What messages and metrics call it.
    pub name: String,
    /// Its factor.
    pub weight: f64,
    /// Its losses.
    pub formula: Formula,
}

/// An objective: a sum of one formula or more.
#[derive(Debug)]
pub struct Sum {
    terms: Vec<Term>,
    needs: Needs,
}

impl Sum {
    /// The sum of these terms.
    pub fn new(terms: Vec<Term>) -> Self {
        let mut needs = Needs::default();
        for (index, term) in terms.iter().enumerate() {
            let own = term.formula.needs();
            needs.tensors.extend(&own.tensors);
            needs.numbers.extend(own.numbers.iter().cloned());
            needs.whole_step |= own.whole_step;
            needs.state.extend(own.state.iter().map(|(name, initial)| (state_name(index, name), *initial)));
        }
        Sum { terms, needs }
    }

    /// A term's view of the pairs: with its own state alone, as all else is shared.
    fn view(&self, index: usize, pairs: &PairNumbers) -> PairNumbers {
        let names = self.terms[index].formula.needs().state.keys();
        let state = names.filter_map(|name| Some((name.clone(), *pairs.state.get(&state_name(index, name))?)));
        PairNumbers { tensors: shared(&pairs.tensors), numbers: shared(&pairs.numbers), state: state.collect() }
    }
}

fn shared<K: Ord + Clone>(tensors: &BTreeMap<K, tch::Tensor>) -> BTreeMap<K, tch::Tensor> {
    tensors.iter().map(|(name, tensor)| (name.clone(), tensor.shallow_clone())).collect()
}

fn state_name(index: usize, name: &str) -> String {
    format!("{index}.{name}")
}

impl Objective for Sum {
    fn needs(&self) -> &Needs {
        &self.needs
    }

    fn losses(&self, pairs: &PairNumbers) -> sapo_flow_training::Result<PairLosses> {
        let mut sum: Option<tch::Tensor> = None;
        let (mut report, mut state) = (Vec::new(), Vec::new());
        for (index, term) in self.terms.iter().enumerate() {
            let of = |error| Error::Argument(format!("objective `{}`: {error}", term.name));
            let found = term.formula.losses(&self.view(index, pairs)).map_err(of)?;
            let weighted = if term.weight == 1.0 {
                found.losses.shallow_clone()
            } else {
                found.losses.f_mul_scalar(term.weight)?
            };
            sum = Some(match sum {
                Some(sum) => sum.f_add(&weighted)?,
                None => weighted,
            });
            if self.terms.len() > 1 {
                report.push((format!("loss/{}", term.name), found.losses));
            }
            // Where several terms report one metric it is the first one's.
            let known: Vec<String> = report.iter().map(|(name, _): &(String, _)| name.clone()).collect();
            report.extend(found.report.into_iter().filter(|(name, _)| !known.contains(name)));
            state.extend(found.state.into_iter().map(|(name, value)| (state_name(index, &name), value)));
        }
        let losses = sum.ok_or_else(|| Error::Argument("an objective without terms".into()))?;
        Ok(PairLosses { losses, report, state })
    }
}

//! Objectives in plain Rust for the learner's tests, each written from its paper. (Those of pipelines are formulas, which
//! the operators crate tests against golden/objectives.json.)

use std::collections::BTreeMap;
use std::sync::Arc;

use sapo_flow_training::Result;
use sapo_flow_training::objectives::math::log1mexp;
use sapo_flow_training::objectives::{Needs, Objective, PairLosses, PairNumbers, PairTensor};
use tch::{Kind, Tensor};

type Losses = fn(&PairNumbers, f64) -> PairLosses;

#[derive(Debug)]
struct Written {
    needs: Needs,
    beta: f64,
    losses: Losses,
}

impl Objective for Written {
    fn needs(&self) -> &Needs {
        &self.needs
    }

    fn losses(&self, pairs: &PairNumbers) -> Result<PairLosses> {
        Ok((self.losses)(pairs, self.beta))
    }
}

fn written<const N: usize>(tensors: [PairTensor; N], beta: f64, losses: Losses) -> Arc<dyn Objective> {
    Arc::new(Written { needs: Needs { tensors: tensors.into(), ..Needs::default() }, beta, losses })
}

fn rewards(chosen: &Tensor, rejected: &Tensor) -> Vec<(String, Tensor)> {
    vec![
        ("rewards/chosen".into(), chosen.shallow_clone()),
        ("rewards/rejected".into(), rejected.shallow_clone()),
        ("rewards/accuracies".into(), chosen.gt_tensor(rejected).to_kind(Kind::Float)),
        ("rewards/margins".into(), chosen - rejected),
    ]
}

/// ORPO (arXiv 2403.07691, equations 6 and 7) with an NLL over prompt and response (`SequenceNll`) or the response
/// (`ChosenNll`).
pub fn orpo(beta: f64, nll: PairTensor) -> Arc<dyn Objective> {
    written([nll, PairTensor::ChosenAvgLogps, PairTensor::RejectedAvgLogps], beta, |pairs, beta| {
        let [chosen, rejected] =
            [PairTensor::ChosenAvgLogps, PairTensor::RejectedAvgLogps].map(|of| &pairs.tensors[&of]);
        let nll = &pairs.tensors[pairs.tensors.keys().find(|of| of.name().ends_with("nll")).unwrap()];
        let log_odds = (chosen - rejected) - (log1mexp(chosen).unwrap() - log1mexp(rejected).unwrap());
        let ratio = log_odds.log_sigmoid();
        let mut report = rewards(&(chosen * beta), &(rejected * beta));
        report.push(("logps/chosen".into(), chosen.shallow_clone()));
        report.push(("logps/rejected".into(), rejected.shallow_clone()));
        report.push(("nll_loss".into(), nll.shallow_clone()));
        report.push(("log_odds_ratio".into(), ratio.shallow_clone()));
        report.push(("log_odds_chosen".into(), log_odds));
        PairLosses { losses: nll - ratio * beta, report, state: vec![] }
    })
}

const AGAINST_REFERENCE: [PairTensor; 4] =
    [PairTensor::ChosenLogps, PairTensor::RejectedLogps, PairTensor::RefChosenLogps, PairTensor::RefRejectedLogps];

/// Log-ratios of policy to reference, chosen and rejected.
fn log_ratios(pairs: &PairNumbers) -> [Tensor; 2] {
    let [chosen, rejected, ref_chosen, ref_rejected] = AGAINST_REFERENCE.map(|of| &pairs.tensors[&of]);
    [chosen - ref_chosen, rejected - ref_rejected]
}

/// DPO (arXiv 2305.18290, equation 7).
pub fn dpo(beta: f64) -> Arc<dyn Objective> {
    written(AGAINST_REFERENCE, beta, |pairs, beta| {
        let [chosen, rejected] = log_ratios(pairs);
        let mut report = rewards(&(&chosen * beta), &(&rejected * beta));
        for (name, of) in [("logps/chosen", PairTensor::ChosenLogps), ("logps/rejected", PairTensor::RejectedLogps)] {
            report.push((name.into(), pairs.tensors[&of].shallow_clone()));
        }
        PairLosses { losses: -((chosen - rejected) * beta).log_sigmoid(), report, state: vec![] }
    })
}

/// IPO (arXiv 2310.12036, equation 17).
pub fn ipo(beta: f64) -> Arc<dyn Objective> {
    written(AGAINST_REFERENCE, beta, |pairs, beta| {
        let [chosen, rejected] = log_ratios(pairs);
        PairLosses { losses: (chosen - rejected - 0.5 / beta).square(), report: vec![], state: vec![] }
    })
}

/// Negative log-likelihood of the chosen answer.
pub fn sft(nll: PairTensor) -> Arc<dyn Objective> {
    written([nll], 0.0, |pairs, _| {
        let losses = pairs.tensors.values().next().unwrap().shallow_clone();
        PairLosses { losses, report: vec![], state: vec![] }
    })
}

/// A loss in which each pair depends on all of its step, and on the steps before: -log sigmoid(beta (D - m)) with m the
/// mean over the step's D, plus half of what m was at the step before. It looks at all that can be asked for.
pub fn entangled(beta: f64) -> Arc<dyn Objective> {
    let losses: Losses = |pairs, beta| {
        let [chosen, rejected] = log_ratios(pairs);
        let margin = chosen - rejected + &pairs.tensors[&PairTensor::ChosenTailLogps] * 0.5;
        let mean = margin.mean(Kind::Float) + 0.5 * pairs.state["mean"];
        let weight = pairs.tensors[&PairTensor::RejectedCollisionEntropy].exp();
        let losses = -((margin - &mean) * beta).log_sigmoid() * weight * &pairs.numbers["weight"];
        let report = PairTensor::ALL.map(|of| (of.name().to_owned(), pairs.tensors[&of].shallow_clone()));
        let report = report.into_iter().chain([("mean".to_owned(), mean.shallow_clone())]).collect();
        PairLosses { losses, report, state: vec![("mean".into(), mean.detach())] }
    };
    let needs = Needs {
        tensors: PairTensor::ALL.into(),
        numbers: ["weight".to_owned()].into(),
        whole_step: true,
        state: BTreeMap::from([("mean".to_owned(), 0.25)]),
    };
    Arc::new(Written { needs, beta, losses })
}

//! What the way through expressions costs: a training step of DPO as the built-in formula, and with the same loss written
//! in Rust, on a model of your choice.
//!
//! ```sh
//! cargo run --release --example time_of_formulas -- tests/golden/models/llama
//! ```
//!
//! A formula takes the same time for every model, so that a tiny one shows the largest share.

use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use sapo_flow_operators::objectives::ObjectiveConfig;
use sapo_flow_training::device;
use sapo_flow_training::learner::{Example, LayoutKind, Learner, LearnerSettings, reference_logps};
use sapo_flow_training::logps::Limits;
use sapo_flow_training::model::{Compute, Model};
use sapo_flow_training::objectives::{Needs, Objective, PairLosses, PairNumbers, PairTensor};
use sapo_flow_training::optim::{Rule, Schedule, ScheduleKind, Warmup};
use tch::{Kind, Tensor};

const BETA: f64 = 0.1;
/// Pairs of a step, and tokens of a prompt and of each response.
const PAIRS: u32 = 8;
const TOKENS: u32 = 64;
const STEPS: u32 = 50;

/// DPO without a formula: the loss, and the metrics that the formula reports.
#[derive(Debug)]
struct ByHand {
    needs: Needs,
}

impl ByHand {
    fn new() -> Self {
        use PairTensor::{ChosenLogps, RefChosenLogps, RefRejectedLogps, RejectedLogps};
        let tensors = [ChosenLogps, RejectedLogps, RefChosenLogps, RefRejectedLogps].into_iter().collect();
        ByHand { needs: Needs { tensors, ..Needs::default() } }
    }
}

impl Objective for ByHand {
    fn needs(&self) -> &Needs {
        &self.needs
    }

    fn losses(&self, pairs: &PairNumbers) -> sapo_flow_training::Result<PairLosses> {
        let of = |tensor: PairTensor| -> &Tensor { &pairs.tensors[&tensor] };
        let chosen = of(PairTensor::ChosenLogps).f_sub(of(PairTensor::RefChosenLogps))?;
        let rejected = of(PairTensor::RejectedLogps).f_sub(of(PairTensor::RefRejectedLogps))?;
        let losses = chosen.f_sub(&rejected)?.f_mul_scalar(BETA)?.f_log_sigmoid()?.f_neg()?;
        let (chosen, rejected) = (chosen.f_mul_scalar(BETA)?, rejected.f_mul_scalar(BETA)?);
        let accurate = chosen.f_gt_tensor(&rejected)?.f_to_kind(chosen.kind())?;
        let margins = chosen.f_sub(&rejected)?;
        let report = vec![
            ("rewards/accuracies".to_owned(), accurate),
            ("rewards/margins".to_owned(), margins),
            ("rewards/chosen".to_owned(), chosen),
            ("rewards/rejected".to_owned(), rejected),
            ("logps/chosen".to_owned(), of(PairTensor::ChosenLogps).shallow_clone()),
            ("logps/rejected".to_owned(), of(PairTensor::RejectedLogps).shallow_clone()),
        ];
        Ok(PairLosses { losses, report, state: Vec::new() })
    }
}

/// Pairs of small token ids, which every vocabulary has.
fn examples() -> Vec<Example> {
    let ids = |seed: u32| (0..TOKENS).map(|n| 3 + (seed * 31 + n * 7) % 90).collect::<Vec<u32>>();
    let pair = |n: u32| Example {
        prompt_ids: ids(3 * n),
        chosen_ids: ids(3 * n + 1),
        rejected_ids: Some(ids(3 * n + 2)),
        ..Example::default()
    };
    (0..PAIRS).map(pair).collect()
}

/// Seconds of the fastest of many calls: other work on the machine only adds to it.
fn fastest<T, E>(times: u32, mut call: impl FnMut() -> Result<T, E>) -> Result<f64, E> {
    let mut best = f64::INFINITY;
    for _ in 0..times {
        let began = Instant::now();
        call()?;
        best = best.min(began.elapsed().as_secs_f64());
    }
    Ok(best)
}

/// Seconds of a step of DPO on the model, and of its losses alone.
fn time(model: &Path, objective: Arc<dyn Objective>) -> anyhow::Result<(f64, f64)> {
    let Model { decoder, parameters, .. } = Model::load(model, device::parse("cpu")?, Kind::Float)?;
    let compute = Compute::new(Kind::Float);
    let mut examples = examples();
    let logps = reference_logps(&decoder, &parameters, &examples, &compute, PAIRS as usize)?;
    examples.iter_mut().zip(logps).for_each(|(example, logps)| example.reference = Some(logps));
    let leaf = |first: f64| {
        let values: Vec<f64> = (0..PAIRS).map(|n| first + f64::from(n)).collect();
        Tensor::from_slice(&values).to_kind(Kind::Float).set_requires_grad(true)
    };
    let tensors = objective.needs().tensors.iter().zip(1..).map(|(of, n)| (*of, leaf(-10.0 * f64::from(n)))).collect();
    let pairs = PairNumbers { tensors, ..PairNumbers::default() };
    let losses = fastest(20 * STEPS, || objective.losses(&pairs))?;
    let settings = LearnerSettings {
        objective,
        optimizer: Rule::Sgd { weight_decay: 0.0 },
        learning_rate: 1e-6,
        schedule: Schedule::new(ScheduleKind::Constant, Warmup::Steps(0), u64::from(STEPS))?,
        max_grad_norm: None,
        layout: LayoutKind::SharedPrefix,
        gradient_checkpointing: false,
        release_gradients: false,
        seed: 0,
        freeze: Vec::new(),
        compute,
        logits: Limits::default(),
    };
    let mut learner = Learner::new(decoder, parameters, settings)?;
    let step = fastest(STEPS, || learner.step(0, &examples, PAIRS as usize))?;
    Ok((step, losses))
}

fn main() -> anyhow::Result<()> {
    let model = std::env::args().nth(1).unwrap_or_else(|| "tests/golden/models/llama".into());
    let config: ObjectiveConfig = serde_yaml::from_str(&format!("{{name: dpo, beta: {BETA}}}"))?;
    let formula = config.compile().map_err(|issues| anyhow::anyhow!("{issues:?}"))?;
    let (step_by_hand, by_hand) = time(Path::new(&model), Arc::new(ByHand::new()))?;
    let (step, formula) = time(Path::new(&model), Arc::new(formula))?;
    println!("{model}, {PAIRS} pairs of {} tokens, the fastest of {STEPS} steps", 3 * TOKENS);
    println!("the losses:  by formula {:8.1} us, by hand {:8.1} us", formula * 1e6, by_hand * 1e6);
    println!("a step:      by formula {:8.2} ms, by hand {:8.2} ms", step * 1e3, step_by_hand * 1e3);
    println!("what the formula adds to a step: {:.2}%", 100.0 * (formula - by_hand) / step_by_hand);
    Ok(())
}

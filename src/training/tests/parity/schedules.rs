//! Learning rate multipliers of transformers' schedules: golden/schedules.json.

use sapo_flow_training::optim::{Schedule, ScheduleKind, Warmup};

use crate::golden;

#[test]
fn multipliers_match() {
    for case in golden::cases("schedules.json", 6) {
        let kind: ScheduleKind = serde_json::from_value(case["schedule"].clone()).unwrap();
        let warmup = Warmup::Steps(case["num_warmup_steps"].as_u64().unwrap_or(0));
        let expected = golden::floats(&case["lr_multiplier_before_step"]);
        let total = case["num_training_steps"].as_u64().unwrap_or(expected.len() as u64);
        let schedule = Schedule::new(kind, warmup, total).unwrap();
        let found: Vec<f64> = (0..expected.len() as u64).map(|step| schedule.multiplier(step)).collect();
        golden::assert_close(&format!("{kind:?}"), &found, &expected, 1e-12);
    }
}

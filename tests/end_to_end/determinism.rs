//! The same pipeline and seed give the same bytes; another seed gives others.

use crate::workplace::{SAPO_ORPO, Workplace};

#[test]
fn the_seed_decides_every_byte() {
    let here = Workplace::new();
    here.pipeline("p.yaml", SAPO_ORPO);
    for max_staleness in [0, 2] {
        let staleness = format!("max_staleness={max_staleness}");
        let run = |name: &str, seed: &str| here.run("p.yaml", &format!("{name}-{max_staleness}"), &[&staleness, seed]);
        let first = run("first", "seed=7");
        assert_eq!(first.metrics.len(), 16);
        first.assert_same(&run("again", "seed=7"), &staleness);
        let other = run("other", "seed=8");
        assert_ne!(first.samples, other.samples);
        assert!(first.models[0] != other.models[0] && first.models[1] != other.models[1]);
        // The average lags behind the policy.
        assert!(first.models[0] != first.models[1]);
    }
}

#[test]
fn two_threads_give_the_same_bytes_each_time() {
    let here = Workplace::on_two_threads(SAPO_ORPO);
    let run = |name: &str| here.run("p.yaml", name, &["max_staleness=1", "steps=6"]);
    run("first").assert_same(&run("again"), "two threads");
}

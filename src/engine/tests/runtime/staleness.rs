//! Which version of the weights made which sample is a function of the graph, never of timing.

use sapo_flow_engine::runtime::Outcome;

use crate::toys::{expected, run_fresh, self_play};

#[test]
fn staleness_equals_the_declared_bound_at_every_step() {
    for max_staleness in [0, 1, 3] {
        let (report, seen) = run_fresh(&self_play(max_staleness, 0, ""), 1).expect("the run completes");
        assert_eq!(report.outcome, Outcome::Completed);
        assert_eq!((report.total_steps, report.steps_done), (20, 20));
        assert_eq!(seen, expected(max_staleness, 20), "max_staleness {max_staleness}");
    }
}

#[test]
fn slow_device_threads_change_nothing() {
    for salt in [1, 2, 3] {
        let (_, seen) = run_fresh(&self_play(2, salt, ""), 1).expect("the run completes");
        assert_eq!(seen, expected(2, 20), "salt {salt}");
    }
}

#[test]
fn any_number_of_workers_gives_the_same() {
    for workers in [2, 3] {
        let (report, seen) = run_fresh(&self_play(1, 5, ""), workers).expect("the run completes");
        assert_eq!(seen, expected(1, 20), "{workers} workers");
        assert_eq!(report.busy.len(), 4);
    }
}

//! A node that fails ends the run with its name, whatever else is under way.

use std::time::Duration;

use crate::toys::{run_fresh, self_play};

fn failure(max_staleness: u64, learner_config: &str, workers: usize) -> String {
    run_fresh(&self_play(max_staleness, 1, learner_config), workers).expect_err("the learner fails").to_string()
}

#[test]
fn an_error_names_node_and_step() {
    assert_eq!(failure(0, "fail_at: 7", 1), "node `learner` at step 7: loss is not finite");
    assert_eq!(failure(2, "fail_at: 0", 1), "node `learner` at step 0: loss is not finite");
}

#[test]
fn a_panic_names_node_and_step() {
    assert_eq!(failure(2, "fail_at: 3\nfail_how: panic", 1), "node `learner` at step 3: panicked: out of luck");
}

/// No answer comes, and none ever will: the run must not wait for it.
#[test]
fn a_thread_that_dies_ends_the_run() {
    const PATIENCE: Duration = Duration::from_secs(60);
    for (max_staleness, workers) in [(0, 1), (2, 1), (1, 2)] {
        let (sender, ended) = std::sync::mpsc::channel();
        std::thread::spawn(move || sender.send(failure(max_staleness, "fail_at: 3\nfail_how: die", workers)));
        let message = ended.recv_timeout(PATIENCE).expect("the run ends");
        assert_eq!(message, "node `learner` at step 3: its device thread ended without an answer");
    }
}

#[test]
fn other_workers_end_too() {
    assert_eq!(failure(1, "fail_at: 4", 2), "node `learner` at step 4: loss is not finite");
}

#[test]
fn a_record_on_a_port_that_does_not_exist_is_an_error() {
    assert_eq!(
        failure(0, "fail_at: 2\nfail_how: port", 1),
        "node `learner` at step 2: emitted a record on port `nowhere`, which it does not have"
    );
}

//! The timeline tells what overlapped, adds up to the busy times, and survives a failure.

use std::sync::Arc;
use std::time::Duration;

use sapo_flow_engine::runtime::timeline::{Span, Timeline, Work};
use sapo_flow_engine::runtime::{RunError, RunOptions, RunReport, run};

use crate::toys::{run_fresh, self_play};

fn traced(max_staleness: u64, learner_config: &str) -> (Result<RunReport, RunError>, Vec<Span>) {
    let directory = tempfile::tempdir().expect("a temporary directory");
    let timeline = Timeline::begin();
    let options = RunOptions { timeline: Some(timeline.clone()), ..RunOptions::new(directory.path()) };
    let report = run(&self_play(max_staleness, 3, learner_config), options);
    assert_eq!(Arc::strong_count(&timeline), 1, "nobody notes anything any more");
    (report, timeline.spans())
}

/// A node's steps, as beginning and end.
fn steps(spans: &[Span], node: usize) -> Vec<(Duration, Duration)> {
    let steps = spans.iter().filter(|span| span.node == node && matches!(span.work, Work::Step(_)));
    steps.map(|span| (span.began, span.began + span.took)).collect()
}

/// For how long two nodes were at work at the same time.
fn overlap(spans: &[Span], one: usize, other: usize) -> Duration {
    let others = steps(spans, other);
    let pairs = steps(spans, one).into_iter().flat_map(|a| others.iter().map(move |b| (a, *b)));
    pairs.map(|(a, b)| a.1.min(b.1).saturating_sub(a.0.max(b.0))).sum()
}

const SAMPLER: usize = 1;
const LEARNER: usize = 2;

#[test]
fn sampling_and_learning_overlap_where_staleness_lets_them() {
    let (_, spans) = traced(0, "");
    assert_eq!(overlap(&spans, SAMPLER, LEARNER), Duration::ZERO);
    let (_, spans) = traced(2, "");
    assert!(overlap(&spans, SAMPLER, LEARNER) > Duration::ZERO);
}

#[test]
fn steps_add_up_to_the_busy_time_of_the_report() {
    let (report, spans) = traced(2, "");
    for (node, (name, busy)) in report.expect("the run completes").busy.into_iter().enumerate() {
        assert_eq!(
            steps(&spans, node).into_iter().map(|(began, ended)| ended - began).sum::<Duration>(),
            busy,
            "{name}"
        );
        let works: Vec<Work> = spans.iter().filter(|span| span.node == node).map(|span| span.work).collect();
        let expected = [Work::Build, Work::Start].into_iter().chain((0..20).map(Work::Step)).chain([Work::Finish]);
        assert_eq!(works, expected.collect::<Vec<_>>(), "{name}");
    }
}

#[test]
fn a_failed_run_has_a_timeline_up_to_its_failure() {
    let (report, spans) = traced(0, "fail_at: 4\nfail_how: panic");
    assert!(report.is_err());
    let last = spans.iter().rfind(|span| span.node == LEARNER).expect("it has worked");
    assert_eq!(last.work, Work::Step(4));
}

/// Processor time of one thread is at most the time on the clock, and no run is free.
#[test]
fn the_engine_takes_some_time_and_not_more_than_the_run() {
    let (report, _) = run_fresh(&self_play(1, 3, ""), 1).expect("the run completes");
    assert!(report.engine > Duration::ZERO);
    assert!(report.engine <= report.elapsed, "{:?} of {:?}", report.engine, report.elapsed);
}

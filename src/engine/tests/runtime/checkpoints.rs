//! A resumed run ends like one that was never interrupted; a damaged checkpoint is refused by name.

use std::fs;
use std::path::Path;
use std::sync::atomic::Ordering::SeqCst;

use sapo_flow_engine::Graph;
use sapo_flow_engine::runtime::checkpoint::LoadedCheckpoint;
use sapo_flow_engine::runtime::event::{Event, EventSender};
use sapo_flow_engine::runtime::{Outcome, RunOptions, RunReport, run};

use crate::toys::{expected, self_play};

fn with_checkpoints(mut graph: Graph, every: u64, keep: usize) -> Graph {
    graph.run.checkpoint.every = Some(every);
    graph.run.checkpoint.keep = keep;
    graph
}

fn resume(graph: &Graph, directory: &Path) -> RunReport {
    let checkpoint = LoadedCheckpoint::latest(directory, graph).expect("a sound checkpoint");
    let options = RunOptions { resume: checkpoint, ..RunOptions::new(directory) };
    run(graph, options).expect("the run completes")
}

#[test]
fn failed_runs_resume_to_the_same_end() {
    for max_staleness in [0, 2] {
        let directory = tempfile::tempdir().expect("a temporary directory");
        // Each run gets a few steps further before it fails; what fails is no part of what must stay the same, so the
        // failing graphs' checkpoints are taken up by the sound one.
        let sound = with_checkpoints(self_play(max_staleness, 3, ""), 3, 2);
        let failing = with_checkpoints(self_play(max_staleness, 3, "fail_at: 11"), 3, 2);
        run(&failing, RunOptions::new(directory.path())).expect_err("it fails at step 11");
        let checkpoint = LoadedCheckpoint::latest(directory.path(), &failing).expect("sound").expect("one was stored");
        assert_eq!(checkpoint.step, 9);
        let options = RunOptions { resume: Some(checkpoint), ..RunOptions::new(directory.path()) };
        let report = run(&sound, options).expect("the run completes");
        assert_eq!((report.steps_done, report.total_steps), (11, 20));
        let seen = fs::read_to_string(directory.path().join("seen.txt")).expect("the sink wrote it");
        assert_eq!(seen, expected(max_staleness, 20), "max_staleness {max_staleness}");
    }
}

#[test]
fn nodes_inside_of_composites_keep_their_state() {
    let inside = |mut graph: Graph| {
        graph.nodes[1].name = "outer/sampler".to_owned();
        graph.nodes[2].name = "outer/inner/learner".to_owned();
        with_checkpoints(graph, 3, 2)
    };
    let directory = tempfile::tempdir().expect("a temporary directory");
    let failing = inside(self_play(2, 3, "fail_at: 11"));
    run(&failing, RunOptions::new(directory.path())).expect_err("it fails at step 11");
    let checkpoint = LoadedCheckpoint::latest(directory.path(), &failing).expect("a sound checkpoint");
    let options = RunOptions { resume: checkpoint, ..RunOptions::new(directory.path()) };
    let report = run(&inside(self_play(2, 3, "")), options).expect("the run completes");
    assert_eq!((report.steps_done, report.total_steps), (11, 20));
    let seen = fs::read_to_string(directory.path().join("seen.txt")).expect("the sink wrote it");
    assert_eq!(seen, expected(2, 20));
}

#[test]
fn an_interrupt_stores_a_checkpoint_and_the_rest_follows() {
    for max_staleness in [0, 2] {
        let directory = tempfile::tempdir().expect("a temporary directory");
        let graph = self_play(max_staleness, 1, "");
        let (events, receiver) = EventSender::channel();
        let options = RunOptions { events, ..RunOptions::new(directory.path()) };
        let interrupt = options.interrupt.clone();
        let watcher = std::thread::spawn(move || {
            for event in receiver {
                if matches!(event, Event::StepCompleted { step: 4, .. }) {
                    interrupt.store(true, SeqCst);
                }
            }
        });
        let report = run(&graph, options).expect("an interrupt is no error");
        watcher.join().expect("the watcher only watches");
        let Outcome::Interrupted { step } = report.outcome else { panic!("{:?}", report.outcome) };
        assert!((6..20).contains(&step), "stopped after {step} steps");
        assert!(!directory.path().join("seen.txt").exists(), "finish is for completed runs");

        assert_eq!(resume(&graph, directory.path()).steps_done, 20 - step);
        let seen = fs::read_to_string(directory.path().join("seen.txt")).expect("the sink wrote it");
        assert_eq!(seen, expected(max_staleness, 20), "max_staleness {max_staleness}");
    }
}

/// Of the run's steps only one brings a checkpoint, and as many come after it: nothing else would notice.
#[test]
fn a_checkpoint_that_cannot_be_completed_stops_the_run_at_once() {
    const EVERY: u64 = 300_000;
    let directory = tempfile::tempdir().expect("a temporary directory");
    let mut graph = with_checkpoints(self_play(0, 0, ""), 3, 1);
    run(&graph, RunOptions::new(directory.path())).expect("the run completes");
    let mut checkpoint = LoadedCheckpoint::latest(directory.path(), &graph).expect("sound").expect("one was stored");
    checkpoint.step = EVERY - 3;
    graph.run.steps = Some(2 * EVERY);
    graph.run.checkpoint.every = Some(EVERY);
    let in_the_way = directory.path().join("checkpoints/step-00300000");
    fs::write(&in_the_way, "").expect("writable");

    let (events, receiver) = EventSender::channel();
    let error = run(&graph, RunOptions { resume: Some(checkpoint), events, ..RunOptions::new(directory.path()) });
    let message = error.expect_err("a file is where the checkpoint belongs").to_string();
    assert_eq!(message, format!("checkpoint {}: Not a directory (os error 20)", in_the_way.display()));
    let steps = receiver.iter().filter(|event| matches!(event, Event::StepCompleted { .. })).count() as u64;
    assert!((3..EVERY).contains(&steps), "{steps} steps");
}

#[test]
fn only_the_newest_are_kept() {
    let directory = tempfile::tempdir().expect("a temporary directory");
    run(&with_checkpoints(self_play(0, 0, ""), 4, 2), RunOptions::new(directory.path())).expect("the run completes");
    let mut names: Vec<String> = fs::read_dir(directory.path().join("checkpoints"))
        .expect("it exists")
        .map(|entry| entry.expect("readable").file_name().into_string().expect("ASCII"))
        .collect();
    names.sort();
    assert_eq!(names, ["latest", "step-00000012", "step-00000016"]);
}

#[test]
fn damage_is_refused_by_name() {
    let directory = tempfile::tempdir().expect("a temporary directory");
    let graph = with_checkpoints(self_play(1, 0, ""), 8, 1);
    run(&graph, RunOptions::new(directory.path())).expect("the run completes");
    let checkpoint = directory.path().join("checkpoints/step-00000016");
    let refused = || LoadedCheckpoint::latest(directory.path(), &graph).err().expect("refused").to_string();

    let state = checkpoint.join("nodes/learner/state.json");
    let whole = fs::read(&state).expect("the learner wrote it");
    fs::write(&state, &whole[..whole.len() - 1]).expect("writable");
    let message = refused();
    assert!(message.contains("nodes/learner/state.json: truncated or altered"), "{message}");
    fs::write(&state, &whole).expect("writable");

    fs::write(checkpoint.join("nodes/extra"), "x").expect("writable");
    let message = refused();
    assert!(message.contains("nodes/extra: not part of the checkpoint's manifest"), "{message}");
    fs::remove_file(checkpoint.join("nodes/extra")).expect("removable");

    fs::remove_file(&state).expect("removable");
    let message = refused();
    assert!(message.contains("nodes/learner/state.json: No such file"), "{message}");
    fs::write(&state, &whole).expect("writable");

    let other = with_checkpoints(self_play(2, 0, ""), 8, 1);
    let message = LoadedCheckpoint::latest(directory.path(), &other).err().expect("refused").to_string();
    assert!(message.contains("a different pipeline"), "{message}");
    assert!(LoadedCheckpoint::latest(directory.path(), &graph).expect("sound again").is_some());
}

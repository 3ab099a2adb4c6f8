//! Runs that are killed or interrupted at seeded moments, and resumed, end as if nothing had happened.

use std::fs;
use std::io::{BufRead, BufReader};
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::{Child, Stdio};

use crate::workplace::{Results, SAPO_ORPO, Workplace};

/// SAPO with DPO: the reference is another model at first, and the EMA model from step 4 on.
const SAPO_DPO: &str = r#"
  prompts: {op: prompt_source, with: {path: chats.jsonl, tokenizer: model, batch_size: 3}}
  segments:
    op: segment_sampler
    in: {prompts: prompts, weights: {from: ema, feedback: {max_staleness: "${max_staleness}"}}}
    with: {segment_tokens: 4, max_length: 48, max_prompt_tokens: 24}
  replay: {op: replay_buffer, in: segments, with: {capacity: 10, draws: 3}}
  batches: {op: batcher, in: replay.pairs, with: {batch_size: 2, max_length: 48}}
  reference:
    op: reference
    in: {batches: batches.batches, weights: {from: ema, feedback: {max_staleness: "${max_staleness}"}}}
    with: {model: reference, refresh_every: 4}
  learner:
    op: preference_learner
    in: reference
    with: {model: model, objective: dpo, optimizer: rmsprop, learning_rate: 1e-3, max_grad_norm: 1.0}
  ema: {op: ema, in: learner.weights, with: {decay: 0.5}}
  metrics: {op: metrics_sink, in: [learner.metrics, segments.metrics, replay.metrics, batches.metrics], with: {every: 2}}
  samples: {op: sample_sink, in: replay.pairs, with: {tokenizer: model, every: 1}}
  policy: {op: checkpoint, in: learner.weights}
  average: {op: checkpoint, in: ema.weights}
"#;

/// The policy samples itself.
const ON_POLICY: &str = r#"
  prompts: {op: prompt_source, with: {path: chats.jsonl, tokenizer: model, batch_size: 3}}
  segments:
    op: segment_sampler
    in: {prompts: prompts, weights: {from: learner.weights, feedback: {max_staleness: "${max_staleness}"}}}
    with: {segment_tokens: 4, max_length: 48, max_prompt_tokens: 24, responses_per_prompt: 2}
  batches: {op: batcher, in: segments.pairs, with: {batch_size: 4, max_length: 48, bucketing: length}}
  learner:
    op: preference_learner
    in: batches.batches
    with: {model: model, objective: orpo, learning_rate: 1e-3, optimizer: sgd}
  metrics: {op: metrics_sink, in: [learner.metrics, segments.metrics, batches.metrics]}
  samples: {op: sample_sink, in: segments, with: {tokenizer: model, every: 1, count: 6}}
  policy: {op: checkpoint, in: learner.weights}
"#;

/// Self-play in iterations of four updates: the model of the last one writes, and is the reference.
const ITERATIONS: &str = r#"
  prompts: {op: prompt_source, with: {path: chats.jsonl, tokenizer: model, batch_size: 3}}
  answers:
    op: segment_sampler
    in: {prompts: prompts, weights: {from: opponent, feedback: {max_staleness: "${max_staleness}"}}}
    with: {segment_tokens: all, max_length: 48, max_prompt_tokens: 24}
  batches: {op: batcher, in: answers.pairs, with: {batch_size: 4, max_length: 48}}
  reference:
    op: reference
    in: {batches: batches.batches, weights: {from: opponent, feedback: {max_staleness: "${max_staleness}"}}}
    with: {model: model, refresh_every: 1}
  learner: {op: preference_learner, in: reference, with: {model: model, objective: dpo, learning_rate: 1e-3}}
  opponent: {op: ema, in: learner.weights, with: {decay: 0, every: 4}}
  metrics: {op: metrics_sink, in: [learner.metrics, answers.metrics, batches.metrics]}
  samples: {op: sample_sink, in: answers, with: {tokenizer: model, every: 1}}
  policy: {op: checkpoint, in: learner.weights, with: {every: 4, keep: 9}}
  average: {op: checkpoint, in: opponent.weights}
"#;

/// Two steps of three have no pairs, so that the weights stay as they are; and the reference takes the EMA model's weights
/// over before they have had an update. The objective carries a running mean, and looks at all of a step.
const IDLE_STEPS: &str = r#"
  prompts: {op: prompt_source, with: {path: chats.jsonl, tokenizer: model, batch_size: 3}}
  segments:
    op: segment_sampler
    in: {prompts: prompts, weights: {from: ema, feedback: {max_staleness: "${max_staleness}"}}}
    with: {segment_tokens: 4, max_length: 48, max_prompt_tokens: 24, sample_every: 3}
  batches: {op: batcher, in: segments.pairs, with: {batch_size: 4, max_length: 48}}
  reference:
    op: reference
    in: {batches: batches.batches, weights: {from: ema, feedback: {max_staleness: "${max_staleness}"}}}
    with: {model: reference, refresh_every: 2}
  learner:
    op: preference_learner
    in: reference
    with: {model: model, objective: [{name: bco_pair, weight: 0.5}, aot], learning_rate: 1e-3}
  ema: {op: ema, in: learner.weights, with: {decay: 0.5}}
  metrics: {op: metrics_sink, in: [learner.metrics, segments.metrics, batches.metrics]}
  samples: {op: sample_sink, in: segments, with: {tokenizer: model, every: 1}}
  policy: {op: checkpoint, in: learner.weights}
  average: {op: checkpoint, in: ema.weights}
"#;

/// When to kill.
#[derive(Clone, Copy, Debug)]
enum Moment {
    /// Once it has said so many lines.
    Lines(usize),
    /// While a checkpoint is being written.
    Writing,
}

/// Kill the run at a moment, unless it ends before; whether it was killed.
fn killed(here: &Workplace, run_directory: &str, arguments: &[&str], moment: Moment) -> bool {
    let mut command = here.command(arguments);
    command.stdout(Stdio::null()).stderr(Stdio::piped());
    let mut child = command.spawn().expect("the program starts");
    let said = BufReader::new(child.stderr.take().expect("it is piped")).lines();
    match moment {
        // The pipe is kept open until the child is gone.
        Moment::Lines(count) => {
            let mut said = said;
            said.by_ref().take(count).for_each(|line| drop(line.expect("it speaks UTF-8")));
            kill(child)
        }
        Moment::Writing => {
            let reader = std::thread::spawn(move || said.for_each(drop));
            while !is_writing(&here.path(run_directory)) && child.try_wait().expect("it is ours").is_none() {
                std::thread::yield_now();
            }
            let killed = kill(child);
            reader.join().expect("it only reads");
            killed
        }
    }
}

/// SIGKILL, and wait; whether it came before the end.
fn kill(mut child: Child) -> bool {
    child.kill().expect("it is ours");
    let status = child.wait().expect("it is ours");
    assert!(status.success() || status.signal() == Some(9), "{status}");
    !status.success()
}

fn is_writing(run_directory: &Path) -> bool {
    let entries = fs::read_dir(run_directory.join("checkpoints")).into_iter().flatten().flatten();
    entries.into_iter().any(|entry| entry.file_name().to_string_lossy().starts_with(".writing-"))
}

/// Seeded moments. Every third is in the middle of writing.
fn moments(seed: u64) -> impl Iterator<Item = Moment> {
    let mut state = seed;
    std::iter::repeat_with(move || {
        // Knuth's MMIX generator.
        state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        state >> 33
    })
    .enumerate()
    .map(|(number, draw)| match number % 3 {
        2 => Moment::Writing,
        _ => Moment::Lines(1 + draw as usize % 14),
    })
}

/// Kill runs of a pipeline so many times in all, resume each until it ends, and compare it with one left alone.
fn kill_and_resume(pipeline: &str, overrides: &[&str], kills: usize, seed: u64) {
    let here = Workplace::new();
    here.pipeline("p.yaml", pipeline);
    kill_and_resume_in(&here, overrides, kills, seed);
}

/// The same for the pipeline in p.yaml.
pub fn kill_and_resume_in(here: &Workplace, overrides: &[&str], kills: usize, seed: u64) {
    let expected = here.run("p.yaml", "whole", overrides);
    let mut moments = moments(seed);
    let mut left = kills;
    for number in 0.. {
        let run_directory = format!("killed-{number}");
        let mut begin = vec!["run", "p.yaml", "--run-dir", &run_directory];
        overrides.iter().for_each(|value| begin.extend(["-S", value]));
        let resume = ["run", "--resume", &run_directory];
        let mut arguments = &begin[..];
        while left > 0 && killed(here, &run_directory, arguments, moments.next().expect("there is no end of them")) {
            left -= 1;
            arguments = &resume;
        }
        if left == 0 {
            let said = here.sapo_flow(arguments);
            assert_eq!(said.code, Some(0), "{}", said.stderr);
        }
        expected.assert_same(&here.results(&run_directory), &run_directory);
        assert_tidy(here, &run_directory);
        if left == 0 {
            break;
        }
    }
}

/// Nothing half written is left, and the event file is as long as it should be.
fn assert_tidy(here: &Workplace, run_directory: &str) {
    assert!(!is_writing(&here.path(run_directory)), "{run_directory}");
    let events = |run: &str| fs::metadata(here.path(run).join("tensorboard/metrics/events.out.tfevents.0")).unwrap();
    assert_eq!(events(run_directory).len(), events("whole").len());
}

#[test]
fn sapo_orpo_survives_ten_kills() {
    kill_and_resume(SAPO_ORPO, &["max_staleness=0"], 10, 1);
}

#[test]
fn sapo_orpo_survives_ten_kills_when_it_samples_ahead() {
    kill_and_resume(SAPO_ORPO, &["max_staleness=2"], 10, 2);
}

#[test]
fn sapo_orpo_on_two_threads_survives_kills() {
    kill_and_resume_in(&Workplace::on_two_threads(SAPO_ORPO), &["max_staleness=1", "steps=8"], 2, 13);
}

#[test]
fn sapo_dpo_survives_kills() {
    kill_and_resume(SAPO_DPO, &["max_staleness=0"], 3, 3);
    kill_and_resume(SAPO_DPO, &["max_staleness=2"], 3, 4);
}

/// Weights and average in bfloat16, optimizer state in 8 bits, gradients released.
#[test]
fn sapo_dpo_in_little_memory_survives_kills() {
    let little = SAPO_DPO
        .replace("{batch_size: 2, max_length: 48}", "{batch_size: 3, max_length: 48}")
        .replace("optimizer: rmsprop", "optimizer: adamw_8bit, weights: bfloat16, gradient_checkpointing: true")
        .replace("max_grad_norm: 1.0", "release_gradients: true")
        .replace("{decay: 0.5}", "{decay: 0.9, dtype: bfloat16}");
    assert!(little.contains("weights: bfloat16") && little.contains("dtype: bfloat16"));
    kill_and_resume(&little, &["max_staleness=0"], 3, 10);
    kill_and_resume(&little, &["max_staleness=2"], 3, 11);
}

#[test]
fn a_policy_that_samples_itself_survives_kills() {
    kill_and_resume(ON_POLICY, &["max_staleness=2"], 4, 5);
}

#[test]
fn steps_without_pairs_survive_kills() {
    kill_and_resume(IDLE_STEPS, &["max_staleness=2"], 4, 6);
}

#[test]
fn self_play_in_iterations_survives_kills() {
    kill_and_resume(ITERATIONS, &["max_staleness=0"], 3, 8);
    kill_and_resume(ITERATIONS, &["max_staleness=2"], 3, 9);
}

#[test]
fn the_opponent_is_the_model_of_the_last_iteration() {
    let here = Workplace::new();
    here.pipeline("p.yaml", ITERATIONS);
    let results = here.run("p.yaml", "out", &["steps=14"]);
    // At step t, after t updates, the newest multiple of four at most t.
    let staleness: Vec<u64> = results.metrics.iter().map(|step| step["staleness"].as_f64().unwrap() as u64).collect();
    assert_eq!(staleness, [0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3, 0, 1]);
    let saved = |name: &str| fs::read(here.path("out").join(name).join("model.safetensors")).unwrap();
    assert!(results.models[1] == saved("policy/checkpoint-12"));
    // The reference is the policy at the beginning of an iteration, and at no other step.
    let margins = results.metrics.iter().map(|step| step["rewards/margins"].as_f64().unwrap());
    let alike: Vec<usize> =
        margins.enumerate().filter(|(_, margin)| margin.abs() < 1e-4).map(|(step, _)| step).collect();
    assert_eq!(alike, [0, 4, 8, 12]);

    // With a decay of 1 it stays what it was at first; other averages move after every `every` updates.
    let first = ITERATIONS.replace("{decay: 0, every: 4}", "{decay: 1}");
    here.pipeline("first.yaml", &first);
    let [two, three] = ["2", "3"].map(|steps| here.run("first.yaml", steps, &[&format!("steps={steps}")]));
    assert_eq!(three.metrics[2]["staleness"], 2.0);
    assert!(two.models[0] != three.models[0] && two.models[1] == three.models[1]);
}

#[test]
fn online_self_play_survives_kills() {
    kill_and_resume(crate::relational::ONLINE, &["max_staleness=1"], 4, 7);
}

/// Interrupt once the run has said that it has done so many steps.
fn interrupt_after(here: &Workplace, arguments: &[&str], steps: u64) {
    let mut command = here.command(arguments);
    let mut child = command.stdout(Stdio::null()).stderr(Stdio::piped()).spawn().expect("the program starts");
    let mut said = BufReader::new(child.stderr.take().expect("it is piped")).lines().map(Result::unwrap);
    let done = |line: &String| line.strip_prefix("step ")?.split_once('/')?.0.parse().ok();
    said.by_ref().find(|line| done(line).is_some_and(|done: u64| done >= steps)).expect("it comes that far");
    let sent = std::process::Command::new("kill").args(["-INT", &child.id().to_string()]).status();
    assert!(sent.expect("there is a kill").success());
    let rest: Vec<String> = said.collect();
    assert_eq!(child.wait().expect("it is ours").code(), Some(130), "{rest:?}");
    assert!(rest.last().is_some_and(|line| line.contains("go on with: sapo-flow run --resume")), "{rest:?}");
}

#[test]
fn an_interrupted_run_ends_with_the_same_bytes() {
    let here = Workplace::new();
    here.pipeline("p.yaml", SAPO_ORPO);
    for max_staleness in ["max_staleness=0", "max_staleness=2"] {
        let overrides = [max_staleness, "steps=40"];
        let whole = format!("whole-{max_staleness}");
        let expected = here.run("p.yaml", &whole, &overrides);
        let out = format!("out-{max_staleness}");
        interrupt_after(&here, &["run", "p.yaml", "--run-dir", &out, "-S", overrides[0], "-S", overrides[1]], 2);
        interrupt_after(&here, &["run", "--resume", &out], 12);
        assert_eq!(here.sapo_flow(&["run", "--resume", &out]).code, Some(0));
        expected.assert_same(&here.results(&out), max_staleness);
    }
}

#[test]
fn leftovers_of_a_killed_run_do_no_harm() {
    let here = Workplace::new();
    here.pipeline("p.yaml", SAPO_ORPO);
    let expected = here.run("p.yaml", "out", &[]);
    let checkpoints = here.path("out/checkpoints");
    // As if it had been killed between two renames, when the checkpoint of step 15 was in place, but not the latest; and
    // earlier, in the middle of two others.
    fs::write(checkpoints.join("latest"), "step-00000012").unwrap();
    fs::remove_file(checkpoints.join("step-00000015/manifest.json")).unwrap();
    for half_written in [".writing-step-00000015", ".writing-step-00000007"] {
        fs::create_dir_all(checkpoints.join(half_written).join("nodes/learner/learner")).unwrap();
        fs::write(checkpoints.join(half_written).join("nodes/learner/learner/model.safetensors"), "half").unwrap();
    }
    fs::create_dir_all(here.path("out/policy/.writing-final")).unwrap();
    fs::write(here.path("out/policy/.writing-final/model.safetensors"), "half").unwrap();
    for file in ["metrics.jsonl", "samples.jsonl"] {
        let text = fs::read(here.path("out").join(file)).unwrap();
        fs::write(here.path("out").join(file), &text[..text.len() - 7]).unwrap();
    }

    let said = here.sapo_flow(&["run", "--resume", "out"]);
    assert_eq!(said.code, Some(0), "{}", said.stderr);
    assert!(said.stderr.contains("training from step 12: 16 steps"), "{}", said.stderr);
    expected.assert_same(&here.results("out"), "leftovers");
    let names = |directory: &str| {
        let entries = fs::read_dir(here.path(directory)).unwrap();
        let mut names: Vec<String> = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    };
    assert_eq!(names("out/checkpoints"), ["latest", "step-00000012", "step-00000015"]);
    assert_eq!(names("out/policy"), ["checkpoint-15", "final"]);
}

#[test]
fn a_run_stopped_before_its_first_checkpoint_begins_anew() {
    let here = Workplace::new();
    here.pipeline("p.yaml", SAPO_ORPO);
    let expected: Results = here.run("p.yaml", "out", &[]);
    fs::remove_dir_all(here.path("out/checkpoints")).unwrap();
    let said = here.sapo_flow(&["run", "--resume", "out"]);
    assert_eq!(said.code, Some(0), "{}", said.stderr);
    assert!(said.stderr.contains("out has no checkpoint yet: its run begins anew"), "{}", said.stderr);
    expected.assert_same(&here.results("out"), "anew");
}

#[test]
fn a_run_without_a_checkpoint_begins_anew_with_its_own_pipeline_only() {
    let here = Workplace::new();
    here.pipeline("p.yaml", SAPO_ORPO);
    let expected: Results = here.run("p.yaml", "out", &["steps=4"]);
    fs::remove_dir_all(here.path("out/checkpoints")).unwrap();
    here.pipeline("q.yaml", &SAPO_ORPO.replace("learning_rate: 1e-3", "learning_rate: 2e-3"));
    let manifest = fs::read(here.path("out/manifest.json")).unwrap();
    for (pipeline, steps, difference) in [
        ("q.yaml", "steps=4", "nodes.learner.with.learning_rate was 0.001, and is 0.002 now"),
        ("p.yaml", "steps=5", "run.steps was 4, and is 5 now"),
    ] {
        let said = here.sapo_flow(&["run", pipeline, "-S", steps, "--resume", "out"]);
        assert_eq!(said.code, Some(1), "{}", said.stderr);
        assert!(said.stderr.contains("out is the run of a different pipeline"), "{}", said.stderr);
        assert!(said.stderr.contains(difference), "{difference}: {}", said.stderr);
    }
    assert!(fs::read(here.path("out/manifest.json")).unwrap() == manifest, "a refused pipeline leaves no trace");

    // What an earlier beginning left does not mix with what comes now.
    here.write("out/evaluations.json", r#"[{"node": "gone", "version": 0, "values": {}}]"#);
    here.write("out/learner-failed-at-step-3.json", "{}");
    let said = here.sapo_flow(&["run", "p.yaml", "-S", "steps=4", "--resume", "out"]);
    assert_eq!(said.code, Some(0), "{}", said.stderr);
    expected.assert_same(&here.results("out"), "anew");
    assert!(!here.path("out/learner-failed-at-step-3.json").exists());
}

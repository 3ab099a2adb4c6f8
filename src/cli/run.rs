//! `sapo-flow run`: a pipeline from its file to a trained model.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, anyhow, bail};
use sapo_flow_engine::Graph;
use sapo_flow_engine::runtime::checkpoint::LoadedCheckpoint;
use sapo_flow_engine::runtime::event::EventSender;
use sapo_flow_engine::runtime::timeline::Timeline;
use sapo_flow_engine::runtime::{self, Outcome as RunOutcome, RunError, RunOptions, RunReport};
use sapo_flow_operators::settled_dtype;
use sapo_flow_training::device;
use serde_json::Value;

use super::args::RunArgs;
use super::lock::{self, Lock};
use super::manifest::Manifest;
use super::progress::{Display, Summary, Watcher};
use super::report::{self, Evaluations};
use super::trace::Trace;
use super::{Failure, Outcome, directory, manifest, plan, settings, show, terminal, validate};

/// How many differences between two pipelines are told of.
const DIFFERENCES_TOLD: usize = 5;

/// Which run to take up.
enum Resume {
    No,
    /// The latest of the pipeline.
    Latest,
    Directory(PathBuf),
}

/// Run a pipeline.
pub fn run(args: RunArgs) -> Outcome {
    device::keep_memory();
    let (pipeline, resume) = what_to_run(&args)?;
    let mut graph = with_options(validate::load(&pipeline, &args.overrides.overrides)?, &args);
    if !args.quiet {
        show(&graph.warnings);
    }
    if args.dry_run {
        return plan::show(&directory::stem(&pipeline), &graph);
    }
    let trace = args.trace.as_ref().map(|path| Trace::begin(path, &pipeline, &graph)).transpose()?;
    let device = device::name(device::parse(&graph.run.device)?);
    let (run_directory, _lock, checkpoint) = match resume {
        Resume::No => {
            let (run_directory, lock) = begin(&args, &graph, &pipeline, device)?;
            (run_directory, lock, None)
        }
        Resume::Latest => take_up(directory::latest(&graph, &pipeline)?, &mut graph, &args)?,
        Resume::Directory(run_directory) => take_up(run_directory, &mut graph, &args)?,
    };
    let display = match args.quiet {
        true => Display::Quiet,
        false if terminal::is_watched() => Display::Bar,
        false => Display::Lines,
    };
    if !args.quiet {
        terminal::message(&format!("run directory: {}", run_directory.display()));
    }
    let timeline = trace.as_ref().map(|trace| trace.timeline.clone());
    let executed = execute(&graph, &run_directory, checkpoint, display, timeline);
    let traced = trace.as_ref().map(Trace::write).transpose();
    let noted = manifest::end(&run_directory, executed.as_ref().map(|(report, _)| report));
    if let (Ok(Some(path)), false) = (&traced, args.quiet) {
        terminal::message(&format!("timeline: {}", path.display()));
    }
    let (report, summary) = executed?;
    noted?;
    traced?;
    finish(&report, &summary, &run_directory, args.quiet)
}

/// The pipeline with what the command line says of its `run` block, and with what `dtype: auto` comes to here. The stored
/// pipeline runs again as it is.
fn with_options(mut graph: Graph, args: &RunArgs) -> Graph {
    graph.run.seed = args.seed.unwrap_or(graph.run.seed);
    graph.run.dtype = settled_dtype(&graph.run).into();
    if let Some(run) = graph.resolved.get_mut("run").and_then(|run| run.as_mapping_mut()) {
        run.insert("seed".into(), graph.run.seed.into());
        run.insert("dtype".into(), graph.run.dtype.to_string().into());
    }
    graph.run.threads = graph.run.threads.or(given_threads(args));
    graph
}

/// The threads that the command line gives a fresh run, or else OpenMP's variable, as PyTorch takes it. A resumed run has
/// those that it began with.
fn given_threads(args: &RunArgs) -> Option<usize> {
    let from_environment = || std::env::var("OMP_NUM_THREADS").ok()?.split(',').next()?.trim().parse().ok();
    let given = args.threads.map(usize::from).or_else(from_environment);
    given.filter(|threads| *threads > 0 && args.resume.is_none())
}

/// The pipeline's file, and the run to go on with.
fn what_to_run(args: &RunArgs) -> Result<(PathBuf, Resume), Failure> {
    let latest = Path::new("latest");
    if let Some(resume) = args.resume.as_deref().filter(|resume| *resume != latest && !resume.is_file())
        && !manifest::is_there(resume)
    {
        let found = if resume.is_dir() { "holds no run" } else { "is no directory" };
        return Err(anyhow!("cannot resume: {} {found}", resume.display()).into());
    }
    match (&args.pipeline, &args.resume) {
        (Some(directory), _) if manifest::is_there(directory) => Err(Failure::Usage(format!(
            "{} is the directory of a run, and no pipeline: go on with it by `sapo-flow run --resume {}`",
            directory.display(),
            directory.display()
        ))),
        (Some(pipeline), None) => Ok((pipeline.clone(), Resume::No)),
        (Some(pipeline), Some(resume)) if resume == latest => Ok((pipeline.clone(), Resume::Latest)),
        (Some(pipeline), Some(resume)) => Ok((pipeline.clone(), Resume::Directory(resume.clone()))),
        // `run --resume p.yaml`
        (None, Some(file)) if file.is_file() => Ok((file.clone(), Resume::Latest)),
        (None, Some(resume)) if resume != latest => {
            Ok((resume.join(directory::PIPELINE), Resume::Directory(resume.clone())))
        }
        _ => Err(Failure::Usage("which pipeline? Give its file, or a run directory with `--resume RUN_DIR`".into())),
    }
}

/// The directory of a fresh run, with its lock. Where it cannot be made whole, nothing of it stays: without a manifest it
/// would be neither a run to go on with nor an empty directory.
fn begin(args: &RunArgs, graph: &Graph, pipeline: &Path, device: String) -> anyhow::Result<(PathBuf, Lock)> {
    let wanted = args.run_dir.as_deref().unwrap_or(Path::new(&graph.run.directory));
    let absent = directory::absent(wanted);
    let run_directory = match &args.run_dir {
        Some(directory) => directory::create_at(directory)?,
        None => directory::create(graph, pipeline)?,
    };
    let lock = lock::take(&run_directory)?;
    let written = directory::write_pipeline(&run_directory, graph, pipeline)
        .and_then(|()| manifest::create(&run_directory, graph, pipeline, device, given_threads(args)));
    if let Err(error) = written {
        let is_ours = args.run_dir.is_none() || absent.contains(&run_directory);
        directory::clear_beginning(&run_directory);
        for directory in is_ours.then_some(&run_directory).into_iter().chain(&absent) {
            // One that others have put something into stays.
            let _ = fs::remove_dir(directory);
        }
        return Err(error);
    }
    Ok((run_directory, lock))
}

/// A run directory with its newest checkpoint. A run that was stopped before its first one begins anew: with the same
/// pipeline, since the directory says that it is this one's.
fn take_up(
    run_directory: PathBuf,
    graph: &mut Graph,
    args: &RunArgs,
) -> anyhow::Result<(PathBuf, Lock, Option<LoadedCheckpoint>)> {
    let lock = lock::take(&run_directory)?;
    let manifest = Manifest::read(&run_directory)?;
    // Sums are the same to the last bit only if as many threads share them.
    graph.run.threads = graph.run.threads.or(manifest.given_threads);
    if let Some(began) = manifest.working_directory
        && std::env::current_dir().is_ok_and(|now| now != began)
        && !args.quiet
    {
        terminal::message(&format!("the run began in {}: its paths were relative to that", began.display()));
    }
    let checkpoint = match LoadedCheckpoint::latest(&run_directory, graph) {
        Err(error @ RunError::OtherPipeline { .. }) => {
            // What the checkpoint's hash says is said by the settings, where those that are stored can be compared.
            same_pipeline(&run_directory, graph, args)?;
            return Err(error.into());
        }
        loaded => loaded?,
    };
    if checkpoint.is_none() {
        same_pipeline(&run_directory, graph, args)?;
    }
    manifest::resume(&run_directory, graph, checkpoint.as_ref().map_or(0, |checkpoint| checkpoint.step))?;
    if checkpoint.is_none() {
        directory::clear_results(&run_directory)?;
        if !args.quiet {
            terminal::message(&format!("{} has no checkpoint yet: its run begins anew", run_directory.display()));
        }
    }
    Ok((run_directory, lock, checkpoint))
}

/// Refuse a pipeline that is not the one that a run directory stores. How often checkpoints are taken, and how many are
/// kept, may differ, as it may where there is a checkpoint.
fn same_pipeline(run_directory: &Path, graph: &Graph, args: &RunArgs) -> anyhow::Result<()> {
    let mut found = settings::differences(&settings::stored(run_directory)?, &settings::of(&graph.resolved)?);
    found.retain(|(name, _)| !name.starts_with("run.checkpoint"));
    if found.is_empty() {
        return Ok(());
    }
    let text = |value: &Option<Value>| value.as_ref().map_or("absent".to_owned(), Value::to_string);
    let mut list: Vec<String> = found
        .iter()
        .take(DIFFERENCES_TOLD)
        .map(|(name, [then, now])| format!("{name} was {}, and is {} now", text(then), text(now)))
        .collect();
    if found.len() > list.len() {
        list.push(format!("and {} more", found.len() - list.len()));
    }
    let directory = run_directory.display();
    let way_on = match args.pipeline.is_some() || args.resume.as_ref().is_some_and(|resume| resume.is_file()) {
        true => format!("go on with it as it was by `sapo-flow run --resume {directory}`, or start a fresh run"),
        false => "start a fresh run".to_owned(),
    };
    bail!("{directory} is the run of a different pipeline: {}; {way_on}", list.join("; "))
}

fn execute(
    graph: &Graph,
    run_directory: &Path,
    checkpoint: Option<LoadedCheckpoint>,
    display: Display,
    timeline: Option<Arc<Timeline>>,
) -> anyhow::Result<(RunReport, Summary)> {
    let (events, receiver) = EventSender::channel();
    let watcher = Watcher::start(receiver, display, Evaluations::load(run_directory)?);
    let interrupt = interrupt_flag()?;
    let options = RunOptions { resume: checkpoint, interrupt, events, timeline, ..RunOptions::new(run_directory) };
    let report = runtime::run(graph, options);
    let summary = watcher.finish()?;
    let report = report.with_context(|| format!("the run in {} failed", run_directory.display()))?;
    Ok((report, summary))
}

/// Set by Ctrl-C, or a polite kill. A second one ends the process at once, but not one within a moment of the first: a
/// dying parent's threads, or a terminal and a shell, send it twice.
fn interrupt_flag() -> anyhow::Result<Arc<AtomicBool>> {
    const MOMENT: Duration = Duration::from_millis(200);
    let flag = Arc::new(AtomicBool::new(false));
    let set = flag.clone();
    let mut first: Option<Instant> = None;
    ctrlc::set_handler(move || {
        set.store(true, Ordering::SeqCst);
        if let Some(first) = first {
            if first.elapsed() < MOMENT {
                return;
            }
            // Safety: ends the process without running anything, the destructors of libtorch least of all, which other
            // threads are using.
            unsafe { libc::_exit(130) }
        }
        first = Some(Instant::now());
        terminal::message("interrupted: finishing the step and storing a checkpoint; once more to stop at once");
    })
    .context("cannot listen for Ctrl-C")?;
    Ok(flag)
}

fn finish(report: &RunReport, summary: &Summary, run_directory: &Path, quiet: bool) -> Outcome {
    let directory = run_directory.display();
    if let RunOutcome::Interrupted { step } = report.outcome {
        if !quiet {
            terminal::message(&format!(
                "interrupted after {step} of {} steps; go on with: sapo-flow run --resume {directory}",
                report.total_steps
            ));
        }
        return Err(Failure::Interrupted);
    }
    if !quiet {
        let mut text = format!("\n{}", summary.evaluations.to_text());
        text += &format!("{}\n", report::where_time_went(report));
        for path in summary.models.values() {
            text += &format!("model  {}\n", path.display());
        }
        text += &format!("run    {directory}\n");
        terminal::print(&text)?;
    }
    Ok(())
}

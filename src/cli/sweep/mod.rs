//! `sapo-flow sweep`: a pipeline run with several values for its parameters, and several seeds.
//!
//! | module | what it holds |
//! |---|---|
//! | [`queue`] | the runs there are to be, on disk |
//! | [`jobs`] | the runs as processes, some at a time |

use std::path::{Path, PathBuf};

use super::args::SweepArgs;
use super::runs::found;
use super::runs::table;
use super::{Failure, Outcome, count, directory, lock, terminal};
use jobs::{Fate, Interrupts, Runner};
use queue::{Job, Queue};

pub mod jobs;
pub mod queue;

/// Run a sweep, or go on with one.
pub fn sweep(args: &SweepArgs) -> Outcome {
    let (directory, queue) = match (&args.resume, &args.pipeline) {
        (Some(directory), _) => (directory.clone(), Queue::resume(directory)?),
        (None, Some(pipeline)) => {
            let queue = Queue::of(pipeline, &args.overrides, args.repeat)?;
            if args.dry_run {
                let list: String = queue.jobs.iter().map(|job| format!("{}\n", job.name)).collect();
                terminal::print(&format!("{list}{}", count(queue.jobs.len(), "run")))?;
                return Ok(());
            }
            (begin(args, pipeline, &queue)?, queue)
        }
        (None, None) => return Err(Failure::Usage("which pipeline? Give its file, or `--resume SWEEP_DIR`".into())),
    };
    let _lock = lock::take(&directory)?;
    queue.write(&directory)?;
    terminal::message(&format!("sweep directory: {}, {}", directory.display(), count(queue.jobs.len(), "run")));
    let runner = Runner {
        directory: directory.clone(),
        pipeline: queue.pipeline.clone(),
        fixed: queue.fixed.clone(),
        at_a_time: usize::from(args.jobs),
        interrupts: Interrupts::listen(terminal::message)?,
    };
    let fates = runner.run(&queue.jobs, tell)?;
    conclude(&directory, &queue.jobs, &fates)
}

/// Make the directory of a new sweep.
fn begin(args: &SweepArgs, pipeline: &Path, queue: &Queue) -> anyhow::Result<PathBuf> {
    match &args.sweep_dir {
        Some(directory) => directory::create_at(directory),
        None => directory::create_named(&queue.parent, &format!("{}-sweep", directory::stem(pipeline))),
    }
}

fn tell(job: &Job, fate: Option<&Fate>) {
    let name = &job.name;
    terminal::message(&match fate {
        None => format!("{name}: begun"),
        Some(Fate::Kept) => format!("{name}: finished before"),
        Some(Fate::Finished) => format!("{name}: finished"),
        Some(Fate::Interrupted) => format!("{name}: interrupted"),
        Some(Fate::Failed(message)) => format!("{name}: failed: {message}"),
    });
}

/// Show what the runs came to.
fn conclude(directory: &Path, jobs: &[Job], fates: &[Fate]) -> Outcome {
    let found = found::find(&[directory.to_owned()])?.with_settings();
    found.warn();
    if found.runs.iter().any(found::Run::is_finished) {
        terminal::print(&format!("\n{}", table::text(&found.runs, &[])?))?;
    }
    let directory = directory.display();
    if fates.contains(&Fate::Interrupted) {
        terminal::message(&format!("interrupted; go on with: sapo-flow sweep --resume {directory}"));
        return Err(Failure::Interrupted);
    }
    let failed = fates.iter().filter(|fate| matches!(fate, Fate::Failed(_))).count();
    if failed > 0 {
        let runs = count(jobs.len(), "run");
        return Err(Failure::Failed(anyhow::anyhow!(
            "{failed} of {runs} failed: what they said is in {directory}/NAME.log; try them again with \
             `sapo-flow sweep --resume {directory}`"
        )));
    }
    terminal::print(&format!("sweep  {directory}"))?;
    Ok(())
}

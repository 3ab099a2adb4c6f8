//! `sapo-flow test`: the tests that stand in pipelines.

use std::path::Path;

use anyhow::Context;
use quick_junit::{NonSuccessKind, Report, TestCase, TestCaseStatus, TestSuite};
use sapo_flow_engine::pipeline::{self, Case, Diagnostics};

use super::args::TestArgs;
use super::directory::write_whole;
use super::{Failure, Outcome, count, terminal, validate};

/// Run the tests of pipelines.
pub fn test(args: &TestArgs) -> Outcome {
    let mut tally = Tally::default();
    let mut report = Report::new("sapo-flow test");
    for path in &args.pipelines {
        let name = path.display().to_string();
        let mut suite = TestSuite::new(&*name);
        let text = std::fs::read_to_string(path).with_context(|| format!("cannot read {name}"))?;
        let cases = pipeline::tests(&name, &text, &args.overrides.overrides, &sapo_flow_operators::registry());
        match cases {
            Ok(cases) => {
                terminal::print(&format!("{name}: {}", count(cases.len(), "test")))?;
                for case in cases {
                    suite.add_test_case(run(case, &name, &mut tally)?);
                }
            }
            Err(diagnostics) => {
                tally.invalid += 1;
                validate::invalid(path, &diagnostics);
                let status = status(NonSuccessKind::Error, "the pipeline or its tests are invalid", &diagnostics);
                suite.add_test_case(named("the pipeline is valid", &name, status));
            }
        }
        report.add_test_suite(suite);
    }
    if let Some(path) = &args.junit {
        write_report(path, &report)?;
    }
    tally.conclude()
}

/// What became of all tests.
#[derive(Default)]
struct Tally {
    passed: usize,
    failed: usize,
    invalid: usize,
}

impl Tally {
    fn conclude(&self) -> Outcome {
        let Tally { passed, failed, invalid } = self;
        let mut text = format!("{passed} passed, {failed} failed");
        if *invalid > 0 {
            text += &format!(", {} invalid", count(*invalid, "pipeline"));
        }
        terminal::print(&text)?;
        match (passed + failed, failed, invalid) {
            (_, _, 1..) => Err(Failure::Invalid),
            (0, ..) => Err(Failure::Failed(anyhow::anyhow!("there are no tests: pipelines have them under `tests`"))),
            (_, 0, _) => Ok(()),
            _ => Err(Failure::Failed(anyhow::anyhow!("{} failed", count(*failed, "test")))),
        }
    }
}

fn run(case: Case, pipeline: &str, tally: &mut Tally) -> anyhow::Result<TestCase> {
    let name = case.name.clone();
    let verdict = case.run().context("cannot make a directory for a test's run")?;
    let seconds = verdict.took.as_secs_f64();
    let status = if verdict.failures.list.is_empty() {
        tally.passed += 1;
        terminal::print(&format!("  ok      {name} ({seconds:.2} s)"))?;
        TestCaseStatus::success()
    } else {
        tally.failed += 1;
        terminal::print(&format!("  FAILED  {name} ({seconds:.2} s)\n\n{}\n", verdict.failures))?;
        status(NonSuccessKind::Failure, &verdict.failures.list[0].message, &verdict.failures)
    };
    let mut case = named(&name, pipeline, status);
    case.set_time(verdict.took);
    Ok(case)
}

fn named(name: &str, pipeline: &str, status: TestCaseStatus) -> TestCase {
    let mut case = TestCase::new(name, status);
    case.set_classname(pipeline);
    case
}

fn status(kind: NonSuccessKind, message: &str, diagnostics: &Diagnostics) -> TestCaseStatus {
    let mut status = TestCaseStatus::non_success(kind);
    status.set_message(message).set_description(diagnostics.to_string());
    status
}

fn write_report(path: &Path, report: &Report) -> anyhow::Result<()> {
    let text = report.to_string().with_context(|| format!("cannot write {} as XML", path.display()))?;
    if let Some(parent) = path.parent().filter(|parent| !parent.as_os_str().is_empty()) {
        std::fs::create_dir_all(parent).with_context(|| format!("cannot make {}", parent.display()))?;
    }
    write_whole(path, &text)
}

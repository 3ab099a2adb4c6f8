//! For tests: a source that emits what a script says, and a sink that writes down what it sees.

use std::fmt::Write;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use sapo_flow_engine::record::{Pair, Prompt, Record, Retracted, Retraction, Sample};
use sapo_flow_engine::{BuildContext, Define, Inputs, Operator, OperatorError, Outputs, PortSpec, PortType};
use schemars::JsonSchema;
use serde::Deserialize;

use super::RECORDS;

/// What `script` takes: for each step, what it emits there. `+ROW:RESPONSE=SCORE` is a sample, on `prompts` a prompt and on
/// `pairs` a pair with that answer; `-ROW` takes a row back, `-STEP.POSITION` one record.
#[derive(Clone, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Script {
    steps: Vec<String>,
}

/// Emits what its config says, the same on all its outputs.
pub struct Scripted {
    node: String,
    script: Script,
}

impl Scripted {
    /// What a word of the script stands for, on each output.
    fn records(&self, step: u64, position: u32, word: &str) -> Result<[Record; 3], OperatorError> {
        let (node, origin) = (self.node.clone(), self.node.clone());
        if let Some(of) = word.strip_prefix('-') {
            let of = match of.split_once('.') {
                Some((step, position)) => {
                    Retracted::Record { origin, step: step.parse()?, position: position.parse()? }
                }
                None => Retracted::Row { source: node, row: of.parse()? },
            };
            let taken_back = |port_type| {
                Record::Retraction(Retraction { port_type, of: of.clone(), because: Some("edited".into()) })
            };
            return Ok([PortType::Samples, PortType::Prompts, PortType::Pairs].map(taken_back));
        }
        let (row, rest) = word.trim_start_matches('+').split_once(':').ok_or("no response")?;
        let (response, score) = rest.split_once('=').ok_or("no score")?;
        let (row, response): (u64, u32) = (row.parse()?, response.parse()?);
        let values = if score == "-" { Default::default() } else { [("score".to_owned(), score.parse()?)].into() };
        let (prompt_ids, chosen_ids) = (vec![row as u32], vec![response]);
        let sample = Sample {
            step,
            position,
            origin: origin.clone(),
            source: node.clone(),
            row,
            prompt_ids: prompt_ids.clone(),
            response_ids: chosen_ids.clone(),
            weights_version: Some(step),
            seed: None,
            values,
        };
        let values = sample.values.clone();
        let pair = Pair {
            step,
            position,
            origin,
            source: node.clone(),
            row,
            prompt_ids: prompt_ids.clone(),
            chosen_ids: chosen_ids.clone(),
            rejected_ids: Some(vec![0]),
            segment: None,
            weights_version: None,
            seed: None,
            values: values.clone(),
        };
        let prompt = Prompt { source: node, row, epoch: step, prompt_ids, chosen_ids, rejected_ids: None, values };
        Ok([Record::Sample(Arc::new(sample)), Record::Prompt(Arc::new(prompt)), Record::Pair(Arc::new(pair))])
    }
}

impl Operator for Scripted {
    fn step(&mut self, step: u64, _: Inputs) -> Result<Outputs, OperatorError> {
        let mut outputs = Outputs::new();
        let mut position = 0;
        for word in self.script.steps.get(step as usize).map_or("", String::as_str).split_whitespace() {
            let records = self.records(step, position, word)?;
            position += u32::from(!word.starts_with('-'));
            for (port, record) in ["samples", "prompts", "pairs"].into_iter().zip(records) {
                outputs.push(port, record);
            }
        }
        Ok(outputs)
    }
}

impl Define for Scripted {
    const NAME: &'static str = "script";
    const SUMMARY: &'static str = "";
    const DOCS: &'static str = "";
    const EXAMPLE: &'static str = "";
    const INPUTS: &'static [PortSpec] = &[];
    const OUTPUTS: &'static [PortSpec] = &[
        PortSpec::new("samples", &[PortType::Samples], "").retracting(),
        PortSpec::new("prompts", &[PortType::Prompts], "").retracting(),
        PortSpec::new("pairs", &[PortType::Pairs], "").retracting(),
    ];
    type Config = Script;

    fn build(script: Script, context: &BuildContext) -> Result<Self, OperatorError> {
        Ok(Scripted { node: context.node.into(), script })
    }
}

#[derive(Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Nothing {}

/// Writes what it sees, a line a step.
pub struct Recorder {
    path: PathBuf,
    lines: String,
}

/// A sample as `+row:response(score)`, a pair as `+row:chosen>rejected`, a retraction as `-row` or `-origin.step.position`.
fn written(record: &Record) -> String {
    let values = |values: &sapo_flow_engine::Values| {
        let values: Vec<String> = values.numbers().map(|(name, value)| format!("{name}={value}")).collect();
        format!("({})", values.join(","))
    };
    match record {
        Record::Prompt(p) => format!("+{}:{}{}", p.row, p.chosen_ids[0], values(&p.values)),
        Record::Sample(s) => format!("+{}:{}{}", s.row, s.response_ids[0], values(&s.values)),
        Record::Pair(p) => {
            let rejected = p.rejected_ids.as_ref().map_or(0, |ids| ids[0]);
            let version = p.weights_version.map_or(String::new(), |version| format!("@{version}"));
            format!("+{}:{}>{rejected}{version}#{}.{}.{}", p.row, p.chosen_ids[0], p.origin, p.step, p.position)
        }
        Record::Retraction(retraction) => {
            let because = retraction.because.as_ref().map_or("", |_| "!");
            match &retraction.of {
                Retracted::Row { row, .. } => format!("-{row}{because}"),
                Retracted::Record { origin, step, position } => format!("-{origin}.{step}.{position}{because}"),
            }
        }
        other => format!("{other:?}"),
    }
}

impl Operator for Recorder {
    fn step(&mut self, step: u64, mut inputs: Inputs) -> Result<Outputs, OperatorError> {
        let words: Vec<String> = inputs.take("records").iter().map(written).collect();
        writeln!(self.lines, "{step}: {}", words.join(" "))?;
        Ok(Outputs::new())
    }

    fn snapshot(&mut self, directory: &Path) -> Result<(), OperatorError> {
        Ok(fs::write(directory.join("lines"), &self.lines)?)
    }

    fn restore(&mut self, directory: &Path) -> Result<(), OperatorError> {
        self.lines = fs::read_to_string(directory.join("lines"))?;
        Ok(())
    }

    fn finish(&mut self) -> Result<(), OperatorError> {
        Ok(fs::write(&self.path, &self.lines)?)
    }
}

impl Define for Recorder {
    const NAME: &'static str = "recorder";
    const SUMMARY: &'static str = "";
    const DOCS: &'static str = "";
    const EXAMPLE: &'static str = "";
    const INPUTS: &'static [PortSpec] = &[PortSpec::new("records", RECORDS, "").many().honouring_retractions()];
    const OUTPUTS: &'static [PortSpec] = &[];
    type Config = Nothing;

    fn build(_: Nothing, context: &BuildContext) -> Result<Self, OperatorError> {
        Ok(Recorder { path: context.run_directory.join("seen"), lines: String::new() })
    }
}

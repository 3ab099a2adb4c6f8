//! `sample_sink`: a few pairs every n steps in readable form.

mod written;

use std::path::{Path, PathBuf};

use sapo_flow_engine::operator::ConfigIssue;
use sapo_flow_engine::{
    BuildContext, Define, Inputs, Operator, OperatorError, Outputs, Pair, PortSpec, PortType, Retraction, TokenId,
    Values,
};
use sapo_flow_training::text::TextTokenizer;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::Error;
use crate::log_file::{LogFile, check_file_name};
use crate::state;
use written::{Written, WrittenPairs};

/// Configuration of [`SampleSink`].
#[derive(Clone, Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// A model directory with the tokenizer that the pairs were made with.
    pub tokenizer: PathBuf,
    /// Write at every n-th step, the first included.
    #[serde(default = "default_every")]
    pub every: u64,
    /// Pairs to write at such a step, the first to arrive.
    #[serde(default = "default_count")]
    pub count: usize,
    /// Name of the JSON Lines file in the run directory. Each sink needs its own.
    #[serde(default = "default_file")]
    pub file: String,
}

fn default_every() -> u64 {
    50
}

fn default_count() -> usize {
    1
}

fn default_file() -> String {
    "samples.jsonl".into()
}

/// Writes pairs for people to read.
pub struct SampleSink {
    every: u64,
    count: usize,
    tokenizer: TextTokenizer,
    lines: LogFile,
    written: WrittenPairs,
}

/// The line of a written pair that was taken back.
#[derive(Serialize)]
struct TakenBack<'a> {
    step: u64,
    retracted: &'a Written,
    because: Option<&'a str>,
}

/// One line of the file.
#[derive(Serialize)]
struct Sample<'a> {
    step: u64,
    row: u64,
    origin: &'a str,
    made_at_step: u64,
    position: u32,
    weights_version: Option<u64>,
    seed: Option<u64>,
    segment: Option<SegmentText>,
    prompt: String,
    chosen: String,
    rejected: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    values: Option<&'a Values>,
}

/// What a sampler wrote.
#[derive(Serialize)]
struct SegmentText {
    start: usize,
    len: usize,
    ended: bool,
    text: String,
    replaced: String,
}

/// What a checkpoint keeps.
#[derive(Serialize, Deserialize)]
struct State {
    lines_bytes: u64,
    written: Vec<Written>,
}

const STATE_FILE: &str = "sample_sink.json";

impl Define for SampleSink {
    const NAME: &'static str = "sample_sink";
    const SUMMARY: &'static str = "Writes some pairs as readable JSON Lines.";
    const DOCS: &'static str = "\
At every n-th step writes the first `count` pairs that reach it to `samples.jsonl` of the run directory, one object a line: \
`step`; the pair's `row`, `origin` (node), `made_at_step`, `position`, `weights_version` and `seed`; `prompt`, `chosen` and \
`rejected` as text with special tokens written out; and `segment`, the part of the rejected response that a sampler wrote: \
`start` and `len` in tokens of the response, whether it `ended` in EOS, its `text`, and the text of the chosen response that \
it `replaced`. What a pair does not have is null. `values` are its numbers and texts, where it has some. When a pair that was written is taken back, a line says so: `step`; \
`retracted`, with the pair's `source`, `row`, `origin`, `made_at_step` and `position`; and `because`.

State: the length of the file, and which pairs were written. A resumed run cuts the file back to the checkpoint.

Errors: another node writes the same file, before the run; on resuming, the file is shorter than it was.";
    const EXAMPLE: &'static str = "\
prompts: {op: prompt_source, with: {path: data/pairs.jsonl, tokenizer: models/smollm2, batch_size: 8}}
samples: {op: sample_sink, in: prompts.pairs, with: {tokenizer: models/smollm2, every: 100, count: 2}}
";
    const INPUTS: &'static [PortSpec] =
        &[PortSpec::new("pairs", &[PortType::Pairs], "the pairs to choose from; any number of nodes")
            .many()
            .honouring_retractions()];
    const OUTPUTS: &'static [PortSpec] = &[];
    type Config = Config;

    fn check(config: &Config) -> Vec<ConfigIssue> {
        let mut issues = Vec::new();
        if config.every == 0 {
            issues.push(ConfigIssue::new("every", "expected 1 or more, found 0"));
        }
        if config.count == 0 {
            issues.push(ConfigIssue::new("count", "expected 1 or more, found 0"));
        }
        issues.extend(check_file_name(&config.file).map(|message| ConfigIssue::new("file", message)));
        issues
    }

    fn writes(config: &Config, _: &str) -> Vec<PathBuf> {
        vec![config.file.clone().into()]
    }

    fn build(config: Config, context: &BuildContext) -> Result<Self, OperatorError> {
        Ok(SampleSink {
            every: config.every,
            count: config.count,
            tokenizer: TextTokenizer::load(&config.tokenizer)?,
            lines: LogFile::open(context.run_directory.join(&config.file), context.resumed)?,
            written: WrittenPairs::default(),
        })
    }
}

impl Operator for SampleSink {
    fn step(&mut self, step: u64, mut inputs: Inputs) -> Result<Outputs, OperatorError> {
        for retraction in inputs.retractions("pairs") {
            self.take_back(step, &retraction)?;
        }
        if step.is_multiple_of(self.every) {
            for pair in inputs.pairs("pairs").iter().take(self.count) {
                let mut line = serde_json::to_vec(&self.sample(step, pair)?)?;
                line.push(b'\n');
                self.lines.append(&line)?;
                self.written.add(Written::of(pair));
            }
        }
        Ok(Outputs::new())
    }

    fn snapshot(&mut self, directory: &Path) -> Result<(), OperatorError> {
        let state = State { lines_bytes: self.lines.sync()?, written: self.written.to_vec() };
        Ok(state::write(directory, STATE_FILE, &state)?)
    }

    fn restore(&mut self, directory: &Path) -> Result<(), OperatorError> {
        let state: State = state::read(directory, STATE_FILE)?;
        self.written = state.written.into();
        Ok(self.lines.cut_back(state.lines_bytes)?)
    }

    fn finish(&mut self) -> Result<(), OperatorError> {
        self.lines.sync()?;
        Ok(())
    }
}

impl SampleSink {
    /// Write which of the pairs written before a retraction concerns.
    fn take_back(&mut self, step: u64, retraction: &Retraction) -> Result<(), OperatorError> {
        for retracted in &self.written.take(&retraction.of) {
            let taken = TakenBack { step, retracted, because: retraction.because.as_deref() };
            self.lines.append(&[serde_json::to_vec(&taken)?, b"\n".to_vec()].concat())?;
        }
        Ok(())
    }

    fn sample<'a>(&self, step: u64, pair: &'a Pair) -> Result<Sample<'a>, Error> {
        let text = |ids: &[TokenId]| self.tokenizer.decode(ids);
        let segment = match (pair.segment, &pair.rejected_ids) {
            (Some(segment), Some(rejected)) => {
                let end = segment.start + segment.len;
                Some(SegmentText {
                    start: segment.start,
                    len: segment.len,
                    ended: segment.ended,
                    text: text(within(rejected, segment.start, end))?,
                    // Where the sampler ended the response, everything after the start was replaced.
                    replaced: text(within(
                        &pair.chosen_ids,
                        segment.start,
                        if segment.ended { usize::MAX } else { end },
                    ))?,
                })
            }
            _ => None,
        };
        Ok(Sample {
            step,
            row: pair.row,
            origin: &pair.origin,
            made_at_step: pair.step,
            position: pair.position,
            weights_version: pair.weights_version,
            seed: pair.seed,
            segment,
            prompt: text(&pair.prompt_ids)?,
            chosen: text(&pair.chosen_ids)?,
            rejected: pair.rejected_ids.as_deref().map(text).transpose()?,
            values: Some(&pair.values).filter(|values| !values.is_empty()),
        })
    }
}

/// The tokens from `start` to `end`, as far as there are any: a batcher may have cut the response.
fn within(ids: &[TokenId], start: usize, end: usize) -> &[TokenId] {
    let end = end.min(ids.len());
    &ids[start.min(end)..end]
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use sapo_flow_engine::{Record, Retracted, Segment};

    use super::*;
    use crate::testing::{Harness, pair, tiny_tokenizer};

    fn with(extra: &str, tokenizer: &tempfile::TempDir) -> String {
        format!("{{tokenizer: '{}', {extra}}}", tokenizer.path().display())
    }

    fn inputs(pairs: &[Pair]) -> Inputs {
        let records = pairs.iter().map(|pair| Record::Pair(Arc::new(pair.clone()))).collect();
        Inputs::new(vec![("pairs", records)])
    }

    #[test]
    fn a_sample_can_be_read() {
        let tokenizer = tiny_tokenizer();
        let harness = Harness::new();
        let mut sink: SampleSink = harness.build(&with("every: 2, count: 1", &tokenizer)).unwrap();
        let generated = Pair {
            step: 3,
            segment: Some(Segment { start: 1, len: 1, ended: false }),
            weights_version: Some(2),
            seed: Some(u64::MAX),
            ..pair(7, &[0, 2, 5, 1, 3], &[6, 7, 6, 1], Some(&[6, 6, 6, 1]))
        };
        let plain = pair(8, &[0, 5], &[6, 1], None);
        sink.step(4, inputs(&[generated.clone(), plain.clone()])).unwrap();
        sink.step(5, inputs(std::slice::from_ref(&plain))).unwrap();
        sink.step(6, inputs(&[plain])).unwrap();
        let expected = concat!(
            r#"{"step":4,"row":7,"origin":"data","made_at_step":3,"position":7,"weights_version":2,"#,
            r#""seed":18446744073709551615,"segment":{"start":1,"len":1,"ended":false,"text":"a","replaced":"b"},"#,
            r#""prompt":"<s> <user> hi </s> <assistant>","chosen":"a b a </s>","rejected":"a a a </s>"}"#,
            "\n",
            r#"{"step":6,"row":8,"origin":"data","made_at_step":0,"position":8,"weights_version":null,"seed":null,"#,
            r#""segment":null,"prompt":"<s> hi","chosen":"a </s>","rejected":null}"#,
            "\n"
        );
        assert_eq!(harness.read("samples.jsonl"), expected);
    }

    #[test]
    fn a_segment_that_ended_replaced_the_rest() {
        let tokenizer = tiny_tokenizer();
        let sink: SampleSink = Harness::new().build(&with("", &tokenizer)).unwrap();
        let ended = Pair {
            segment: Some(Segment { start: 1, len: 1, ended: true }),
            ..pair(7, &[0], &[6, 7, 6, 1], Some(&[6, 1]))
        };
        let segment = sink.sample(0, &ended).unwrap().segment.unwrap();
        assert_eq!((segment.text.as_str(), segment.replaced.as_str()), ("</s>", "b a </s>"));
    }

    #[test]
    fn what_was_written_and_is_taken_back_is_said_to_be() {
        let tokenizer = tiny_tokenizer();
        let harness = Harness::new();
        let mut sink: SampleSink = harness.build(&with("every: 1, count: 1", &tokenizer)).unwrap();
        sink.step(0, inputs(&[pair(8, &[0, 5], &[6, 1], None), pair(9, &[0, 5], &[6, 1], None)])).unwrap();
        let row = |row| {
            let of = Retracted::Row { source: "data".into(), row };
            Record::Retraction(Retraction { port_type: PortType::Pairs, of, because: Some("edited".into()) })
        };
        // Row 9 was not written, row 8 is taken back once.
        sink.step(3, Inputs::new(vec![("pairs", vec![row(9), row(8), row(8)])])).unwrap();
        let written = harness.read("samples.jsonl");
        let expected = r#"{"step":3,"retracted":{"source":"data","row":8,"origin":"data","made_at_step":0,"position":8},"because":"edited"}"#;
        assert_eq!(written.lines().skip(1).collect::<Vec<_>>(), [expected]);
    }

    #[test]
    fn a_resumed_run_cuts_the_file_back() {
        let tokenizer = tiny_tokenizer();
        let harness = Harness::new();
        let with = with("every: 1", &tokenizer);
        let pairs = [pair(8, &[0, 5], &[6, 1], None)];
        let mut sink: SampleSink = harness.build(&with).unwrap();
        sink.step(0, inputs(&pairs)).unwrap();
        sink.snapshot(&harness.checkpoint()).unwrap();
        sink.step(1, inputs(&pairs)).unwrap();
        sink.finish().unwrap();
        let whole = harness.read("samples.jsonl");
        drop(sink);
        let mut sink: SampleSink = harness.resume(&with).unwrap();
        sink.restore(&harness.checkpoint()).unwrap();
        assert_eq!(harness.read("samples.jsonl").lines().count(), 1);
        sink.step(1, inputs(&pairs)).unwrap();
        assert_eq!(harness.read("samples.jsonl"), whole);
    }
}

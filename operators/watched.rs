//! Rows of files that are edited while the run goes on: what `prompt_source` emits with `watch`.
//!
//! A pass over the data is a queue of rows. Rows that are added go to its front, rows that are removed leave it, and when it
//! is empty the next pass begins with all rows there are, in an order drawn as that of an epoch. Every edit is recorded with
//! the step at which it took effect; a run that repeats a recording, or resumes, takes edits from there.

use std::collections::{BTreeMap, HashSet, VecDeque};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use sapo_flow_engine::Prompt;
use serde::{Deserialize, Serialize};

use crate::data::files::{RawRow, parse_line};
use crate::data::follow::Follower;
use crate::data::recording::{self, Added, Edit, Place};
use crate::data::shuffle::epoch_order;
use crate::data::{self, Encoder, Identity, Report, Settings};
use crate::{Error, state};

/// Where edits come from.
enum Source {
    /// From looking at the files.
    Files(Follower),
    /// From a recording alone.
    Recording,
}

/// See the [module](self).
pub struct Watched {
    node: String,
    seed: u64,
    shuffle: bool,
    encoder: Encoder,
    source: Source,
    /// The run's own recording.
    path: PathBuf,
    /// Recorded edits that are yet to take effect.
    ahead: VecDeque<Edit>,
    rows: BTreeMap<u64, Arc<Prompt>>,
    pass: u64,
    queue: VecDeque<u64>,
}

/// What a checkpoint holds besides the recording up to it.
#[derive(Serialize, Deserialize)]
struct State {
    pass: u64,
    queue: VecDeque<u64>,
    identity: Identity,
}

const STATE: &str = "watched.json";
const EDITS: &str = "edits.jsonl";

/// What a step brings.
#[derive(Debug, Default)]
pub struct Moment {
    /// Rows that went and had been usable, each with its place.
    pub removed: Vec<(Arc<Prompt>, Place)>,
    /// The rows of the step, each with its pass.
    pub rows: Vec<Arc<Prompt>>,
    /// What there is to tell of an edit.
    pub note: Option<String>,
}

impl Watched {
    /// The rows that files hold now, or those that a recording begins with, and what was left out of them. `resumed`: none
    /// yet, [`restore`](Self::restore) brings them.
    ///
    /// # Errors
    /// When files, recording or tokenizer cannot be read, or a row cannot be used and none may be skipped.
    pub fn begin(
        settings: &Settings,
        replay: Option<&Path>,
        path: PathBuf,
        (node, seed, shuffle): (&str, u64, bool),
        resumed: bool,
    ) -> Result<(Self, Report), Error> {
        let encoder = Encoder::load(settings)?;
        let mut ahead = VecDeque::new();
        let mut source = match replay {
            None => Source::Files(Follower::new(settings.paths.as_slice())),
            Some(recorded) => {
                ahead.extend(recording::read(recorded)?.0);
                Source::Recording
            }
        };
        let mut report = Report::default();
        let mut rows = BTreeMap::new();
        if !resumed {
            let beginning = match &mut source {
                Source::Files(follower) => follower.begin()?,
                Source::Recording => ahead.pop_front().unwrap_or_default(),
            };
            (rows, report) = encode(settings, &encoder, &beginning.added)?;
            recording::write(&path, &beginning.to_line()?)?;
        }
        let (node, queue) = (node.to_owned(), VecDeque::new());
        let mut watched = Watched { node, seed, shuffle, encoder, source, path, ahead, rows, pass: 0, queue };
        watched.queue = watched.order();
        Ok((watched, report))
    }

    /// The rows there are.
    pub fn rows(&self) -> impl Iterator<Item = &Arc<Prompt>> {
        self.rows.values()
    }

    /// Take in what takes effect at a step, and take out the step's rows.
    ///
    /// # Errors
    /// As [`begin`](Self::begin); then the edit has had no effect, and is not recorded.
    pub fn step(&mut self, settings: &Settings, step: u64, batch_size: usize) -> Result<Moment, Error> {
        let mut moment = Moment::default();
        let recorded = self.ahead.front().is_some_and(|edit| edit.step == step);
        let edit = match &mut self.source {
            _ if recorded => self.ahead.pop_front().unwrap_or_default(),
            // What the files began with has just been read.
            Source::Files(follower) if self.ahead.is_empty() && step > 0 => follower.look(step)?,
            _ => Edit::default(),
        };
        if !edit.is_empty() {
            // A resumed run's own recording has those ahead already.
            let known = recorded && matches!(self.source, Source::Files(_));
            self.take_effect(settings, edit, !known, &mut moment)?;
        }
        if self.queue.is_empty() && step > 0 && !self.rows.is_empty() {
            self.pass += 1;
            self.queue = self.order();
        }
        while moment.rows.len() < batch_size
            && let Some(row) = self.queue.pop_front()
        {
            let prompt = self.rows.get(&row).map(|prompt| Prompt { epoch: self.pass, ..Prompt::clone(prompt) });
            moment.rows.extend(prompt.map(Arc::new));
        }
        Ok(moment)
    }

    fn take_effect(&mut self, settings: &Settings, edit: Edit, record: bool, moment: &mut Moment) -> Result<(), Error> {
        let (added, report) = encode(settings, &self.encoder, &edit.added)?;
        if record {
            recording::append(&self.path, &edit)?;
        }
        let places: Vec<String> = edit.removed.iter().map(describe).collect();
        let gone: HashSet<u64> = edit.removed.iter().map(|place| place.row).collect();
        if !gone.is_empty() {
            self.queue.retain(|row| !gone.contains(row));
        }
        for place in edit.removed {
            if let Some(prompt) = self.rows.remove(&place.row) {
                moment.removed.push((prompt, place));
            }
        }
        added.keys().rev().for_each(|row| self.queue.push_front(*row));
        let came = added.len();
        self.rows.extend(added);
        let mut parts = Vec::new();
        if !places.is_empty() {
            parts.push(format!("{} removed or edited", places.join(", ")));
        }
        if !edit.added.is_empty() {
            parts.push(format!("{} added", data::rows(came)));
            parts.extend(report.sentences().into_iter().skip(1));
        }
        moment.note = Some(format!("step {}: {}", edit.step, parts.join("; ")));
        Ok(())
    }

    fn order(&self) -> VecDeque<u64> {
        let rows: Vec<u64> = self.rows.keys().copied().collect();
        match self.shuffle {
            true => epoch_order(self.seed, &self.node, self.pass, rows.len()).into_iter().map(|n| rows[n]).collect(),
            false => rows.into(),
        }
    }

    fn identity(&self) -> Identity {
        Identity::of_rows(self.rows.values().map(Arc::as_ref))
    }

    /// The recording up to the step that `done` steps lead to, and what else there is.
    ///
    /// # Errors
    /// When something cannot be read or written.
    pub fn snapshot(&self, directory: &Path) -> Result<(), Error> {
        let state = State { pass: self.pass, queue: self.queue.clone(), identity: self.identity() };
        state::write(directory, STATE, &state)?;
        // A resumed run's own recording holds what is yet to take effect, too.
        let (edits, _) = recording::read(&self.path)?;
        let ahead = match self.source {
            Source::Files(_) => self.ahead.front().map_or(u64::MAX, |edit| edit.step),
            Source::Recording => u64::MAX,
        };
        let lines: Vec<String> =
            edits.iter().filter(|edit| edit.step < ahead).map(Edit::to_line).collect::<Result<_, _>>()?;
        recording::write(&directory.join(EDITS), &lines.concat())
    }

    /// Take up a snapshot. Edits that the run's own recording has beyond it take effect again at their steps.
    ///
    /// # Errors
    /// When something cannot be read, or the recordings do not agree.
    pub fn restore(&mut self, settings: &Settings, directory: &Path) -> Result<(), Error> {
        let state: State = state::read(directory, STATE)?;
        let (done, begun) = recording::read(&directory.join(EDITS))?;
        let own = if self.path.exists() { Some(recording::read(&self.path)?) } else { None };
        let whole = own.as_ref().map_or(&done, |(edits, _)| edits);
        if whole.get(..done.len()) != Some(&done[..]) {
            let message = format!("{} is not the recording that the checkpoint was taken with", self.path.display());
            return Err(Error::Restore(message));
        }
        match &mut self.source {
            Source::Files(follower) => {
                whole.iter().for_each(|edit| follower.know(edit));
                self.ahead = whole[done.len()..].to_vec().into();
                match &own {
                    Some((_, lines)) => recording::cut(&self.path, lines.len() as u64)?,
                    None => recording::write(&self.path, &begun)?,
                }
            }
            Source::Recording => {
                let agrees = self.ahead.iter().zip(&done).all(|(ours, theirs)| ours == theirs);
                if !agrees || self.ahead.len() < done.len() {
                    let message = "the recording to repeat is not the one that the checkpoint was taken with";
                    return Err(Error::Restore(message.into()));
                }
                self.ahead.drain(..done.len());
                recording::write(&self.path, &begun)?;
            }
        }
        let mut there: BTreeMap<u64, &Added> = BTreeMap::new();
        for Edit { removed, added, .. } in &done {
            for place in removed {
                there.remove(&place.row);
            }
            there.extend(added.iter().map(|added| (added.place.row, added)));
        }
        self.rows = encode(settings, &self.encoder, there.into_values())?.0;
        (self.pass, self.queue) = (state.pass, state.queue);
        self.identity().check(&state.identity)
    }
}

/// Why what stems from a row is taken back.
pub fn describe(place: &Place) -> String {
    format!("{}:{}", place.file.display(), place.line)
}

/// The rows that belong to the part of the data and can be used.
fn encode<'a>(
    settings: &Settings,
    encoder: &Encoder,
    added: impl IntoIterator<Item = &'a Added>,
) -> Result<(BTreeMap<u64, Arc<Prompt>>, Report), Error> {
    let raw = |Added { place, text }: &Added| {
        let content = parse_line(text.as_bytes());
        (place.row, RawRow { path: place.file.as_path().into(), line: place.line, content })
    };
    let selected: Vec<(u64, RawRow)> =
        added.into_iter().filter(|added| settings.part.contains(added.place.row)).map(raw).collect();
    if selected.is_empty() {
        return Ok(Default::default());
    }
    let (prompts, report) = data::encode(settings, encoder, &selected)?;
    Ok((prompts.into_iter().map(|prompt| (prompt.row, prompt)).collect(), report))
}

#[cfg(test)]
mod tests {
    use std::fs::OpenOptions;
    use std::io::Write;
    use std::time::{Duration, SystemTime};

    use super::*;
    use crate::data::{Columns, OnError, Part, Paths};
    use crate::testing::{Harness, all_rows, tiny_tokenizer};

    fn row(answer: &str) -> String {
        format!("{{\"prompt\": \"hi\", \"chosen\": \"{answer}\"}}\n")
    }

    /// Rows and passes of a step.
    fn rows(watched: &mut Watched, settings: &Settings, step: u64) -> Vec<(u64, u64)> {
        let moment = watched.step(settings, step, 2).unwrap();
        moment.rows.iter().map(|prompt| (prompt.row, prompt.epoch)).collect()
    }

    #[test]
    fn edits_after_a_checkpoint_are_repeated_when_the_run_resumes() {
        let (harness, tokenizer, columns) = (Harness::new(), tiny_tokenizer(), Columns::default());
        let paths = Paths::One(harness.write("rows.jsonl", &row("a").repeat(5)));
        let settings = Settings {
            part: Part::Training { hold_out_every: 4 },
            on_error: OnError::Skip,
            ..all_rows(&paths, &columns, tokenizer.path())
        };
        let path = harness.path("edits/prompts.jsonl");
        let begin = |replay: Option<&Path>, path: &Path, resumed| {
            Watched::begin(&settings, replay, path.to_path_buf(), ("prompts", 1, false), resumed).unwrap().0
        };
        let mut watched = begin(None, &path, false);
        // Rows 0, 1, 2 and 4: every fourth is held out.
        assert_eq!(rows(&mut watched, &settings, 0), [(0, 0), (1, 0)]);
        assert_eq!(rows(&mut watched, &settings, 1), [(2, 0), (4, 0)]);
        let checkpoint = harness.checkpoint();
        watched.snapshot(&checkpoint).unwrap();
        // Row 5 comes first; what comes next is broken, and 7 is held out.
        harness.write("rows.jsonl", &format!("{}{}{{}}\n{}", row("a").repeat(5), row("b"), row("b")));
        let moment = watched.step(&settings, 2, 2).unwrap();
        assert_eq!(moment.rows.iter().map(|prompt| prompt.row).collect::<Vec<_>>(), [5]);
        let note = moment.note.unwrap();
        assert!(note.starts_with("step 2: 1 row added; 1 row skipped that cannot be used, the first: "), "{note}");
        let then = [rows(&mut watched, &settings, 3), rows(&mut watched, &settings, 4)];
        assert_eq!(then, [[(0, 1), (1, 1)], [(2, 1), (4, 1)]]);

        let mut resumed = begin(None, &path, true);
        resumed.restore(&settings, &checkpoint).unwrap();
        assert_eq!(rows(&mut resumed, &settings, 2), [(5, 0)]);
        assert_eq!([rows(&mut resumed, &settings, 3), rows(&mut resumed, &settings, 4)], then);
        // From here on it follows the files again.
        harness.write("rows.jsonl", &format!("{}{}{{}}\n{}", row("a").repeat(4), row("b"), row("b")));
        assert_eq!(rows(&mut resumed, &settings, 5), [(5, 1)]);
        let moment = resumed.step(&settings, 6, 2).unwrap();
        assert_eq!(moment.removed.iter().map(|(prompt, place)| (prompt.row, place.line)).collect::<Vec<_>>(), [(4, 5)]);
        assert_eq!(moment.rows.iter().map(|prompt| prompt.row).collect::<Vec<_>>(), [0, 1]);
        let (edits, _) = recording::read(&path).unwrap();
        assert_eq!(edits.iter().map(|edit| edit.step).collect::<Vec<_>>(), [0, 2, 6]);

        // The whole run again, from its recording.
        let mut again = begin(Some(&path), &harness.path("again.jsonl"), false);
        let whole: Vec<Vec<(u64, u64)>> = (0..6).map(|step| rows(&mut again, &settings, step)).collect();
        assert_eq!(whole, [&[(0, 0), (1, 0)][..], &[(2, 0), (4, 0)], &[(5, 0)], &then[0], &then[1], &[(5, 1)]]);
        let removed = again.step(&settings, 6, 2).unwrap().removed;
        assert_eq!(removed.iter().map(|(prompt, _)| prompt.row).collect::<Vec<_>>(), [4]);
    }

    /// Nowhere else are the edits after a checkpoint: were it written anew, a kill meanwhile would lose them.
    #[test]
    fn a_resumed_run_cuts_a_last_line_without_an_end_and_nothing_else() {
        let (harness, tokenizer, columns) = (Harness::new(), tiny_tokenizer(), Columns::default());
        let paths = Paths::One(harness.write("rows.jsonl", &row("a")));
        let settings = all_rows(&paths, &columns, tokenizer.path());
        let (path, checkpoint) = (harness.path("edits.jsonl"), harness.checkpoint());
        let begin = |resumed| Watched::begin(&settings, None, path.clone(), ("prompts", 1, false), resumed).unwrap().0;
        begin(false).snapshot(&checkpoint).unwrap();
        let (recorded, long_ago) = (harness.read("edits.jsonl"), SystemTime::UNIX_EPOCH + Duration::from_secs(1 << 30));
        let mut file = OpenOptions::new().append(true).open(&path).unwrap();
        file.set_modified(long_ago).unwrap();
        begin(true).restore(&settings, &checkpoint).unwrap();
        assert_eq!(file.metadata().unwrap().modified().unwrap(), long_ago);
        file.write_all(b"{\"step\": 1, \"rem").unwrap();
        begin(true).restore(&settings, &checkpoint).unwrap();
        assert_eq!(harness.read("edits.jsonl"), recorded);
    }

    #[test]
    fn the_tokenizer_is_read_at_the_beginning_alone() {
        let (harness, tokenizer, columns) = (Harness::new(), tiny_tokenizer(), Columns::default());
        let paths = Paths::One(harness.write("rows.jsonl", &row("a").repeat(3)));
        let settings = all_rows(&paths, &columns, tokenizer.path());
        let (path, checkpoint) = (harness.path("edits.jsonl"), harness.checkpoint());
        let begin = |resumed| Watched::begin(&settings, None, path.clone(), ("prompts", 1, false), resumed).unwrap().0;
        let (mut watched, mut resumed) = (begin(false), begin(true));
        std::fs::remove_dir_all(tokenizer.path()).unwrap();
        assert_eq!(rows(&mut watched, &settings, 0), [(0, 0), (1, 0)]);
        harness.write("rows.jsonl", &format!("{}{}", row("a").repeat(3), row("b")));
        assert_eq!(rows(&mut watched, &settings, 1), [(3, 0), (2, 0)]);
        // The third line goes, once it has been missing twice.
        harness.write("rows.jsonl", &format!("{}{}", row("a").repeat(2), row("b")));
        rows(&mut watched, &settings, 2);
        rows(&mut watched, &settings, 3);
        watched.snapshot(&checkpoint).unwrap();
        resumed.restore(&settings, &checkpoint).unwrap();
        assert_eq!(resumed.rows().map(|prompt| prompt.row).collect::<Vec<_>>(), [0, 1, 3]);
    }
}

//! Following JSON Lines files while they are edited.
//!
//! Files are looked at once a step: their status, and their bytes only where that has changed. Looking is preferred to the
//! system's notifications, since those come at moments that have nothing to do with steps, differ between systems, and do
//! not come at all from network file systems and many containers.
//!
//! Lines added at a file's end count at once. Any other change counts once the file looks the same twice, since most
//! editors empty a file or move it away before they write it anew. A last line without an end waits until it has one, or is
//! a whole JSON object.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use super::files::{self, Stamp};
use super::recording::{Added, Edit, Place};
use crate::Error;

/// Follows the files that paths and glob patterns name.
#[derive(Debug, Default)]
pub struct Follower {
    paths: Vec<String>,
    files: BTreeMap<PathBuf, Followed>,
    next_row: u64,
}

/// A file as it was when last looked at.
#[derive(Debug, Default)]
struct Followed {
    status: Option<Stamp>,
    rows: Vec<Row>,
    /// Other lines than `rows`, seen once.
    seen_once: Option<Vec<(u64, String)>>,
}

#[derive(Clone, Debug)]
struct Row {
    row: u64,
    line: u64,
    text: String,
}

/// A file that was written so recently may be written again without another time of change.
const TIME_RESOLUTION: Duration = Duration::from_secs(2);

impl Follower {
    /// Of paths and glob patterns, with nothing known of their files.
    pub fn new(paths: &[String]) -> Self {
        Follower { paths: paths.to_vec(), ..Follower::default() }
    }

    /// Take an edit as seen: what a recording says.
    pub fn know(&mut self, edit: &Edit) {
        for place in &edit.removed {
            if let Some(file) = self.files.get_mut(&place.file) {
                file.rows.retain(|row| row.row != place.row);
            }
        }
        for Added { place, text } in &edit.added {
            let file = self.files.entry(place.file.clone()).or_default();
            file.rows.push(Row { row: place.row, line: place.line, text: text.clone() });
            self.next_row = self.next_row.max(place.row + 1);
        }
    }

    /// The rows that files hold at the beginning.
    ///
    /// # Errors
    /// When a path names no file, or one cannot be read.
    pub fn begin(&mut self) -> Result<Edit, Error> {
        let mut edit = Edit::default();
        for path in files::resolve(&self.paths)? {
            if self.files.contains_key(&path) {
                return Err(Error::Data(format!("{} is named twice, and cannot be followed so", path.display())));
            }
            let status = status(&path)?;
            let lines = lines(&path)?;
            self.files.insert(path.clone(), Followed { status, ..Followed::default() });
            self.change(&path, lines, &mut edit);
        }
        Ok(edit)
    }

    /// What has changed since files were last looked at, as the edit of a step.
    ///
    /// # Errors
    /// When a file cannot be read, other than because it is gone.
    pub fn look(&mut self, step: u64) -> Result<Edit, Error> {
        let mut edit = Edit { step, ..Edit::default() };
        let mut paths = self.found();
        paths.extend(self.files.keys().filter(|known| !paths.contains(known)).cloned().collect::<Vec<_>>());
        for path in paths {
            let now = status(&path)?;
            let file = self.files.entry(path.clone()).or_default();
            let recent = |status: &Stamp| status.modified.is_none_or(is_recent);
            if file.status == now && file.seen_once.is_none() && !now.as_ref().is_some_and(recent) {
                continue;
            }
            file.status = now;
            let lines = lines(&path)?;
            let same = |(row, (_, text)): (&Row, &(u64, String))| row.text == *text;
            let as_before = file.rows.len() <= lines.len() && file.rows.iter().zip(&lines).all(same);
            if !as_before && file.seen_once.as_ref() != Some(&lines) {
                file.seen_once = Some(lines);
                continue;
            }
            file.seen_once = None;
            self.change(&path, lines, &mut edit);
        }
        edit.removed.sort_by_key(|place| place.row);
        Ok(edit)
    }

    /// Files that there are now, in the order of the paths.
    fn found(&self) -> Vec<PathBuf> {
        let mut found = Vec::new();
        for path in &self.paths {
            // What names nothing now may do so later.
            for file in files::resolve(std::slice::from_ref(path)).unwrap_or_default() {
                if !found.contains(&file) {
                    found.push(file);
                }
            }
        }
        found
    }

    /// Make a file's rows these lines. A line that was there before is the same row, wherever it stood.
    fn change(&mut self, path: &Path, lines: Vec<(u64, String)>, edit: &mut Edit) {
        let file = self.files.entry(path.to_path_buf()).or_default();
        let mut known: HashMap<String, VecDeque<Row>> = HashMap::new();
        for row in file.rows.drain(..) {
            known.entry(row.text.clone()).or_default().push_back(row);
        }
        for (line, text) in lines {
            let row = match known.get_mut(&text).and_then(VecDeque::pop_front) {
                Some(row) => row.row,
                None => {
                    let place = Place { row: self.next_row, file: path.to_path_buf(), line };
                    self.next_row += 1;
                    edit.added.push(Added { place, text: text.clone() });
                    self.next_row - 1
                }
            };
            file.rows.push(Row { row, line, text });
        }
        let gone = known.into_values().flatten();
        edit.removed.extend(gone.map(|row| Place { row: row.row, file: path.to_path_buf(), line: row.line }));
    }
}

fn is_recent(modified: SystemTime) -> bool {
    SystemTime::now().duration_since(modified).map_or(true, |age| age < TIME_RESOLUTION)
}

/// None where there is no such file.
fn status(path: &Path) -> Result<Option<Stamp>, Error> {
    match Stamp::of(path) {
        Ok(stamp) => Ok(Some(stamp)),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(Error::io(path)(error)),
    }
}

/// The lines that hold something, with their numbers; none where there is no such file.
fn lines(path: &Path) -> Result<Vec<(u64, String)>, Error> {
    let bytes = match fs::read(path) {
        Ok(bytes) => bytes,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Vec::new(),
        Err(error) => return Err(Error::io(path)(error)),
    };
    let mut lines: Vec<(u64, &[u8])> = (1..).zip(bytes.split(|byte| *byte == b'\n')).collect();
    let last = lines.pop().filter(|(_, line)| files::parse_line(line).is_ok());
    let held = lines.into_iter().chain(last).filter(|(_, line)| !files::is_blank(line));
    Ok(held.map(|(number, line)| (number, text(line))).collect())
}

/// A line as text. What is no text is kept as something that is no JSON either, so that the row is refused like any other
/// that is broken.
fn text(line: &[u8]) -> String {
    match std::str::from_utf8(line) {
        Ok(text) => text.trim_end_matches('\r').to_owned(),
        Err(_) => format!("not UTF-8: {}", String::from_utf8_lossy(line)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::Harness;

    /// Numbers of the rows that went, and numbers, lines and text of those that came.
    fn told(edit: Edit) -> (Vec<u64>, Vec<(u64, u64, String)>) {
        let added = edit.added.into_iter().map(|added| (added.place.row, added.place.line, added.text));
        (edit.removed.iter().map(|place| place.row).collect(), added.collect())
    }

    fn came(rows: &[(u64, u64, &str)]) -> Vec<(u64, u64, String)> {
        rows.iter().map(|(row, line, text)| (*row, *line, (*text).to_owned())).collect()
    }

    #[test]
    fn lines_at_the_end_count_at_once_and_others_when_seen_twice() {
        let harness = Harness::new();
        let path = harness.write("rows.jsonl", "{\"a\": 1}\n\n{\"a\": 2}\n");
        let mut follower = Follower::new(std::slice::from_ref(&path));
        assert_eq!(told(follower.begin().unwrap()), (vec![], came(&[(0, 1, "{\"a\": 1}"), (1, 3, "{\"a\": 2}")])));
        assert!(follower.look(1).unwrap().is_empty());

        harness.write("rows.jsonl", "{\"a\": 1}\n\n{\"a\": 2}\n{\"a\": 3}\n{\"a\":");
        assert_eq!(told(follower.look(2).unwrap()), (vec![], came(&[(2, 4, "{\"a\": 3}")])));
        assert!(follower.look(3).unwrap().is_empty(), "the last line is not complete");
        harness.write("rows.jsonl", "{\"a\": 1}\n\n{\"a\": 2}\n{\"a\": 3}\n{\"a\": 4}");
        assert_eq!(told(follower.look(4).unwrap()), (vec![], came(&[(3, 5, "{\"a\": 4}")])));

        // An editor empties the file, and then writes: one line less, one changed, one moved.
        harness.write("rows.jsonl", "");
        assert!(follower.look(5).unwrap().is_empty());
        harness.write("rows.jsonl", "{\"a\": 4}\n{\"a\": 1}\n{\"a\": 33}\n");
        assert!(follower.look(6).unwrap().is_empty());
        assert_eq!(told(follower.look(7).unwrap()), (vec![1, 2], came(&[(4, 3, "{\"a\": 33}")])));
        assert!(follower.look(8).unwrap().is_empty());
    }

    #[test]
    fn files_come_and_go() {
        let harness = Harness::new();
        harness.write("a.jsonl", "{\"a\": 1}\n");
        let mut follower = Follower::new(&[harness.path("*.jsonl").display().to_string()]);
        assert_eq!(told(follower.begin().unwrap()).1.len(), 1);
        harness.write("b.jsonl", "{\"b\": 1}\n");
        assert_eq!(told(follower.look(1).unwrap()), (vec![], came(&[(1, 1, "{\"b\": 1}")])));
        fs::remove_file(harness.path("a.jsonl")).unwrap();
        assert!(follower.look(2).unwrap().is_empty());
        assert_eq!(told(follower.look(3).unwrap()), (vec![0], vec![]));
        // It is another row when it comes again.
        harness.write("a.jsonl", "{\"a\": 1}\n");
        assert_eq!(told(follower.look(4).unwrap()), (vec![], came(&[(2, 1, "{\"a\": 1}")])));
    }

    #[test]
    fn what_a_recording_says_is_known() {
        let harness = Harness::new();
        let path = harness.write("rows.jsonl", "{\"a\": 1}\n{\"a\": 2}\n");
        let begun = Follower::new(std::slice::from_ref(&path)).begin().unwrap();
        let mut follower = Follower::new(&[path]);
        follower.know(&begun);
        assert!(follower.look(1).unwrap().is_empty());
        harness.write("rows.jsonl", "{\"a\": 1}\n{\"a\": 2}\n{\"a\": 3}\n");
        assert_eq!(told(follower.look(2).unwrap()), (vec![], came(&[(2, 3, "{\"a\": 3}")])));
    }
}
